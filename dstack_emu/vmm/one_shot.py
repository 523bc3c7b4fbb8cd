"""One machine from a file, without a server: `run` of upstream's VMM, up to the point where QEMU would start.

The file is the JSON of VmConfiguration, the request of CreateVm, with the checks of that RPC. The machine's folder is
that of a deployed machine, with an instance seed that is the same each time. Source: dstack `vmm/src/one_shot.rs` at
312dc605.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.attest.prpc import decode_json
from dstack_emu.attest.release import Release
from dstack_emu.vmm import checks
from dstack_emu.vmm.config import VmmConfig
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.machine import GuestConfig, Launch, MachineFactory
from dstack_emu.vmm.manifest import Manifest
from dstack_emu.vmm.networks import interfaces, require_bridges
from dstack_emu.vmm.requests import created_manifest
from dstack_emu.vmm.store import (
    COMPOSE,
    ENCRYPTED_ENV,
    INSTANCE_INFO,
    MANIFEST,
    STATE,
    SYS_CONFIG,
    USER_CONFIG,
    MachineFolder,
)
from dstack_emu.vmm.sys_config import sys_config

INSTANCE_SEED: Final = bytes.fromhex("4befb40617034796ce9aad5b07b812359d8817bd")


@dataclass(frozen=True, slots=True)
class OneShot:
    """What a machine is made of: `file` describes it, and `vm_id` and `created_at_ms` are what a request cannot say."""

    file: Path
    config: VmmConfig
    factory: MachineFactory
    release: Release
    vm_id: str
    created_at_ms: int

    def prepare(self, folder: Path | None = None) -> "Prepared":
        """Check everything, then write the machine's folder: `folder`, or a new one in the working directory.

        Raises `VmmError`; nothing is written then.
        """
        request = self._request()
        manifest = created_manifest(request, self.vm_id, self.created_at_ms, self.config.cvm, {}, self.release)
        found = interfaces(manifest, self.config.cvm)
        require_bridges(found)
        checks.check_image_name(manifest.image)
        self.factory.require_image(manifest.image)
        try:
            checks.parse_compose(request.compose_file, self.release)
        except VmmError as error:
            raise VmmError(f"Failed to parse compose_file as AppCompose: {error}") from error
        where = folder or Path.cwd() / f"dstack-oneshot-{manifest.name}-{self.created_at_ms // 1000}"
        launch = self._launch(manifest, request, where)
        guest = self.factory.guest_config(launch)
        _write(where, self._files(manifest, request, launch, guest))
        return Prepared(manifest, where, request.compose_file, self.config.cvm.cid_start, tuple(found), guest.vm_config)

    def _request(self) -> pb.VmConfiguration:
        try:
            content = self.file.read_bytes()
        except OSError as error:
            raise VmmError(f"Failed to read VM configuration file: {self.file}: {error.strerror}") from error
        try:
            if not content.strip():
                raise FormatError("a JSON object expected, got nothing")
            return decode_json(pb.VmConfiguration, content)
        except FormatError as error:
            raise VmmError(f"Failed to parse VM configuration from: {self.file}: {error}") from error

    def _launch(self, manifest: Manifest, request: pb.VmConfiguration, folder: Path) -> Launch:
        cvm = self.config.cvm
        return Launch(
            manifest=manifest,
            folder=folder,
            compose_file=request.compose_file,
            user_config=request.user_config,
            encrypted_env=request.encrypted_env,
            instance_seed=INSTANCE_SEED,
            has_disk=False,
            kms_urls=manifest.kms_urls or cvm.kms_urls,
            gateway_urls=manifest.gateway_urls or cvm.gateway_urls,
        )

    def _files(
        self, manifest: Manifest, request: pb.VmConfiguration, launch: Launch, guest: GuestConfig
    ) -> Mapping[str, bytes]:
        instance = {"instance_id_seed": INSTANCE_SEED.hex(), "instance_id": "", "app_id": manifest.app_id}
        given = {ENCRYPTED_ENV: request.encrypted_env, USER_CONFIG: request.user_config.encode()}
        return {
            MANIFEST: manifest.encode(),
            STATE: json.dumps({"started": False}).encode(),
            COMPOSE: request.compose_file.encode(),
            INSTANCE_INFO: json.dumps(instance).encode(),
            SYS_CONFIG: sys_config(self.config, launch, guest, self.release),
            **{name: content for name, content in given.items() if content},
        }


@dataclass(frozen=True, slots=True)
class Prepared:
    """A machine whose folder is written, and which nothing has started."""

    manifest: Manifest
    folder: Path
    compose_file: str
    cid: int
    interfaces: tuple[pb.NetworkInterfaceStatus, ...]
    vm_config: str

    def description(self) -> str:
        """Return, as one line of JSON, the machine that would run: it takes the place of a QEMU command."""
        document: dict[str, Any] = {
            "name": self.manifest.name,
            "image": self.manifest.image,
            "vcpu": self.manifest.vcpu,
            "memory": self.manifest.memory,
            "disk_size": self.manifest.disk_size,
            "ports": [str(port) for port in self.manifest.port_map],
            "interfaces": [
                {"mode": each.mode, "mac": each.mac, **({"bridge": each.bridge_name} if each.bridge_name else {})}
                for each in self.interfaces
            ],
            "vm_config": json.loads(self.vm_config),
        }
        return json.dumps(document)


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VmmError(f"Failed to create workdir: {folder}: {error.strerror}") from error
    MachineFolder(folder).change(files)
