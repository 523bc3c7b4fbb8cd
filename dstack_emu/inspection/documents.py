"""Documents without evidence that people compare with policies: an app-compose.json, and the boot info of a KMS.

Nothing in them is proven. The compose hash is over the bytes of the file, so it is made of exactly these bytes.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Final

from dstack_emu.attest.app_compose import AppManifest
from dstack_emu.attest.app_info import APP_ID_SIZE
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.release import DEFAULT
from dstack_emu.inspection.description import Description, load_json

Described = tuple[str, Description]
"""What a document is, and its description."""

SHORT: Final = 200
"""Characters of a text in an app-compose above which its size and its SHA-256 are shown instead."""
LONG: Final = 4096
"""The same in a boot info, whose `keyProviderInfo` may be long."""

_MARKS: Final = (b'"manifest_version"', b'"mrAggregated"')
_RUNS: Final = frozenset(("runner", "docker_compose_file", "bash_script"))


def describe_document(data: bytes) -> Described | None:
    """Describe an app-compose or a boot info, as text in JSON; return None if it is neither."""
    if not any(mark in data for mark in _MARKS):
        return None  # without parsing it
    try:
        document = load_json(data.decode("utf-8-sig"))
    except (FormatError, UnicodeDecodeError):
        return None
    if not isinstance(document, dict):
        return None
    return _app_compose(data, document) or _boot_info(document)


def app_compose_hash(data: bytes) -> bytes | None:
    """Return the SHA-256 of an app-compose.json, 32 bytes; None if the bytes are none."""
    described = describe_document(data)
    return None if described is None else described[1].get("compose_hash")


def _app_compose(data: bytes, document: Mapping[str, Any]) -> Described | None:
    if "manifest_version" not in document or not _RUNS & document.keys():
        return None
    digest = hashlib.sha256(data).digest()
    shown: Description = {"compose_hash": digest, "app_id_by_default": digest[:APP_ID_SIZE]}
    try:
        AppManifest.parse(data.decode(), DEFAULT)
    except FormatError as error:
        shown["refused_by_guests"] = f"of dstack {DEFAULT.name}: {error}"
    return "app-compose", shown | {"app_compose": _shortened(document, SHORT)}


def _shortened(value: Any, most: int) -> Any:
    """Return a member as it is shown: long texts, such as a compose file, and keys by size and SHA-256."""
    if isinstance(value, dict):
        return {name: _shortened(each, most) for name, each in value.items()}
    if isinstance(value, list):
        return [_shortened(each, most) for each in value]
    if not isinstance(value, str) or (len(value) <= most and "-----BEGIN " not in value):
        return value
    octets = value.encode(errors="replace")
    return f"{len(octets)} bytes, SHA-256 {hashlib.sha256(octets).hexdigest()}"


def _boot_info(document: Mapping[str, Any]) -> Described | None:
    details = document.get("details")
    found = details.get("boot_info") if isinstance(details, Mapping) else document
    if not isinstance(found, dict) or not {"mrAggregated", "osImageHash"} <= found.keys():
        return None
    return "boot info", {"boot_info": _shortened(found, LONG)}
