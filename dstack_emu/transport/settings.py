"""Configuration files in TOML, and the environment variables that override their keys.

A file is parsed into a pydantic model with every key; an unknown key is an error that names it. The variables are an
argument: nothing here reads the environment of the process.
"""

import re
import tomllib
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from dstack_emu.transport.errors import ConfigError
from dstack_emu.transport.validation import problems

M = TypeVar("M", bound=BaseModel)

_UNITS: Final = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}


def _seconds(value: Any) -> Any:
    """Parse `2m`, `500ms`, `5s`, `5`; leave a number of seconds as it is."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|)", value)):
        return float(match[1]) * _UNITS[match[2]]
    return value


Seconds = Annotated[float, BeforeValidator(_seconds)]

HUNDRED_YEARS: Final = 100.0 * 365 * 86400
"""The seconds that `never` stands for, for which every event loop can wait."""
_DURATION_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _duration(value: Any) -> float:
    """Read a duration as dstack's configuration has it: whole seconds, minutes, hours or days with their unit."""
    if value == "never":
        return HUNDRED_YEARS
    match = re.fullmatch(r"([0-9]{1,20})([smhd])", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"a duration such as 10s, 2m, 1h or 1d, or never, expected, got {value!r:.40}")
    return min(float(match[1]) * _DURATION_UNITS[match[2]], HUNDRED_YEARS)


Duration = Annotated[float, BeforeValidator(_duration)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Section(BaseModel):
    """A section of a configuration file: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StrictSection(Section):
    """A section in which a value must have its key's type: `"off"` is no boolean, `"8000"` no port.

    dstack's own reader is as strict. Source: figment's providers for TOML, and serde, at 312dc605.
    """

    model_config = ConfigDict(strict=True)


FilePath = Annotated[Path, Field(strict=False)]
"""A path in a strict section, where TOML has text."""


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; raise `ConfigError`, which names it."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and deeply nested values
        raise ConfigError(f"{path} is not TOML: {error}") from error


def validate(model: type[M], document: Any, source: str) -> M:
    """Validate a parsed document; raise `ConfigError`, which names `source` and each wrong key."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{source}: {'; '.join(problems(error))}") from error


def merge(document: Any, over: Mapping[str, Any]) -> Any:
    """Return a document whose keys are overridden by another; what is not a table stays, and is refused later."""
    if not isinstance(document, dict):
        return document
    merged = dict(document)
    for key, value in over.items():
        merged[key] = merge(merged.get(key, {}), value) if isinstance(value, dict) else value
    return merged


# ---- environment variables: a prefix, then the key in capitals with __ in place of the dot

MAX_SECTIONS: Final = 16
"""How deep the section of a variable may be; real ones have at most four."""

ReadValue = Callable[[str, Sequence[str], str], Any]
"""Parses the value of a variable, from its name, the parts of its key, and its text."""


def overrides(variables: Mapping[str, str], prefix: str, read: ReadValue) -> dict[str, Any]:
    """Return the document of the variables with this prefix; other variables are ignored.

    Raises `ConfigError`, which names the variable.
    """
    document: dict[str, Any] = {}
    for name in sorted(name for name in variables if name.startswith(prefix)):
        *sections, key = path = name.removeprefix(prefix).lower().split("__")
        if len(sections) > MAX_SECTIONS:
            raise ConfigError(f"{name:.100}: at most {MAX_SECTIONS} sections expected, got {len(sections)}")
        section = document
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{name}: {part} is not a section")
        section[key] = read(name, path, variables[name])
    return document


def toml_value(_name: str, _path: Sequence[str], text: str) -> int | str:
    """Parse a number or a boolean in TOML's syntax; anything else is the text itself."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, int | str) else text


def typed_value(model: type[BaseModel], file: str) -> ReadValue:
    """Return a parser of values by the type of their key in `model`; `file` names the model in errors.

    Booleans are `true` or `false`, a list has commas between its texts; other values are written as in the file,
    without quotes. The parser raises `ConfigError` if a variable names no key, or its value does not have the key's
    type.
    """

    def read(name: str, path: Sequence[str], text: str) -> Any:
        return _typed(name, _field(model, path, name, file), text)

    return read


def _field(model: type[BaseModel], path: Sequence[str], name: str, file: str) -> FieldInfo:
    section: Any = model
    field: FieldInfo | None = None
    for part in path:
        known = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else {}
        if part not in known:
            raise ConfigError(f"{name}: {file} has no key {'.'.join(path)}")
        field = known[part]
        section = field.annotation
    if field is None or (isinstance(section, type) and issubclass(section, BaseModel)) or get_origin(section) is dict:
        raise ConfigError(f"{name}: {'.'.join(path)} is a section of {file}, a key expected")
    return field


def _typed(name: str, field: FieldInfo, text: str) -> Any:
    if field.annotation is bool:
        if text not in ("true", "false"):
            raise ConfigError(f"{name}: true or false expected, got {text!r:.80}")
        return text == "true"
    if not text and _is_optional(field.annotation):
        return None
    if field.annotation == list[str]:
        return [each.strip() for each in text.split(",") if each.strip()]
    kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        value = TypeAdapter(kind).validate_strings(text)
    except ValidationError as error:
        got = "" if "TOKEN" in name else f", got {text!r:.80}"  # it may be the token itself, in place of its hash
        raise ConfigError(f"{name}: {error.errors()[0]['msg']}{got}") from error
    # What a validator of ours has read it shall read again, with the rest of the file: from the text.
    return text if any(isinstance(part, BeforeValidator) for part in field.metadata) else value


def _is_optional(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation)
