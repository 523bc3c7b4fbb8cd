"""The interceptor of every gRPC service: it records calls and applies faults, as `observability.middleware` does.

A grpc.aio interceptor wraps a call's handler, so the requests that the handler sends run in the context in which the
call's span was entered. Health and reflection are not recorded, as `/health` is not.

A fault has the effect that it has over HTTP, or the nearest one: gRPC has one message where HTTP has a body, and status
codes of its own.

Import this module only if gRPC is enabled: grpcio costs time and memory.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pool import Default as default_pool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.prpc import decode_json, encode_binary
from dstack_emu.attest.varint import encode_varint
from dstack_emu.observability.fault_effects import PIECES, until_lifted
from dstack_emu.observability.fault_rules import FaultRule, FaultRules, InstalledRule
from dstack_emu.observability.journal import Journal
from dstack_emu.observability.spans import HEADER, TraceContext, entered, forget_request, read_header
from dstack_emu.observability.w3c_trace import TRACEPARENT, TRACESTATE, Trace, read_trace
from dstack_emu.transport.grpc_server import details
from dstack_emu.transport.relay import reset_connection

UNRECORDED_PREFIX: Final = "/grpc."
"""The prefix of the paths of gRPC's own services, health and reflection."""

NOT_A_MESSAGE: Final = b"\xff malformed by a fault"

VARINT: Final = 0
DELIMITED: Final = 2
"""Wire types of protobuf."""
_DELIMITED: Final = (FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_MESSAGE)

UnaryHandler = Callable[[Any, Any], Awaitable[Any]]

_PROXIED: Final = {
    400: grpc.StatusCode.INTERNAL,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.UNIMPLEMENTED,
    429: grpc.StatusCode.UNAVAILABLE,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.UNAVAILABLE,
}
"""The code that a gRPC client derives from an HTTP status; all others are UNKNOWN (doc/http-grpc-status-mapping.md)."""


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpcio has no types
    """The interceptor of one service."""

    def __init__(self, service: str, journal: Journal, faults: FaultRules) -> None:
        self._service, self._journal, self._faults = service, journal, faults

    async def intercept_service(self, proceed: Callable[[Any], Awaitable[Any]], called: Any) -> Any:
        """Return the handler of a call, wrapped if the call is to be recorded or faulted. Streams are not wrapped."""
        found, path = await proceed(called), str(called.method)
        is_recorded = self._journal.enabled and not path.startswith(UNRECORDED_PREFIX)
        if not is_recorded and not self._faults.rules:
            return found
        if found is None:
            if is_recorded:
                self._record_unknown(path, called)
            return None
        if found.unary_unary is None:
            return found
        wrap = self._recorded if is_recorded else self._unrecorded
        return grpc.unary_unary_rpc_method_handler(
            wrap(found.unary_unary, path, _trace_context(called), _remote_trace(called)),
            request_deserializer=found.request_deserializer,
            response_serializer=found.response_serializer,
        )

    def _recorded(self, handler: UnaryHandler, path: str, trace: TraceContext, remote: Trace | None) -> UnaryHandler:
        name, journal = path.rpartition("/")[2], self._journal
        parent, number, caller = trace

        async def handle(request: Any, context: Any) -> Any:
            met = self._faults.meet(self._service, name, caller)
            call = journal.begin(self._service, name, parent, number, caller, remote)

            def refused(code: grpc.StatusCode, text: str) -> None:
                call.annotate("grpc", code.name)
                journal.end(call, 400, journal.scrub(text))

            status, recording = None, _RecordingContext(context, refused)
            try:
                with entered(call):
                    if met is None:
                        answer = await handler(request, recording)
                    else:
                        call.annotate("fault", {"id": met[0].id, "kind": met[1].kind})
                        answer = await _apply_fault(*met, path, handler, request, recording)
                status = 200
                call.annotate("grpc", "OK")
                return answer
            finally:
                journal.end(call, status)  # has no effect after a refusal, which ended the call above

        return handle

    def _unrecorded(self, handler: UnaryHandler, path: str, trace: TraceContext, _remote: Trace | None) -> UnaryHandler:
        name = path if path.startswith(UNRECORDED_PREFIX) else path.rpartition("/")[2]

        async def handle(request: Any, context: Any) -> Any:
            met = self._faults.meet(self._service, name, trace[2])
            if met is None:
                return await handler(request, context)
            return await _apply_fault(*met, path, handler, request, context)

        return handle

    def _record_unknown(self, path: str, called: Any) -> None:
        call = self._journal.begin(self._service, path, *_trace_context(called), _remote_trace(called))
        call.annotate("grpc", grpc.StatusCode.UNIMPLEMENTED.name)
        self._journal.end(call, 400, "Method not found!")


class _RecordingContext:
    """A call's context that records a refusal before it is sent to the client."""

    def __init__(self, context: Any, refused: Callable[[grpc.StatusCode, str], None]) -> None:
        self._context, self._refused = context, refused

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def abort(self, code: grpc.StatusCode, text: str = "", trailing_metadata: Any = ()) -> None:
        """Record the refusal, and end the call with its status."""
        self._refused(code, text)
        await self._context.abort(code, text, trailing_metadata)


def _trace_context(called: Any) -> TraceContext:
    """Return the trace context in the call's metadata."""
    header = next((value for key, value in called.invocation_metadata if key == HEADER.lower()), None)
    trace = read_header(header)
    forget_request(header)  # grpcio does not repeat a call
    return trace


def _remote_trace(called: Any) -> Trace | None:
    """Return the trace that the call's metadata name, None if they name none."""
    named: dict[str, list[str]] = {TRACEPARENT: [], TRACESTATE: []}
    for key, value in called.invocation_metadata:
        if key in named:
            named[key].append(value)
    return read_trace(named[TRACEPARENT], named[TRACESTATE])


async def _apply_fault(
    rule: InstalledRule, fault: FaultRule, path: str, handler: UnaryHandler, request: Any, context: Any
) -> Any:
    """Apply a fault to a call and return the answer; raise `asyncio.CancelledError` if the fault drops it."""
    match fault.kind:
        case "delay":
            await until_lifted(rule, fault.seconds)
        case "status":
            text, _ = fault.content or (f"made by fault {rule.id}", "")
            if fault.status < 400:
                return await _message_of(path, text, context)
            await context.abort(_code(fault), details(text))
        case "reset":
            await _reset(rule, context)
        case "hang":
            await rule.lifted.wait()
            await _reset(rule, context)
    answer = await handler(request, context)
    match fault.kind:
        case "drop":
            await context.send_initial_metadata(())
            await _reset(rule, context)
        case "slow":
            await context.send_initial_metadata(())
            await until_lifted(rule, PIECES * fault.seconds)
    if not isinstance(answer, bytes):
        return answer  # gRPC's own health service returns a message, ours return bytes
    match fault.kind:
        case "truncate":
            return answer[: len(answer) // 2]
        case "malformed":
            return NOT_A_MESSAGE
        case "wrong-type":
            return wrong_wire_types(path, answer)
    return answer


def _code(fault: FaultRule) -> grpc.StatusCode:
    if fault.grpc_status is not None:
        return grpc.StatusCode[fault.grpc_status]
    return _PROXIED.get(fault.status, grpc.StatusCode.UNKNOWN)


async def _message_of(path: str, text: str, context: Any) -> bytes:
    """Return the message that a fault's JSON stands for; end the call as INTERNAL if it is not one of the RPC's."""
    method = default_pool().FindMethodByName(path.strip("/").replace("/", "."))
    try:
        return encode_binary(decode_json(GetMessageClass(method.output_type), text.encode()))
    except AttestError as error:
        await context.abort(grpc.StatusCode.INTERNAL, details(f"body of the fault: {error}"))
    raise AssertionError("abort raises")


async def _reset(rule: InstalledRule, context: Any) -> None:
    """Reset the connection; on a socket file, which grpcio serves itself, end only the call."""
    if not reset_connection(context.peer()):
        await context.abort(grpc.StatusCode.UNAVAILABLE, f"the connection is reset: fault {rule.id}")
    raise asyncio.CancelledError


def wrong_wire_types(path: str, answer: bytes) -> bytes:
    """Return an answer whose fields have wrong wire types: a client reads it, and finds no field set."""
    method = default_pool().FindMethodByName(path.strip("/").replace("/", "."))
    try:
        message = GetMessageClass(method.output_type).FromString(answer)
    except DecodeError:
        return NOT_A_MESSAGE
    # The number 0 and an empty text are the same byte, so only the tag in front of it has to change.
    fields = ((field.number, field.cpp_type in _DELIMITED) for field, _ in message.ListFields())
    return b"".join(
        encode_varint(number << 3 | (VARINT if delimited else DELIMITED)) + b"\0" for number, delimited in fields
    )
