"""The KMS of a test's stack, and the policies of their webhooks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from dstack_emu.control.policies import foreign_policy
from dstack_emu.control.schemas import ControlError
from dstack_emu.kms_emu.cert_dir import ROOT_CA_CERT
from dstack_emu.testing.access import NamedPart, StackAccess, name_of, raise_refusals
from dstack_emu.testing.platforms import LivePlatform
from dstack_emu.testing.trust_domains import LiveTrustDomain


class LivePolicy:
    """The policy of a KMS's webhook (auth-simple); `kms` is the KMS's name. The next request uses a changed policy."""

    def __init__(self, access: StackAccess, kms: str) -> None:
        self._access, self.kms = access, kms

    @property
    def path(self) -> Path:
        """The path of the policy file."""
        return Path(self._access.control.policies()[self.kms])

    @property
    def content(self) -> Any:
        """The content of the policy file."""
        return self._access.control.policy(self.kms)

    def set(self, content: Mapping[str, Any]) -> None:
        """Replace the policy; the content is not validated."""
        self._access.control.set_policy(self.kms, content)

    def allow(self, *parts: "LiveTrustDomain | LiveKms | str", this_device_only: bool = False) -> Self:
        """Allow trust domains by their present measurements and their OS images.

        With `this_device_only` they are allowed only on their own platforms.
        """
        for name in map(_trust_domain_name, parts):
            self._access.control.allow(self.kms, name, this_device_only=this_device_only)
        return self

    def deny(self, *parts: "LiveTrustDomain | LiveKms | str") -> Self:
        """Remove the measurement of a KMS from the policy, or the whole entry of an app."""
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
        """The KMS as the control API describes it: its phase, its URL, its trust domain."""
        self._access.control.refresh_kms()
        info: dict[str, Any] = self._access.control.kms(self.name)
        return info

    @property
    def phase(self) -> str:
        """`onboard` while it has no keys, `runtime` after that."""
        return str(self.info["phase"])

    @property
    def url(self) -> str:
        """The URL of the KMS; in the runtime phase it begins with `https`."""
        return str(self.info["url"])

    @property
    def root_ca(self) -> Path:
        """The path of its root certificate (PEM), which exists once it has keys."""
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
        """The policy of its webhook, which decides about the KMS itself and its callers."""
        webhook = str(self.info["webhook"])
        if "://" in webhook:
            raise ControlError(foreign_policy(f"kms-{self.name}", webhook))
        return LivePolicy(self._access, self.name) if webhook == "own" else LiveKms(self._access, webhook).policy

    def bootstrap(self) -> Self:
        """Generate keys and end the onboard phase; raise `Refused` with the KMS's text."""
        __tracebackhide__ = True
        raise_refusals(lambda: self._access.control.onboard_kms(self.name, None))
        return self

    def onboard(self, source: NamedPart | str = "src", *, source_token: str = "") -> Self:
        """Receive the keys of another KMS and end the onboard phase; raise `Refused` with the KMS's text.

        With a `source_token` the keys are requested from the admin listener of the source.
        """
        __tracebackhide__ = True
        raise_refusals(lambda: self._access.control.onboard_kms(self.name, name_of(source), source_token))
        return self

    def restart(self) -> Self:
        """Start the KMS anew with its keys, as a new process that verifies its own evidence again."""
        self._access.control.restart_kms(self.name)
        return self

    def rpc(self, method: str, **fields: Any) -> dict[str, Any]:
        """Call an RPC in JSON, without a client certificate; raise `Refused` with the KMS's text.

        If `method` names no service, it is `Onboard` in the onboard phase and `KMS` in the runtime phase.
        """
        runtime = self.phase == "runtime"
        name = method if "." in method else f"{'KMS' if runtime else 'Onboard'}.{method}"
        return self._access.post(f"{self.url}/prpc/{name}?json", fields, self.root_ca if runtime else None)

    def remove(self) -> None:
        """Stop the KMS; raise `ControlError` if it is part of every stack."""
        self._access.control.remove_kms(self.name)
