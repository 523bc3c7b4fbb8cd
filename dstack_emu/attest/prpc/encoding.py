"""Which encoding a call uses, what its method is called without the service's prefix, and the body of an error."""

import json
from typing import Final
from urllib.parse import unquote_plus

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.proto.prpc_pb2 import PrpcError

JSON_TYPE: Final = "application/json"
BINARY_TYPE: Final = "application/octet-stream"
MAX_PAIRS: Final = 1024
"""The maximum number of parameters in a query; a call has at most a dozen, and one for each alternative name."""


def wants_json(method: str, query: str, content_type: str | None = None) -> bool:
    """Return whether a call is answered in JSON; `method` is the HTTP verb, `query` the undecoded query string.

    Pass the request's Content-Type for the call itself. Leave it out for an error raised before the call is
    dispatched (a bad client certificate, an oversized body): there upstream looks at verb and query only.
    """
    if method == "GET" or _json_flag(query):
        return True
    return content_type is not None and content_type.partition(";")[0].strip().lower() == JSON_TYPE


def _json_flag(query: str) -> bool:
    """Return whether the query has `json` bare, empty, as `true` or as `1`. The first occurrence decides."""
    if query == "json":
        return True
    for piece in query.split("&", MAX_PAIRS)[:MAX_PAIRS] if query else ():
        name, _, value = piece.partition("=")
        if unquote_plus(name) == "json":
            return unquote_plus(value) in ("", "true", "1")
    return False


def require_few_pairs(query: str) -> None:
    """Raise `FormatError` if a query has more than MAX_PAIRS parameters."""
    count = query.count("&") + 1
    if count > MAX_PAIRS:
        raise FormatError(f"at most {MAX_PAIRS} parameters expected in the query, got {count}")


def trim_prefix(name: str, prefix: str) -> str:
    """Remove `prefix` from the start of `name` as often as it occurs there."""
    if not prefix or not name.startswith(prefix):
        return name
    # Compared by ever longer, then ever shorter runs of it: a name may be megabytes of nothing else.
    run, at = prefix, 0
    while name.startswith(run, at):
        at += len(run)
        run += run
    while len(run) > len(prefix):
        run = run[: len(run) // 2]
        if name.startswith(run, at):
            at += len(run)
    return name[at:]


def error_body(text: str, as_json: bool) -> bytes:
    """Encode the body of an HTTP 400. JSON is indented, unlike an answer, and ASCII like one."""
    # A name out of a URL may hold a lone surrogate, which no UTF-8 can carry.
    text = text.encode("utf-8", "replace").decode()
    if as_json:
        return json.dumps({"error": text}, indent=2).encode()
    return PrpcError(message=text).SerializeToString()
