"""Receivers of OpenTelemetry that others wrote have every call: its trace, place, name, status, attributes and events.

Rotel is a collector: it decodes what it takes, and passes it on to the collector of these tests. DSTACK_EMU_ROTEL names
the program (`make collector` installs it). Phoenix keeps spans in a database, and is asked by its REST API.
DSTACK_EMU_PHOENIX names the program `phoenix` of an environment with the package arize-phoenix, which has 0.9 GB; no
target installs it.
"""

import asyncio
import contextlib
import json
import os
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
from yarl import URL

from dstack_emu.control.schemas import ControlError
from tests.collector import Received, running_collector
from tests.own_stack import own_stack
from tests.ports import free_port

pytestmark = pytest.mark.asyncio

ROTEL, PHOENIX = os.environ.get("DSTACK_EMU_ROTEL"), os.environ.get("DSTACK_EMU_PHOENIX")
TRACE_ID, SPAN_ID, STATE = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "rojo=00f067aa0ba902b7"
HOSTILE: Final = "%FF%00%22%3Cb%3E%0A%E2%98%83"
TIMEOUT: Final = 120
"""Seconds until a receiver must have done what is waited for; Phoenix starts in half a minute."""


@dataclass(frozen=True)
class Seen:
    """A span as a receiver has it."""

    name: str
    trace_id: str
    id: str
    parent: str
    error: str | None
    attributes: Mapping[str, Any]
    events: Mapping[str, Mapping[str, Any]]


async def until_open(process: asyncio.subprocess.Process, port: int) -> None:
    """Wait until a program listens."""
    end = time.monotonic() + TIMEOUT
    while True:
        assert process.returncode is None
        assert time.monotonic() < end
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def program(folder: Path, port: int, *command: str, **environment: str) -> AsyncIterator[str]:
    """Run a receiver until the block ends; yield its URL."""
    with (folder / "log").open("wb") as log:
        settings = {**os.environ, **environment}
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, env=settings)
    try:
        await until_open(process, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


async def called(url: str) -> dict[str, dict[str, Any]]:
    """Let a stack that exports to a URL boot in a trace of ours and be denied; return its records by their ids."""
    async with own_stack(otlp=url) as stack:
        headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "tracestate": STATE}
        boot, hostile = f"{stack.services['control']}/guests/app/boot", f"{stack.services['app']}/{HOSTILE}"
        async with aiohttp.ClientSession() as session:
            async with session.post(boot, json={}, headers=headers) as answer:
                assert answer.status == 200
            async with session.get(URL(hostile, encoded=True)) as answer:
                assert answer.status == 404
        stack.control.deny("src", "app")
        with pytest.raises(ControlError, match="app not registered"):
            await stack.control.boot_guest("app")
        return {record["id"]: record for record in flat(stack.control.journal.records())}


def flat(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for record in records:
        yield record
        yield from flat(record.get("inner", []))


def agree(spans: list[Seen], records: Mapping[str, dict[str, Any]]) -> None:
    """Hold what a receiver has against the journal."""
    by_record = {span.attributes["dstack.record"]: span for span in spans}
    assert by_record.keys() == records.keys()
    assert len(spans) == len(records) == len({span.id for span in spans})
    for number, record in records.items():
        span, said = by_record[number], by_record[number].attributes
        if "." in number:
            above = by_record[number.rpartition(".")[0]]
            assert (span.trace_id, span.parent) == (above.trace_id, above.id)
        name = record.get("call", "verify evidence").encode(errors="replace").decode()
        assert span.name.removeprefix("GET ").removeprefix("POST ") == name
        refused = record.get("outcome", "ok") != "ok" or record.get("attestation") == "refused"
        assert (span.error is not None) == refused
        assert said.get("dstack.caller") == record.get("caller")
        assert said.get("dstack.outcome") == record.get("outcome")
        if "http.request.method" in said:
            assert said["http.response.status_code"] == record["status"]
        if decision := record.get("decision"):
            assert said["dstack.decision"] == ("allowed" if decision["allowed"] else "denied")
            assert span.events["dstack.decision"]["dstack.asked.mr_aggregated"] == decision["asked"]["mr_aggregated"]
        if "attestation" in record:
            assert span.events["dstack.verification"]["dstack.advisory_ids"] == record["advisory_ids"]
    (ours,) = (span for span in spans if (span.trace_id, span.parent) == (TRACE_ID, SPAN_ID))
    assert (ours.name, ours.error) == ("Boot", None)
    assert sum(span.trace_id == TRACE_ID for span in spans) > 10
    assert len({span.trace_id for span in spans}) == sum("." not in number for number in records)
    (denied,) = (span for span in spans if span.attributes.get("dstack.decision") == "denied")
    assert (denied.error, denied.attributes["dstack.rule"]) == ("app not registered", "app_registered")
    (refused_boot,) = (span for span in spans if span.name == "Boot" and span.error is not None)
    assert "Boot denied: app not registered" in str(refused_boot.error)


def relayed(each: Received) -> Seen:
    status = each.span.status
    return Seen(
        each.span.name,
        each.trace_id,
        each.id,
        each.parent,
        status.message if status.code == status.STATUS_CODE_ERROR else None,
        each.attributes,
        each.events,
    )


@pytest.mark.skipif(ROTEL is None, reason="DSTACK_EMU_ROTEL is not set: `make collector`")
@pytest.mark.parametrize("compression", ["none", "gzip"])
async def test_collector_passes_every_call_on(
    compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", compression)
    port = free_port()
    addresses = ("--otlp-http-endpoint", f"127.0.0.1:{port}", "--otlp-grpc-endpoint", f"127.0.0.1:{free_port()}")
    async with running_collector() as collector:
        target = ("--exporter", "otlp", "--otlp-exporter-protocol", "http", "--otlp-exporter-endpoint", collector.url)
        async with program(tmp_path, port, str(ROTEL), "start", *addresses, *target) as url:
            records = await called(url)
            async with asyncio.timeout(TIMEOUT):
                await collector.until(lambda: len(collector.spans) >= len(records))
    agree([relayed(each) for each in collector.spans], records)
    for each in collector.spans:
        record = records[each.attributes["dstack.record"]]
        assert each.resource["service.namespace"] == "dstack-emu"
        assert each.service == record.get("service", each.service)
        assert each.kind == ("SERVER" if "http.request.method" in each.attributes else "INTERNAL")
        assert each.span.trace_state == (STATE if each.trace_id == TRACE_ID else "")
        assert 0 < each.span.start_time_unix_nano <= each.span.end_time_unix_nano


def kept_by_phoenix(url: str, count: int) -> list[Seen]:
    """Return the spans of Phoenix once it has that many: it takes them into its database later than it answers."""
    end, found = time.monotonic() + TIMEOUT, list[Any]()
    while len(found) < count:
        assert time.monotonic() < end
        time.sleep(0.2)
        with urllib.request.urlopen(f"{url}/v1/projects/default/spans?limit=1000", timeout=20) as answer:
            found = json.load(answer)["data"]
    return [
        Seen(
            each["name"],
            each["context"]["trace_id"],
            each["context"]["span_id"],
            each["parent_id"] or "",
            each["status_message"] if each["status_code"] == "ERROR" else None,
            each["attributes"],
            {event["name"]: event["attributes"] for event in each["events"]},
        )
        for each in found
    ]


@pytest.mark.skipif(PHOENIX is None, reason="DSTACK_EMU_PHOENIX is not set: it names the program phoenix")
async def test_phoenix_keeps_every_call(tmp_path: Path) -> None:
    port = free_port()
    settings = {
        "PHOENIX_PORT": str(port),
        "PHOENIX_GRPC_PORT": str(free_port()),
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_WORKING_DIR": str(tmp_path),
        "PHOENIX_TELEMETRY_ENABLED": "false",
    }
    async with program(tmp_path, port, str(PHOENIX), "serve", **settings) as url:
        records = await called(url)
        agree(await asyncio.to_thread(kept_by_phoenix, url, len(records)), records)
