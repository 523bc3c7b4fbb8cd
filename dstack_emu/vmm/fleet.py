"""All machines of one VMM: creates, starts, changes and removes them, and keeps their folders true.

Source: dstack `vmm/src/app.rs` and `vmm/src/main_service.rs` at 312dc605.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterable, Mapping

from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.attest.release import Release
from dstack_emu.transport.background import begin_in_background
from dstack_emu.transport.events import EventLog
from dstack_emu.vmm import checks
from dstack_emu.vmm.config import VmmConfig
from dstack_emu.vmm.errors import UnknownVmError, VmmError
from dstack_emu.vmm.launching import Entropy, stored_launch
from dstack_emu.vmm.machine import Launch, MachineFactory
from dstack_emu.vmm.manifest import Manifest
from dstack_emu.vmm.pulls import ImagePulls
from dstack_emu.vmm.requests import created_manifest, require_resources, resized_manifest, updated_manifest
from dstack_emu.vmm.restarter import Restarter
from dstack_emu.vmm.state import FleetState, MachineState
from dstack_emu.vmm.store import (
    COMPOSE,
    ENCRYPTED_ENV,
    INSTANCE_INFO,
    MANIFEST,
    STATE,
    SYS_CONFIG,
    USER_CONFIG,
    Store,
)
from dstack_emu.vmm.sys_config import sys_config
from dstack_emu.vmm.vm import Vm


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
        self.factory, self._clock, self._new_id, self._entropy = factory, clock, new_id, entropy
        self._removals: dict[str, asyncio.Task[None]] = {}
        self.restarter = Restarter(
            config.cvm.auto_restart, self.vms, self._start_stored, self.log, backs_off=release.vmm_restarts_with_backoff
        )
        self._restarts: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self.pulls = ImagePulls(config.image, self.log)

    # ---- opening and closing

    async def open(self) -> None:
        """Load every machine, and start those that are to run; raise `OSError` if the folder cannot be used."""
        self._store.open()
        for vm_id in self._store.ids():
            self._load_stored(vm_id)
        for vm in list(self.vms.values()):
            if vm.is_started:
                await self._start_stored(vm)
        if self.config.cvm.auto_restart.enabled:
            self._restarts = begin_in_background(self.restarter.run(), "restarts of machines")

    def _load_stored(self, vm_id: str) -> bool:
        """Load a machine's folder; log what is wrong with one that cannot be loaded, and return whether it was."""
        try:
            manifest = self._store.folder(vm_id).manifest()
            if manifest.id != vm_id:
                raise VmmError(f"its manifest is that of {manifest.id!r:.80}: a copy of a folder is no machine")
            self._load(manifest, self._free_cid())
        except VmmError as error:
            self.log.warning("machine not loaded", id=vm_id, reason=str(error))
            return False
        return True

    async def _start_stored(self, vm: Vm) -> None:
        try:
            await self._start(vm)
        except VmmError as error:
            vm.boot_error = str(error)
            self.log.warning("machine not started", id=vm.id, reason=str(error))

    def end_followers(self) -> None:
        """End the answers of those who follow a log, for which a server that closes would wait."""
        for vm in self.vms.values():
            vm.logs.close()

    async def close(self) -> None:
        """End every machine; their folders stay."""
        if self._restarts is not None:
            self._restarts.cancel()
            await asyncio.gather(self._restarts, return_exceptions=True)
        await self.pulls.close()
        await asyncio.gather(*self._removals.values(), return_exceptions=True)
        await asyncio.gather(*(vm.close() for vm in self.vms.values()))

    def _load(self, manifest: Manifest, cid: int) -> Vm:
        vm = Vm(
            self._store.folder(manifest.id), manifest, cid, clock=self._clock, config=self.config, release=self.release
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

    def ordered(self, ids: Iterable[str] = ()) -> list[Vm]:
        """Return the machines of these ids, or all of them without any, in the order of their creation."""
        wanted = set(ids)
        vms = [self.vms[vm_id] for vm_id in wanted if vm_id in self.vms] if wanted else self.vms.values()
        return sorted(vms, key=lambda vm: (vm.manifest.created_at_ms, vm.id))

    # ---- changing

    async def create(self, request: pb.VmConfiguration) -> str:
        """Create a machine, and start it unless the request says otherwise; return its id.

        A machine that cannot be created or started leaves nothing behind. Raises `VmmError`.
        """
        async with self._changing:
            now = int(self._clock() * 1000)
            manifest = created_manifest(request, self._free_id(), now, self.config.cvm, self._manifests(), self.release)
            self._require_loadable(manifest, request.compose_file)
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
            vm = self._load(manifest, cid)
            try:
                if not request.stopped:
                    await self._start(vm)
            except BaseException:
                self.vms.pop(manifest.id, None)
                with contextlib.suppress(OSError):
                    self._store.remove(manifest.id)
                raise
        self.log.info("created", id=manifest.id, app_id=manifest.app_id)
        return manifest.id

    def _free_id(self) -> str:
        """Draw an id that no machine and no folder has: after a restart, a stack's seed gives the same ids again."""
        while (vm_id := self._new_id()) in self.vms or self._store.is_taken(vm_id):
            pass
        return vm_id

    def _manifests(self, but: str = "") -> Mapping[str, Manifest]:
        return {vm.id: vm.manifest for vm in self.vms.values() if vm.id != but}

    def _require_loadable(self, manifest: Manifest, compose_file: str) -> None:
        """Check that a machine's image exists and its compose file is one; the texts begin as upstream's."""
        try:
            checks.check_image_name(manifest.image)
            self.factory.require_image(manifest.image)
        except VmmError as error:
            raise VmmError(f"Failed to load VM: {error}") from error
        try:
            checks.parse_compose(compose_file, self.release)
        except VmmError as error:
            raise VmmError(f"Failed to load VM: Failed to read compose file: {error}") from error

    def _launch(self, vm: Vm) -> Launch:
        """Return what a machine is started with now, and write what the guest is told of its surroundings."""
        if (pid := vm.folder.qemu()) is not None:
            raise VmmError(f"QEMU runs this machine, as process {pid}: stop it with the VMM that started it")
        launch = stored_launch(vm.folder, vm.manifest, self.config.cvm, self._entropy)
        if not vm.is_alive:
            guest = self.factory.guest_config(launch)
            vm.folder.write(SYS_CONFIG, sys_config(self.config, launch, guest, self.release), durably=False)
        return launch

    async def _start(self, vm: Vm) -> None:
        await vm.start(lambda: self._launch(vm), self.factory)

    async def start(self, vm_id: str) -> None:
        """Start a machine; one that runs stays as it is. Raises `VmmError`."""
        try:
            vm = self.find(vm_id, "VM not found")
            vm.restart.reset()
            await self._start(vm)
        except VmmError as error:
            raise type(error)(f"Failed to start VM: {error}") from error

    async def stop(self, vm_id: str) -> None:
        """End a machine at once; one that does not run stays as it is. Raises `VmmError`."""
        vm = self.find(vm_id, "Failed to stop VM: VM not found")
        vm.restart.reset()
        await vm.stop()

    async def remove(self, vm_id: str) -> None:
        """Begin to remove a machine; it is gone when its folder is. Raises `VmmError`."""
        vm = self.find(vm_id, "Failed to remove VM: VM not found")
        if vm_id in self._removals:
            return
        vm.folder.mark_removing()
        vm.is_removing = True
        self._removals[vm_id] = begin_in_background(self._remove(vm), f"removal of machine {vm_id}")

    async def _remove(self, vm: Vm) -> None:
        try:
            await vm.close()
            await self.factory.discard(vm.id)
            self._store.remove(vm.id)
            self.vms.pop(vm.id, None)
        except OSError as error:
            self.log.error("machine not removed", id=vm.id, reason=error.strerror or str(error))
        else:
            self.log.info("removed", id=vm.id)
        finally:
            self._removals.pop(vm.id, None)

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
            manifest = updated_manifest(
                vm.manifest,
                request,
                request.compose_file or vm.folder.compose_file(),
                is_at_rest=vm.is_at_rest,
                cvm=self.config.cvm,
                release=self.release,
                others=self._manifests(but=vm.id),
            )
            self._apply(vm, manifest, files)
        return answer

    async def resize(self, request: pb.ResizeVmRequest) -> None:
        """Change the resources of a machine that does not run; raise `VmmError`."""
        async with self._changing:
            if self.release.vmm_checks_resources:
                require_resources(request)
            vm = self.find(request.id)
            resized = resized_manifest(vm.manifest, request, is_at_rest=vm.is_at_rest)
            self._apply(vm, resized, {})

    def _apply(self, vm: Vm, manifest: Manifest, files: Mapping[str, bytes]) -> None:
        if manifest.image != vm.manifest.image:
            self._require_loadable(manifest, vm.folder.compose_file())
        if manifest != vm.manifest or files:
            vm.folder.change({MANIFEST: manifest.encode(), **files})
        vm.manifest = manifest

    # ---- as data

    def capture(self) -> FleetState:
        """Return the machines as they are now, without those that are being removed."""
        machines = {vm.id: self._captured(vm) for vm in self.vms.values() if not vm.is_removing}
        return FleetState(machines=machines)

    def _captured(self, vm: Vm) -> MachineState:
        files = vm.folder.files()
        return MachineState(manifest=vm.manifest, files=files, is_started=vm.is_started, is_alive=vm.is_alive)

    async def restore(self, state: FleetState) -> None:
        """Make the machines what they were: others are removed, and those that differ are made anew.

        A machine that ran boots again, and this does not wait for it. Raises `VmmError` if one cannot be stored.
        """
        async with self._changing:
            await asyncio.gather(*self._removals.values(), return_exceptions=True)
            for vm in list(self.vms.values()):
                if state.machines.get(vm.id) != self._captured(vm):
                    vm.is_removing = True
                    await self._remove(vm)
                    if vm.id in self.vms:
                        raise VmmError(f"machine {vm.id} cannot be removed: see the log")
            for vm_id, machine in state.machines.items():
                if vm_id not in self.vms:
                    started = {STATE: json.dumps({"started": machine.is_started}).encode()}
                    self._store.create(machine.manifest, {**machine.files, **started})
                    vm = self._load(machine.manifest, self._free_cid())
                    if machine.is_alive:
                        await self._start_stored(vm)

    # ---- the rest

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
