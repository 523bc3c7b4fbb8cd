"""The token of the control API: whoever has it controls the stack, over an address that other machines can reach.

It is random, and not derived from the seed, which is no secret.
"""

import hmac
import ipaddress
import re
import secrets
import socket
from pathlib import Path
from typing import Final

from dstack_emu.deployment.config import TOKEN_FILE, TOKEN_VARIABLE
from dstack_emu.deployment.errors import StackError
from dstack_emu.transport.files import replace_file_durably

_SIZE: Final = 32
"""The number of random bytes in a token. It is in hex: one in base64url may begin with `-`, as an option does."""
_FORM: Final = re.compile(r"[!-~]{16,512}")


def is_needed(sock: socket.socket) -> bool:
    """Return whether the API demands a token on this bound socket: unless it is of a loopback address."""
    host = str(sock.getsockname()[0]).partition("%")[0]  # without the scope of an IPv6 address
    return not ipaddress.ip_address(host).is_loopback


def make_token(given: str | None, state: Path) -> str:
    """Return the token: the given one, that of an earlier run of the state folder, or a random one.

    It is written to the state folder, readable by the owner alone. Raises `StackError` if the given one is too short or
    cannot be a header's value, or if the file cannot be written.
    """
    if given is not None and not _FORM.fullmatch(given):
        raise StackError(f"{TOKEN_VARIABLE}: 16 to 512 visible ASCII characters expected, got {len(given)} characters")
    path = state / TOKEN_FILE
    token = given or _earlier(path) or secrets.token_hex(_SIZE)
    try:
        replace_file_durably(path, f"{token}\n".encode(), 0o600)
    except OSError as error:
        raise StackError(f"{path} cannot be written: {error.strerror}") from error
    return token


def _earlier(path: Path) -> str | None:
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if _FORM.fullmatch(text) else None


def is_authorized(header: str | None, token: str) -> bool:
    """Return whether an Authorization header has the token, in a time that does not depend on the token."""
    scheme, _, sent = (header or "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(sent.strip().encode(), token.encode())
