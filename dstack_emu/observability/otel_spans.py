"""The journal's calls as spans of OpenTelemetry, with the names and attributes of its semantic conventions.

A call that a service of the stack answered is a SERVER span of that service; a request to a webhook outside the stack,
which only its sender records, is a CLIENT span of the KMS; the boot of a trust domain and a verification of evidence
are INTERNAL spans. What a span says is what the journal's record says, and nothing else.

Import this module only if spans are exported: it needs the extra `otel`.

Source of truth: OpenTelemetry semantic conventions 1.44 for HTTP and RPC
(https://opentelemetry.io/docs/specs/semconv/).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from opentelemetry import trace as otel
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
from opentelemetry.trace.span import NonRecordingSpan

from dstack_emu.attest.version import EMULATOR
from dstack_emu.observability.record import Record, fields_of, inner_of
from dstack_emu.observability.spans import CallSpan, Span, VerificationSpan
from dstack_emu.observability.tracing import SpanTrace

SCOPE: Final = "dstack_emu.journal"
NAMESPACE: Final = "dstack-emu"
MAX_TEXT: Final = 1024
"""Characters of a text in an attribute; longer ones are cut."""
VERIFICATION: Final = "verify evidence"
"""The name of the span of a verification."""
OUTSIDE_SERVICES: Final = ("webhook",)
"""Services outside the stack, whose calls their sender records."""

Attributes = dict[str, Any]
UrlOf = Callable[[str], str]
"""Returns the URL of a service, empty if it has none."""


class SpanMaker:
    """Makes the spans of one stack. `release` is its dstack release."""

    def __init__(self, release: str, url_of: UrlOf) -> None:
        self._release, self._url_of = release, url_of
        self._ids, self._ended = _Ids(), _Ended()
        self._tracers: dict[str, otel.Tracer] = {}

    def spans_of(self, call: CallSpan) -> list[ReadableSpan]:
        """Return the spans of a call from outside, with those of everything that it caused."""
        trace = call.trace
        if isinstance(trace, SpanTrace):
            parent = _context(trace, trace.parent_id, is_remote=True) if trace.parent_id else None
            self._make(call, trace, parent, call.service)
        return self._ended.take()

    def _make(self, span: Span, trace: SpanTrace, parent: Context | None, part: str) -> None:
        record, is_call = fields_of(span, trace.record_id), isinstance(span, CallSpan)
        if isinstance(span, CallSpan):
            part = span.caller if span.service in OUTSIDE_SERVICES else span.service
        ended = max(trace.ended, trace.began)
        self._ids.trace_id, self._ids.span_id = int(trace.trace_id, 16), int(trace.span_id, 16)
        made = self._tracer(part).start_span(
            _name(record, trace) if is_call else VERIFICATION,
            context=parent or Context(),
            kind=_kind(record, trace),
            attributes=dict(_clean(self._attributes(record, trace))),
            start_time=trace.began,
        )
        for name, said in _events(record, is_verification=isinstance(span, VerificationSpan)):
            made.add_event(name, dict(_clean(said)), timestamp=ended)
        if (error := _error(record)) is not None:
            made.set_status(Status(StatusCode.ERROR, _text(error)))
        above = _context(trace, trace.span_id, is_remote=False)
        for inner in inner_of(span):
            if isinstance(inner.trace, SpanTrace):
                inner.trace.ended = inner.trace.ended or ended  # its caller gave up
                self._make(inner, inner.trace, above, part)
        made.end(end_time=ended)

    def _tracer(self, part: str) -> otel.Tracer:
        """Return the tracer of a part of the stack, which is a service of its own."""
        tracer = self._tracers.get(part)
        if tracer is None:
            about = {
                "service.name": _text(part),
                "service.namespace": NAMESPACE,
                "service.version": EMULATOR,
                "dstack.release": self._release,
            }
            provider = TracerProvider(
                sampler=ALWAYS_ON,  # whether a trace is recorded was decided when it began
                resource=Resource.create(about),
                shutdown_on_exit=False,
                id_generator=self._ids,
            )
            provider.add_span_processor(self._ended)
            tracer = self._tracers[part] = provider.get_tracer(SCOPE, EMULATOR)
        return tracer

    def _attributes(self, record: Record, trace: SpanTrace) -> Iterator[tuple[str, Any]]:
        yield "dstack.record", record["id"]
        for key in ("caller", "outcome", "time"):
            yield f"dstack.{key}", record.get(key)
        yield from _conclusions(record)
        for key, value in record.get("chain", {}).items():
            yield f"dstack.chain.{key}", value
        if record.get("outcome", "ok") != "ok":
            yield "error.type", _error_type(record)
        if "grpc" in record:
            yield from _rpc("grpc", record["call"], record["grpc"])
        elif trace.method:
            yield from _http(record, trace)
        if "call" in record:
            url = urlsplit(trace.url or self._url_of(record["service"]))
            yield "server.address", url.hostname or url.path or None
            yield "server.port", url.port
            yield "url.scheme", url.scheme if trace.method and url.hostname else None


class _Ids(IdGenerator):
    """The ids of the next span."""

    trace_id = span_id = 0

    def generate_span_id(self) -> int:
        return self.span_id

    def generate_trace_id(self) -> int:
        return self.trace_id


class _Ended(SpanProcessor):
    """Collects spans as they end."""

    def __init__(self) -> None:
        self._spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self._spans.append(span)

    def take(self) -> list[ReadableSpan]:
        """Return the spans since the last time."""
        spans, self._spans = self._spans, []
        return spans


def _context(trace: SpanTrace, span_id: str, *, is_remote: bool) -> Context:
    """Return the context of what a span causes."""
    state = TraceState.from_header([trace.state]) if trace.state else None
    ids = int(trace.trace_id, 16), int(span_id, 16)
    return otel.set_span_in_context(
        NonRecordingSpan(SpanContext(*ids, is_remote=is_remote, trace_flags=TraceFlags(trace.flags), trace_state=state))
    )


def _name(record: Record, trace: SpanTrace) -> str:
    call = record["call"]
    return _text(f"{trace.method} {call}" if trace.method and call.startswith("/") else call)


def _kind(record: Record, trace: SpanTrace) -> SpanKind:
    if "call" not in record or not (trace.method or "grpc" in record):
        return SpanKind.INTERNAL
    return SpanKind.CLIENT if record["service"] in OUTSIDE_SERVICES else SpanKind.SERVER


def _http(record: Record, trace: SpanTrace) -> Iterator[tuple[str, Any]]:
    yield "http.request.method", trace.method
    yield "url.path", trace.path
    yield "http.response.status_code", record["status"]
    if record["service"] == "chain":
        yield from _rpc("jsonrpc", record["call"], None)
    elif not record["call"].startswith("/"):
        yield from _rpc("prpc", record["call"], None)


def _rpc(system: str, method: str, status: str | None) -> Iterator[tuple[str, Any]]:
    # The conventions have renamed the first; most tools still look for the former name.
    yield "rpc.system.name", system
    yield "rpc.system", system
    yield "rpc.method", method
    yield "rpc.response.status_code", status


def _conclusions(record: Record) -> Iterator[tuple[str, Any]]:
    """Yield what the record concludes, for queries: the decision, its rule, and the app."""
    decision, verdict, receiver = record.get("decision"), record.get("verdict"), record.get("released", {}).get("to")
    if decision is not None:
        yield "dstack.decision", "allowed" if decision["allowed"] is True else "denied"
        yield "dstack.rule", decision.get("rule")
        yield "dstack.reason", decision.get("reason")
        yield "dstack.app_id", decision.get("asked", {}).get("app_id")
    elif verdict is not None:
        yield "dstack.decision", "valid" if verdict["is_valid"] else "invalid"
        yield "dstack.reason", verdict.get("reason")
        yield "dstack.app_id", verdict.get("app_id")
    elif receiver is not None:
        yield "dstack.app_id", receiver.get("app_id")
    if fault := record.get("fault"):
        yield "dstack.fault", fault["kind"]
    for key in ("attestation", "tcb_status"):
        yield f"dstack.{key}", record.get(key)


def _events(record: Record, *, is_verification: bool) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Yield the events of a span, each with what the record has of it."""
    if is_verification:
        yield "dstack.verification", list(_flat("dstack", {k: v for k, v in record.items() if k != "id"}))
    for key in ("fault", "decision", "verdict", "released"):
        if key in record:
            yield f"dstack.{key}", list(_flat("dstack", record[key]))


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _flat(f"{prefix}.{key}", each)
    else:
        yield prefix, value


def _error(record: Record) -> str | None:
    """Return the text of the error if a call was refused, denied or not answered, or evidence refused; else None."""
    said: str = record.get("error", "")
    if record.get("attestation") == "refused":
        return said
    if record.get("outcome", "ok") == "ok":
        return None
    return said or (record.get("decision") or record.get("verdict") or {}).get("reason") or ""


def _error_type(record: Record) -> str:
    return str(record["status"]) if record["outcome"] == "refused" and "grpc" not in record else _kind_of_error(record)


def _kind_of_error(record: Record) -> str:
    return str(record["grpc"]) if record["outcome"] == "refused" else str(record["outcome"])


def _clean(attributes: Any) -> Iterator[tuple[str, Any]]:
    """Leave out what is not known, and make texts valid."""
    for key, value in attributes:
        if isinstance(value, str):
            yield key, _text(value)
        elif isinstance(value, list) and all(isinstance(each, str) for each in value):
            yield key, [_text(each) for each in value]
        elif isinstance(value, list | Mapping):  # an attribute has no values of several types
            yield key, _text(json.dumps(value))
        elif value is not None:
            yield key, value


def _text(text: str) -> str:
    """Return a text as valid UTF-8: a path may have any bytes, which OTLP cannot carry."""
    return text[:MAX_TEXT].encode(errors="replace").decode()
