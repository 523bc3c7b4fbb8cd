"""`dstack-emu verifier`: run the verifier as a service, or verify one file."""

import argparse
import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from dstack_emu.attest.errors import AttestError, FormatError
from dstack_emu.attest.release import Release
from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.cli.commands.collateral_options import PCCS
from dstack_emu.cli.commands.common import WARNING, UsageError, add_release, listen_address, say, stop_on_signals
from dstack_emu.cli.commands.production import require_emulated
from dstack_emu.cli.commands.root_options import REAL_EVIDENCE, NamedAnchor, add_root, chosen_root, default_root
from dstack_emu.deployment.clock import wall_clock
from dstack_emu.transport.files import replace_file
from dstack_emu.transport.image_store import ImageStore
from dstack_emu.transport.listen import bind_tcp, serve
from dstack_emu.transport.pccs_client import AttestationVerifier, PccsClient
from dstack_emu.transport.ports import PORTS
from dstack_emu.transport.trust_root import trust_anchor
from dstack_emu.verifier.config import VARIABLES, VerifierConfig
from dstack_emu.verifier.server import verifier_app
from dstack_emu.verifier.service import (
    InputError,
    RequestSyntaxError,
    RequestTooLargeError,
    RequestTypeError,
    VerificationRequest,
    VerificationResponse,
    Verifier,
)

DESCRIPTION = (
    "Serve POST /verify and GET /health, as dstack-verifier does. It verifies the quote, the runtime events, and that "
    "the registers are those of the OS image that the VM config names. Or verify one file: exit 0 if it is valid, 1 "
    f"if not. Upstream's dstack-verifier.toml and its variables ({VARIABLES}…) are read; options override "
    "both. " + WARNING
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="a dstack-verifier.toml")
    parser.add_argument(
        "--listen", type=listen_address, metavar="HOST:PORT", help=f"address (127.0.0.1:{PORTS['verifier']})"
    )
    parser.add_argument("--pccs", metavar="URL", help=f"where to fetch collateral ({PCCS})")
    add_root(parser)
    add_release(parser, "the dstack release of the verifier")
    once = parser.add_mutually_exclusive_group()
    once.add_argument(
        "--verify",
        type=Path,
        metavar="FILE",
        help="verify the request in this file (JSON, as POSTed), print the answer, write it to FILE.verification.json",
    )
    once.add_argument(
        "--verify-cert",
        type=Path,
        metavar="FILE",
        help="verify a self-signed RA-TLS certificate (PEM or DER), print what it proves, and write it to "
        "FILE.ratls-verification.json",
    )
    once.add_argument("--json", action="store_true", help="print one line of JSON when ready, no more on stdout")


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal, or verify one file."""
    config = VerifierConfig.load(arguments.config, os.environ)
    anchor, root = _anchor(arguments, config)
    pccs_url: str = arguments.pccs or config.attestation.urls.pccs or PCCS
    if not arguments.intel:
        require_emulated(anchor, pccs_url, REAL_EVIDENCE)
    verifier = _verifier(config, pccs_url, anchor, arguments.release)
    if arguments.verify is not None:
        return _verify_file(arguments.verify, verifier)
    if arguments.verify_cert is not None:
        return _verify_certificate(arguments.verify_cert, verifier)
    host, port = arguments.listen or (config.address, config.port)
    sock = bind_tcp(host, port, setting="--listen HOST:PORT")
    return asyncio.run(_serve(verifier, sock, root, arguments.json))


def _anchor(arguments: argparse.Namespace, config: VerifierConfig) -> NamedAnchor:
    """Return the root to verify under: an option's, else the file's, else the default seed's."""
    chosen = chosen_root(arguments)
    if chosen is not None and arguments.seed is None:
        return chosen
    configured = trust_anchor(config.attestation)
    if chosen is None and configured.root_ca is not None:
        return configured, f"the root in {config.attestation.root_ca.tdx}"
    return chosen or default_root()


@asynccontextmanager
async def _verifier(
    config: VerifierConfig, pccs_url: str, anchor: TrustAnchor, release: Release
) -> AsyncIterator[Verifier]:
    attestation = config.attestation
    pccs = PccsClient(pccs_url, ttl=attestation.collateral_ttl, revalidates_at_once=attestation.emulated_pccs)
    images = ImageStore(
        Path(config.image_cache_dir),
        config.image_download_url,
        float(config.image_download_timeout_secs),
        documents=release.measurement_documents,
    )
    try:
        yield Verifier(AttestationVerifier(pccs, anchor, wall_clock), images, release)
    finally:
        await images.close()
        await pccs.close()


async def _serve(verifier: AbstractAsyncContextManager[Verifier], sock: socket.socket, root: str, as_json: bool) -> int:
    stop = stop_on_signals()
    async with verifier as opened:
        server = await serve(verifier_app(opened), sock)
        try:
            if as_json:
                print(json.dumps({"url": server.url, "root": root}), flush=True)
            else:
                print(f"Verifier at {server.url}, under {root}. Ctrl-C stops it.", flush=True)
            await stop.wait()
        finally:
            await server.close()
    return 0


def _verify_file(path: Path, verifier: AbstractAsyncContextManager[Verifier]) -> int:
    """Verify a request. Print one JSON document in every case, as upstream's program does."""

    async def verify(request: VerificationRequest) -> VerificationResponse:
        async with verifier as opened:
            return await opened.verify(request)

    try:
        response = asyncio.run(verify(VerificationRequest.parse(path.read_bytes(), takes_log_as_list=True)))
        _write(path, ".verification.json", response.to_document(), "verification result")
    except OSError as error:
        response = VerificationResponse.internal_error(f"Failed to read file {path}: {error.strerror}")
    except (RequestSyntaxError, RequestTypeError, RequestTooLargeError) as error:
        response = VerificationResponse.internal_error(f"Failed to parse JSON: {error}")
    except (InputError, AttestError) as error:
        response = VerificationResponse.internal_error(str(error))
    print(json.dumps(response.to_document(), separators=(",", ":")), flush=True)
    if not response.is_valid:
        say(f"Error: {response.reason}")
    return 0 if response.is_valid else 1


def _verify_certificate(path: Path, verifier: AbstractAsyncContextManager[Verifier]) -> int:
    async def verify(certificate: bytes) -> dict[str, Any]:
        async with verifier as opened:
            return await opened.verify_certificate(certificate, wall_clock)

    try:
        found = asyncio.run(verify(path.read_bytes()))
    except OSError as error:
        raise UsageError(f"failed to read certificate {path}: {error.strerror}") from error
    _write(path, ".ratls-verification.json", found, "certificate verification result")
    print(json.dumps(found, indent=2), flush=True)
    return 0


def _write(path: Path, suffix: str, document: dict[str, Any], what: str) -> None:
    """Write an answer beside the request's file; it is written completely or not at all."""
    target = path.with_name(path.name + suffix)
    try:
        replace_file(target, (json.dumps(document, indent=2) + "\n").encode())
    except OSError as error:
        raise FormatError(f"Failed to write {what} to {target}: {error.strerror}") from error
