"""`dstack-emu boot`: boot an app through a KMS, as dstack-util does, and run its agent."""

import argparse
from urllib.parse import urlsplit

from dstack_emu.cli.commands.agent import add_listener_options, serve_guest
from dstack_emu.cli.commands.common import WARNING, seconds_to_wait
from dstack_emu.cli.commands.guest_options import add_guest_options, encrypted_env, guest_config
from dstack_emu.deployment.guest_config import KmsBoot
from dstack_emu.simulator.platform import PlatformState

DESCRIPTION = (
    "Boot one emulated trust domain with keys from a running KMS, as dstack-util does: it calls GetTempCaCert, makes "
    "a certificate with evidence under that CA, calls GetAppKey, and records the key provider as an event. Then run "
    "its agent with those keys, on the same listeners as `agent`; the KMS signs its certificates (SignCert). If the "
    "KMS refuses, the command prints the KMS's text and exits with status 1. --seed must be the seed of the KMS's "
    "stack: otherwise the KMS's PCCS does not know this platform, nor this guest the platform of the KMS. " + WARNING
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--kms",
        required=True,
        action="append",
        type=_kms_url,
        metavar="URL",
        help="the KMS: https://host:port; several are tried in order",
    )
    parser.add_argument(
        "--wait",
        type=seconds_to_wait,
        default=0.0,
        metavar="SECONDS",
        help="repeat calls for so long while no KMS is reachable (default: do not repeat them)",
    )
    parser.add_argument(
        "--keep-asking",
        action="store_true",
        help="listen at once, without keys, and call the KMS until it gives them, even if it refuses",
    )
    add_listener_options(parser)
    add_guest_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Boot the app and run its agent until a signal."""
    kms = KmsBoot(
        tuple(arguments.kms),
        patience=arguments.wait,
        keeps_asking=arguments.keep_asking,
    )
    config = guest_config(
        arguments,
        platform_state=PlatformState(other_root=arguments.other_root),
        kms=kms,
        allow_emit_event=not arguments.upstream_compat,
        encrypted_env=encrypted_env(arguments.encrypted_env),
    )
    return serve_guest(config, arguments)


def _kms_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = parts.scheme == "https" and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.path.strip("/") or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError(f"https://host:port expected, without a path, got {text!r:.200}")
    return text.rstrip("/")
