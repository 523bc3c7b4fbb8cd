"""The query string of a GET, as serde_qs reads it. Only scalars and lists of them can be written so."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar
from urllib.parse import unquote_to_bytes

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.prpc.encoding import require_few_pairs
from dstack_emu.attest.prpc.ignored import Ignored, ignore
from dstack_emu.attest.prpc.messages import Field, MessageTable, table_of

M = TypeVar("M", bound=Message)

_KEY: Final = re.compile(r"([^\[]*)(?:\[([0-9]*)\])?", re.ASCII)
_MAX_INDEX_DIGITS: Final = 6


def decode_query(message_type: type[M], query: str, ignored: Ignored | None = None) -> M:
    """Decode the query string of a GET, given undecoded: `a=1&list[0]=x&list[1]=y`, also `list[]=x`.

    Unknown keys, the bare `json` among them, are ignored, and all but `json` named in `ignored`; for Empty the query is
    ignored. Raises `FormatError` if a key stands twice, a value is not of its field's type, or there are too many.
    """
    if message_type is Empty:
        return message_type()
    require_few_pairs(query)
    table = table_of(message_type)
    pairs = _Pairs()
    for piece in filter(None, query.split("&")):
        pairs.add(piece, table)
    for key in (*pairs.listed, *pairs.single):
        if key not in table.by_name and key != "json":
            ignore(key, table, ignored)
    return message_type(**_read_lists(table, pairs), **_read_single(table, pairs.single))


@dataclass(slots=True)
class _Pairs:
    """The values of a query: one for a key, or several by their index."""

    single: dict[str, str] = field(default_factory=dict)
    listed: dict[str, dict[int, str]] = field(default_factory=dict)

    def add(self, piece: str, table: MessageTable) -> None:
        """Read one `key=value`."""
        raw_key, _, raw_value = piece.partition("=")
        shape = _KEY.fullmatch(raw_key)
        key = _unquote(shape[1] if shape else raw_key.partition("[")[0])
        value = _unquote(raw_value)
        if shape is None or (shape[2] is not None and len(shape[2]) > _MAX_INDEX_DIGITS):
            if key in table.by_name:
                raise FormatError(f"unexpected index in the query for field `{key}`")
        elif shape[2] is not None:
            self._add_listed(key, shape[2], value)
        elif key in self.single:
            raise FormatError(f'Multiple values for one key: "{key}"')
        else:
            self.single[key] = value

    def _add_listed(self, key: str, digits: str, value: str) -> None:
        items = self.listed.setdefault(key, {})
        index = int(digits) if digits else len(items)
        if index in items:
            raise FormatError(f'Multiple values for one key: "{key}[{index}]"')
        items[index] = value


def _read_lists(table: MessageTable, pairs: _Pairs) -> dict[str, object]:
    arguments: dict[str, object] = {}
    for key, items in pairs.listed.items():
        if (known := table.by_name.get(key)) is None:
            continue
        if not known.repeated or key in pairs.single:
            raise FormatError(f"invalid type: a sequence for field `{key}`")
        arguments[known.name] = [_parse(known, items[index], key) for index in sorted(items)]
    return arguments


def _read_single(table: MessageTable, single: Mapping[str, str]) -> dict[str, object]:
    arguments: dict[str, object] = {}
    for key, value in single.items():
        if (known := table.by_name.get(key)) is None:
            continue
        if known.repeated:
            raise FormatError(f"invalid type: a string, expected a sequence for field `{key}`")
        if not (value == "" and known.presence):
            arguments[known.name] = _parse(known, value, key)
    return arguments


def _parse(known: Field, value: str, key: str) -> object:
    if known.message is not None:
        raise FormatError(f"invalid type: a string, expected message {known.message.name} for field `{key}`")
    assert known.scalar is not None  # noqa: S101 - it is one or the other
    return known.scalar.parse(value, key)


def _unquote(text: str) -> str:
    try:
        return unquote_to_bytes(text.replace("+", " ")).decode()
    except UnicodeError as error:
        raise FormatError("the query is not valid UTF-8") from error
