"""The pRPC codec: how a message becomes the body of an HTTP request or answer, and back.

Three encodings carry the same messages: JSON, the query string of a GET, and raw protobuf. The JSON is not
protobuf's own JSON mapping but what serde makes of the fields: snake_case names, hex for bytes, plain numbers
for 64 bits, every field present. Decoding is as strict as the parsers it stands for (serde_json, serde_qs,
prost): what they refuse is refused here, though in our words where theirs only name a position.

Not here: HTTP itself (dstack_emu/transport/prpc_server.py), the services, and any meaning of a field.

Source of truth: Dstack-TEE/dstack, branch next at 312dc605, dstack/ra-rpc/src/{lib,rocket_helper}.rs,
dstack/guest-agent/rpc/build.rs and crate prpc 0.6; recorded answers of the real programs.
"""

from dstack_emu.attest.prpc.binary import decode_binary, encode_binary
from dstack_emu.attest.prpc.encoding import (
    BINARY_TYPE,
    JSON_TYPE,
    MAX_PAIRS,
    error_body,
    require_few_pairs,
    trim_prefix,
    wants_json,
)
from dstack_emu.attest.prpc.ignored import Ignored, IgnoredMember
from dstack_emu.attest.prpc.json import decode_json, encode_json
from dstack_emu.attest.prpc.query import decode_query

__all__ = [
    "BINARY_TYPE",
    "JSON_TYPE",
    "MAX_PAIRS",
    "Ignored",
    "IgnoredMember",
    "decode_binary",
    "decode_json",
    "decode_query",
    "encode_binary",
    "encode_json",
    "error_body",
    "require_few_pairs",
    "trim_prefix",
    "wants_json",
]
