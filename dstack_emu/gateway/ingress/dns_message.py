"""Queries for TXT records, and their answers, as bytes.

Not here: sending (`dns_records`), and every other type of record.
Source: RFC 1035, sections 3.1, 3.3.14 and 4.1.
"""

import struct
from dataclasses import dataclass
from typing import Final

MAX_NAME: Final = 253
"""The maximum length of a domain name as text."""
MAX_LABEL: Final = 63

_HEADER: Final = struct.Struct("!HHHHHH")  # id, flags, then the numbers of questions, answers and other records
_QUESTION: Final = struct.Struct("!HH")  # type, class
_RECORD: Final = struct.Struct("!HHIH")  # type, class, time to live, length of the data
_TXT: Final = 16
_IN: Final = 1
_RESPONSE, _TRUNCATED, _RECURSION_DESIRED, _STATUS = 0x8000, 0x0200, 0x0100, 0x000F
_NO_SUCH_NAME: Final = 3
_POINTER: Final = 0xC0


class DnsError(Exception):
    """A name that DNS cannot have, or an answer that is none."""


@dataclass(frozen=True, slots=True)
class TxtAnswer:
    """The first string of the first TXT record, None if there is none, and how long it is valid, in seconds.

    If `is_truncated`, the whole answer comes over TCP only.
    """

    text: bytes | None = None
    ttl: int = 0
    is_truncated: bool = False


def encode_query(name: str, query_id: int) -> bytes:
    """Encode a query, which the server may ask others; raise `DnsError` for a name that DNS cannot have."""
    head = _HEADER.pack(query_id, _RECURSION_DESIRED, 1, 0, 0, 0)
    return head + _encode_name(name) + _QUESTION.pack(_TXT, _IN)


def _encode_name(name: str) -> bytes:
    labels = name.split(".")
    if not name.isascii() or len(name) > MAX_NAME or not all(0 < len(label) <= MAX_LABEL for label in labels):
        raise DnsError(f"{name!r:.80} is no domain name")
    return b"".join(bytes([len(label)]) + label.encode() for label in labels) + b"\0"


def parse_answer(data: bytes, query: bytes) -> TxtAnswer:
    """Parse the answer to a query; raise `DnsError` if it is none, or says that the server failed."""
    question = query[_HEADER.size :]
    if len(data) < _HEADER.size:
        raise DnsError(f"an answer has at least {_HEADER.size} bytes, got {len(data)}")
    query_id, flags, questions, answers, _, _ = _HEADER.unpack_from(data)
    if query_id != int.from_bytes(query[:2], "big") or not flags & _RESPONSE or questions != 1:
        raise DnsError("an answer to another query")
    if data[_HEADER.size : _HEADER.size + len(question)].lower() != question.lower():
        raise DnsError("an answer to another question")
    if flags & _TRUNCATED:
        return TxtAnswer(is_truncated=True)
    if flags & _STATUS not in (0, _NO_SUCH_NAME):
        raise DnsError(f"the server answered with status {flags & _STATUS}")
    return _first_txt(data, _HEADER.size + len(question), answers)


def _first_txt(data: bytes, at: int, answers: int) -> TxtAnswer:
    try:
        for _ in range(answers):
            at = _after_name(data, at)
            kind, of_class, ttl, size = _RECORD.unpack_from(data, at)
            at += _RECORD.size
            if kind == _TXT and of_class == _IN and size:
                length = data[at]
                if length >= size or at + size > len(data):
                    raise DnsError("a TXT record is cut off")
                return TxtAnswer(data[at + 1 : at + 1 + length], ttl)
            at += size
    except (IndexError, struct.error) as error:
        raise DnsError("the answer is cut off") from error
    return TxtAnswer()


def _after_name(data: bytes, at: int) -> int:
    """Skip a name, which ends with an empty label or with a pointer."""
    while size := data[at]:
        if size & _POINTER == _POINTER:
            return at + 2
        at += 1 + size
    return at + 1
