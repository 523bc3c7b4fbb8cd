"""`dstack-emu agent`: a trust domain with its guest agent."""

import argparse
import asyncio
import json
from pathlib import Path

from dstack_emu.attest.errors import FormatError
from dstack_emu.cli.commands.common import WARNING, UsageError, listen_address, run_server, say, stop_on_signals
from dstack_emu.cli.commands.guest_options import (
    add_encrypted_env,
    add_guest_options,
    add_vendor_options,
    encrypted_env,
    guest_config,
    load_key_file,
    platform_state,
    vendor_state,
)
from dstack_emu.cli.commands.production import require_emulated
from dstack_emu.deployment.guest_config import GuestConfig
from dstack_emu.deployment.standalone_guest import ListenOptions, StandaloneGuest

DESCRIPTION = (
    "Run the guest agent of one emulated trust domain, on dstack.sock, tappd.sock and one TCP port that serves all "
    "its services, so DSTACK_SIMULATOR_ENDPOINT and TAPPD_SIMULATOR_ENDPOINT may be the sockets or the URL. The app "
    "has generated keys, or those of a file; for keys from a KMS use `dstack-emu boot`. " + WARNING
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_listener_options(parser)
    parser.add_argument(
        "--keys",
        type=Path,
        metavar="FILE",
        help="use the keys in upstream's key file (appkeys.json) instead of generated ones",
    )
    parser.add_argument(
        "--key-provider",
        choices=("none", "local-sgx"),
        default="none",
        help="the key provider that the agent reports for generated keys; the KMS of `up` have local-sgx (%(default)s)",
    )
    add_guest_options(parser)
    add_vendor_options(parser)


def add_listener_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of an agent's listeners and behaviour."""
    parser.add_argument(
        "--listen",
        type=listen_address,
        default=("127.0.0.1", 0),
        metavar="HOST:PORT",
        help="address of the TCP port (127.0.0.1, a free port)",
    )
    parser.add_argument(
        "--dstack-sock", type=Path, metavar="PATH", help="path of dstack.sock (default: in a new folder)"
    )
    parser.add_argument("--tappd-sock", type=Path, metavar="PATH", help="path of tappd.sock")
    parser.add_argument("--grpc", type=listen_address, metavar="HOST:PORT", help="also serve gRPC here")
    parser.add_argument("--grpc-sock", type=Path, metavar="PATH", help="also serve gRPC on this socket")
    parser.add_argument(
        "--pccs", metavar="URL", help="the PCCS that serves collateral for its quotes (default: start one)"
    )
    add_encrypted_env(parser)
    parser.add_argument("--upstream-compat", action="store_true", help="refuse EmitEvent as upstream's simulator does")
    parser.add_argument("--json", action="store_true", help="print one line of JSON when ready, no more on stdout")


def run(arguments: argparse.Namespace) -> int:
    """Run the agent until a signal."""
    try:
        platform, vendor = platform_state(arguments), vendor_state(arguments)
    except FormatError as error:
        raise UsageError(str(error)) from error
    config = guest_config(
        arguments,
        platform_state=platform,
        vendor_state=vendor,
        key_file=load_key_file(arguments.keys),
        key_provider=arguments.key_provider,
        allow_emit_event=not arguments.upstream_compat,
        encrypted_env=encrypted_env(arguments.encrypted_env),
    )
    return serve_guest(config, arguments)


def serve_guest(config: GuestConfig, arguments: argparse.Namespace) -> int:
    """Run a guest's agent, on the listeners of the options, until a signal."""
    require_emulated(None, arguments.pccs or "", "it knows no platform of the emulated Intel")
    host, port = arguments.listen
    listen = ListenOptions(host, port, arguments.dstack_sock, arguments.tappd_sock, arguments.grpc, arguments.grpc_sock)
    guest = StandaloneGuest(config, listen, pccs_url=arguments.pccs, progress=say)
    has_grpc = listen.grpc is not None or listen.grpc_sock is not None
    return run_server(_serve(guest, as_json=arguments.json), has_grpc=has_grpc)


async def _serve(guest: StandaloneGuest, *, as_json: bool) -> int:
    stop = stop_on_signals()
    starting, stopping = asyncio.create_task(guest.__aenter__()), asyncio.create_task(stop.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():  # the guest still waits for a KMS
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return 0
    try:
        starting.result()
    except FormatError as error:  # about options that only the boot can verify, such as the memory size
        raise UsageError(str(error)) from error
    try:
        description = guest.description()
        if as_json:
            print(json.dumps(description), flush=True)
        else:
            env = description.pop("env")
            lines = [f"{name:<14} {value}" for name, value in description.items()]
            lines += ["", *(f"export {name}={value}" for name, value in env.items()), "", "Ctrl-C stops it."]
            print("\n".join(lines), flush=True)
        await stopping
    finally:
        await guest.__aexit__(None, None, None)
    return 0
