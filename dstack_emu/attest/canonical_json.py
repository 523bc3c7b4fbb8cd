"""The canonical form of JSON (JCS, RFC 8785): one byte string for a value, independent of order and spacing.

dstack hashes this form of version 2 events, of `requirements.gpu_policy` and of mr_config documents (upstream's crate
`serde_jcs`). Numbers are those of JavaScript: integers beyond 2^53 have no canonical form here.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import rfc8785

from dstack_emu.attest.errors import FormatError

JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"


def canonical_json(value: JsonValue) -> bytes:
    """Encode a JSON value canonically, in UTF-8; raise `FormatError` for numbers and texts without such a form."""
    try:
        return rfc8785.dumps(value)
    except (ValueError, RecursionError) as error:  # from rfc8785, and for a member name that is not text
        raise FormatError(f"canonical JSON: {error or type(error).__name__}") from error
