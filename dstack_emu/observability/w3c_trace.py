"""W3C Trace Context: the headers `traceparent` and `tracestate`, which connect spans of different programs.

A traceparent that is malformed, or that comes twice, is ignored with its tracestate; a malformed tracestate is ignored
alone. Sent is always version 00, with the two flags that are known.

Source of truth: W3C Trace Context Level 2 (https://www.w3.org/TR/trace-context-2/), sections 3.2 and 3.3.
"""

import re
from collections.abc import Sequence
from typing import Final

TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"

SAMPLED: Final = 0x01
_KNOWN_FLAGS: Final = SAMPLED | 0x02  # sampled, and that the trace id is random
MAX_MEMBERS: Final = 32
"""The maximum number of members of a tracestate."""

_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_MEMBER: Final = re.compile(
    r"[a-z0-9][a-z0-9_\-*/@]{0,255}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)


class Trace:
    """The trace that a call belongs to, and the span that is the parent of the requests of this call.

    `trace_id` has 32 hexadecimal digits, `span_id` 16. `flags` are those of the traceparent, `state` is the tracestate,
    empty if there is none.
    """

    __slots__ = ("_headers", "flags", "span_id", "state", "trace_id")

    def __init__(self, trace_id: str, span_id: str, flags: int, state: str = "") -> None:
        self.trace_id, self.span_id, self.flags, self.state = trace_id, span_id, flags, state
        self._headers: dict[str, str] | None = None

    @property
    def is_sampled(self) -> bool:
        """Whether the caller records the trace."""
        return bool(self.flags & SAMPLED)

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a request whose parent is the span."""
        if self._headers is None:
            self._headers = {TRACEPARENT: f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"}
            if self.state:
                self._headers[TRACESTATE] = self.state
        return self._headers


def read_trace(parents: Sequence[str], states: Sequence[str]) -> Trace | None:
    """Return the trace of a request from every value of its two headers; None if it names none."""
    found = _TRACEPARENT.fullmatch(parents[0].strip(" \t")) if len(parents) == 1 else None
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return Trace(trace_id, span_id, int(flags, 16) & _KNOWN_FLAGS, _read_state(states))


def _read_state(values: Sequence[str]) -> str:
    members = [stripped for value in values for member in value.split(",") if (stripped := member.strip(" \t"))]
    keys = {member.partition("=")[0] for member in members}
    if len(members) > MAX_MEMBERS or len(keys) != len(members) or not all(map(_MEMBER.fullmatch, members)):
        return ""
    return ",".join(members)
