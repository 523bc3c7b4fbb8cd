"""Journal and faults around a service that is asked by HTTP: each call is recorded, and meets its fault if it has one.

One object for each service, whichever kind of application serves it: an application of our own (`transport.http`) takes
`HttpInstruments.middleware`, one of aiohttp's takes `observability.aiohttp_middleware`. If the journal is off and there
are no faults, a call is handed on and nothing is done.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Final

from dstack_emu.observability.fault_effects import DroppedError, Stale, apply_fault
from dstack_emu.observability.fault_rules import FaultRules, Met
from dstack_emu.observability.http_call import DirectCall, HttpCall, RefusedByHandlerError
from dstack_emu.observability.journal import Journal
from dstack_emu.observability.spans import HEADER, CallSpan, answered, enter, leave, read_header
from dstack_emu.simulator.pccs import REVALIDATION_PATH
from dstack_emu.transport.http import Handler, Request, Response

UNNOTED: Final = frozenset(("/health", "/metrics", REVALIDATION_PATH))
"""Paths that are requested all the time, and are not recorded."""

SHOWN: Final = 500
"""Characters of an error that the journal keeps."""

_GONE: Final = Response()
"""The answer to a connection that is gone."""


class HttpInstruments:
    """Journal and faults of one service; `stale` answers for a PCCS with collateral that has expired."""

    def __init__(self, service: str, journal: Journal, faults: FaultRules, *, stale: Stale | None = None) -> None:
        self._service, self._journal, self._faults, self._stale = service, journal, faults, stale

    def concern(self, path: str) -> bool:
        """Tell whether there is anything to do about a call of this path."""
        return bool(self._faults.rules) or self._is_recorded(path)

    async def middleware(self, request: Request, handler: Handler) -> Response:
        """Be the middleware of an application of our own."""
        if not self.concern(request.path):
            return await handler(request)
        return await self.answer(DirectCall(request, handler))

    async def answer(self, call: HttpCall) -> Response:
        """Answer a call: by its handler, or as its fault wants it.

        Raises `RefusedByHandlerError` if the handler did. A connection that is dropped gets an empty answer, which
        nobody reads.
        """
        if self._faults.rules and call.path == REVALIDATION_PATH:
            return Response(204)  # "ask for the documents": a fault may be before any of them
        header = call.header(HEADER)
        name, (_, _, caller) = call_name(call.path), read_header(header)
        met = self._faults.meet(self._service, name, caller) if self._faults.rules else None
        try:
            if not self._is_recorded(call.path):
                return await self._answer(call, met)
            return await self._recorded(call, name, header, met)
        except DroppedError:
            return _GONE

    def _is_recorded(self, path: str) -> bool:
        return self._journal.enabled and path not in UNNOTED

    async def _answer(self, call: HttpCall, met: Met | None) -> Response:
        return await (call.proceed() if met is None else apply_fault(*met, call, self._stale))

    async def _recorded(self, call: HttpCall, name: str, header: str | None, met: Met | None) -> Response:
        span = self._journal.begin(self._service, name, *read_header(header))
        if met is not None:
            span.note("fault", {"id": met[0].id, "kind": met[1].kind})
        status, error, is_ended = None, "", True
        before = enter(span)
        try:
            response = await self._answer(call, met)
            if met is not None and met[1].kind == "decision":
                span.note("decision", {**(span.notes.get("decision") or {}), **_decided(response)})
            if not isinstance(response.body, bytes):
                is_ended = False
                return replace(response, body=self._while_sent(span, response, header))
            status = response.status
            answered(header)
            if status >= 400:
                error = self._journal.scrub(_error_text(response.body))
            return response
        except RefusedByHandlerError as refusal:
            status, error = refusal.status, refusal.reason
            raise
        finally:
            leave(before)
            if is_ended:
                self._journal.end(span, status, error)

    async def _while_sent(self, span: CallSpan, response: Response, header: str | None) -> AsyncIterator[bytes]:
        """Pass an answer's pieces on; what they were broken off at has no status."""
        assert not isinstance(response.body, bytes)  # noqa: S101 - the caller looked
        status = None
        try:
            async for piece in response.body:
                yield piece
            status = response.status
            answered(header)
        finally:
            self._journal.end(span, status)


def _decided(response: Response) -> dict[str, Any]:
    """Return what an answer that a fault made up says."""
    body = response.body if response.status == 200 else b"{}"
    document = json.loads(body) if isinstance(body, bytes) else {}
    return {"allowed": document.get("isAllowed"), "reason": document.get("reason"), "rule": "fault"}


def call_name(path: str) -> str:
    """Name a call: an RPC by its own name, without service and mount; anything else by its path."""
    head, _, last = path.rpartition("/")
    name = last.rpartition(".")[2]
    return name if head in ("", "/prpc") and name[:1].isupper() and name.isalnum() else path


def _error_text(body: bytes) -> str:
    text = body.decode(errors="replace")
    try:
        document = json.loads(text)
    except ValueError:
        return text[:SHOWN]
    said = document.get("error") if isinstance(document, dict) else None
    return said if isinstance(said, str) else text[:SHOWN]
