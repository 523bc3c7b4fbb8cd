"""vm-manifest.json: what a machine is configured with, as upstream stores it.

A manifest of 0.5 has one network, as `networking`. It is read, and written beside `networks`, as upstream does, so that
either release can take over the folder of the other. Source: dstack `vmm/src/app.rs` and `vmm/src/app/workdir.rs` at
312dc605, and `vmm/src/app.rs` at 40eaf35e.
"""

import json
from typing import Any, Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.transport.settings import Port
from dstack_emu.transport.validation import problems
from dstack_emu.vmm.config import Protocol
from dstack_emu.vmm.errors import VmmError

AttachMode = Literal["listed", "all"]
NetworkMode = Literal["user", "bridge", "custom"]
NETWORK_MODES: Final = frozenset(get_args(NetworkMode))
WILDCARDS: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared with, not listened on


class _Stored(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)


class PortMap(_Stored):
    """A host port, and the port of the machine to which its connections go."""

    address: str
    protocol: Protocol
    host_port: Port = Field(validation_alias="from", serialization_alias="from")
    vm_port: Port = Field(validation_alias="to", serialization_alias="to")

    def conflicts_with(self, other: "PortMap") -> bool:
        """Return whether both cannot be listened on: same protocol and port, and addresses that overlap."""
        same = (self.protocol, self.host_port) == (other.protocol, other.host_port)
        return same and (self.address == other.address or bool(WILDCARDS & {self.address, other.address}))

    def __str__(self) -> str:
        """Return it as upstream's errors have it: `tcp 127.0.0.1:8080`."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.protocol} {host}:{self.host_port}"


class GpuSlot(_Stored):
    """A PCI device of the host."""

    slot: str = ""


class Gpus(_Stored):
    """The GPUs of a machine, and the switches between them."""

    attach_mode: AttachMode = "listed"
    gpus: tuple[GpuSlot, ...] = ()
    bridges: tuple[GpuSlot, ...] = ()


class Network(_Stored):
    """One network interface."""

    mode: NetworkMode
    bridge: str = ""


class Volume(_Stored):
    """A disk beside that of the data: the path of its file."""

    source: str


class Manifest(_Stored):
    """One machine: memory in MB, disk size in GB, the time of its creation in milliseconds since 1970."""

    id: str
    name: str
    app_id: str
    vcpu: int
    memory: int
    disk_size: int
    image: str
    port_map: tuple[PortMap, ...] = ()
    created_at_ms: int
    hugepages: bool = False
    pin_numa: bool = False
    gpus: Gpus = Gpus()
    kms_urls: tuple[str, ...] = ()
    gateway_urls: tuple[str, ...] = ()
    no_tee: bool = False
    networks: tuple[Network, ...] = ()
    simulated_tee: str | None = None
    swtpm: bool = False
    volumes: tuple[Volume, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_release(cls, document: Any) -> Any:
        """Take `networking` for `networks` if that is absent or empty, and no GPUs for `null`."""
        if not isinstance(document, dict):
            return document
        found = dict(document)
        network = found.pop("networking", None)
        if network is not None and not found.get("networks"):
            found["networks"] = [network]
        if found.get("gpus", ...) is None:
            del found["gpus"]
        return found

    @classmethod
    def parse(cls, content: bytes, source: str) -> Self:
        """Parse the stored file; raise `VmmError`, which names `source` and the first fault."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            raise VmmError(f"{source}: {problems(error)[0]}") from error

    def encode(self) -> bytes:
        """Encode it as the stored file."""
        document = self.model_dump(mode="json", by_alias=True)
        if self.networks:
            document["networking"] = document["networks"][0]
        return json.dumps(document, indent=2, ensure_ascii=False).encode()

    def configuration(
        self, *, compose_file: str, encrypted_env: bytes, user_config: str, stopped: bool
    ) -> pb.VmConfiguration:
        """Return the configuration that VmInfo shows."""
        networks = [pb.NetworkingConfig(mode=each.mode, bridge_name=each.bridge) for each in self.networks]
        return pb.VmConfiguration(
            name=self.name,
            image=self.image,
            compose_file=compose_file,
            vcpu=self.vcpu,
            memory=self.memory,
            disk_size=self.disk_size,
            ports=[
                pb.PortMapping(
                    protocol=port.protocol, host_port=port.host_port, vm_port=port.vm_port, host_address=port.address
                )
                for port in self.port_map
            ],
            encrypted_env=encrypted_env,
            app_id=self.app_id,
            user_config=user_config,
            hugepages=self.hugepages,
            pin_numa=self.pin_numa,
            gpus=pb.GpuConfig(
                gpus=[pb.GpuSpec(slot=each.slot) for each in self.gpus.gpus], attach_mode=self.gpus.attach_mode
            ),
            kms_urls=self.kms_urls,
            gateway_urls=self.gateway_urls,
            stopped=stopped,
            no_tee=self.no_tee,
            networking=networks[0] if networks else None,
            networks=networks,
            simulated_tee=self.simulated_tee,
        )
