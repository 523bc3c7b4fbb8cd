"""Journal and faults around a service that is called over HTTP: records each call, and applies a fault if one matches.

Each service has one `HttpInstruments`. An application of our own (`transport.http`) takes `HttpInstruments.middleware`,
one of aiohttp's takes `observability.aiohttp_middleware`. If the journal is off and no fault is in force, a call goes
straight to its handler.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Final

from dstack_emu.attest.pcs import REVALIDATION_PATH
from dstack_emu.observability.fault_effects import DroppedError, OwnFault, Stale, apply_fault
from dstack_emu.observability.fault_rules import FaultRules, Met
from dstack_emu.observability.http_call import DirectCall, HttpCall, RefusedByHandlerError
from dstack_emu.observability.journal import Journal
from dstack_emu.observability.spans import HEADER, CallSpan, enter, forget_request, leave, read_header
from dstack_emu.observability.tracing import SpanTrace
from dstack_emu.observability.w3c_trace import TRACEPARENT, TRACESTATE, Trace, read_trace
from dstack_emu.transport.http import Handler, Request, Response

UNRECORDED_PATHS: Final = frozenset(("/health", "/metrics", REVALIDATION_PATH))
"""Paths that are requested so often that their calls are not recorded."""

UNFAULTED_PATHS: Final = frozenset((REVALIDATION_PATH,))
"""Paths to which no fault applies."""

RECORDED_ERROR_LENGTH: Final = 500
"""Characters that the journal keeps of an error that is not JSON."""

_DROPPED: Final = Response()
"""The answer on a connection that a fault has dropped; it is never sent."""


class HttpInstruments:
    """Journal and faults of one service; for a PCCS, `stale` answers with collateral that has expired.

    `own` answers with the faults of a chain.
    """

    def __init__(
        self,
        service: str,
        journal: Journal,
        faults: FaultRules,
        *,
        stale: Stale | None = None,
        own: OwnFault | None = None,
    ) -> None:
        self._own = own
        self._service, self._journal, self._faults, self._stale = service, journal, faults, stale

    def concern(self, path: str) -> bool:
        """Return whether a call of this path is to be recorded, or may have a fault."""
        return bool(self._faults.rules) or self._is_recorded(path)

    async def middleware(self, request: Request, handler: Handler) -> Response:
        """Handle a request as the middleware of an application of our own."""
        if not self.concern(request.path):
            return await handler(request)
        return await self.answer(DirectCall(request, handler))

    async def answer(self, call: HttpCall) -> Response:
        """Answer a call, by its handler or by the fault that applies to it.

        Raises `RefusedByHandlerError` if the handler does. If a fault drops the connection, the answer is empty, and is
        never sent.
        """
        if self._faults.rules and call.path in UNFAULTED_PATHS:
            return Response(204)  # none of them is confirmed: a fault may apply to the request of each document
        header = call.header(HEADER)
        name, (_, _, caller) = call_name(call.path), read_header(header)
        met = self._faults.meet(self._service, name, caller) if self._faults.rules else None
        try:
            if not self._is_recorded(call.path):
                return await self._answer(call, met)
            return await self._recorded(call, name, header, met)
        except DroppedError:
            return _DROPPED

    def _is_recorded(self, path: str) -> bool:
        return self._journal.enabled and path not in UNRECORDED_PATHS

    async def _answer(self, call: HttpCall, met: Met | None) -> Response:
        return await (call.proceed() if met is None else apply_fault(*met, call, self._stale, self._own))

    async def _recorded(self, call: HttpCall, name: str, header: str | None, met: Met | None) -> Response:
        parent, number, caller = read_header(header)
        remote = _remote_trace(call) if parent is None else None
        span = self._journal.begin(self._service, name, parent, number, caller, remote)
        if isinstance(span.trace, SpanTrace):
            span.trace.method = call.method
            span.trace.path = call.path if call.path.startswith("/") else "/"  # of a chain it is the method
        if met is not None:
            span.annotate("fault", {"id": met[0].id, "kind": met[1].kind})
        status, error, is_ended = None, "", True
        before = enter(span)
        try:
            response = await self._answer(call, met)
            if met is not None and met[1].kind == "decision":
                span.annotate("decision", {**(span.annotations.get("decision") or {}), **_decided(response)})
            if not isinstance(response.body, bytes):
                is_ended = False
                return replace(response, body=self._while_sent(span, response, header))
            status = response.status
            forget_request(header)
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
        """Pass an answer's pieces on, then end the span; if they break off, it ends without a status."""
        assert not isinstance(response.body, bytes)  # noqa: S101 - the caller looked
        status = None
        try:
            async for piece in response.body:
                yield piece
            status = response.status
            forget_request(header)
        finally:
            self._journal.end(span, status)


def _remote_trace(call: HttpCall) -> Trace | None:
    if call.header(TRACEPARENT) is None:
        return None
    return read_trace(call.headers(TRACEPARENT), call.headers(TRACESTATE))


def _decided(response: Response) -> dict[str, Any]:
    """Return the decision in an answer that a fault has made."""
    body = response.body if response.status == 200 else b"{}"
    document = json.loads(body) if isinstance(body, bytes) else {}
    return {"allowed": document.get("isAllowed"), "reason": document.get("reason"), "rule": "fault"}


def call_name(path: str) -> str:
    """Return the name of a call: for an RPC its method, without service and mount, otherwise the path."""
    head, _, last = path.rpartition("/")
    name = last.rpartition(".")[2]
    return name if head in ("", "/prpc") and name[:1].isupper() and name.isalnum() else path


def _error_text(body: bytes) -> str:
    text = body.decode(errors="replace")
    try:
        document = json.loads(text)
    except ValueError:
        return text[:RECORDED_ERROR_LENGTH]
    said = document.get("error") if isinstance(document, dict) else None
    return said if isinstance(said, str) else text[:RECORDED_ERROR_LENGTH]
