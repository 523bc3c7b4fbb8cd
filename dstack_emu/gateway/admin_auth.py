"""Which credentials the admin listener accepts. Source: dstack `gateway/src/admin_auth.rs` at 312dc605.

In 0.5.11 whoever reaches the listener is an operator.
"""

from collections.abc import Mapping
from typing import Final

from dstack_emu.attest.release import Release
from dstack_emu.gateway.config import AdminSection
from dstack_emu.gateway.errors import GatewayConfigError
from dstack_emu.transport.api_auth import Credentials, ListenerAuth

VARIABLES: Final = ("DSTACK_GATEWAY_ADMIN_TOKEN", "ADMIN_API_TOKEN")


def admin_auth(admin: AdminSection, environment: Mapping[str, str], release: Release) -> ListenerAuth:
    """Return the credentials of the listener; raise `GatewayConfigError` if it needs one and none is configured."""
    credentials = None
    if admin.enabled and release.gateway_admin_needs_credential and not admin.insecure_no_auth:
        token = admin.auth_token or next((environment[name] for name in VARIABLES if name in environment), "")
        credentials = Credentials.of([token], admin.htpasswd_file, "core.admin.htpasswd_file")
        if not credentials.are_configured:
            raise GatewayConfigError(
                "admin API is enabled but neither auth_token nor htpasswd_file is configured; set "
                f"core.admin.auth_token, {', '.join(VARIABLES)}, core.admin.htpasswd_file, or insecure_no_auth = true "
                "(testing only)"
            )
    return ListenerAuth("gateway-admin", "dstack-gateway admin", "X-Admin-Token", credentials, takes_query=True)
