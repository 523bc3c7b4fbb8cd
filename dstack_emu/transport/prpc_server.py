"""pRPC over HTTP: serves the RPCs of a service table under a path of an application.

Every call has the same steps, as upstream: context (who calls; a KMS verifies the attestation in the client certificate
here), body, name, decode, handler, encode. An error that the caller may see becomes an HTTP 400 with its text. Any
other error is logged, and answered without details.

Not here: HTTP (`transport.http`), encodings (`attest.prpc`), and the services.

Source of truth: Dstack-TEE/dstack, branch next at 312dc605, dstack/ra-rpc/src/rocket_helper.rs, and recorded
answers of the real programs.
"""

import functools
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, Generic, Self, TypeVar
from urllib.parse import unquote

from google.protobuf.message import Message

from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.prpc import (
    BINARY_TYPE,
    JSON_TYPE,
    Ignored,
    decode_binary,
    decode_json,
    decode_query,
    encode_binary,
    encode_json,
    error_body,
    require_few_pairs,
    trim_prefix,
    wants_json,
)
from dstack_emu.attest.release import Release
from dstack_emu.transport.aside import run_aside
from dstack_emu.transport.events import EventLog
from dstack_emu.transport.http import Application, BodyError, BodyTooLargeError, Handler, Request, Response, status_page
from dstack_emu.transport.service import Rpc, ServiceTable

C = TypeVar("C")

MOST_REPORTED: Final = 256

_log = logging.getLogger(__name__)
_events = EventLog(__name__)

Context = Callable[[Request], Awaitable[C]]
"""Returns the context of a call (who calls), before the body is read; it may refuse the call."""

Answered = Callable[[str, bool], None]
"""Is called after every call, with its name in the path, and whether it was refused."""

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_VERBS: Final = ("GET", "HEAD", "POST")
_HEADERS: Final = {True: (("Content-Type", JSON_TYPE),), False: (("Content-Type", BINARY_TYPE),)}


@dataclass(frozen=True, slots=True)
class RpcStatuses:
    """The HTTP statuses of refused calls: those that reach no handler, and errors with a status of their own.

    The status of any other refusal is 400. The release table has the statuses that differ between releases.
    """

    unknown_method: int = HTTPStatus.BAD_REQUEST
    oversize: int = HTTPStatus.BAD_REQUEST
    errors: Mapping[type[Exception], int] = field(default_factory=dict)

    @classmethod
    def of(cls, release: Release, errors: Mapping[type[Exception], int] | None = None) -> Self:
        """Return the statuses of a dstack release."""
        return cls(release.unknown_method_status, release.oversize_status, errors or {})

    def of_error(self, error: Exception) -> int:
        """Return the status of a refusal."""
        if isinstance(error, _UnknownMethodError):
            return self.unknown_method
        if isinstance(error, _OversizeError):
            return self.oversize
        found = (status for kind, status in self.errors.items() if isinstance(error, kind))
        return next(found, HTTPStatus.BAD_REQUEST)


class _CallError(Exception):
    """A call that reaches no handler; the caller gets the text."""


class _UnknownMethodError(_CallError):
    """The mount has no such method."""


class _OversizeError(_CallError):
    """The body is longer than the application's limit."""


def add_prpc(
    app: Application,
    mount: str,
    table: ServiceTable[C],
    context: Context[C],
    *,
    errors: tuple[type[Exception], ...],
    trim: bool = True,
    answered: Answered | None = None,
    statuses: RpcStatuses | None = None,
) -> None:
    """Serve `table` at POST and GET `<mount>/<Method>`; `mount` is empty or starts with a slash.

    `context` is awaited before the body is read. If it or a handler raises an exception of `errors`, or an
    `AttestError`, the answer has status 400, or that in `statuses`, and the exception's text. Any other exception is
    logged with its traceback, and answered with only the name of its type. If `trim` is false, names with the table's
    prefix are unknown.

    The mount also answers names that are unknown, percent-encoded, or after several slashes; a path without a method
    gets status 422, whatever the number of slashes, unless the application has a page there.
    """
    prefix = table.prefix if trim else ""
    refusals: tuple[type[Exception], ...] = (_CallError, AttestError, *errors)
    served = PrpcMount(mount, prefix, table, context, refusals, answered, statuses or RpcStatuses())
    for name in table.rpcs:
        for spelling in (name, prefix + name):
            app.add("POST", f"{mount}/{spelling}", served.answer)
            app.add("GET", f"{mount}/{spelling}", served.answer)
    app.add_finder(served.find)


@dataclass(frozen=True, slots=True)
class PrpcMount(Generic[C]):
    """A service table at a path; `prefix` is removed from names, `refusals` are the errors whose text is answered."""

    mount: str
    prefix: str
    table: ServiceTable[C]
    context: Context[C]
    refusals: tuple[type[Exception], ...]
    answered: Answered | None
    statuses: RpcStatuses
    reported: set[tuple[str, str]] = field(default_factory=set)
    """RPC and name of each unknown member that was logged: each is logged once, and no more than `MOST_REPORTED`."""

    async def answer(self, request: Request) -> Response:
        """Answer one call; this raises nothing."""
        name = self._rest_of(request.path).lstrip("/")
        is_query, query = request.method != "POST", request.query
        verb = "GET" if is_query else "POST"
        as_json = wants_json(verb, query)
        status: int = HTTPStatus.OK
        try:
            require_few_pairs(query)
            context = await self.context(request)
            body = b"" if is_query else await _read(request)
            as_json = wants_json(verb, query, request.headers.get("Content-Type"))
            rpc = self._rpc(name)
            ignored = Ignored()
            if not rpc.reads_request:
                message = rpc.request_type()
            elif is_query:
                message = decode_query(rpc.request_type, query, ignored)
            else:
                decode = functools.partial(_decode, rpc.request_type, body, as_json, ignored)
                message = await run_aside(len(body), decode)
            if ignored:
                self._report(trim_prefix(name, self.prefix), ignored)
            reply = await rpc.handler(context, message)
            given = encode_json(reply, old_spellings=rpc.old_spellings) if as_json else encode_binary(reply)
        except self.refusals as error:
            status, given = self.statuses.of_error(error), error_body(str(error), as_json)
        except Exception as error:  # the server's edge
            _log.exception("%r failed", self.table.prefix + trim_prefix(name, self.prefix))  # the name may be anything
            status, given = HTTPStatus.BAD_REQUEST, error_body(f"internal error: {type(error).__name__}", as_json)
        if self.answered is not None:
            self.answered(self._rest_of(request.path), status != HTTPStatus.OK)
        return Response(status, given, _HEADERS[as_json])

    def find(self, request: Request) -> Handler | None:
        """Return the handler of a request below the mount whose path is not exactly that of an RPC."""
        if not request.path.startswith(f"{self.mount}/"):
            return None
        rest = request.path[len(self.mount) + 1 :]
        name = rest.lstrip("/")  # several slashes before the name are one
        if request.method in _VERBS and name and "/" not in name:
            return self.answer
        if self.answered is not None:
            self.answered(self._rest_of(request.path), True)
        return _no_method if request.method in _VERBS and not name else None

    def _report(self, rpc: str, ignored: Ignored) -> None:
        """Log members of a request that were ignored: one may be the misspelt name of another."""
        for member in ignored:
            if (rpc, member.name) not in self.reported and len(self.reported) < MOST_REPORTED:
                self.reported.add((rpc, member.name))
                advice = {"did_you_mean": member.nearest} if member.nearest else {}
                shown = (
                    member.name if _NAME.fullmatch(member.name) else "(not a name)"
                )  # it could be a misplaced secret
                _events.warning("unknown member", rpc=rpc, member=shown, **advice)

    def _rest_of(self, path: str) -> str:
        """Return the path after the mount's slash, percent-decoded."""
        rest = path[len(self.mount) + 1 :]
        return unquote(rest) if "%" in rest else rest

    def _rpc(self, name: str) -> Rpc[C, Any, Any]:
        trimmed = trim_prefix(name, self.prefix)
        rpc = self.table.rpcs.get(trimmed)
        if rpc is None:
            raise _UnknownMethodError(f"Service not found: {trimmed}")
        return rpc


async def _no_method(request: Request) -> Response:
    return status_page(HTTPStatus.UNPROCESSABLE_ENTITY, request)


def _decode(request_type: type[Message], body: bytes, as_json: bool, ignored: Ignored) -> Message:
    return decode_json(request_type, body, ignored) if as_json else decode_binary(request_type, body)


async def _read(request: Request) -> bytes:
    try:
        return await request.read()
    except BodyTooLargeError as error:
        raise _OversizeError("failed to read data: payload too large") from error
    except BodyError as error:
        raise _CallError("failed to read data: the body broke off") from error
