"""KMS of a test's stack, and the policies of their webhooks."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dstack_emu.control.schemas import ControlError
from dstack_emu.kms_emu.cert_dir import ROOT_CA_CERT
from dstack_emu.testing.trust_domain import LivePlatform, LiveTrustDomain, with_refusals

if TYPE_CHECKING:
    from dstack_emu.testing.live import LiveStack


class LivePolicy:
    """Whom the webhook (auth-simple) of a KMS allows; heeded by its next answer."""

    def __init__(self, live: "LiveStack", side: str) -> None:
        self._live, self.side = live, side

    @property
    def path(self) -> Path:
        """Its file."""
        return Path(self._live.control.policies()[self.side])

    @property
    def content(self) -> Any:
        """What is in it."""
        return self._live.control.policy(self.side)

    def set(self, content: Mapping[str, Any]) -> None:
        """Put another in its place; it is not checked."""
        self._live.control.set_policy(self.side, content)

    def allow(self, *who: "LiveTrustDomain | LiveKms | str", this_device_only: bool = False) -> Self:
        """Allow trust domains as they are now, with their OS images; on their own machines alone where asked."""
        for name in map(_domain, who):
            self._live.control.allow(self.side, name, this_device_only=this_device_only)
        return self

    def deny(self, *who: "LiveTrustDomain | LiveKms | str") -> Self:
        """Allow them no longer: of a KMS its measurement, of an app all of it."""
        for name in map(_domain, who):
            self._live.control.deny(self.side, name)
        return self


def _domain(who: "LiveTrustDomain | LiveKms | str") -> str:
    if isinstance(who, str):
        return who
    return who.trust_domain.name if isinstance(who, LiveKms) else who.name


class LiveKms:
    """A KMS."""

    def __init__(self, live: "LiveStack", name: str) -> None:
        self._live, self.name = live, name

    @property
    def info(self) -> dict[str, Any]:
        """Its phase, where it answers, what it measures."""
        info: dict[str, Any] = self._live.control.kms(self.name)
        return info

    @property
    def phase(self) -> str:
        """`onboard` while it has no keys, `runtime` after that."""
        return str(self.info["phase"])

    @property
    def url(self) -> str:
        """Where it answers: over TLS in its runtime phase."""
        return str(self.info["url"])

    @property
    def root_ca(self) -> Path:
        """Its root certificate (PEM), once it has keys."""
        return Path(self.info["certs"]) / ROOT_CA_CERT

    @property
    def trust_domain(self) -> LiveTrustDomain:
        """The trust domain it runs in."""
        return LiveTrustDomain(self._live, f"kms-{self.name}")

    @property
    def platform(self) -> LivePlatform:
        """The machine it runs on."""
        return self.trust_domain.platform

    @property
    def policy(self) -> LivePolicy:
        """The policy that decides about it and its callers."""
        webhook = str(self.info["webhook"])
        if "://" in webhook:
            raise ControlError(f"kms-{self.name} asks {webhook}, which has no policy of the stack's")
        return LivePolicy(self._live, self.name) if webhook == "own" else LiveKms(self._live, webhook).policy

    def bootstrap(self) -> Self:
        """Make new keys and end the onboard phase; raise `Refused` with its words."""
        __tracebackhide__ = True
        with_refusals(lambda: self._live.control.onboard_kms(self.name, None))
        return self

    def onboard(self, source: "LiveKms | str" = "src") -> Self:
        """Take another KMS's keys over and end the onboard phase; raise `Refused` with its words."""
        __tracebackhide__ = True
        name = source if isinstance(source, str) else source.name
        with_refusals(lambda: self._live.control.onboard_kms(self.name, name))
        return self

    def rpc(self, method: str, **fields: Any) -> dict[str, Any]:
        """Ask it, in JSON and without a client certificate; raise `Refused` with its words.

        The service need not be named: it is `KMS`, and `Onboard` in the onboard phase.
        """
        runtime = self.phase == "runtime"
        name = method if "." in method else f"{'KMS' if runtime else 'Onboard'}.{method}"
        return self._live.post(f"{self.url}/prpc/{name}?json", fields, self.root_ca if runtime else None)

    def remove(self) -> None:
        """Stop it, where it was made in the test."""
        self._live.control.remove_kms(self.name)
