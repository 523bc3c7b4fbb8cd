"""The chain of a test's stack: the transactions by which its contracts allow more, or less."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, TypeVar

from dstack_emu.deployment.errors import StackError
from dstack_emu.stack import Stack
from dstack_emu.testing.access import StackAccess
from dstack_emu.testing.trust_domains import LiveTrustDomain

if TYPE_CHECKING:
    from dstack_emu.deployment.stack_chain import StackChain

T = TypeVar("T")


class LiveChain:
    """The chain whose contracts decide. An act has taken effect when it returns; `StackError` if a contract refuses."""

    def __init__(self, access: StackAccess) -> None:
        self._access = access

    @property
    def url(self) -> str:
        """The URL of its JSON-RPC."""
        return self._access.in_thread(lambda stack: stack.services["chain"])

    @property
    def description(self) -> dict[str, Any]:
        """Its id, and the addresses of its contracts and accounts, as in the line of `up --json`."""
        described: dict[str, Any] = self._access.in_thread(lambda stack: stack.description()["chain"])
        return described

    @property
    def kms_contract(self) -> str:
        """The address of DstackKms."""
        return str(self.description["contracts"]["kms"])

    @property
    def block(self) -> int:
        """The number of the latest block."""
        return self._with(lambda chain: chain.head)

    def mine(self, count: int = 1) -> None:
        """Mine empty blocks."""
        self._with(lambda chain: chain.mine(count))

    def deploy_app(self, compose_hash: str = "00" * 32, *, allow_any_device: bool = True) -> str:
        """Create the contract of an app, and register it; return its app id (hex), for `dstack_app(…, app_id=…)`."""
        allowed = bytes.fromhex(compose_hash)
        return self._with(lambda chain: chain.deploy_app(compose_hash=allowed, allow_any_device=allow_any_device))

    def allow_compose_hash(self, app: LiveTrustDomain, compose_hash: str | None = None) -> Self:
        """Let an app's contract allow a compose hash (hex), by default that of the app."""
        return self._list("compose-hash", compose_hash or app.compose_hash, app, allowed=True)

    def remove_compose_hash(self, app: LiveTrustDomain, compose_hash: str | None = None) -> Self:
        """Let an app's contract allow a compose hash (hex) no longer, by default that of the app."""
        return self._list("compose-hash", compose_hash or app.compose_hash, app, allowed=False)

    def allow_device(self, app: LiveTrustDomain, device_id: str) -> Self:
        """Let an app's contract allow a device (hex)."""
        return self._list("device", device_id, app, allowed=True)

    def remove_device(self, app: LiveTrustDomain, device_id: str) -> Self:
        """Let an app's contract allow a device (hex) no longer."""
        return self._list("device", device_id, app, allowed=False)

    def allow(self, kind: str, value: str) -> Self:
        """Let DstackKms allow an `os-image`, `kms-mr` or `kms-device` (hex)."""
        return self._list(kind, value, None, allowed=True)

    def remove(self, kind: str, value: str) -> Self:
        """Let DstackKms allow an `os-image`, `kms-mr` or `kms-device` (hex) no longer."""
        return self._list(kind, value, None, allowed=False)

    def _list(self, kind: str, value: str, app: LiveTrustDomain | None, *, allowed: bool) -> Self:
        app_id = None if app is None else bytes.fromhex(app.app_id)
        hashed = bytes.fromhex(value.removeprefix("0x"))
        self._with(lambda chain: chain.list_entry(kind, hashed, allowed=allowed, app_id=app_id))
        return self

    def _with(self, work: "Callable[[StackChain], T]") -> T:
        def found(stack: Stack) -> T:
            if stack.context.chain is None:
                raise StackError("the stack has no chain of its own: give it the setting auth")
            return work(stack.context.chain)

        return self._access.in_thread(found)
