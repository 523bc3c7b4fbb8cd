"""One allowed request, changed in one thing at a time: each change is a request of its own."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from dstack_emu.simulator.platform import TCB_STATUSES

Kind = Literal[
    "value",
    "empty",
    "respelled",
    "spaced",
    "absent",
    "null",
    "mistyped",
    "last_differs",
    "first_differs",
    "no_object",
    "encoded",
]
"""What is changed. `respelled`: other case, or 0x in front; `spaced`: blanks around it; `last_differs` and
`first_differs`: the member is there twice, and that one has another value; `no_object`: the body is no JSON object;
`encoded`: it is the allowed request in another encoding than UTF-8."""

HEX_MEMBERS: Final = (
    "mrAggregated",
    "osImageHash",
    "mrSystem",
    "appId",
    "composeHash",
    "instanceId",
    "deviceId",
    "keyProviderInfo",
)
_SENT_STATUSES: Final[tuple[str, ...]] = tuple(status for status in TCB_STATUSES if status != "Revoked")
"""The statuses that a verification answers; a KMS makes no request about a platform that is `Revoked`."""
_NEVER_SENT: Final = ("Revoked", "TDRelaunchAdvised", "TDRelaunchAdvisedConfigurationNeeded", "Unknown")
"""Statuses of Intel's documents that end a verification, or are of later documents, and one that is none."""
OTHER_PATH: Final = "path"
"""In place of a member: the request that is allowed on the other path."""
_UNLISTED_ADVISORY: Final = "INTEL-SA-99999"
_MAY_BE_EMPTY: Final = ("osImageHash", "instanceId", "keyProviderInfo")
"""Members that are empty in some requests of a KMS."""
_LONG: Final = 32 * 1024
"""Bytes of a value that is far too long."""
_MISTYPES: Final[tuple[tuple[str, Callable[[Any], Any]], ...]] = (
    ("as a number", lambda value: 1),
    ("as true", lambda value: True),
    ("in a list", lambda value: [value]),
    ("as an object", lambda value: {"value": value}),
)


@dataclass(frozen=True, slots=True)
class Change:
    """One changed request: which member, how, and the body. `value` is the member's new value, if it is well-formed.

    `is_sent`: a KMS can send such a request.
    """

    member: str
    how: str
    kind: Kind
    body: bytes
    value: Any = None
    is_sent: bool = False

    @property
    def name(self) -> str:
        """Return the member and how it is changed."""
        return f"{self.member} {self.how}"


def changes_of(document: Mapping[str, Any], of_other_path: Mapping[str, Any]) -> Iterator[Change]:
    """Yield every change of an allowed request, the JSON object that a KMS sends.

    `of_other_path` is the allowed request of the other path: a webhook that allows an
    app does not have to allow the same identity as a KMS.
    """
    for member in HEX_MEMBERS:
        yield from _of_hex(document, member)
    yield from _of_status(document)
    yield from _of_advisories(document)
    for member in ("teeVariant", "attestationMode"):
        yield _value(document, member, "another value", "dstack-other", is_sent=True)
        yield from _of_form(document, member)
    yield from _of_body(document)
    if of_other_path != document:
        yield Change(OTHER_PATH, "of the other kind", "value", _json(of_other_path), is_sent=True)


def _of_hex(document: Mapping[str, Any], member: str) -> Iterator[Change]:
    text: str = document[member]
    data = bytes.fromhex(text)
    if data:
        yield _value(document, member, "last byte changed", (data[:-1] + _other(data[-1:])).hex(), is_sent=True)
        yield _value(document, member, "first byte changed", (_other(data[:1]) + data[1:]).hex(), is_sent=True)
        yield _value(document, member, "all zero", bytes(len(data)).hex(), is_sent=True)
        yield _value(document, member, "one byte short", data[:-1].hex())
    yield _value(document, member, "one byte too long", f"{text}00")
    yield _value(document, member, "padded with a zero byte", f"00{text}")
    yield _value(document, member, "far too long", text + "00" * _LONG)
    yield _value(document, member, "no hex", "zz" * 20)
    if text:
        yield _change(document, member, "empty", "empty", "", is_sent=member in _MAY_BE_EMPTY)
        yield _change(document, member, "with 0x", "respelled", f"0x{text}")
        for how, respelled in (("in upper case", text.upper()), ("in upper case with 0X", f"0X{text.upper()}")):
            if respelled != text:
                yield _change(document, member, how, "respelled", respelled)
        yield _change(document, member, "with blanks around it", "spaced", f" {text} ")
    yield from _of_form(document, member)


def _of_status(document: Mapping[str, Any]) -> Iterator[Change]:
    member, status = "tcbStatus", str(document["tcbStatus"])
    for other in _SENT_STATUSES:
        if other != status:
            yield _value(document, member, other, other, is_sent=True)
    for other in _NEVER_SENT:
        yield _value(document, member, other, other)
    yield _value(document, member, "in lower case", status.lower())
    yield _value(document, member, "in upper case", status.upper())
    yield _value(document, member, "with blanks around it", f" {status} ")
    yield _value(document, member, "with more text", f"{status}OutOfDate")
    yield _value(document, member, "far too long", status + "x" * _LONG)
    yield _change(document, member, "empty", "empty", "")
    yield from _of_form(document, member)


def _of_advisories(document: Mapping[str, Any]) -> Iterator[Change]:
    member, listed = "advisoryIds", list(document["advisoryIds"])
    yield _value(document, member, "one more", [*listed, "INTEL-SA-00837"], is_sent=True)
    yield _value(document, member, "three more", [*listed, "INTEL-SA-00837", "INTEL-SA-01079", _UNLISTED_ADVISORY])
    yield _value(document, member, "one that is unknown", [*listed, _UNLISTED_ADVISORY], is_sent=True)
    yield _value(document, member, "one that is empty", [*listed, ""])
    yield _value(document, member, "far too long", [*listed, "x" * _LONG])
    if listed:
        yield _change(document, member, "empty", "empty", [], is_sent=True)
    yield _change(document, member, "as text", "mistyped", "INTEL-SA-00837")
    yield _change(document, member, "with a number in it", "mistyped", [*listed, 837])
    yield _change(document, member, "with null in it", "mistyped", [*listed, None])
    yield from _of_form(document, member, mistypes=_MISTYPES[:2] + _MISTYPES[3:])


def _of_form(
    document: Mapping[str, Any], member: str, mistypes: tuple[tuple[str, Callable[[Any], Any]], ...] = _MISTYPES
) -> Iterator[Change]:
    """Yield what makes a member of any type malformed."""
    value = document.get(member, "")
    without = {name: kept for name, kept in document.items() if name != member}
    yield Change(member, "absent", "absent", _json(without))
    respelled = "".join(f"_{c.lower()}" if c.isupper() else c for c in member)
    yield Change(member, f"named {respelled}", "absent", _json(without | {respelled: value}))
    yield Change(member, f"named {member.upper()}", "absent", _json(without | {member.upper(): value}))
    yield _change(document, member, "null", "null", None)
    for how, mistype in mistypes:
        yield _change(document, member, how, "mistyped", mistype(value))
    other = [_UNLISTED_ADVISORY] if isinstance(value, list) else "OutOfDate" if member == "tcbStatus" else "ee" * 32
    rest, first, second = _json(without)[1:], _member(member, value), _member(member, other)
    yield Change(member, "twice, the last another", "last_differs", b"{" + first + b"," + second + b"," + rest)
    yield Change(member, "twice, the first another", "first_differs", b"{" + second + b"," + first + b"," + rest)


def _of_body(document: Mapping[str, Any]) -> Iterator[Change]:
    yield Change("body", "an object without members", "absent", b"{}")
    for how, body in (
        ("empty", b""),
        ("in a list", _json([document])),
        ("null", b"null"),
        ("as text", _json(_json(document).decode())),
        ("cut off", _json(document)[:-1]),
        ("twice", _json(document) * 2),
    ):
        yield Change("body", how, "no_object", body)
    yield Change("body", "in UTF-16", "encoded", _json(document).decode().encode("utf-16"))


def _value(document: Mapping[str, Any], member: str, how: str, value: Any, *, is_sent: bool = False) -> Change:
    return _change(document, member, how, "value", value, is_sent=is_sent)


def _change(
    document: Mapping[str, Any], member: str, how: str, kind: Kind, value: Any, *, is_sent: bool = False
) -> Change:
    return Change(member, how, kind, _json({**document, member: value}), value, is_sent)


def _member(name: str, value: Any) -> bytes:
    return _json({name: value})[1:-1]


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _other(byte: bytes) -> bytes:
    return bytes([byte[0] ^ 1])
