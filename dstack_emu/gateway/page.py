"""The page of the admin listener: nodes and instances for people. It has no script and loads nothing."""

from html import escape
from typing import Final

from dstack_emu.gateway.gateway import Gateway

CONTENT_SECURITY_POLICY: Final = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def dashboard(gateway: Gateway) -> str:
    """Return the page (HTML)."""
    domain, port = gateway.base_domain()
    where = escape(f"*.{domain}, port {port}" if domain else "no domain is configured")
    title = f"dstack gateway {gateway.node_id} (EMULATED)"
    rows = "".join(_row(gateway, id_) for id_ in sorted(gateway.records.instances))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>\n'
        f"<body><h1>{title}</h1><p>There is no WireGuard tunnel, and nothing is protected.</p>\n"
        f"<p>Domain: {where}. Connections: {gateway.connections.total}.</p>\n<table>\n"
        "<tr><th>instance id</th><th>app id</th><th>address</th><th>last handshake</th><th>connections</th></tr>\n"
        f"{rows or '<tr><td colspan=5>no instance is registered</td></tr>'}</table></body></html>\n"
    )


def _row(gateway: Gateway, instance_id: str) -> str:
    entry = gateway.records.instances[instance_id]
    age = "never" if entry.handshake_at is None else f"{gateway.context.clock() - entry.handshake_at} s ago"
    cells = (instance_id, entry.app_id, entry.ip, age, str(gateway.connections.of(instance_id)))
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>\n"
