"""The options of a VMM for what runs in its machines."""

import argparse

from dstack_emu.deployment.config import VMM_WORKLOADS


def add_workload(parser: argparse.ArgumentParser) -> None:
    """Add --vmm-workload and --vmm-script-image."""
    parser.add_argument(
        "--vmm-workload",
        choices=VMM_WORKLOADS,
        default=VMM_WORKLOADS[0],
        help="what runs in machines of the VMM: with `docker` their containers, on this host's engine (%(default)s)",
    )
    parser.add_argument(
        "--vmm-script-image",
        metavar="IMAGE",
        help="the image in whose containers scripts of an app run (default: that of its first service)",
    )
