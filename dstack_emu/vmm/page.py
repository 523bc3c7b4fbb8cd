"""The list of machines for people: state, ports and links to the logs. It has no script and loads nothing."""

from html import escape
from typing import Final
from urllib.parse import quote

from dstack_emu.vmm.fleet import Fleet
from dstack_emu.vmm.logs import CHANNELS
from dstack_emu.vmm.vm import Vm

CONTENT_SECURITY_POLICY: Final = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def machines_page(fleet: Fleet) -> str:
    """Return the page (HTML)."""
    title = escape(f"{fleet.config.node_name or 'VMM'} (EMULATED)")
    rows = "".join(_row(vm) for vm in fleet.ordered()) or '<tr><td colspan="7">there is no machine</td></tr>'
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>\n'
        f"<body><h1>{title}</h1><p>The machines protect nothing.</p>\n<table>\n"
        "<tr><th>name</th><th>id</th><th>app id</th><th>status</th><th>boot</th><th>ports</th><th>logs</th></tr>\n"
        f"{rows}</table></body></html>\n"
    )


def _row(vm: Vm) -> str:
    manifest = vm.manifest
    ports = ", ".join(f"{port} to {port.vm_port}" for port in manifest.port_map)
    boot = f"{vm.boot_progress}: {vm.boot_error}" if vm.boot_error else vm.boot_progress
    logs = " ".join(f'<a href="/logs?id={quote(vm.id)}&amp;ch={channel}">{channel}</a>' for channel in CHANNELS)
    cells = (manifest.name, vm.id, manifest.app_id, vm.status, boot, ports)
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}<td>{logs}</td></tr>\n"
