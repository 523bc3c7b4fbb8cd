"""The interceptor of every gRPC service: it records calls and applies faults, as `observability.middleware` does.

A grpc.aio interceptor wraps a call's handler, so the requests that the handler sends run in the context in which the
call's span was entered. Health and reflection are not recorded, as `/health` is not.

What a fault does here is what it does over HTTP, or the nearest to it: gRPC has one message where HTTP has a body, and
its statuses are its own.

Imported only if gRPC is switched on: grpcio costs time and memory.
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

from dstack_emu.attest.varint import encode_varint
from dstack_emu.observability.fault_effects import PIECES, until_lifted
from dstack_emu.observability.fault_rules import FaultRule, FaultRules, InstalledRule
from dstack_emu.observability.journal import Journal
from dstack_emu.observability.spans import HEADER, Origin, answered, entered, read_header
from dstack_emu.transport.grpc_server import details
from dstack_emu.transport.relay import reset_connection

UNNOTED: Final = "/grpc."
"""What the names of gRPC's own services begin with."""

NOT_A_MESSAGE: Final = b"\xff malformed by a fault"

VARINT: Final = 0
DELIMITED: Final = 2
"""Wire types of protobuf."""
_DELIMITED: Final = (FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_MESSAGE)

Handler = Callable[[Any, Any], Awaitable[Any]]

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
"""What a client of gRPC takes an HTTP status for; all others are UNKNOWN (gRPC, doc/http-grpc-status-mapping.md)."""


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpcio has no types
    """One service's interceptor."""

    def __init__(self, service: str, journal: Journal, faults: FaultRules) -> None:
        self._service, self._journal, self._faults = service, journal, faults

    async def intercept_service(self, proceed: Callable[[Any], Awaitable[Any]], called: Any) -> Any:
        """Find the handler of a call, and wrap it where there is something to do; streams go on as they are."""
        found, path = await proceed(called), str(called.method)
        noted = self._journal.enabled and not path.startswith(UNNOTED)
        if not noted and not self._faults.rules:
            return found
        if found is None:
            if noted:
                self._note_unknown(path, called)
            return None
        if found.unary_unary is None:
            return found
        around = self._noted if noted else self._unnoted
        return grpc.unary_unary_rpc_method_handler(
            around(found.unary_unary, path, _trace(called)),
            request_deserializer=found.request_deserializer,
            response_serializer=found.response_serializer,
        )

    def _noted(self, handler: Handler, path: str, trace: Origin) -> Handler:
        name, journal = path.rpartition("/")[2], self._journal
        asking, place, caller = trace

        async def handle(request: Any, context: Any) -> Any:
            met = self._faults.meet(self._service, name, caller)
            call = journal.begin(self._service, name, asking, place, caller)

            def refused(code: grpc.StatusCode, text: str) -> None:
                call.note("grpc", code.name)
                journal.end(call, 400, journal.scrub(text))

            status, noting = None, _RecordingContext(context, refused)
            try:
                with entered(call):
                    if met is None:
                        answer = await handler(request, noting)
                    else:
                        call.note("fault", {"id": met[0].id, "kind": met[1].kind})
                        answer = await _misbehave(*met, path, handler, request, noting)
                status = 200
                call.note("grpc", "OK")
                return answer
            finally:
                journal.end(call, status)  # but for a refusal, which is noted already

        return handle

    def _unnoted(self, handler: Handler, path: str, trace: Origin) -> Handler:
        name = path if path.startswith(UNNOTED) else path.rpartition("/")[2]

        async def handle(request: Any, context: Any) -> Any:
            met = self._faults.meet(self._service, name, trace[2])
            if met is None:
                return await handler(request, context)
            return await _misbehave(*met, path, handler, request, context)

        return handle

    def _note_unknown(self, path: str, called: Any) -> None:
        call = self._journal.begin(self._service, path, *_trace(called))
        call.note("grpc", grpc.StatusCode.UNIMPLEMENTED.name)
        self._journal.end(call, 400, "Method not found!")


class _RecordingContext:
    """A call's context that tells of a refusal before the client hears of it."""

    def __init__(self, context: Any, refused: Callable[[grpc.StatusCode, str], None]) -> None:
        self._context, self._refused = context, refused

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def abort(self, code: grpc.StatusCode, text: str = "", trailing_metadata: Any = ()) -> None:
        """End the call with a status."""
        self._refused(code, text)
        await self._context.abort(code, text, trailing_metadata)


def _trace(called: Any) -> Origin:
    """Span, place and caller, from the call's metadata."""
    header = next((value for key, value in called.invocation_metadata if key == HEADER.lower()), None)
    asked = read_header(header)
    answered(header)  # grpcio sends nothing twice
    return asked


async def _misbehave(
    rule: InstalledRule, fault: FaultRule, path: str, handler: Handler, request: Any, context: Any
) -> Any:
    """Answer a call as a fault wants it; raise `asyncio.CancelledError` where it gets no answer."""
    match fault.kind:
        case "delay":
            await until_lifted(rule, fault.seconds)
        case "status":
            text = f"made by fault {rule.id}" if fault.body is None else fault.body
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
        return answer  # health's, which is no service of ours
    match fault.kind:
        case "truncate":
            return answer[: len(answer) // 2]
        case "malformed":
            return NOT_A_MESSAGE
        case "wrong-type":
            return wrong_types(path, answer)
    return answer


def _code(fault: FaultRule) -> grpc.StatusCode:
    if fault.grpc_status is not None:
        return grpc.StatusCode[fault.grpc_status]
    return _PROXIED.get(fault.status, grpc.StatusCode.UNKNOWN)


async def _reset(rule: InstalledRule, context: Any) -> None:
    """End the connection; on a socket file, which grpcio serves itself, the call alone."""
    if not reset_connection(context.peer()):
        await context.abort(grpc.StatusCode.UNAVAILABLE, f"the connection is reset: fault {rule.id}")
    raise asyncio.CancelledError


def wrong_types(path: str, answer: bytes) -> bytes:
    """An answer whose fields have other wire types than they should: whoever reads it finds them all absent."""
    method = default_pool().FindMethodByName(path.strip("/").replace("/", "."))
    try:
        message = GetMessageClass(method.output_type).FromString(answer)
    except DecodeError:
        return NOT_A_MESSAGE
    # A number 0 and an empty text are the same byte: only the tag before it tells them apart.
    fields = ((field.number, field.cpp_type in _DELIMITED) for field, _ in message.ListFields())
    return b"".join(
        encode_varint(number << 3 | (VARINT if delimited else DELIMITED)) + b"\0" for number, delimited in fields
    )
