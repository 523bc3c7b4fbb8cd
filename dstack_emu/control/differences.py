"""What differs between two states of a stack, place by place. Secrets are not shown: only that they differ."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from dstack_emu.control.snapshots import StackState

_OPENED: Final = re.compile(r"|/guests(/[^/]+)?|/kms(/[^/]+)?|/machines(/machines(/[^/]+)?)?")
"""Places whose members are compared one by one; what they are is not shown."""
_SHOWN: Final = re.compile(
    r"(/clock|/vendor|/platforms|/policies|/faults|/journal|/guests/[^/]+/(rtmr3|events)|/kms/[^/]+/phase"
    r"|/machines/machines/[^/]+/(is_started|is_alive|manifest))(/.*)?"
)
"""Places whose values are shown. Everywhere else there may be keys, tokens, or positions of random streams."""
_LONGEST: Final = 300
"""Characters of a value that are shown."""


class _Absent:
    """The type that stands for an absent member, for which JSON has none."""


_ABSENT: Final = _Absent()


def differences(one: StackState, other: StackState) -> list[dict[str, str]]:
    """Return the places in which two states differ, as `path`, `before` and `after`.

    Values are JSON of at most 300 characters, `absent`, or `not shown`.
    """
    return list(_compared("", _document(one), _document(other)))


def _document(state: StackState) -> dict[str, Any]:
    """Return a state as JSON, with its policies as what they contain."""
    document = state.model_dump(mode="json", exclude={"policies"})
    return document | {"policies": {name: _policy(content) for name, content in state.policies.items()}}


def _policy(content: bytes | None) -> Any:
    try:
        return json.loads(content or b"null")
    except ValueError:
        return "no JSON"


def _compared(path: str, one: Any, other: Any) -> Iterator[dict[str, str]]:
    if one == other:
        return
    is_opened = _OPENED.fullmatch(path) or _SHOWN.fullmatch(path)
    if is_opened and isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys([*one, *other]):
            yield from _compared(f"{path}/{key}", one.get(key, _ABSENT), other.get(key, _ABSENT))
    else:
        yield {"path": path, "before": _text(path, one), "after": _text(path, other)}


def _text(path: str, value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    if not _SHOWN.fullmatch(path):
        return "not shown"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
