"""The verifier's configuration: upstream's dstack-verifier.toml, and its variables.

Source: dstack `verifier/dstack-verifier.toml` and `verifier/src/main.rs` at 312dc605. An unknown key is an error that
names it, as there; `host`, which upstream's README has for `address`, is known, too.
"""

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator

from dstack_emu.transport.image_store import PLACEHOLDER
from dstack_emu.transport.ports import IMAGE_URL, PORTS
from dstack_emu.transport.settings import merge, overrides, read_toml, toml_value, validate
from dstack_emu.transport.trust_root import AttestationConfig

VARIABLES: Final = "DSTACK_VERIFIER_"
"""The prefix of variables that set a key, such as DSTACK_VERIFIER_PORT; __ replaces the dot of a nested key."""


class VerifierConfig(BaseModel):
    """The whole file. Two defaults are this emulator's own: the loopback address, and the port."""

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
        """Read the file, if one is named, and the variables, which override it; raise `ConfigError`."""
        document = read_toml(path) if path is not None else {}
        document = merge(document, overrides(environment, VARIABLES, toml_value))
        return validate(cls, document, str(path or "the environment"))
