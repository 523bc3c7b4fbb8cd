"""Options of `agent`, `boot` and `quote` that describe a guest: platform, VM, app, and the vendor's state."""

import argparse
import re
import time
from pathlib import Path
from typing import Any, Final, get_args

from dstack_emu.attest.app_compose import AppManifest
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.release import Release
from dstack_emu.cli.commands.common import UsageError, add_release, hex_bytes
from dstack_emu.deployment.guest_config import DEFAULT_NAME, GuestConfig, VirtualMachine
from dstack_emu.simulator.guest_files import KeyFile, load_encrypted_env, load_vm_config, read_text_file
from dstack_emu.simulator.platform import PART_STATUSES, TCB_STATUSES, PlatformState
from dstack_emu.simulator.seed import DEFAULT_SEED
from dstack_emu.simulator.trust_domain import AppCompose, DomainSettings
from dstack_emu.simulator.vendor_state import Dating, Validity, VendorState, validity_of_issue

_UNITS: Final = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_MAX_MEMORY: Final = 1 << 52  # bytes that x86-64 can address physically
_MAX_CPUS: Final = 4096  # QEMU's own limit for a machine of this kind


def memory_size(text: str) -> int:
    """Read a size in bytes, or with a unit: 2G, 4096M."""
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"a size like 2G, 4096M or bytes expected, got {text!r}")
    size = int(match[1]) * _UNITS[match[2].upper()]
    if size > _MAX_MEMORY:
        raise argparse.ArgumentTypeError(f"at most {_MAX_MEMORY >> 40}T expected, got {text!r}")
    return size


def cpu_count(text: str) -> int:
    """Read a number of CPUs, at least one."""
    if not text.isdecimal() or not 1 <= int(text) <= _MAX_CPUS:
        raise argparse.ArgumentTypeError(f"a number of CPUs from 1 to {_MAX_CPUS} expected, got {text!r}")
    return int(text)


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Add --seed, the same for every command that derives something from a seed."""
    parser.add_argument(
        "--seed",
        default=DEFAULT_SEED,
        metavar="TEXT",
        help="the text from which all keys and ids are derived (%(default)s)",
    )


def add_guest_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe a guest."""
    add_seed(parser)
    add_release(parser, "the dstack release of the guest")
    guest = parser.add_argument_group("the guest")
    guest.add_argument(
        "--name", metavar="NAME", help=f"the app's name, if its app-compose is generated ({DEFAULT_NAME})"
    )
    guest.add_argument(
        "--platform",
        metavar="NAME",
        help="the platform; each name has its own device id (default: `host of ` and the app's name)",
    )
    guest.add_argument(
        "--app-compose", type=Path, metavar="FILE", help="the app's app-compose.json (default: a generated one)"
    )
    guest.add_argument(
        "--user-config",
        type=Path,
        metavar="FILE",
        help="the app's user_config, which may contain its launch token (default: none)",
    )
    guest.add_argument(
        "--app-id",
        type=hex_bytes,
        metavar="HEX",
        help="the app's id, 20 bytes (default: the first 20 of the compose hash)",
    )
    guest.add_argument(
        "--instance", default="", metavar="NAME", help="another instance of the app; each name has its own instance id"
    )
    _add_machine(guest)
    _add_quote_options(guest)


def _add_machine(guest: argparse._ArgumentGroup) -> None:
    """Add the options of its OS image and its VM."""
    guest.add_argument(
        "--image", default="dstack-emu", metavar="NAME", help="name of the generated OS image (%(default)s)"
    )
    guest.add_argument(
        "--image-version", metavar="TEXT", help="version of the generated OS image (default: that of the release)"
    )
    guest.add_argument("--image-dir", type=Path, metavar="DIR", help="boot this image (see `dstack-emu image build`)")
    guest.add_argument("--cpus", type=cpu_count, default=2, metavar="N", help="CPUs of the VM (%(default)s)")
    guest.add_argument(
        "--memory",
        type=memory_size,
        default=2 * 1024**3,
        metavar="SIZE",
        help="memory of the VM: 2G, or at least 2816M (2G)",
    )
    guest.add_argument(
        "--sys-config", type=Path, metavar="FILE", help="a sys-config.json whose vm_config replaces these options"
    )


def _add_quote_options(guest: argparse._ArgumentGroup) -> None:
    """Add the options that a quote shows."""
    guest.add_argument("--debug", action="store_true", help="a debug trust domain, which every verifier refuses")
    guest.add_argument(
        "--mr-config-id",
        type=hex_bytes,
        metavar="HEX",
        help="the mr_config_id with which the trust domain is started, 48 bytes",
    )
    guest.add_argument(
        "--quote-version", type=int, choices=(4, 5), default=4, help="version of the quotes (%(default)s)"
    )
    guest.add_argument("--td15", action="store_true", help="quote the TD 1.5 report; needs --quote-version 5")
    guest.add_argument(
        "--other-root",
        action="store_true",
        help="a platform whose quotes are signed under another root, which no verifier of the stack trusts",
    )


def add_vendor_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the platform's and the vendor's state."""
    vendor = parser.add_argument_group("the state of the platform and its emulated vendor")
    statuses, parts = ", ".join(TCB_STATUSES), ", ".join(PART_STATUSES)
    vendor.add_argument(
        "--tcb-status", default="UpToDate", metavar="STATUS", help=f"TCB status of the platform (UpToDate): {statuses}"
    )
    vendor.add_argument(
        "--advisory", action="append", default=[], metavar="ID", help="an advisory id for that status; may be repeated"
    )
    vendor.add_argument(
        "--module-status",
        default="UpToDate",
        metavar="STATUS",
        help=f"TCB status of the TDX module (UpToDate): {parts}",
    )
    vendor.add_argument(
        "--module-advisory",
        action="append",
        default=[],
        metavar="ID",
        help="an advisory id for that status; may be repeated",
    )
    vendor.add_argument(
        "--qe-status",
        default="UpToDate",
        metavar="STATUS",
        help=f"TCB status of the quoting enclave (UpToDate): {parts}",
    )
    vendor.add_argument(
        "--qe-advisory",
        action="append",
        default=[],
        metavar="ID",
        help="an advisory id for that status; may be repeated",
    )
    vendor.add_argument(
        "--revoke",
        action="append",
        default=[],
        choices=("pck", "pck-ca"),
        help="revoke the platform's certificate, or its CA",
    )
    add_collateral_issued(vendor)
    for document in ("tcb-info", "qe-identity", "pck-crl", "root-ca-crl"):
        vendor.add_argument(
            f"--{document}",
            choices=get_args(Dating),
            default="current",
            help=f"validity of the {document} (%(default)s)",
        )


def add_collateral_issued(parser: argparse._ActionsContainer) -> None:
    """Add --collateral-issued, for the commands that serve collateral."""
    parser.add_argument(
        "--collateral-issued",
        metavar="DATE",
        help="the day on which the collateral was issued, which expires 30 days later as Intel's does: 2026-06-01, or "
        "`today` (default: collateral that is valid from 2024 to 2099)",
    )


def guest_config(arguments: argparse.Namespace, **more: Any) -> GuestConfig:
    """Make the guest's configuration from the options; raise `UsageError` that names a wrong one."""
    if arguments.td15 and arguments.quote_version != 5:
        raise UsageError(f"--td15 needs --quote-version 5, got {arguments.quote_version}")
    try:
        return GuestConfig(
            seed=arguments.seed,
            platform=arguments.platform or f"host of {arguments.name or DEFAULT_NAME}",
            compose=_compose(arguments.app_compose, arguments.name, arguments.release),
            app_id=_app_id(arguments.app_id),
            instance=arguments.instance,
            machine=VirtualMachine(
                arguments.image,
                arguments.image_version,
                arguments.cpus,
                arguments.memory,
                None if arguments.sys_config is None else load_vm_config(arguments.sys_config),
                arguments.image_dir,
            ),
            settings=DomainSettings(
                arguments.debug,
                arguments.mr_config_id,
                arguments.quote_version,
                arguments.td15,
            ),
            user_config=None if arguments.user_config is None else read_text_file(arguments.user_config, "user-config"),
            release=arguments.release,
            **more,
        )
    except FormatError as error:
        raise UsageError(str(error)) from error


def platform_state(arguments: argparse.Namespace) -> PlatformState:
    """Return the platform's state that the options describe."""
    return PlatformState(
        tcb_status=arguments.tcb_status,
        advisory_ids=tuple(arguments.advisory),
        module_status=arguments.module_status,
        module_advisory_ids=tuple(arguments.module_advisory),
        pck_revoked="pck" in arguments.revoke,
        other_root=getattr(arguments, "other_root", False),
    )


def vendor_state(arguments: argparse.Namespace) -> VendorState:
    """Return the vendor's state that the options describe; raise `FormatError`."""
    issued: Dating | Validity = "current"
    if arguments.collateral_issued is not None:
        issued = validity_of_issue(arguments.collateral_issued, time.time())

    def dating(given: Dating) -> Dating | Validity:
        return issued if given == "current" else given

    return VendorState(
        qe_status=arguments.qe_status,
        qe_advisory_ids=tuple(arguments.qe_advisory),
        pck_ca_revoked="pck-ca" in arguments.revoke,
        tcb_info_dating=dating(arguments.tcb_info),
        qe_identity_dating=dating(arguments.qe_identity),
        pck_crl_dating=dating(arguments.pck_crl),
        root_ca_crl_dating=dating(arguments.root_ca_crl),
    )


def add_encrypted_env(parser: argparse.ArgumentParser) -> None:
    """Add --encrypted-env, for the commands whose guest gets keys."""
    parser.add_argument(
        "--encrypted-env",
        type=Path,
        metavar="FILE",
        help="the encrypted environment of the deployment, as bytes or hex: decrypted into `decrypted_env`",
    )


def encrypted_env(path: Path | None) -> bytes:
    """Load the encrypted environment, if one is given."""
    try:
        return b"" if path is None else load_encrypted_env(path)
    except FormatError as error:
        raise UsageError(str(error)) from error


def load_key_file(path: Path | None) -> KeyFile | None:
    """Load upstream's key file, if one is given."""
    try:
        return None if path is None else KeyFile.load(path)
    except FormatError as error:
        raise UsageError(str(error)) from error


def _compose(path: Path | None, name: str | None, release: Release) -> AppCompose:
    if path is None:
        return AppCompose.named(DEFAULT_NAME if name is None else name)
    if name is not None:
        raise UsageError("--name is for a generated app-compose: with --app-compose, the name is in the file")
    compose = AppCompose(read_text_file(path, "app-compose"))
    AppManifest.parse(compose.text, release)  # an invalid file is reported before anything runs
    return compose


def _app_id(app_id: bytes | None) -> bytes | None:
    if app_id is not None and len(app_id) != 20:
        raise UsageError(f"--app-id: 20 bytes expected, got {len(app_id)}")
    return app_id
