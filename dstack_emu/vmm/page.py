"""The list of machines for people: state, ports and links to the logs. It has no script and loads nothing."""

from urllib.parse import quote

from dstack_emu.transport.html import Markup, page, table
from dstack_emu.vmm.fleet import Fleet
from dstack_emu.vmm.logs import CHANNELS
from dstack_emu.vmm.vm import Vm

_COLUMNS = ("name", "id", "app id", "status", "boot", "ports", "logs")


def machines_page(fleet: Fleet) -> str:
    """Return the page (HTML)."""
    return page(
        f"{fleet.config.node_name or 'VMM'} (EMULATED)",
        "dstack VMM",
        "<p>The machines protect nothing.</p>\n",
        table("Machines", _COLUMNS, (_row(vm) for vm in fleet.ordered()), "there is no machine"),
    )


def _row(vm: Vm) -> tuple[str, ...]:
    manifest = vm.manifest
    ports = ", ".join(f"{port} to {port.vm_port}" for port in manifest.port_map)
    boot = f"{vm.boot_progress}: {vm.boot_error}" if vm.boot_error else vm.boot_progress
    logs = " ".join(f'<a href="/logs?id={quote(vm.id)}&amp;ch={channel}">{channel}</a>' for channel in CHANNELS)
    return manifest.name, vm.id, manifest.app_id, vm.status, boot, ports, Markup(logs)
