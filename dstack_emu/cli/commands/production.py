"""What keeps commands from real hardware: refuses Intel's root and a PCCS for real hardware, unless it is asked for."""

import argparse
from typing import TYPE_CHECKING

from dstack_emu.cli.commands.common import UsageError
from dstack_emu.transport.production import pccs_of_reality, reality_of

if TYPE_CHECKING:  # commands that verify nothing start without dcap-qvl
    from dstack_emu.attest.verify import TrustAnchor

_NAMES = (
    "Name the emulated root and PCCS: core.attestation.root_ca.tdx and core.attestation.urls.pccs, with root_ca and "
    "pccs_url of `dstack-emu agent --json`; or add --trust-production"
)


def add_trust_production(parser: argparse.ArgumentParser, consequence: str) -> None:
    """Add the option that lets a service start all the same; `consequence` says what then happens."""
    parser.add_argument(
        "--trust-production",
        action="store_true",
        help=f"start with Intel's root certificate or a PCCS for real hardware, too: {consequence}",
    )


def require_emulated_service(anchor: "TrustAnchor", pccs_url: str, where: object, why: str) -> None:
    """Refuse a service whose configuration file at `where` trusts real hardware: raise `UsageError` with `why`."""
    if real := reality_of(anchor, pccs_url):
        raise UsageError(f"{where}: {real}. {why} {_NAMES}")


def require_emulated(anchor: "TrustAnchor | None", pccs_url: str, advice: str) -> None:
    """Refuse a root (None: not asked about) and a PCCS of real hardware: raise `UsageError` with `advice`."""
    if real := pccs_of_reality(pccs_url) if anchor is None else reality_of(anchor, pccs_url):
        raise UsageError(f"{real}: {advice}")
