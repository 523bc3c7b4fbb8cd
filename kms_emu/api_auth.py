"""Credentials for the listeners of operators: a shared token, or a user of an htpasswd file.

The admin listener does not start without a credential; the onboarding listener is open without one. Tokens and
passwords are compared and never logged. Source: dstack `dstack-api-auth/src/lib.rs` and
`kms/src/{admin_auth,onboard_auth}.rs` before 0.6.0 (0441b5ac).
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self
from urllib.parse import parse_qsl, unquote_plus

import bcrypt

from dstack_emu.attest.prpc import MAX_PAIRS
from dstack_emu.attest.release import Release
from dstack_emu.kms_emu.config import AdminSection, Core, OnboardConfig
from dstack_emu.kms_emu.errors import KmsConfigError
from dstack_emu.transport.events import EventLog
from dstack_emu.transport.http import Handler, Middleware, Request, Response

ADMIN_VARIABLES: Final = ("DSTACK_KMS_ADMIN_TOKEN", "ADMIN_API_TOKEN")
ONBOARD_VARIABLES: Final = ("DSTACK_KMS_ONBOARD_TOKEN",)
MAX_PASSWORD: Final = 72
"""Bytes of a password that bcrypt reads; bytes after them have no effect, as in Apache and upstream."""

_BCRYPT: Final = re.compile(r"\$2[aby]\$[0-3][0-9]\$[./A-Za-z0-9]{53}")
_QUERY_TOKEN: Final = "token"  # noqa: S105 - a parameter's name


@dataclass(frozen=True, slots=True)
class Credentials:
    """The accepted credentials: the SHA-256 of a token (None: no token), and users with their bcrypt hashes."""

    token_hash: bytes | None = field(default=None, repr=False)
    users: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, token: str, htpasswd_file: str, key: str) -> Self:
        """Take a token (empty: none) and read a file (empty: none); raise `KmsConfigError`, which names `key`."""
        token = token.strip()
        return cls(_digest(token) if token else None, _read_htpasswd(Path(htpasswd_file), key) if htpasswd_file else ())

    @property
    def are_configured(self) -> bool:
        """Return whether there is a token or a user."""
        return self.token_hash is not None or bool(self.users)

    def admit_token(self, token: str) -> bool:
        """Return whether this is the token."""
        return self.token_hash is not None and hmac.compare_digest(_digest(token), self.token_hash)

    async def admit_basic(self, user: str, password: str) -> bool:
        """Return whether the file has this user and password, or one of them is the token.

        The user is compared with the token only if the password is empty.
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


def admin_auth(admin: AdminSection, environment: Mapping[str, str]) -> ListenerAuth:
    """Return the credentials of the admin listener; raise `KmsConfigError` if it needs one and none is configured."""
    credentials = None
    if not admin.insecure_no_auth:
        token = admin.auth_token.strip() or _from(environment, ADMIN_VARIABLES)
        credentials = Credentials.of(token, admin.htpasswd_file, "core.admin.htpasswd_file")
        if not credentials.are_configured:
            raise KmsConfigError(
                "admin API is enabled but neither auth_token nor htpasswd_file is configured; set "
                "core.admin.auth_token, DSTACK_KMS_ADMIN_TOKEN, ADMIN_API_TOKEN, core.admin.htpasswd_file, or "
                "insecure_no_auth = true (testing only)"
            )
    return ListenerAuth("admin", "dstack-kms admin", "X-Admin-Token", credentials)


def onboard_auth(onboard: OnboardConfig, environment: Mapping[str, str]) -> ListenerAuth:
    """Return the credentials of the onboarding listener; raise `KmsConfigError` if its file cannot be used."""
    token = onboard.auth_token or _from(environment, ONBOARD_VARIABLES)
    credentials = Credentials.of(token, onboard.htpasswd_file, "core.onboard.htpasswd_file")
    return ListenerAuth(
        "onboard",
        "dstack-kms onboard",
        "X-Onboard-Token",
        credentials if credentials.are_configured else None,
        takes_query=True,
    )


@dataclass(frozen=True, slots=True)
class KmsAuth:
    """The credentials that each listener of one KMS accepts."""

    admin: ListenerAuth
    onboard: ListenerAuth

    @classmethod
    def of(cls, core: Core, environment: Mapping[str, str], release: Release) -> Self:
        """Read the credentials from configuration and environment; raise `KmsConfigError` if one cannot be used.

        An admin listener that is switched off needs no credential. In releases without a credential for onboarding, its
        variable has no effect.
        """
        admin = core.admin if core.admin.enabled else AdminSection(insecure_no_auth=True)
        return cls(
            admin_auth(admin, environment), onboard_auth(core.onboard, environment if release.onboard_token else {})
        )


def _from(environment: Mapping[str, str], names: Sequence[str]) -> str:
    """Return the value of the first of these variables that is set, even if the value is empty."""
    return next((environment[name] for name in names if name in environment), "")


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
    """Read users and their hashes; raise `KmsConfigError` naming `key`, the file, and the line without its hash."""
    try:
        lines = path.read_text().split("\n")
    except OSError as error:
        raise KmsConfigError(f"{key}: failed to read htpasswd file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise KmsConfigError(f"{key}: failed to read htpasswd file {path}: {error.reason}") from error
    users = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        user, colon, hashed = line.removesuffix("\r").partition(":")
        if not colon:
            raise KmsConfigError(f"{key}: invalid htpasswd entry in {path}, line {number}: user:hash expected")
        if not user or not _BCRYPT.fullmatch(hashed):
            raise KmsConfigError(
                f"{key}: unsupported htpasswd entry for {user!r} in {path}, line {number}; only bcrypt hashes are "
                f"supported (htpasswd -B)"
            )
        users.append((user, hashed))
    if not users:
        raise KmsConfigError(f"{key}: htpasswd file {path} contains no users")
    return tuple(users)


def _is_password(password: str, hashed: str) -> bool:
    """Return whether a password has this hash. It takes milliseconds to seconds, so call it in a thread."""
    try:
        return bcrypt.checkpw(password.encode()[:MAX_PASSWORD], hashed.encode())
    except ValueError:  # bcrypt does not support the cost in the hash
        return False
