"""Raw HTTP that the real programs were sent, and what they answered: the rows `http-edge` of the recorded calls.

Requests whose bytes were too many to be recorded are made again, to the byte count that was.
"""

import re
from dataclasses import dataclass
from typing import Any, Final

from tests.recorded import golden

REFUSED_ON_PURPOSE: Final = ("both_cl_te",)
"""The real programs answer these with 200; here they are refused, as nothing that could be smuggled is let through."""

UNANSWERED: Final = ("short_body_then_close",)

_KMS: Final = (
    b"POST /prpc/KMS.GetAppEnvEncryptPubKey?json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    b"%bContent-Length: 53\r\n\r\n"
    b'{"app_id":"1111111111111111111111111111111111111111"}'
)
_AGENT: Final = (
    b'POST /GetKey?json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%bContent-Length: 12\r\n\r\n{"path":"a"}'
)
_MORE_HEADERS: Final = {
    "big_header": b"X-Big: %b\r\n" % (b"a" * 500_000),
    "many_headers": b"".join(b"X-%d: a\r\n" % number for number in range(150)),
}


@dataclass(frozen=True, slots=True)
class EdgeRow:
    """One request in bytes, and the statuses of its answers in order; none if the real program did not answer."""

    name: str
    request: bytes
    statuses: tuple[int, ...]
    content_type: str | None

    @property
    def is_json(self) -> bool:
        """Whether the last answer is JSON, and then of a call that succeeded."""
        return self.content_type == "application/json"


def edge_rows(server: str) -> list[EdgeRow]:
    """Return the rows of one server: `kms-tls` or `agent-unix`."""
    return [_row(row, _KMS if server == "kms-tls" else _AGENT) for row in golden("wire.json") if _is_of(row, server)]


def _is_of(row: dict[str, Any], server: str) -> bool:
    return bool(row["component"] == f"http-edge {server}")


def _row(row: dict[str, Any], template: bytes) -> EdgeRow:
    name, answer = row["name"], row["response"]
    request = row["raw_request"].encode()
    if (omitted := re.fullmatch(rb"<(\d+) bytes>", request)) is not None:
        request = template % _MORE_HEADERS[name]
        assert len(request) == int(omitted[1]), (name, len(request))
    if answer is None:
        return EdgeRow(name, request, (), None)
    more = re.findall(r"HTTP/1\.1 (\d+)", answer["body"])
    statuses = (answer["status"], *map(int, more))
    kind = answer["headers"].get("content-type")
    if name == "expect_100":  # the recorded headers are those of 100
        kind = "application/json"
    return EdgeRow(name, request, statuses, kind)
