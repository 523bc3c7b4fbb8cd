"""The stack's own app: its files, read and checked before anything starts.

An environment file is read as dstack's `vmm-cli.py` does (dstack `vmm/src/vmm-cli.py` at 312dc605).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from dstack_emu.attest.app_compose import AppManifest
from dstack_emu.attest.encrypted_env import MAX_FILE_SIZE, parse_env, plain_env
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.release import release
from dstack_emu.deployment import policy_files
from dstack_emu.deployment.config import StackConfig
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.specs import GuestSpec
from dstack_emu.simulator.guest_files import read_text_file
from dstack_emu.simulator.trust_domain import TrustDomain

NAME: Final = "app"
"""The name of the stack's own app."""

log = logging.getLogger("dstack_emu.stack")

_OVERHEAD: Final = 60
"""What sealing adds to a plain text, in bytes."""


@dataclass(frozen=True, slots=True)
class OwnApp:
    """The stack's own app: its trust domain, and the variables of its environment.

    `dropped` are the names of variables that the app-compose does not allow.
    """

    spec: GuestSpec = field(default_factory=lambda: GuestSpec(name=NAME))
    variables: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: StackConfig) -> "OwnApp":
        """Read the files that the settings name; raise `StackError`, which names file, line or member."""
        try:
            return cls._read(config)
        except FormatError as error:
            raise StackError(str(error)) from error

    def with_id(self, app_id: str) -> "OwnApp":
        """Return the same app with another app id than that of its compose hash (hex)."""
        return replace(self, spec=self.spec.model_copy(update={"app_id": app_id}))

    @classmethod
    def _read(cls, config: StackConfig) -> "OwnApp":
        compose = _text(config.app_compose, "app-compose")
        spec = GuestSpec(name=NAME, compose=compose, user_config=_text(config.user_config, "user-config"))
        manifest = None
        if compose is not None:
            manifest = _manifest(config, compose)
        if config.env_file is None:
            return cls(spec)
        if manifest is None:
            raise FormatError(
                f"env-file {config.env_file}: the generated app-compose allows no variables: "
                "name one with allowed_envs by --app-compose"
            )
        variables = read_env_file(Path(config.env_file))
        _require_usable(config.env_file, variables, manifest.allowed_envs)
        return cls(spec, variables, tuple(name for name in variables if name not in manifest.allowed_envs))


def _text(path: Path | None, what: str) -> str | None:
    return None if path is None else read_text_file(Path(path), what)


def _manifest(config: StackConfig, compose: str) -> AppManifest:
    try:
        return AppManifest.parse(compose, release(config.release))
    except FormatError as error:
        raise FormatError(f"app-compose {config.app_compose}: {str(error).removeprefix('app-compose: ')}") from error


def _require_usable(path: Path, variables: Mapping[str, str], allowed: tuple[str, ...]) -> None:
    """Verify what the guest will verify; raise `FormatError`."""
    text = plain_env(variables)
    try:
        parse_env(text, allowed)
    except FormatError as error:
        raise FormatError(f"env-file {path}: {error}") from error
    if len(text) + _OVERHEAD > MAX_FILE_SIZE:
        raise FormatError(f"env-file {path}: at most {MAX_FILE_SIZE} bytes expected, got {len(text) + _OVERHEAD}")


def read_env_file(path: Path) -> dict[str, str]:
    """Read lines `NAME=VALUE`, as vmm-cli does: spaces around both are removed, quotes are kept, `#` begins a comment
    line, and of one name the last line counts. Raises `FormatError` that names file and line, and shows no value.
    """
    variables = {}
    for number, line in enumerate(read_text_file(path, "env-file").split("\n"), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise FormatError(f"env-file {path}: line {number}: NAME=VALUE expected")
        variables[name.strip()] = value.strip()
    return variables


@dataclass(frozen=True, slots=True)
class DomainRules:
    """The rules of a policy that allow the apps of trust domains, as `AppToAllow`."""

    domains: Sequence[TrustDomain]

    async def rule(self) -> dict[policy_files.AppRule, str]:
        """Return their rules, each with the hash of its OS image (hex)."""
        return {
            policy_files.AppRule(domain.app_id.hex(), domain.compose_hash.hex()): domain.image.os_image_hash.hex()
            for domain in self.domains
        }


@dataclass(frozen=True, slots=True)
class RememberedApp:
    """The app of the earlier run of a state folder, by its compose hash (hex); empty if there was no earlier run."""

    compose_hash: str

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> "RememberedApp":
        """Read it from the description of that run."""
        app = description.get("app")
        return cls(str(app.get("compose_hash", "")) if isinstance(app, dict) else "")

    def advise(self, domain: TrustDomain, policy: Path | None) -> None:
        """Log what to do if another app than that of the earlier run was refused, by this policy of the stack."""
        now = domain.compose_hash.hex()
        if self.compose_hash in ("", now) or policy is None:  # a webhook of the user's own has no policy here
            return
        log.warning(
            "the app-compose has changed since the last run: its compose hash was %s, and is %s. %s was written for "
            "the old one. To allow the new one: dstack-emu ctl policy allow src app && dstack-emu ctl guest boot app. "
            "Or give the old file again, or another --state folder",
            self.compose_hash,
            now,
            policy,
        )
