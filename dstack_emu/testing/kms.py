"""KMS of a test's stack, and the policies of their webhooks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from dstack_emu.control.schemas import ControlError
from dstack_emu.kms_emu.cert_dir import ROOT_CA_CERT
from dstack_emu.testing.access import Named, StackAccess, name_of, raise_refusals
from dstack_emu.testing.platforms import LivePlatform
from dstack_emu.testing.trust_domains import LiveTrustDomain


class LivePolicy:
    """Whom the webhook (auth-simple) of a KMS allows; in force from its next answer on. `kms` is the KMS's name."""

    def __init__(self, access: StackAccess, kms: str) -> None:
        self._access, self.kms = access, kms

    @property
    def path(self) -> Path:
        """Its file."""
        return Path(self._access.control.policies()[self.kms])

    @property
    def content(self) -> Any:
        """What is in it."""
        return self._access.control.policy(self.kms)

    def set(self, content: Mapping[str, Any]) -> None:
        """Put another in its place; it is not validated."""
        self._access.control.set_policy(self.kms, content)

    def allow(self, *parts: "LiveTrustDomain | LiveKms | str", this_device_only: bool = False) -> Self:
        """Allow trust domains as they are now, with their OS images; on their own platforms alone if asked for."""
        for name in map(_trust_domain_name, parts):
            self._access.control.allow(self.kms, name, this_device_only=this_device_only)
        return self

    def deny(self, *parts: "LiveTrustDomain | LiveKms | str") -> Self:
        """Stop allowing them: of a KMS its measurement, of an app all of it."""
        for name in map(_trust_domain_name, parts):
            self._access.control.deny(self.kms, name)
        return self


def _trust_domain_name(part: "LiveTrustDomain | LiveKms | str") -> str:
    return name_of(part.trust_domain if isinstance(part, LiveKms) else part)


class LiveKms:
    """A KMS of the stack."""

    def __init__(self, access: StackAccess, name: str) -> None:
        self._access, self.name = access, name

    @property
    def info(self) -> dict[str, Any]:
        """Its phase, its URL, and what it measures."""
        info: dict[str, Any] = self._access.control.kms(self.name)
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
        return LiveTrustDomain(self._access, f"kms-{self.name}")

    @property
    def platform(self) -> LivePlatform:
        """The platform it runs on."""
        return self.trust_domain.platform

    @property
    def policy(self) -> LivePolicy:
        """The policy of its webhook, by which it and its callers are allowed."""
        webhook = str(self.info["webhook"])
        if "://" in webhook:
            raise ControlError(f"kms-{self.name} asks {webhook}, which has no policy of the stack's")
        return LivePolicy(self._access, self.name) if webhook == "own" else LiveKms(self._access, webhook).policy

    def bootstrap(self) -> Self:
        """Make new keys and end the onboard phase; raise `Refused` with its words."""
        __tracebackhide__ = True
        raise_refusals(lambda: self._access.control.onboard_kms(self.name, None))
        return self

    def onboard(self, source: Named | str = "src") -> Self:
        """Take another KMS's keys over and end the onboard phase; raise `Refused` with its words."""
        __tracebackhide__ = True
        raise_refusals(lambda: self._access.control.onboard_kms(self.name, name_of(source)))
        return self

    def rpc(self, method: str, **fields: Any) -> dict[str, Any]:
        """Call it, in JSON and without a client certificate; raise `Refused` with its words.

        The service need not be named: it is `KMS`, and `Onboard` in the onboard phase.
        """
        runtime = self.phase == "runtime"
        name = method if "." in method else f"{'KMS' if runtime else 'Onboard'}.{method}"
        return self._access.post(f"{self.url}/prpc/{name}?json", fields, self.root_ca if runtime else None)

    def remove(self) -> None:
        """Stop it, if it was made in the test."""
        self._access.control.remove_kms(self.name)
