"""All machines of one VMM: creates, starts, changes and removes them, and keeps their folders true.

Source: dstack `vmm/src/app.rs` and `vmm/src/main_service.rs` at 312dc605.
"""

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.attest.release import Release
from dstack_emu.transport.events import EventLog
from dstack_emu.vmm import checks
from dstack_emu.vmm.config import VmmConfig
from dstack_emu.vmm.errors import UnknownVmError, VmmError
from dstack_emu.vmm.machine import Launch, MachineFactory
from dstack_emu.vmm.manifest import Manifest
from dstack_emu.vmm.store import COMPOSE, ENCRYPTED_ENV, INSTANCE_INFO, STATE, USER_CONFIG, Store
from dstack_emu.vmm.vm import Vm

Entropy = Callable[[int], bytes]
_SEED_SIZE: Final = 20


class Fleet:
    """The machines of one VMM. Open it before use, and close it: machines that run are started again by `open`."""

    def __init__(
        self,
        config: VmmConfig,
        factory: MachineFactory,
        *,
        release: Release,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        entropy: Entropy,
    ) -> None:
        self.config, self.release = config, release
        self.vms: dict[str, Vm] = {}
        self.log = EventLog("dstack_emu.vmm")
        self._store = Store(config.run_path.absolute())
        self._factory, self._clock, self._new_id, self._entropy = factory, clock, new_id, entropy
        self._removals: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()

    # ---- opening and closing

    async def open(self) -> None:
        """Load every machine, and start those that are to run; raise `OSError` if the folder cannot be used."""
        self._store.open()
        for vm_id in self._store.ids():
            self._load_stored(vm_id)
        for vm in list(self.vms.values()):
            if vm.is_started:
                await self._start_stored(vm)

    def _load_stored(self, vm_id: str) -> bool:
        """Load a machine's folder; log what is wrong with one that cannot be loaded, and return whether it was."""
        try:
            self._load(self._store.folder(vm_id).manifest())
        except VmmError as error:
            self.log.warning("machine not loaded", id=vm_id, reason=str(error))
            return False
        return True

    async def _start_stored(self, vm: Vm) -> None:
        try:
            await vm.start(self._launch(vm), self._factory)
        except VmmError as error:
            vm.boot_error = str(error)
            self.log.warning("machine not started", id=vm.id, reason=str(error))

    async def close(self) -> None:
        """End every machine; their folders stay."""
        await asyncio.gather(*self._removals, return_exceptions=True)
        await asyncio.gather(*(vm.close() for vm in self.vms.values()))

    def _load(self, manifest: Manifest) -> Vm:
        vm = Vm(
            self._store.folder(manifest.id),
            manifest,
            self._free_cid(),
            clock=self._clock,
            events=self.config.event_buffer_size,
        )
        self.vms[vm.id] = vm
        return vm

    def _free_cid(self) -> int:
        first, size = self.config.cvm.cid_start, self.config.cvm.cid_pool_size
        taken = {vm.cid for vm in self.vms.values()}
        for cid in range(first, first + size):
            if cid not in taken:
                return cid
        raise VmmError("CID pool exhausted")

    # ---- finding

    def find(self, vm_id: str, text: str = "vm not found") -> Vm:
        """Return a machine; raise `UnknownVmError` with `text` if there is none."""
        vm = self.vms.get(vm_id)
        if vm is None:
            raise UnknownVmError(text)
        return vm

    def ordered(self) -> list[Vm]:
        """Return the machines in the order of their creation."""
        return sorted(self.vms.values(), key=lambda vm: (vm.manifest.created_at_ms, vm.id))

    # ---- changing

    async def create(self, request: pb.VmConfiguration) -> str:
        """Create a machine, and start it unless the request says otherwise; return its id.

        A machine that cannot be created or started leaves nothing behind. Raises `VmmError`.
        """
        async with self._changing:
            manifest = self._manifest_of(request)
            files = {
                COMPOSE: request.compose_file.encode(),
                INSTANCE_INFO: json.dumps({"app_id": manifest.app_id}).encode(),
                STATE: json.dumps({"started": not request.stopped}).encode(),
            }
            if request.encrypted_env:
                files[ENCRYPTED_ENV] = request.encrypted_env
            if request.user_config:
                files[USER_CONFIG] = request.user_config.encode()
            cid = self._free_cid()  # refused before anything is written
            self._store.create(manifest, files)
            try:
                vm = self._load(manifest)
                assert vm.cid == cid  # noqa: S101 - nothing ran meanwhile
                self._check_loads(vm)
                if not request.stopped:
                    await vm.start(self._launch(vm), self._factory)
            except BaseException:
                self.vms.pop(manifest.id, None)
                self._store.remove(manifest.id)
                raise
        self.log.info("created", id=manifest.id, app_id=manifest.app_id)
        return manifest.id

    def _manifest_of(self, request: pb.VmConfiguration) -> Manifest:
        """Check a request to create a machine, in upstream's order."""
        cvm = self.config.cvm
        checks.check_name(request.name)
        ports = checks.mapped_ports(request.ports, cvm.port_mapping)
        app_id = request.app_id.removeprefix("0x").lower() if request.HasField("app_id") else ""
        gpus = request.gpus if request.HasField("gpus") else pb.GpuConfig(attach_mode="listed")
        manifest = Manifest(
            id=self._new_id(),
            name=request.name,
            app_id=app_id or checks.app_id_of(request.compose_file),
            vcpu=request.vcpu,
            memory=request.memory,
            disk_size=request.disk_size,
            image=request.image,
            port_map=ports,
            created_at_ms=int(self._clock() * 1000),
            hugepages=request.hugepages,
            pin_numa=request.pin_numa,
            gpus=checks.requested_gpus(gpus, cvm),
            kms_urls=tuple(request.kms_urls),
            gateway_urls=tuple(request.gateway_urls),
            no_tee=request.no_tee or request.HasField("simulated_tee"),
            networks=checks.requested_networks(request),
            simulated_tee=checks.requested_tee(request),
        )
        checks.check_port_conflicts(ports, self._manifests())
        return manifest

    def _manifests(self, but: str = "") -> Mapping[str, Manifest]:
        return {vm.id: vm.manifest for vm in self.vms.values() if vm.id != but}

    def _check_loads(self, vm: Vm) -> None:
        """Check that a machine's image exists and its compose file is one; the texts begin as upstream's."""
        try:
            checks.check_image_name(vm.manifest.image)
            self._factory.check(self._launch(vm))
        except VmmError as error:
            raise VmmError(f"Failed to load VM: {error}") from error
        try:
            checks.parse_compose(vm.folder.compose_file(), self.release)
        except VmmError as error:
            raise VmmError(f"Failed to load VM: Failed to read compose file: {error}") from error

    def _launch(self, vm: Vm) -> Launch:
        cvm, manifest = self.config.cvm, vm.manifest
        seed = vm.folder.instance_info().get("instance_id_seed", "")
        return Launch(
            manifest=manifest,
            folder=vm.folder.path,
            compose_file=vm.folder.compose_file(),
            user_config=vm.folder.user_config(),
            encrypted_env=vm.folder.encrypted_env(),
            instance_seed=bytes.fromhex(seed) if len(seed) == 2 * _SEED_SIZE else self._entropy(_SEED_SIZE),
            kms_urls=manifest.kms_urls or cvm.kms_urls,
            gateway_urls=manifest.gateway_urls or cvm.gateway_urls,
        )

    async def start(self, vm_id: str) -> None:
        """Start a machine; one that runs stays as it is. Raises `VmmError`."""
        vm = self.find(vm_id, "Failed to start VM: VM not found")
        if vm.is_removing:
            raise VmmError("Failed to start VM: VM is being removed")
        async with self._changing:
            await vm.start(self._launch(vm), self._factory)

    async def stop(self, vm_id: str) -> None:
        """End a machine at once; one that does not run stays as it is. Raises `VmmError`."""
        await self.find(vm_id, "Failed to stop VM: VM not found").stop()

    async def remove(self, vm_id: str) -> None:
        """Begin to remove a machine; it is gone when its folder is. Raises `VmmError`."""
        vm = self.find(vm_id, "Failed to remove VM: VM not found")
        if vm.is_removing:
            return
        vm.folder.mark_removing()
        vm.is_removing = True
        task = asyncio.create_task(self._remove(vm), name=f"remove machine {vm_id}")
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)

    async def _remove(self, vm: Vm) -> None:
        await vm.close()
        self._store.remove(vm.id)
        del self.vms[vm.id]
        self.log.info("removed", id=vm.id)

    async def update(self, request: pb.UpdateVmRequest) -> str:
        """Change a machine for its next start, all of the request or nothing; return the hash that the answer names.

        Upstream writes files before it has checked the rest; the texts are the same. Raises `VmmError`.
        """
        async with self._changing:
            files: dict[str, bytes] = {}
            answer = ""
            if request.compose_file:
                try:
                    checks.parse_compose(request.compose_file, self.release)
                except VmmError as error:
                    raise VmmError(f"Invalid compose file: {error}") from error
                answer = checks.app_id_of(request.compose_file)
                files[COMPOSE] = request.compose_file.encode()
            vm = self.find(request.id, f"The instance {request.id} not found")
            if request.encrypted_env:
                files[ENCRYPTED_ENV] = request.encrypted_env
            if request.user_config:
                files[USER_CONFIG] = request.user_config.encode()
            self._apply(vm, self._updated(vm, request), files)
        return answer

    def _updated(self, vm: Vm, request: pb.UpdateVmRequest) -> Manifest:
        """Return a machine's manifest after an update, whose members are checked in upstream's order."""
        manifest = self._resized(vm, request)
        changes: dict[str, object] = {}
        if request.HasField("gpus"):
            changes["gpus"] = checks.requested_gpus(request.gpus, self.config.cvm)
        if request.HasField("no_tee"):
            changes["no_tee"] = request.no_tee
        if request.update_ports:
            ports = checks.changed_ports(request.ports)
            checks.check_port_conflicts(ports, self._manifests(but=vm.id))
            changes["port_map"] = ports
        if request.update_kms_urls:
            changes["kms_urls"] = tuple(request.kms_urls)
        if request.update_gateway_urls:
            changes["gateway_urls"] = tuple(request.gateway_urls)
        if request.update_networking:
            changes["networks"] = checks.changed_networks(request.networks)
        return manifest.model_copy(update=changes)

    async def resize(self, request: pb.ResizeVmRequest) -> None:
        """Change the resources of a machine that does not run; raise `VmmError`."""
        async with self._changing:
            vm = self.find(request.id)
            if not any(request.HasField(name) for name in ("vcpu", "memory", "disk_size", "image")):
                raise VmmError("resize request contains no updates")
            self._apply(vm, self._resized(vm, request), {})

    def _resized(self, vm: Vm, request: pb.ResizeVmRequest | pb.UpdateVmRequest) -> Manifest:
        changes: dict[str, object] = {}
        for name in ("vcpu", "memory", "disk_size"):
            if request.HasField(name):
                changes[name] = getattr(request, name)
                if changes[name] == 0:
                    raise VmmError(f"{name} must be greater than zero")
        if request.HasField("image"):
            if not request.image:
                raise VmmError("image must not be empty")
            changes["image"] = request.image
        if changes and vm.status not in ("stopped", "exited"):
            raise VmmError(f"vm should be stopped before resize: {vm.id}")
        if "disk_size" in changes and request.disk_size < vm.manifest.disk_size:
            raise VmmError("Cannot shrink disk size")
        return vm.manifest.model_copy(update=changes)

    def _apply(self, vm: Vm, manifest: Manifest, files: Mapping[str, bytes]) -> None:
        if manifest != vm.manifest or files:
            vm.folder.change({"vm-manifest.json": manifest.encode(), **files})
        vm.manifest = manifest

    async def shutdown(self, vm_id: str) -> None:
        """Let a machine's guest power off; raise `VmmError`."""
        await self.find(vm_id).shutdown()

    def reload(self) -> tuple[int, int, int]:
        """Load folders that appeared, and forget those that are gone; return how many were loaded, updated, removed."""
        present = set(self._store.ids())
        loaded = sum(self._load_appeared(vm_id) for vm_id in present - self.vms.keys())
        gone = [vm for vm in self.vms.values() if vm.id not in present and not vm.is_alive and not vm.is_removing]
        for vm in gone:
            del self.vms[vm.id]
        return loaded, self._reread(present), len(gone)

    def _load_appeared(self, vm_id: str) -> bool:
        """Load a folder that appeared, as a machine that is not to run."""
        if not self._load_stored(vm_id):
            return False
        self.vms[vm_id].set_started(False)
        return True

    def _reread(self, ids: Iterable[str]) -> int:
        """Read the manifests of known machines again; return how many differ from before."""
        changed = 0
        for vm_id in ids:
            try:
                manifest = self._store.folder(vm_id).manifest()
            except VmmError as error:
                self.log.warning("machine not updated", id=vm_id, reason=str(error))
                continue
            changed += manifest != self.vms[vm_id].manifest if vm_id in self.vms else 0
            if vm_id in self.vms:
                self.vms[vm_id].manifest = manifest
        return changed
