"""Credentials for the listeners of operators: tokens, or a user of an htpasswd file.

Tokens and passwords are compared and never logged. Source: dstack `dstack-api-auth/src/lib.rs` before 0.6.0 (0441b5ac).
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self
from urllib.parse import parse_qsl, unquote_plus

import bcrypt

from dstack_emu.attest.prpc import MAX_PAIRS
from dstack_emu.transport.errors import ConfigError
from dstack_emu.transport.events import EventLog
from dstack_emu.transport.http import Handler, Middleware, Request, Response

MAX_PASSWORD: Final = 72
"""Bytes of a password that bcrypt reads; bytes after them have no effect, as in Apache and upstream."""

_BCRYPT: Final = re.compile(r"\$2[aby]\$[0-3][0-9]\$[./A-Za-z0-9]{53}")
_QUERY_TOKEN: Final = "token"  # noqa: S105 - a parameter's name


@dataclass(frozen=True, slots=True)
class Credentials:
    """The accepted credentials: the SHA-256 of each token, and users with their bcrypt hashes."""

    token_hashes: tuple[bytes, ...] = field(default=(), repr=False)
    users: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, tokens: Iterable[str], htpasswd_file: str, key: str) -> Self:
        """Take tokens (an empty one is none) and read a file (empty: none); raise `ConfigError`, which names `key`."""
        hashes = tuple(_digest(token.strip()) for token in tokens if token.strip())
        return cls(hashes, _read_htpasswd(Path(htpasswd_file), key) if htpasswd_file else ())

    @property
    def are_configured(self) -> bool:
        """Return whether there is a token or a user."""
        return bool(self.token_hashes or self.users)

    def admit_token(self, token: str) -> bool:
        """Return whether this is one of the tokens."""
        digest = _digest(token)
        return any(hmac.compare_digest(digest, known) for known in self.token_hashes)

    async def admit_basic(self, user: str, password: str) -> bool:
        """Return whether the file has this user and password, or one of them is a token.

        The user is compared with the tokens only if the password is empty.
        """
        for name, hashed in self.users:
            if name == user and await asyncio.to_thread(_is_password, password, hashed):
                return True
        return self.admit_token(password) or (not password and self.admit_token(user))


@dataclass(frozen=True, slots=True)
class ListenerAuth:
    """The credentials that one listener accepts. Without `credentials` anyone may call.

    A client sends one in the header `token_header`, as Bearer, as Basic or, if `takes_query`, as `?token=` of a GET.
    """

    listener: str
    realm: str
    token_header: str
    credentials: Credentials | None
    takes_query: bool = False

    @property
    def is_open(self) -> bool:
        """Return whether anyone may call."""
        return self.credentials is None

    async def admits(self, headers: Mapping[str, str], query: str = "") -> bool:
        """Return whether headers (names in any case), or the query of a GET, contain an accepted credential."""
        known = self.credentials
        if known is None or (self.token_header in headers and known.admit_token(headers[self.token_header])):
            return True
        scheme, _, value = headers.get("Authorization", "").partition(" ")
        if scheme == "Bearer":
            return known.admit_token(value.strip())
        if scheme == "Basic" and (pair := _basic(value.strip())) is not None:
            return await known.admit_basic(*pair)
        return (
            self.takes_query
            and query.count("&") < MAX_PAIRS
            and any(
                known.admit_token(token)
                for name, token in parse_qsl(query, keep_blank_values=True)
                if name == _QUERY_TOKEN
            )
        )

    def middleware(self, log: EventLog) -> Middleware:
        """Return middleware that answers 401 to a call without an accepted credential.

        It removes a token from the query before the handler is called.
        """

        async def check(request: Request, handler: Handler) -> Response:
            if not await self.admits(request.headers, request.query if request.method == "GET" else ""):
                log.info("refused", listener=self.listener, reason="no valid credential", path=request.path)
                return Response(401, headers=(("WWW-Authenticate", f'Basic realm="{self.realm}"'),))
            if self.takes_query and request.query.count("&") < MAX_PAIRS:  # one with more is refused, unread
                request.query = _without_token(request.query)
            return await handler(request)

        return check


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()  # a header may hold any bytes


def _basic(encoded: str) -> tuple[str, str] | None:
    """Decode the value of Basic into user and password; return None if it is malformed."""
    try:
        user, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return None
    return user, password


def _without_token(query: str) -> str:
    """Remove the token from a query, and leave the rest unchanged."""
    pairs = (pair for pair in query.split("&") if unquote_plus(pair.partition("=")[0]) != _QUERY_TOKEN)
    return "&".join(pair for pair in pairs if pair)


def _read_htpasswd(path: Path, key: str) -> tuple[tuple[str, str], ...]:
    """Read users and their hashes; raise `ConfigError` naming `key`, the file, and the line without its hash."""
    try:
        lines = path.read_text().split("\n")
    except OSError as error:
        raise ConfigError(f"{key}: failed to read htpasswd file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: failed to read htpasswd file {path}: {error.reason}") from error
    users = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        user, colon, hashed = line.removesuffix("\r").partition(":")
        if not colon:
            raise ConfigError(f"{key}: invalid htpasswd entry in {path}, line {number}: user:hash expected")
        if not user or not _BCRYPT.fullmatch(hashed):
            raise ConfigError(
                f"{key}: unsupported htpasswd entry for {user!r} in {path}, line {number}; only bcrypt hashes are "
                f"supported (htpasswd -B)"
            )
        users.append((user, hashed))
    if not users:
        raise ConfigError(f"{key}: htpasswd file {path} contains no users")
    return tuple(users)


def _is_password(password: str, hashed: str) -> bool:
    """Return whether a password has this hash. It takes milliseconds to seconds, so call it in a thread."""
    try:
        return bcrypt.checkpw(password.encode()[:MAX_PASSWORD], hashed.encode())
    except ValueError:  # bcrypt does not support the cost in the hash
        return False
