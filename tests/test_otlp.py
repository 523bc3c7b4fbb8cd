"""Traces of other programs continue in a stack, and a collector of OpenTelemetry gets its calls as spans."""

import asyncio
import contextlib
import functools
import logging
import re
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc
import pytest
import pytest_asyncio
from opentelemetry import propagate
from opentelemetry.sdk.trace import TracerProvider

from dstack_emu.cli.commands.stack_options import stack_config
from dstack_emu.cli.main import parser
from dstack_emu.deployment.clock import StackClock
from dstack_emu.deployment.errors import StackError
from dstack_emu.observability.journal import Journal
from dstack_emu.observability.otlp import QUEUE, OtlpExport
from dstack_emu.observability.spans import OUTSIDE, CallSpan, enter, headers_of, leave, read_header
from dstack_emu.observability.tracing import SpanTrace, Tracer, traces_url
from dstack_emu.observability.w3c_trace import read_trace
from dstack_emu.stack import Stack
from tests.collector import Collector, Received, running_collector
from tests.own_stack import own_stack
from tests.their_webhook import TheirWebhook, their_webhook

pytestmark = pytest.mark.asyncio(loop_scope="module")

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
STATE = "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"


@pytest.fixture(scope="module")
def webhook() -> Any:
    """A webhook of a user, which allows everybody."""
    with their_webhook("*") as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def collector() -> AsyncIterator[Collector]:
    """A collector."""
    async with running_collector() as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(collector: Collector, webhook: TheirWebhook) -> AsyncIterator[Stack]:
    """A stack that exports, whose source KMS asks the user's webhook."""
    async with own_stack(otlp=collector.url, grpc=True, webhooks={"src": webhook.url}) as running:
        yield running


async def boot(stack: Stack, **headers: str) -> int:
    """Boot the app by the control API, as any HTTP client does; return the status."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(stack.services["control"] + "/guests/app/boot", json={}, headers=headers) as answer,
    ):
        return answer.status


def of(spans: list[Received], service: str, name: str) -> Received:
    """Return the first span of a name that a service recorded."""
    return next(each for each in spans if each.service == service and each.span.name == name)


async def test_spans_of_every_hop_are_below_the_users_own(stack: Stack, collector: Collector) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("their test")
    headers: dict[str, str] = {}
    with tracer.start_as_current_span("their test") as theirs:
        propagate.inject(headers)
        assert await boot(stack, **headers) == 200
    context = theirs.get_span_context()
    spans = await collector.trace(f"{context.trace_id:032x}", "Boot")
    root, key = of(spans, "app", "Boot"), of(spans, "kms-src", "GetAppKey")
    assert root.parent == f"{context.span_id:016x}"
    assert (root.kind, key.kind, key.parent) == ("INTERNAL", "SERVER", root.id)
    by_id = {each.id: each for each in spans}
    assert all(each.parent in by_id for each in spans if each is not root)
    asked = next(each for each in spans if each.parent == key.id and each.span.name == "POST /bootAuth/app")
    verified = next(each for each in spans if each.parent == key.id and each.span.name == "verify evidence")
    assert (asked.kind, asked.service) == ("CLIENT", "kms-src")
    collateral = [each for each in spans if each.parent == verified.id]
    assert {each.service for each in collateral} <= {"pccs"}
    for inner in spans:
        outer = by_id.get(inner.parent)
        if outer is not None:
            assert outer.span.start_time_unix_nano <= inner.span.start_time_unix_nano
            assert inner.span.end_time_unix_nano <= outer.span.end_time_unix_nano


async def test_span_says_what_the_conventions_and_the_journal_have(
    stack: Stack, collector: Collector, webhook: TheirWebhook
) -> None:
    assert await boot(stack, traceparent=PARENT) == 200
    spans = await collector.trace(TRACE_ID, "Boot")
    key = of(spans, "kms-src", "GetAppKey")
    app_id = stack.app.domain.app_id.hex()
    host, _, port = stack.services["kms-src"].rpartition("://")[2].rpartition(":")
    said = key.attributes
    assert said.pop("dstack.time").endswith("Z")
    record = stack.control.journal.find("GetAppKey")[-1]
    assert said == {
        "http.request.method": "POST",
        "url.path": "/prpc/GetAppKey",
        "url.scheme": "https",
        "http.response.status_code": 200,
        "rpc.system.name": "prpc",
        "rpc.system": "prpc",
        "rpc.method": "GetAppKey",
        "server.address": host,
        "server.port": int(port),
        "dstack.record": record["id"],
        "dstack.caller": "app",
        "dstack.outcome": "ok",
        "dstack.app_id": app_id,
    }
    assert key.events["dstack.released"]["dstack.to.app_id"] == app_id
    assert key.resource["service.namespace"] == "dstack-emu"
    assert key.resource["dstack.release"] == stack.config.release
    async with aiohttp.ClientSession() as session, session.get(stack.services["control"] + "/metrics") as answer:
        assert re.search(r'^dstack_emu_otlp_spans_total{result="sent"} [1-9]', await answer.text(), re.MULTILINE)
    asked = of(spans, "kms-src", "POST /bootAuth/app")
    record_of_decision = stack.control.journal.find("/bootAuth/app")[-1]["decision"]
    assert asked.attributes["server.port"] == webhook.server_port
    assert asked.attributes["dstack.decision"] == "allowed"
    assert asked.events["dstack.decision"]["dstack.asked.mr_aggregated"] == record_of_decision["asked"]["mr_aggregated"]
    verified = of(spans, "kms-src", "verify evidence")
    assert verified.events["dstack.verification"]["dstack.tcb_status"] == "UpToDate"


async def test_webhook_of_the_user_gets_the_span_that_asks_it_and_the_state(
    stack: Stack, collector: Collector, webhook: TheirWebhook
) -> None:
    webhook.traces.clear()
    trace_id = TRACE_ID[::-1]
    assert await boot(stack, traceparent=f"00-{trace_id}-{SPAN_ID}-01", tracestate=STATE) == 200
    spans = await collector.trace(trace_id, "Boot")
    asking = {each.id for each in spans if each.kind == "CLIENT"}
    sent = {(f"00-{trace_id}-{span_id}-01", STATE) for span_id in asking}
    assert set(webhook.traces) == sent
    assert {each.span.trace_state for each in spans} == {STATE}


async def test_refusal_is_an_error_with_its_status_and_text(
    stack: Stack, collector: Collector, webhook: TheirWebhook
) -> None:
    webhook.allowed = set()
    trace_id = "c" * 32
    try:
        assert await boot(stack, traceparent=f"00-{trace_id}-{SPAN_ID}-01") == 403
    finally:
        webhook.allowed = {"*"}
    spans = await collector.trace(trace_id, "Boot")
    refused, denied = of(spans, "kms-src", "GetTempCaCert"), of(spans, "kms-src", "POST /bootAuth/kms")
    for span in (refused, denied):
        assert span.span.status.code == span.span.status.STATUS_CODE_ERROR
        assert "not on their list" in span.span.status.message
    assert refused.attributes["error.type"] == str(refused.attributes["http.response.status_code"])
    assert denied.attributes["error.type"] == "denied"
    assert denied.attributes["dstack.reason"] == "not on their list"


async def test_call_of_the_agent_goes_on_to_kms_and_webhook(
    stack: Stack, collector: Collector, webhook: TheirWebhook
) -> None:
    trace_id = "a" * 32
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(stack.app.dstack_sock))) as session,
        session.post(
            "http://dstack/GetTlsKey",
            json={"subject": "app"},
            headers={"Traceparent": f"00-{trace_id}-{SPAN_ID}-01"},
        ) as answer,
    ):
        assert answer.status == 200, await answer.text()
    spans = await collector.trace(trace_id, "GetTlsKey")
    key, signed = of(spans, "app", "GetTlsKey"), of(spans, "kms-src", "SignCert")
    assert (key.parent, signed.parent) == (SPAN_ID, key.id)
    assert (webhook.traces[-1][0] or "").startswith(f"00-{trace_id}-")


async def test_call_that_the_control_port_makes_belongs_to_the_trace_of_its_request(
    stack: Stack, collector: Collector, webhook: TheirWebhook
) -> None:
    trace_id = "b" * 32
    await stack.control.add_kms("third", webhook=webhook.url)
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            stack.services["control"] + "/kms/third/onboard",
            json={"source": "src"},
            headers={"traceparent": f"00-{trace_id}-{SPAN_ID}-01"},
        ) as answer,
    ):
        assert answer.status == 200, await answer.text()
    spans = await collector.trace(trace_id, "Onboard")
    onboard, key = of(spans, "kms-third", "Onboard"), of(spans, "kms-src", "GetKmsKey")
    assert onboard.parent == SPAN_ID
    assert key.parent == onboard.id


async def test_call_over_grpc_belongs_to_the_trace_of_its_metadata(stack: Stack, collector: Collector) -> None:
    trace_id = "d" * 32
    async with grpc.aio.insecure_channel(stack.grpc["app-grpc"]) as channel:
        info = channel.unary_unary("/dstack_guest.DstackGuest/Info")
        await info(b"", metadata=(("traceparent", f"00-{trace_id}-{SPAN_ID}-01"),))
    (span,) = await collector.trace(trace_id, "Info")
    assert (span.parent, span.service, span.kind) == (SPAN_ID, "app", "SERVER")
    assert span.attributes["rpc.system.name"] == "grpc"
    assert span.attributes["rpc.response.status_code"] == "OK"


async def test_trace_that_is_not_sampled_is_not_exported_but_passed_on(
    stack: Stack, collector: Collector, webhook: TheirWebhook
) -> None:
    webhook.traces.clear()
    unsampled, sampled = "e" * 32, "f" * 32
    assert await boot(stack, traceparent=f"00-{unsampled}-{SPAN_ID}-00") == 200
    assert {(parent or "")[:36] for parent, _ in webhook.traces} == {f"00-{unsampled}-"}
    assert {(parent or "")[-3:] for parent, _ in webhook.traces} == {"-00"}
    assert await boot(stack, traceparent=f"00-{sampled}-{SPAN_ID}-01") == 200
    await collector.trace(sampled, "Boot")
    assert not [each for each in collector.spans if each.trace_id == unsampled]


async def test_no_span_has_a_key(stack: Stack, collector: Collector) -> None:
    await collector.until(lambda: collector.bodies)
    provided = stack.app.agent.capture()
    assert provided is not None
    secret = provided.keys.disk_crypt_key
    exported = b"".join(collector.bodies)
    assert stack.app.domain.app_id.hex().encode() in exported
    assert secret not in exported
    assert secret.hex().encode() not in exported


async def test_without_export_a_trace_is_passed_on_as_it_came_and_otherwise_nothing_is_sent(
    webhook: TheirWebhook,
) -> None:
    webhook.traces.clear()
    async with own_stack(webhooks={"src": webhook.url}) as stack:
        assert set(webhook.traces) == {(None, None)}
        webhook.traces.clear()
        assert await boot(stack, traceparent=PARENT, tracestate=STATE) == 200
        assert set(webhook.traces) == {(PARENT, STATE)}
        webhook.traces.clear()
        assert await boot(stack, traceparent=PARENT.upper()) == 200
        assert set(webhook.traces) == {(None, None)}


@pytest.mark.parametrize(
    "parents",
    [
        [],
        [PARENT, PARENT],
        [PARENT.upper()],
        [PARENT + "-00"],
        [PARENT[:-1]],
        [PARENT.replace("00-", "ff-", 1)],
        [PARENT.replace("00-", "0x-", 1)],
        [f"00-{'0' * 32}-{SPAN_ID}-01"],
        [f"00-{TRACE_ID}-{'0' * 16}-01"],
        [f"00-{TRACE_ID}-{SPAN_ID}-1"],
        [f"cc-{TRACE_ID}-{SPAN_ID}-01.what"],
        ["\u0660\u0660-" + PARENT[3:]],
        [""],
    ],
)
async def test_malformed_traceparent_is_ignored(parents: list[str]) -> None:
    assert read_trace(parents, [STATE]) is None


@pytest.mark.parametrize(
    ("parent", "sent"),
    [
        (PARENT, PARENT),
        (f"  {PARENT}\t", PARENT),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01-what-comes-later", PARENT),
        (f"cc-{TRACE_ID}-{SPAN_ID}-03", PARENT[:-1] + "3"),
        (f"00-{TRACE_ID}-{SPAN_ID}-ff", PARENT[:-1] + "3"),
    ],
)
async def test_traceparent_of_a_later_version_is_read_as_the_known_one(parent: str, sent: str) -> None:
    trace = read_trace([parent], [])
    assert trace is not None
    assert trace.headers == {"traceparent": sent}


@pytest.mark.parametrize(
    ("states", "sent"),
    [
        ([STATE], STATE),
        (["rojo=1 , congo=2", "a@b=3"], "rojo=1,congo=2,a@b=3"),
        (["rojo=1,,congo=2"], "rojo=1,congo=2"),
        ([",".join(f"k{number}=v" for number in range(33))], None),
        (["rojo=1,rojo=2"], None),
        (["Rojo=1"], None),
        (["rojo"], None),
        (["rojo=\x7f"], None),
        ([f"{'k' * 257}=1"], None),
    ],
)
async def test_tracestate_is_passed_on_if_it_is_valid(states: list[str], sent: str | None) -> None:
    trace = read_trace([PARENT], states)
    assert trace is not None
    assert trace.headers.get("tracestate") == sent


def _call(journal: Journal, call: str = "/inner") -> CallSpan:
    """Record a call from outside, and one that it causes."""
    outer = journal.begin("s", "Outer", None, 0, OUTSIDE)
    before = enter(outer)
    header = headers_of("s")()["X-Dstack-Emu-Trace"]
    journal.end(journal.begin("t", call, *read_header(header)), 200)
    leave(before)
    journal.end(outer, 200)
    return outer


async def test_ids_are_the_same_whenever_the_journal_is() -> None:
    def ids(seed: bytes, moment: float) -> list[str]:
        clock = StackClock()
        clock.freeze(moment)
        journal = Journal(clock, kept=5)
        journal.tracer = Tracer(seed, lambda span: None)
        traces = [each.trace for outer in (_call(journal), _call(journal)) for each in (outer, *outer.inner)]
        return [text for each in traces if isinstance(each, SpanTrace) for text in (each.trace_id, each.span_id)]

    first = ids(b"one", 1.0)
    assert len(set(first)) == 6
    assert ids(b"one", 1.0) == first
    assert not set(ids(b"two", 1.0)) & set(first)
    assert not set(ids(b"one", 2.0)) & set(first)


@contextlib.asynccontextmanager
async def exporting(url: str) -> AsyncIterator[tuple[OtlpExport, Journal]]:
    """Export a journal without a stack."""
    export, journal = (
        OtlpExport(traces_url(url), "0.6", lambda service: ""),
        Journal(StackClock(), kept=5),
    )
    journal.tracer = Tracer(b"", export.put)
    try:
        yield export, journal
    finally:
        await export.close()


def _is_refused(collector: Collector, times: int) -> bool:
    return collector.refused == times


async def test_collector_that_fails_is_reported_once_and_again_when_it_recovers(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    before = collector.refused
    collector.status = 400
    async with exporting(collector.url) as (export, journal):
        for expected in (1, 2):
            _call(journal)
            await collector.until(functools.partial(_is_refused, collector, before + expected))
        collector.status, count = 200, len(collector.spans)
        _call(journal)
        await collector.until(lambda: len(collector.spans) > count)
    assert (export.sent, export.lost, export.dropped) == (2, 4, 0)
    failed, recovered, total = (each.getMessage() for each in caplog.records if each.name == "dstack_emu.otlp")
    assert failed.endswith("takes no spans: Failed to export spans batch code: 400, reason: Bad Request")
    assert recovered.endswith("takes spans again; 4 were lost so far")
    assert total.endswith("took 2 spans; 4 spans, and 0 calls with all their spans, were lost")
    assert not [each for each in caplog.records if each.name.startswith("opentelemetry")]


async def test_calls_for_which_the_queue_has_no_place_are_dropped_and_counted(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.gate.clear()
    asked, count = collector.asked, len(collector.spans)
    async with exporting(collector.url) as (export, journal):
        journal.end(journal.begin("s", "First", None, 0, OUTSIDE), 200)
        await collector.until(lambda: collector.asked > asked)  # from now on the export waits for an answer
        for _ in range(QUEUE + 3):
            journal.end(journal.begin("s", "C", None, 0, OUTSIDE), 200)
        assert export.dropped == 3
        collector.gate.set()
        await collector.until(lambda: len(collector.spans) == count + 1 + QUEUE)
    first, total = (each.getMessage() for each in caplog.records if each.name == "dstack_emu.otlp")
    assert "further ones are dropped" in first
    assert total.endswith("0 spans, and 3 calls with all their spans, were lost")


async def test_collector_that_never_answers_does_not_keep_the_end_and_all_calls_count_as_lost(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstack_emu.observability.otlp.DEADLINE", 0.1)
    async with running_collector() as silent:
        silent.gate.clear()
        before = set(threading.enumerate())
        async with exporting(silent.url) as (_, journal):
            _call(journal)
            await silent.until(lambda: silent.asked)
            _call(journal)
        silent.gate.set()
        (export,) = {thread for thread in threading.enumerate() if thread.name == "otlp"} - before
        await asyncio.to_thread(export.join)
        assert silent.asked == 1
    (total,) = (each.getMessage() for each in caplog.records if each.name == "dstack_emu.otlp")
    assert not [each for each in caplog.records if each.name.startswith("opentelemetry")]
    assert total.endswith("took 0 spans; 0 spans, and 2 calls with all their spans, were lost")


async def test_value_of_several_types_is_exported_as_json(collector: Collector) -> None:
    count = len(collector.spans)
    async with exporting(collector.url) as (export, journal):
        call = journal.begin("chain", "eth_call", None, 0, OUTSIDE)
        call.annotate("chain", {"function": "isAppAllowed", "block": None, "result": [True, "why"]})
        journal.end(call, 200)
    assert export.sent == 1
    said = collector.spans[count].attributes
    assert (said["dstack.chain.function"], said["dstack.chain.result"]) == ("isAppAllowed", '[true, "why"]')
    assert "dstack.chain.block" not in said


async def test_text_that_is_no_unicode_is_exported(collector: Collector) -> None:
    count = len(collector.spans)
    async with exporting(collector.url) as (export, journal):
        _call(journal, "/\udcff" + "x" * 5000)
    assert (export.sent, export.lost) == (2, 0)
    (inner,) = [each for each in collector.spans[count:] if each.service == "t"]
    assert inner.span.name.startswith("/?xxx")
    assert len(inner.span.name) == 1024


async def test_option_without_a_url_takes_that_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(*words: str) -> str | None:
        arguments = parser(["exec"]).parse_args(["exec", *words, "--", "env"])
        assert arguments.words[-1] == "env"
        return stack_config(arguments, free_ports=True).otlp

    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert given("--otlp") == "http://localhost:4318"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector.example/otlp")
    assert given("--otlp") == "https://collector.example/otlp"
    assert given("--otlp", "http://other:1") == "http://other:1"
    assert given() is None
    assert traces_url("https://collector.example/otlp/") == "https://collector.example/otlp/v1/traces"
    assert traces_url("https://collector.example/v1/traces") == "https://collector.example/v1/traces"


async def test_stack_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dstack_emu.observability.otlp", None)
    with pytest.raises(StackError, match=r"pip install 'dstack-emu\[otel\]"):
        async with own_stack(otlp="http://127.0.0.1:1"):
            pass


async def test_url_that_is_none_is_refused_without_its_password() -> None:
    with pytest.raises(StackError, match=r"--otlp: the http or https URL of a collector expected.*got 'ftp://host'"):
        async with own_stack(otlp="ftp://me:secret@host"):
            pass


async def test_stack_starts_and_ends_without_a_collector(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
    async with own_stack(otlp="http://127.0.0.1:1", fresh=True) as stack:
        await stack.control.health()
    failed, total = (each.getMessage() for each in caplog.records if each.name == "dstack_emu.otlp")
    assert failed.startswith("--otlp: http://127.0.0.1:1/v1/traces takes no spans: ")
    assert ("HTTPConnection" in failed, len(failed) < 160) == (False, True)
    assert "took 0 spans" in total
