"""The verifier's configuration: upstream's dstack-verifier.toml, and its variables.

Source: dstack `verifier/dstack-verifier.toml` and `verifier/src/main.rs` at 312dc605. An unknown key is an error that
names it, as there; `host`, which upstream's README has for `address`, is known, too.
"""

import ipaddress
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator

from dstack_emu.deployment.config import IMAGE_URL, PORTS
from dstack_emu.kms_emu.config import AttestationConfig
from dstack_emu.kms_emu.errors import KmsConfigError
from dstack_emu.transport.image_store import PLACEHOLDER

VARIABLES: Final = "DSTACK_VERIFIER_"
"""What variables begin with that set a key: DSTACK_VERIFIER_PORT, or with __ for the dot of a nested one."""


class VerifierConfig(BaseModel):
    """The whole file. Where it says nothing the defaults are this emulator's: loopback, and a port of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    address: str = Field(default="127.0.0.1", validation_alias=AliasChoices("address", "host"))
    port: int = Field(default=PORTS["verifier"], ge=1, le=65535)
    image_cache_dir: str = "/tmp/dstack-verifier/cache"  # noqa: S108 - upstream's default
    image_download_url: str = IMAGE_URL
    image_download_timeout_secs: int = Field(default=300, gt=0)
    attestation: AttestationConfig = AttestationConfig()

    @field_validator("address")
    @classmethod
    def _is_address(cls, value: str) -> str:
        try:
            ipaddress.ip_address(value)
        except ValueError as error:
            raise ValueError(f"invalid verifier address: {value}") from error
        return value

    @field_validator("image_cache_dir")
    @classmethod
    def _is_folder(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("image_cache_dir must not be empty")
        return value

    @field_validator("image_download_url")
    @classmethod
    def _is_template(cls, value: str) -> str:
        if PLACEHOLDER not in value:
            raise ValueError(f"image_download_url must contain {PLACEHOLDER}")
        if not value.startswith(("http://", "https://")):
            raise ValueError("image_download_url must use http or https")
        return value

    @classmethod
    def load(cls, path: Path | None, environment: Mapping[str, str]) -> Self:
        """Read the file, if one is named, and the variables, which go before it; raise `KmsConfigError`."""
        document: dict[str, Any] = {}
        if path is not None:
            try:
                document = tomllib.loads(path.read_text())
            except OSError as error:
                raise KmsConfigError(f"cannot read {path}: {error.strerror}") from error
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise KmsConfigError(f"{path} is no TOML: {error}") from error
        for name, value in environment.items():
            if name.startswith(VARIABLES):
                _set(document, name.removeprefix(VARIABLES).lower().split("__"), _value(value), name)
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
            raise KmsConfigError(f"{path or 'the environment'}: {problems}") from error


def _set(document: dict[str, Any], keys: list[str], value: object, name: str) -> None:
    *outer, last = keys
    for key in outer:
        document = document.setdefault(key, {})
        if not isinstance(document, dict):
            raise KmsConfigError(f"{name}: {key} is no section")
    document[last] = value


def _value(text: str) -> object:
    """A variable's value: a number, a truth value, else the text itself."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, int | str) else text
