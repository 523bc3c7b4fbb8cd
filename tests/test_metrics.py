"""The metrics of a stack, as Prometheus reads them: both formats are parsed by Prometheus' own library."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics

from dstack_emu.attest.version import EMULATOR
from dstack_emu.control.schemas import ControlError
from dstack_emu.deployment.clock import StackClock
from dstack_emu.observability.journal import Journal
from dstack_emu.observability.metrics import MAX_KEYS, Metrics
from dstack_emu.observability.spans import OUTSIDE
from dstack_emu.stack import Stack
from tests.own_stack import own_stack

pytestmark = pytest.mark.asyncio(loop_scope="module")

OPENMETRICS = "application/openmetrics-text; version=1.0.0"

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[Stack]:
    """A ready stack."""
    async with own_stack() as running:
        yield running


async def scraped(stack: Stack, accept: str = "", **headers: str) -> tuple[int, str, str]:
    """Ask for the metrics; return status, content type and text."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(stack.services["control"] + "/metrics", headers={"Accept": accept, **headers}) as answer,
    ):
        return answer.status, answer.headers["Content-Type"], await answer.text()


async def samples(stack: Stack) -> Samples:
    """Return every sample by its name and its labels."""
    families = parser.text_string_to_metric_families((await scraped(stack))[2])
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: Any) -> float:
    """Return one of them, 0 if there is none."""
    return found.get((f"dstack_emu_{name}", frozenset(labels.items())), 0.0)


async def over_http(url: str, body: Any) -> int:
    async with aiohttp.ClientSession() as session, session.post(url, json=body, ssl=False) as answer:
        return answer.status


async def test_calls_are_counted_as_the_journal_has_them(stack: Stack) -> None:
    journal = stack.control.journal
    found = await samples(stack)
    for service in ("kms-src", "auth-src", "pccs", "agent-src"):
        counted = sum(v for (name, labels), v in found.items() if _is_of(name, labels, service))
        assert counted == journal.calls(service=service) > 0
    assert value(found, "journal_records_total") == value(found, "journal_kept_records") == journal.position
    assert value(found, "kms_phase", service="kms-src", phase="runtime") == 1
    assert value(found, "build_info", version=EMULATOR, release="0.6", dstack_version="0.6.0") == 1
    assert value(found, "open_connections", service="control") >= 1
    assert found[("process_open_fds", frozenset())] > 0


def _is_of(name: str, labels: frozenset[tuple[str, str]], service: str) -> bool:
    return name == "dstack_emu_calls_total" and ("service", service) in labels


async def test_denial_fault_and_refused_evidence_are_counted_by_rule_kind_and_result(stack: Stack) -> None:
    control = stack.control
    before = await samples(stack)
    control.deny("src", "app")
    with pytest.raises(ControlError):
        await control.boot_guest("app")
    control.allow("src", "app")
    control.set_platform("host of app", pck_revoked=True)
    with pytest.raises(ControlError):
        await control.boot_guest("app")
    control.add_fault(service="auth-src", call="/bootAuth/kms", kind="status", status=503, times=1)
    with pytest.raises(ControlError):
        await control.boot_guest("app")
    decision = control.journal.find("/bootAuth/app", outcome="denied")[-1]["decision"]
    await control.reset()
    after = await samples(stack)

    def grew(name: str, **labels: Any) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert grew("decisions_total", service="auth-src", about="app", decision="denied", rule=decision["rule"]) == 1
    assert grew("faults_met_total", service="auth-src", kind="status") == 1
    assert grew("calls_total", service="auth-src", call="/bootAuth/kms", outcome="refused") == 1
    assert grew("calls_total", service="app", call="Boot", outcome="refused") == 3
    assert grew("call_duration_seconds_count", service="app", call="Boot") == 3
    assert grew("verifications_total", service="kms-src", result="refused", tcb_status="") == 1


async def test_names_of_unknown_calls_share_one_series_whoever_invents_them(stack: Stack) -> None:
    before = await samples(stack)
    app = stack.services["app"]
    for path in ("/a", "/b", "/prpc/Invented", "/prpc/Also.Invented", "/%22%0a"):
        assert await over_http(app + path, {}) in (400, 404)
    after = await samples(stack)
    labels = {"service": "app", "call": "other", "outcome": "refused"}
    assert value(after, "calls_total", **labels) - value(before, "calls_total", **labels) == 5
    assert not any("nvented" in str(key) for key in after)


async def test_both_formats_are_valid_with_hostile_names(stack: Stack) -> None:
    journal = stack.context.instrumentation.journal
    hostile = 'a"b\\c\nd{}\udcff'
    journal.end(journal.begin(hostile, "/x", None, 0, OUTSIDE), 200)
    status, kind, text = await scraped(stack)
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    services = {
        sample.labels.get("service")
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert 'a"b\\c\nd{}?' in services
    status, kind, text = await scraped(stack, OPENMETRICS)
    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in openmetrics.text_string_to_metric_families(text)}  # type: ignore[no-untyped-call]  # the library has no types there
    assert families["dstack_emu_calls"].type == "counter"
    assert families["dstack_emu_call_duration_seconds"].type == "histogram"
    assert all(family.documentation.endswith(".") for family in families.values() if "dstack_emu" in family.name)


async def test_guards_of_the_control_port_hold(stack: Stack) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        status, _, text = await scraped(stack, **headers)
        assert status == 403
        assert "error" in json.loads(text)


async def test_number_of_series_is_bounded() -> None:
    metrics, journal = Metrics(lambda service: ("/x",)), Journal(StackClock(), kept=1)
    journal.count = metrics.count
    for number in range(MAX_KEYS + 5):
        journal.end(journal.begin(f"guest-{number}", "/x", None, 0, OUTSIDE), 200)
    assert len(metrics.calls) == MAX_KEYS + 1
    assert metrics.calls["other", "other"].outcomes == {"ok": 5}
    assert (journal.ended, journal.forgotten, journal.kept) == (MAX_KEYS + 5, MAX_KEYS + 4, 1)


async def test_call_whose_caller_gave_up_is_counted_as_unanswered() -> None:
    metrics, journal = Metrics(lambda service: ("/x",)), Journal(StackClock(), kept=1)
    journal.count = metrics.count
    outer = journal.begin("one", "/x", None, 0, OUTSIDE)
    late = journal.begin("two", "/x", outer, 1, "one")
    journal.end(outer, 502)
    journal.end(late, 200)
    counted = {key: (counts.outcomes, sum(counts.buckets)) for key, counts in metrics.calls.items()}
    assert counted == {("one", "/x"): ({"refused": 1}, 1), ("two", "/x"): ({"unanswered": 1}, 0)}
