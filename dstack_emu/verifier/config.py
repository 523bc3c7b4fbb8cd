"""The verifier's configuration: upstream's dstack-verifier.toml, and its variables.

Source: dstack `verifier/dstack-verifier.toml` and `verifier/src/main.rs` at 312dc605. An unknown key is an error that
names it, as there; `host`, which upstream's README has for `address`, is known, too.
"""

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Self
from urllib.parse import urlsplit

from pydantic import AliasChoices, ConfigDict, Field

from dstack_emu.transport.errors import ConfigError
from dstack_emu.transport.image_store import PLACEHOLDER
from dstack_emu.transport.ports import IMAGE_URL, PORTS
from dstack_emu.transport.settings import Port, StrictSection, merge, overrides, read_toml, toml_value, validate
from dstack_emu.transport.trust_root import AttestationConfig
from dstack_emu.transport.urls import shown_url

VARIABLES: Final = "DSTACK_VERIFIER_"
"""The prefix of variables that set a key, such as DSTACK_VERIFIER_PORT; __ replaces the dot of a nested key."""


class VerifierConfig(StrictSection):
    """The whole file. Two defaults are this emulator's own: the loopback address, and the port."""

    model_config = ConfigDict(populate_by_name=True)

    address: str = Field(default="127.0.0.1", validation_alias=AliasChoices("address", "host"))
    port: Port = PORTS["verifier"]
    image_cache_dir: str = "/tmp/dstack-verifier/cache"  # noqa: S108 - upstream's default
    image_download_url: str = IMAGE_URL
    image_download_timeout_secs: Annotated[int, Field(ge=0, lt=1 << 64)] = 300
    attestation: AttestationConfig = AttestationConfig()

    @classmethod
    def load(cls, path: Path | None, environment: Mapping[str, str]) -> Self:
        """Read the file, if one is named, and the variables, which override it.

        Raises `ConfigError`: for what is no configuration with the key, for values that cannot be with upstream's text.
        """
        source = str(path or "the environment")
        try:
            document = read_toml(path) if path is not None else {}
            document = merge(document, overrides(environment, VARIABLES, toml_value))
            config = validate(cls, document, source)
        except ConfigError as error:
            raise ConfigError(f"Failed to load configuration: {error}") from error
        if (problem := config._problem()) is not None:
            raise ConfigError(f"{problem} (in {source})")
        return config

    def _problem(self) -> str | None:
        """Return the first of upstream's texts that applies, in its order."""
        url = self.image_download_url
        checks: tuple[tuple[bool, str], ...] = (
            (_is_address(self.address), f"invalid verifier address: {self.address}"),
            (self.port != 0, "verifier port must not be zero"),
            (bool(self.image_cache_dir.strip()), "image_cache_dir must not be empty"),
            (self.image_download_timeout_secs > 0, "image_download_timeout_secs must be greater than zero"),
            (PLACEHOLDER in url, f"image_download_url must contain {PLACEHOLDER}"),
            (url.startswith(("http://", "https://")), "image_download_url must use http or https"),
            (_is_url(url.replace(PLACEHOLDER, "00" * 32)), f"invalid image_download_url: {shown_url(url)}"),
        )
        return next((text for holds, text in checks if not holds), None)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text  # Rust's addresses have no zone


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return bool(parts.hostname) and (parts.port or 0) >= 0  # `port` raises if there is something else
    except ValueError:
        return False
