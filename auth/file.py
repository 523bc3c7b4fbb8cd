"""dstack-auth: a webhook that decides by an allowlist file. The service; no HTTP.

The file's bytes are read again on every request, so a change takes effect with the next one. A file that is missing,
unreadable, not JSON or of the wrong shape is an empty allowlist, as upstream: it denies every boot, with the reason of
the first rule that an empty allowlist fails.

Source: dstack next 312dc605, `crates/dstack-auth/src/main.rs`.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Final

from dstack_emu.auth.allowlist import Allowlist, evaluate_allowlist, parse_allowlist
from dstack_emu.auth.boot_info import PolicyDecision, ReceivedBootInfo
from dstack_emu.auth.config_file import read_config
from dstack_emu.auth.errors import AuthConfigError
from dstack_emu.auth.spelling import unread_keys_of

_log = logging.getLogger("dstack_emu.auth.file")

DEFAULT_ALLOWLIST_PATH: Final = "/var/lib/dstack/auth-allowlist.json"


class FileAuth:
    """Decides by the allowlist file at `config_path`."""

    def __init__(self, config_path: Path | str) -> None:
        self._config_path = str(config_path)
        self._content: bytes | None = None
        self._allowlist = Allowlist()

    def allowlist(self) -> Allowlist:
        """Read the file now, or raise `AuthConfigError`; bytes equal to the last valid ones are not parsed again.

        Logs a warning for each key that nothing reads, once for each content.
        """
        content = read_config(self._config_path)
        if content != self._content:
            self._allowlist = parse_allowlist_file(content, self._config_path)
            self._content = content
            for warning in unread_keys_of(content, Allowlist):
                _log.warning("%s: %s", self._config_path, warning)
        return self._allowlist

    def decide(self, boot_info: ReceivedBootInfo, is_kms: bool) -> PolicyDecision:
        """Decide by the file as it is now; a file that cannot be used denies, and `config_error` says why."""
        try:
            return evaluate_allowlist(self.allowlist(), boot_info, is_kms)
        except AuthConfigError as error:
            return replace(evaluate_allowlist(Allowlist(), boot_info, is_kms), config_error=str(error))

    def info(self) -> dict[str, object]:
        """Build the answer of `GET /`, which is the same whatever the file says: no chain stands behind it."""
        return {
            "status": "ok",
            "kmsContractAddr": "",
            "ethRpcUrl": "",
            "gatewayAppId": "",
            "chainId": 0,
            "appImplementation": "",
        }


def parse_allowlist_file(content: bytes, path: str) -> Allowlist:
    """Parse a file's bytes; raise `AuthConfigError`, which names the file and what is wrong."""
    try:
        return parse_allowlist(content)
    except AuthConfigError as error:
        raise AuthConfigError(f"failed to load config: {path}: {error}") from error
