"""What runs a machine: the interface that the VMM's caller implements, and what the machine tells its host.

The VMM knows no trust domain. It hands over what its folder says (`Launch`), and learns of the boot by the host API
(`HostApi`), as the real one does over vsock.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from google.protobuf.message import Message

from dstack_emu.vmm.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Launch:
    """What a machine is started with.

    `folder` is the machine's own, for sockets and files; `compose_file` the text of its app-compose.json;
    `instance_seed` 20 bytes, `has_disk` whether an earlier boot has made the machine's data disk. The KMS and gateway
    URLs are the machine's, or the VMM's.
    """

    manifest: Manifest
    folder: Path
    compose_file: str
    user_config: str
    encrypted_env: bytes
    instance_seed: bytes
    has_disk: bool
    kms_urls: tuple[str, ...]
    gateway_urls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GuestConfig:
    """What the host tells a guest about its machine: the texts of `vm_config` and of `mr_config`, None without one."""

    vm_config: str
    mr_config: str | None = None


class HostApi(Protocol):
    """What a guest tells its host: the methods of upstream's HostApi that the VMM handles."""

    def notify(self, event: str, payload: str) -> None:
        """Handle an event: `boot.progress`, `boot.error`, `shutdown.progress`, `instance.info`, or any other."""
        ...

    def log(self, text: str, channel: str = "serial") -> None:
        """Append a text to a log: `serial`, `stdout` or `stderr`."""
        ...


class Machine(Protocol):
    """A machine that runs."""

    async def wait(self) -> None:
        """Wait until it has ended, by itself or by `stop`; return at once if it has."""
        ...

    async def stop(self) -> None:
        """End it at once, and release what it holds; return when that is done."""
        ...

    async def shutdown(self) -> None:
        """Let its guest power off: it reports `shutdown.progress` and then ends. Return at once."""
        ...

    async def guest_call(self, method: str) -> Message:
        """Call a method of its guest API but Shutdown, such as `Info`; raise `VmmError` if it does not answer."""
        ...


class MachineFactory(Protocol):
    """Starts machines."""

    def require_image(self, name: str) -> None:
        """Raise `VmmError` if there is no OS image of that name."""
        ...

    def built_in_images(self) -> Mapping[str, bytes]:
        """Return the metadata.json of each OS image that exists without a folder, by the image's name."""
        ...

    def guest_config(self, launch: Launch) -> GuestConfig:
        """Return what a guest is told about its machine; raise `VmmError` if its image cannot be loaded."""
        ...

    async def start(self, launch: Launch, host: HostApi) -> Machine:
        """Start a machine, and return while it boots; raise `VmmError` if it cannot be started at all."""
        ...

    async def discard(self, vm_id: str) -> None:
        """Delete what a machine that does not run, and never will again, has left outside its folder."""
        ...
