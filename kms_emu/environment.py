"""Environment variables that override keys of kms.toml: `DSTACK_EMU_KMS_<SECTION>__<KEY>`, such as
`DSTACK_EMU_KMS_CORE__AUTH_API__WEBHOOK__URL` for `core.auth_api.webhook.url`.

Ours alone: upstream's KMS reads no configuration from the environment (`load_config/src/lib.rs` at 40eaf35e merges
files into the web server's defaults, and nothing else). A variable that names no key, or whose value is none of the
key's type, is an error that names the variable.
"""

import types
from collections.abc import Mapping
from typing import Annotated, Any, Final, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from dstack_emu.kms_emu.errors import KmsConfigError

PREFIX: Final = "DSTACK_EMU_KMS_"


def overrides(model: type[BaseModel], variables: Mapping[str, str]) -> dict[str, Any]:
    """What the variables with our prefix say, as a document of `model`'s shape; the others are left alone."""
    document: dict[str, Any] = {}
    for name in sorted(name for name in variables if name.startswith(PREFIX)):
        path = name.removeprefix(PREFIX).lower().split("__")
        section = document
        for part in path[:-1]:
            section = section.setdefault(part, {})
        section[path[-1]] = _value(name, _field(model, path, name), variables[name])
    return document


def merged(document: Any, over: Mapping[str, Any]) -> Any:
    """A document with another one laid over it; where a section is no table, it stays as it is, to be refused."""
    if not isinstance(document, dict):
        return document
    laid = dict(document)
    for key, value in over.items():
        laid[key] = merged(laid.get(key, {}), value) if isinstance(value, dict) else value
    return laid


def _field(model: type[BaseModel], path: list[str], name: str) -> FieldInfo:
    section: Any = model
    field: FieldInfo | None = None
    for part in path:
        known = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else {}
        if part not in known:
            raise KmsConfigError(f"{name}: kms.toml has no key {'.'.join(path)}")
        field = known[part]
        section = field.annotation
    if field is None or (isinstance(section, type) and issubclass(section, BaseModel)) or get_origin(section) is dict:
        raise KmsConfigError(f"{name}: {'.'.join(path)} is a section of kms.toml, a key expected")
    return field


def _value(name: str, field: FieldInfo, text: str) -> Any:
    """Read a value: booleans are `true` or `false`, all else as it stands in the file, without quotes."""
    if field.annotation is bool:
        if text not in ("true", "false"):
            raise KmsConfigError(f"{name}: true or false expected, got {text!r:.80}")
        return text == "true"
    if not text and _is_optional(field.annotation):
        return None
    kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        return TypeAdapter(kind).validate_strings(text)
    except ValidationError as error:
        raise KmsConfigError(f"{name}: {error.errors()[0]['msg']}, got {text!r:.80}") from error


def _is_optional(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation)
