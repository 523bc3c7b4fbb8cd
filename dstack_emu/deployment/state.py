"""The state of a deployment's parts as data, and the protocol by which it is captured and restored.

What grows from the seed alone, ports and connections are in no state. Bytes are base64 in JSON.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from dstack_emu.attest.app_info import BootInfo
from dstack_emu.attest.eventlog import RuntimeEvent
from dstack_emu.deployment.specs import GuestSpec, KmsSpec
from dstack_emu.gateway.state import GatewayState
from dstack_emu.simulator.app_keys import AppKeys
from dstack_emu.simulator.gateway_keys import Registration
from dstack_emu.transport.tls import Identity

if TYPE_CHECKING:
    from dstack_emu.gateway.gateway import Gateway

S = TypeVar("S")

Register = Annotated[bytes, Field(min_length=48, max_length=48)]
Count = Annotated[int, Field(ge=0)]


class Restorable(Protocol[S]):
    """A part whose state can be captured, and restored later in this process or in another one of the same seed."""

    def capture(self) -> S:
        """Return the state as it is now. It does not change afterwards."""
        ...

    def restore(self, state: S) -> None:
        """Make the part what it was when the state was captured."""
        ...


class RestorableService(Protocol[S]):
    """The same for a service that has to stop and start, or to close connections, when it is restored."""

    def capture(self) -> S:
        """Return the state as it is now. It does not change afterwards."""
        ...

    async def restore(self, state: S) -> None:
        """Make the service what it was when the state was captured."""
        ...


class RunningGateway(RestorableService[GatewayState | None], Protocol):
    """The gateway of a stack, as its control sees it.

    `txt_records` are the TXT records of its ingress, by lowercase domain name, which its control changes.
    """

    txt_records: dict[str, str]

    def find(self) -> "Gateway | None":
        """Return the gateway, None before it has keys."""
        ...


class StateModel(BaseModel):
    """A part of a saved state. What is captured here is not validated again; only a document from outside is."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        ser_json_bytes="base64",
        val_json_bytes="base64",
        defer_build=True,  # most stacks neither save nor load a state, and start sooner
    )


class KeysState(StateModel):
    """What a trust domain got from a KMS, and the identity it shows to it."""

    keys: AppKeys
    identity: Identity
    kms: str
    demo_certificate: str


class GuestState(StateModel):
    """A trust domain: its description, what its log claims, and its keys if a KMS gave it some.

    `encrypted_env` None is that of the description; `gateway` is None if it does not register at one.
    """

    spec: GuestSpec
    rtmr3: Register
    events: tuple[RuntimeEvent, ...]
    streams: dict[str, Count]
    keys: KeysState | None = None
    encrypted_env: bytes | None = None
    gateway: Registration | None = None


class KmsState(StateModel):
    """A KMS: its phase, its folder, and what it knows beside that. Its trust domain is a `GuestState` of its own.

    Of a KMS that is another program there are no files, but `foreign_root`, its root certificate (PEM), empty before it
    has keys; it is None of our own KMS.
    """

    spec: KmsSpec
    phase: Literal["onboard", "runtime"]
    files: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]+\.?[a-z0-9-]*$")], bytes]
    own_boot_info: BootInfo | None
    requests: Count
    failures: Count
    measured: dict[str, Any] | None
    foreign_root: str | None = None
