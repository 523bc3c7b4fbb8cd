"""What `ctl policy allow` and `deny` change: a trust domain of the stack, an app-compose.json, an app id, or evidence.

Nothing in evidence is verified here: the user must know where it came from.
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any, Final

from dstack_emu.attest.app_compose import read_document
from dstack_emu.attest.app_info import APP_ID_SIZE, decode_app_info
from dstack_emu.attest.errors import FormatError
from dstack_emu.cli.commands.common import UsageError, hex_bytes
from dstack_emu.cli.commands.inspect import identify, read_bytes
from dstack_emu.cli.terminal import printable

_EXPECTED: Final = (
    "the name of a trust domain expected, such as app or kms-dst, or --app-compose, --app-id or --evidence"
)


def add_subject(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--app-compose", type=Path, metavar="FILE", help="the app of this app-compose.json, by the hash of its bytes"
    )
    parser.add_argument(
        "--app-id",
        type=_app_id,
        metavar="HEX",
        help="the app's id, 20 bytes (with --app-compose: its first 20 hash bytes); `deny` needs no more",
    )
    parser.add_argument(
        "--evidence", metavar="FILE", help="the app that this evidence names, in any form that `inspect` reads"
    )
    parser.add_argument("--as-kms", action="store_true", help="with --evidence: it is that of a KMS")


def subject(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the members of the request to the control API; raise `UsageError`."""
    ways = [arguments.what, arguments.app_compose or arguments.app_id, arguments.evidence]
    if sum(way is not None for way in ways) != 1:
        raise UsageError(f"ctl policy {arguments.verb}: {_EXPECTED}")
    if arguments.as_kms and arguments.evidence is None:
        raise UsageError("ctl policy: --as-kms is about evidence: --evidence FILE expected")
    if arguments.what is not None:
        return {"guest": arguments.what}
    if arguments.this_device_only:
        raise UsageError("ctl policy: --this-device-only is about a trust domain of the stack, whose device is known")
    if arguments.evidence is not None:
        return _of_evidence(arguments.evidence, is_kms=arguments.as_kms)
    return _of_app(arguments)


def _of_app(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.app_compose is None:
        if arguments.verb == "allow":
            raise UsageError(
                "ctl policy allow: --app-compose FILE expected with --app-id: an app has a compose hash, too"
            )
        return {"app_id": arguments.app_id.hex()}
    name = printable(str(arguments.app_compose))
    try:
        data = arguments.app_compose.read_bytes()
        read_document(data.decode())  # another file, such as docker-compose.yaml, would allow an app that no guest has
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}") from error
    except (FormatError, UnicodeDecodeError) as error:
        raise UsageError(f"app-compose {name}: {str(error).removeprefix('app-compose: ')}") from error
    digest = hashlib.sha256(data).digest()
    app_id = arguments.app_id or digest[:APP_ID_SIZE]
    return {"app_id": app_id.hex(), "compose_hash": digest.hex()}


def _of_evidence(name: str, *, is_kms: bool) -> dict[str, Any]:
    found = identify(name, read_bytes(name))
    attestation = found.evidence.attestation if found.evidence else None
    if attestation is None or not attestation.config:
        missing = "an event log" if attestation is None else "a VM config"
        raise UsageError(
            printable(f"{name}: {found.what}: evidence with {missing} expected, such as a GetQuote answer")
        )
    try:
        info = decode_app_info(attestation)
    except FormatError as error:
        raise UsageError(printable(f"{name}: {error}")) from error
    image = {"os_image_hash": info.os_image_hash.hex()}
    if is_kms:
        return {"mr_aggregated": info.mr_aggregated.hex(), **image}
    return {"app_id": info.app_id.hex(), "compose_hash": info.compose_hash.hex(), **image}


def _app_id(text: str) -> bytes:
    data = hex_bytes(text)
    if len(data) != APP_ID_SIZE:
        raise argparse.ArgumentTypeError(f"{APP_ID_SIZE} bytes expected, got {len(data)}")
    return data
