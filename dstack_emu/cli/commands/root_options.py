"""The options that name the root certificate of verification: `--seed`, `--root`, `--intel`."""

import argparse
from pathlib import Path
from typing import Final

from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.cli.commands.common import UsageError
from dstack_emu.cli.commands.production import require_emulated
from dstack_emu.cli.terminal import printable
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import DEFAULT_SEED, Seed
from dstack_emu.transport.errors import ConfigError
from dstack_emu.transport.trust_root import read_root

REAL_EVIDENCE: Final = "evidence of real hardware is verified with --intel alone"

NamedAnchor = tuple[TrustAnchor, str]
"""A trust anchor, and its name in messages."""


def add_root(parser: argparse.ArgumentParser) -> None:
    """Add the options, of which one may be given."""
    root = parser.add_mutually_exclusive_group()
    root.add_argument("--seed", metavar="TEXT", help=f"trust the emulated root of this seed ({DEFAULT_SEED})")
    root.add_argument("--root", type=Path, metavar="FILE", help="trust the root certificate in this file, PEM or DER")
    root.add_argument("--intel", action="store_true", help="trust Intel's production root")


def chosen_root(arguments: argparse.Namespace) -> NamedAnchor | None:
    """Return the root that an option names, None if none does; raise `UsageError`."""
    if arguments.intel:
        return TrustAnchor.intel(), "Intel's production root"
    if arguments.root is not None:
        return _in_file(arguments.root)
    return None if arguments.seed is None else _of_seed(arguments.seed)


def default_root() -> NamedAnchor:
    """Return the emulated root of the default seed."""
    return _of_seed(DEFAULT_SEED)


def _of_seed(seed: str) -> NamedAnchor:
    return TrustAnchor.of(Intel(Seed.of(seed)).root), f"the emulated root of seed {seed!r}"


def _in_file(path: Path) -> NamedAnchor:
    try:
        certificate = read_root(path)
    except ConfigError as error:
        raise UsageError(printable(str(error))) from error
    anchor = TrustAnchor.of(certificate)
    require_emulated(anchor, "", f"{REAL_EVIDENCE}, not with --root {path}")
    return anchor, f"the root in {path}"
