"""auth-simple: a webhook whose config file decides. The service; no HTTP.

The file's bytes are read again on every request, so a change takes effect with the next one. A file that is
missing, unreadable, not JSON or of the wrong shape denies every boot, with a reason that says what is wrong
with which file; upstream uses an empty config then, whose reason `OS image is not allowed` misleads. A file
that is read while it is being rewritten denies too: no beginning of a JSON object, short of the whole, is
itself JSON.

Source: `kms/auth-simple/index.ts` of dstack, next 312dc605 (ConfigBackend), and the README of auth-simple.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from dstack_emu.auth.boot_info import PolicyDecision, ReceivedBootInfo, parse_body
from dstack_emu.auth.config_file import read_config
from dstack_emu.auth.errors import AuthConfigError, MalformedJsonError
from dstack_emu.auth.policy import DEFAULT_CONTRACT, Contract, Policy, evaluate, parse_contract
from dstack_emu.auth.spelling import unread_keys_of
from dstack_emu.transport.validation import problems

_log = logging.getLogger("dstack_emu.auth.simple")

DEFAULT_CONFIG_PATH: Final = "./auth-config.json"


@dataclass(frozen=True, slots=True)
class SimpleSettings:
    """What auth-simple takes from its environment, except the port: the caller binds the socket."""

    config_path: str = DEFAULT_CONFIG_PATH
    contract: Contract = DEFAULT_CONTRACT

    @classmethod
    def from_env(cls, env: Mapping[str, str], *, default_contract: Contract = DEFAULT_CONTRACT) -> "SimpleSettings":
        """Read AUTH_CONFIG_PATH and AUTH_SIMPLE_COMPAT; an empty value is an absent one.

        `default_contract` is the release's. Raises `AuthConfigError`.
        """
        return cls(
            config_path=env.get("AUTH_CONFIG_PATH") or DEFAULT_CONFIG_PATH,
            contract=parse_contract(env.get("AUTH_SIMPLE_COMPAT") or default_contract),
        )


class SimpleAuth:
    """Decides by the config file at `config_path`, under one of the contracts of `policy`."""

    def __init__(self, config_path: Path | str, *, contract: Contract = DEFAULT_CONTRACT) -> None:
        """Take the file's path; a `str` keeps its spelling in answers (`./x`). Raises `AuthConfigError`."""
        self._config_path = str(config_path)
        self.contract: Final = parse_contract(contract)
        self._content: bytes | None = None
        self._policy = Policy()

    def policy(self) -> Policy:
        """Read the file now, or raise `AuthConfigError`; bytes equal to the last good ones are not parsed.

        Logs a warning for each key that nothing reads, once for each content.
        """
        content = read_config(self._config_path)
        if content != self._content:
            self._policy = parse_policy(content, self._config_path)
            self._content = content
            for warning in unread_keys_of(content, Policy):
                _log.warning("%s: %s", self._config_path, warning)
        return self._policy

    def decide(self, boot_info: ReceivedBootInfo, is_kms: bool) -> PolicyDecision:
        """Decide by the file as it is now; the rule of a file that cannot be used is `config`, and denies."""
        try:
            policy = self.policy()
        except AuthConfigError as error:
            return PolicyDecision(is_allowed=False, reason=str(error), gateway_app_id="", rule="config")
        return evaluate(policy, boot_info, is_kms, contract=self.contract)

    def info(self) -> dict[str, object]:
        """Build the answer of `GET /`.

        The status is `ok` even if the file cannot be used, as upstream does: the webhook is up, and the file may
        come later. The values are then zero, and an additional `configError` says why.
        """
        problem: dict[str, object] = {}
        try:
            policy = self.policy()
        except AuthConfigError as error:
            policy = Policy()
            problem["configError"] = str(error)
        return {
            "status": "ok",
            "kmsContractAddr": policy.kms_contract_addr,
            "gatewayAppId": policy.gateway_app_id,
            "chainId": policy.chain_id,
            "appAuthImplementation": policy.app_implementation,
            "appImplementation": policy.app_implementation,
            "configPath": self._config_path,
            **problem,
        }


def parse_policy(content: bytes, path: str) -> Policy:
    """Parse a config file's bytes; raise `AuthConfigError`, which names the file and the first fault."""
    try:
        parse_body(content, None)  # pydantic's parser lets NaN and Infinity pass, which are no JSON
        return Policy.model_validate_json(content)
    except MalformedJsonError as error:
        raise AuthConfigError(f"failed to load config: {path}: Invalid JSON: {error.__cause__}") from error
    except ValidationError as error:
        first, *others = problems(error)
        more = f" (and {len(others)} more)" if others else ""
        raise AuthConfigError(f"failed to load config: {path}: {first}{more}") from error
