"""One route of the control API, and how its query and body are read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel

from dstack_emu.control.api import Control
from dstack_emu.control.schemas import ControlError, RequestBody

JSON: Final = "application/json"

Run = Callable[[Control, dict[str, str], dict[str, str], Any], Any]


@dataclass(frozen=True, slots=True)
class Route:
    """One route. `body` is the schema of its body, validated if `validates` is set; `query` names its parameters.

    `media_type` is that of its answer: of a call that returns a text, another one than JSON.
    """

    method: str
    path: str
    summary: str
    run: Run
    body: type[BaseModel] | None = None
    query: tuple[str, ...] = ()
    validates: bool = True
    media_type: str = JSON


class Nothing(RequestBody):
    """An empty object, or no body."""


def given(body: BaseModel) -> dict[str, Any]:
    """Return the fields that a body contains."""
    return {name: getattr(body, name) for name in body.model_fields_set}


def number(query: dict[str, str], name: str, default: int) -> int:
    """Return a parameter that is a number; raise `ControlError`."""
    text = query.get(name, str(default))
    if not text.isdecimal() or len(text) > 12:
        raise ControlError(f"{name}: a number expected, got {text!r:.40}")
    return int(text)
