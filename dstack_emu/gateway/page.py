"""The page of the admin listener: nodes and instances for people. It has no script and loads nothing."""

from html import escape

from dstack_emu.gateway.gateway import Gateway
from dstack_emu.transport.html import page, table

_COLUMNS = ("instance id", "app id", "address", "last handshake", "connections")


def dashboard(gateway: Gateway) -> str:
    """Return the page (HTML)."""
    domain, port = gateway.base_domain()
    where = escape(f"*.{domain}, port {port}" if domain else "no domain is configured")
    rows = [_row(gateway, id_) for id_ in sorted(gateway.records.instances)]
    return page(
        f"dstack gateway {gateway.node_id} (EMULATED)",
        "dstack gateway",
        "<p>There is no WireGuard tunnel, and nothing is protected.</p>\n",
        f"<p>Domain: {where}. Connections: {gateway.connections.total}.</p>\n",
        table("Instances", _COLUMNS, rows, "no instance is registered"),
    )


def _row(gateway: Gateway, instance_id: str) -> tuple[str, ...]:
    entry = gateway.records.instances[instance_id]
    age = "never" if entry.handshake_at is None else f"{gateway.context.clock() - entry.handshake_at} s ago"
    return instance_id, entry.app_id, entry.ip, age, str(gateway.connections.of(instance_id))
