"""Keys of a policy file that nothing reads. A misspelt key is no error, because files may have further keys.

One file serves servers of several versions, so an unknown key alone says nothing; the nearest known one does. A key
that begins with `_`, `$` or `//` is a comment.
"""

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Final

from pydantic import BaseModel

_COMMENTS: Final = ("_", "$", "//")
_ALIKE: Final = 0.6
"""Similarity from which a known key is taken for the one that was meant."""


def unread_keys(document: object, model: type[BaseModel]) -> tuple[str, ...]:
    """Name each key of a policy's JSON that its model does not read, with the nearest one; one sentence for each."""
    return tuple(_unread(document, model, ""))


def unread_keys_of(content: bytes, model: type[BaseModel]) -> tuple[str, ...]:
    """Name them in the bytes of a policy file; none if it is not JSON."""
    try:
        return unread_keys(json.loads(content), model)
    except (ValueError, RecursionError):
        return ()


def _unread(document: object, model: type[BaseModel], place: str) -> Iterator[str]:
    if not isinstance(document, Mapping):
        return
    known = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    for key, value in document.items():
        if key in known:
            yield from _inside(value, known[key], f"{place}{key}.")
        elif not key.startswith(_COMMENTS):
            yield f"{place}{key}: nothing reads this key{_advice(key, known)}"


def _inside(value: object, annotation: Any, place: str) -> Iterator[str]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from _unread(value, annotation, place)
    elif (entry := _entry_model(annotation)) is not None and isinstance(value, Mapping):
        for app_id, app in value.items():
            yield from _unread(app, entry, f"{place}{app_id}.")


def _entry_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a mapping's values, None if it is none of models."""
    *_, last = getattr(annotation, "__args__", ()) or (None,)
    return last if isinstance(last, type) and issubclass(last, BaseModel) else None


def _advice(key: str, known: Mapping[str, Any]) -> str:
    plain = {name.lower(): name for name in known}
    near = get_close_matches(key.lower().replace("_", ""), plain, n=1, cutoff=_ALIKE)
    return f", did you mean {plain[near[0]]}?" if near else ""
