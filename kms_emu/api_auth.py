"""Which credentials the listeners of a KMS accept.

The admin listener does not start without a credential; the onboarding listener is open without one. Source: dstack
`kms/src/{admin_auth,onboard_auth}.rs` before 0.6.0 (0441b5ac).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from dstack_emu.attest.release import Release
from dstack_emu.kms_emu.config import AdminSection, Core, OnboardConfig
from dstack_emu.kms_emu.errors import KmsConfigError
from dstack_emu.transport.api_auth import Credentials, ListenerAuth

ADMIN_VARIABLES: Final = ("DSTACK_KMS_ADMIN_TOKEN", "ADMIN_API_TOKEN")
ONBOARD_VARIABLES: Final = ("DSTACK_KMS_ONBOARD_TOKEN",)


def admin_auth(admin: AdminSection, environment: Mapping[str, str]) -> ListenerAuth:
    """Return the credentials of the admin listener; raise `KmsConfigError` if it needs one and none is configured."""
    credentials = None
    if not admin.insecure_no_auth:
        token = admin.auth_token.strip() or _from(environment, ADMIN_VARIABLES)
        credentials = Credentials.of([token], admin.htpasswd_file, "core.admin.htpasswd_file")
        if not credentials.are_configured:
            raise KmsConfigError(
                "admin API is enabled but neither auth_token nor htpasswd_file is configured; set "
                "core.admin.auth_token, DSTACK_KMS_ADMIN_TOKEN, ADMIN_API_TOKEN, core.admin.htpasswd_file, or "
                "insecure_no_auth = true (testing only)"
            )
    return ListenerAuth("admin", "dstack-kms admin", "X-Admin-Token", credentials)


def onboard_auth(onboard: OnboardConfig, environment: Mapping[str, str]) -> ListenerAuth:
    """Return the credentials of the onboarding listener; raise `KmsConfigError` if its file cannot be used."""
    token = onboard.auth_token or _from(environment, ONBOARD_VARIABLES)
    credentials = Credentials.of([token], onboard.htpasswd_file, "core.onboard.htpasswd_file")
    return ListenerAuth(
        "onboard",
        "dstack-kms onboard",
        "X-Onboard-Token",
        credentials if credentials.are_configured else None,
        takes_query=True,
    )


@dataclass(frozen=True, slots=True)
class KmsAuth:
    """The credentials that each listener of one KMS accepts."""

    admin: ListenerAuth
    onboard: ListenerAuth

    @classmethod
    def of(cls, core: Core, environment: Mapping[str, str], release: Release) -> Self:
        """Read the credentials from configuration and environment; raise `KmsConfigError` if one cannot be used.

        An admin listener that is switched off needs no credential. In releases without a credential for onboarding, its
        variable has no effect.
        """
        admin = core.admin if core.admin.enabled else AdminSection(insecure_no_auth=True)
        return cls(
            admin_auth(admin, environment), onboard_auth(core.onboard, environment if release.onboard_token else {})
        )


def _from(environment: Mapping[str, str], names: Sequence[str]) -> str:
    """Return the value of the first of these variables that is set, even if the value is empty."""
    return next((environment[name] for name in names if name in environment), "")
