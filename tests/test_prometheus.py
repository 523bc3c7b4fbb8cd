"""Prometheus scrapes a stack, and its queries count what the journal has.

It runs if DSTACK_EMU_PROMETHEUS is set (`make prometheus`), with the programs `prometheus` and `promtool`, which are on
the path or in `.prometheus/usr/bin`.
"""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from dstack_emu.observability.spans import OUTSIDE
from tests.documents import blocks, document, section
from tests.own_stack import own_stack
from tests.ports import free_port
from tests.repository import ROOT
from tests.running import RunningStack, running_stack

pytestmark = pytest.mark.skipif(
    "DSTACK_EMU_PROMETHEUS" not in os.environ, reason="DSTACK_EMU_PROMETHEUS is not set: `make prometheus`"
)

TIMEOUT: Final = 30
"""Seconds until Prometheus must have done what is waited for."""
INTERVAL: Final = "500ms"


def program(name: str) -> str:
    """Return the path of one of Prometheus' programs."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:{ROOT / '.prometheus/usr/bin'}")
    if path is None:
        pytest.fail(f"DSTACK_EMU_PROMETHEUS is set, and there is no {name}: install Debian's package prometheus")
    return path


class Prometheus:
    """The HTTP API of a running Prometheus."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, path: str, **query: str) -> Any:
        """Return the data of an answer."""
        with urllib.request.urlopen(f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            said = json.load(answer)
        assert said["status"] == "success"
        return said["data"]

    def numbers(self, query: str) -> dict[tuple[str, ...], float]:
        """Return the values of a query by the values of their labels, in the order of the labels' names."""
        result = self.ask("query", query=query)["result"]
        return {tuple(value for _, value in sorted(each["metric"].items())): float(each["value"][1]) for each in result}

    def until_scraped(self) -> None:
        """Wait until every target has been scraped after this moment."""
        begun, end = time.time(), time.monotonic() + TIMEOUT
        while True:
            targets = self.ask("targets", state="active")["activeTargets"]
            scraped = self.numbers("timestamp(up) and up == 1")
            if targets and len(scraped) == len(targets) and min(scraped.values()) > begun:
                return
            assert time.monotonic() < end, [each["lastError"] for each in targets]
            time.sleep(0.05)


@contextlib.contextmanager
def running_prometheus(folder: Path, *jobs: dict[str, Any]) -> Iterator[Prometheus]:
    """Run Prometheus, with its files in a folder, until the block ends."""
    config, address = folder / "prometheus.yml", f"127.0.0.1:{free_port()}"
    settings = {"scrape_interval": INTERVAL, "scrape_timeout": INTERVAL}
    config.write_text(yaml.safe_dump({"global": settings, "scrape_configs": jobs}))
    subprocess.run([program("promtool"), "check", "config", str(config)], check=True, capture_output=True)
    command = [program("prometheus"), f"--config.file={config}", f"--web.listen-address={address}"]
    command.append(f"--storage.tsdb.path={folder / 'data'}")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said: list[str] = []
            while "Server is ready" not in "".join(said[-1:]):
                said.append(process.stderr.readline())  # what follows is little, and fits into the pipe
                assert said[-1], "".join(said)
            yield Prometheus(f"http://{address}")
        finally:
            process.terminate()


class Watched:
    """A stack that demands a token, and the Prometheus that scrapes it."""

    def __init__(self, stack: RunningStack, token: str, prometheus: Prometheus) -> None:
        self.stack, self.prometheus = stack, prometheus
        self._token = token

    def control(self, path: str, *arguments: str) -> tuple[int, str]:
        """Ask the control API with curl; return status and body."""
        return self.stack.curl(
            self.stack.services["control"] + path, "-H", f"Authorization: Bearer {self._token}", *arguments
        )

    def post(self, path: str, **body: Any) -> int:
        """Make a call of the control API; return the status."""
        return self.control(path, "-H", "Content-Type: application/json", "-d", json.dumps(body))[0]

    def records(self) -> list[dict[str, Any]]:
        """Return all calls and verifications of the journal, inner ones too."""
        return list(flat(json.loads(self.control("/journal?limit=2000")[1])["records"]))


def flat(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for record in records:
        yield record
        yield from flat(record.get("inner", []))


def address_of(stack: RunningStack, service: str) -> str:
    return stack.services[service].partition("://")[2]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A stack with a denial, a fault and a boot, scraped as the documents say; and its KMS, as those of deployments."""
    folder = tmp_path_factory.mktemp("prometheus")
    described = section(document("docs/howto/observability.md"), "## Metrics")
    (given,) = (yaml.safe_load(each.text) for each in blocks(described) if each.language == "yaml")
    (job,) = given["scrape_configs"]
    with running_stack("--listen", "0.0.0.0", "--state", str(folder / "state")) as stack:
        token = folder / "state/control.token"
        job["authorization"]["credentials_file"] = str(token)
        job["static_configs"] = [{"targets": [address_of(stack, "control")]}]
        kms = {
            "job_name": "kms",
            "scheme": "https",
            "tls_config": {"insecure_skip_verify": True},
            "static_configs": [{"targets": [address_of(stack, name) for name in ("kms-src", "kms-dst")]}],
        }
        with running_prometheus(folder, job, kms) as prometheus:
            found = Watched(stack, token.read_text().strip(), prometheus)
            assert found.post("/policies/src/deny", guest="app") == 200
            assert found.post("/guests/app/boot") == 403
            assert found.post("/policies/src/allow", guest="app") == 200
            fault = {"call": "/bootAuth/app", "kind": "status", "status": 503, "times": 1}
            assert found.post("/faults", service="auth-src", **fault) == 200
            assert found.post("/guests/app/boot") == 403
            assert found.post("/guests/app/boot") == 200
            prometheus.until_scraped()
            yield found


def test_queries_count_what_the_journal_has(watched: Watched) -> None:
    records, numbers = watched.records(), watched.prometheus.numbers
    calls = [each for each in records if "call" in each]
    assert numbers("sum by (call, outcome, service) (dstack_emu_calls_total)") == Counter(
        (each["call"], each["outcome"], each["service"]) for each in calls
    )
    assert numbers("sum by (about, decision, rule, service) (dstack_emu_decisions_total)") == Counter(
        (said["about"], "allowed" if said["allowed"] else "denied", *([said["rule"]] if said["rule"] else []), service)
        for service, said in ((each["service"], each.get("decision")) for each in calls)
        if said is not None
    )
    denied = 'sum by (rule, service) (dstack_emu_decisions_total{decision="denied"})'
    assert numbers(denied) == {("app_registered", "auth-src"): 1}
    assert numbers("sum by (kind, service) (dstack_emu_faults_met_total)") == {("status", "auth-src"): 1}
    assert numbers("sum by (result) (dstack_emu_verifications_total)") == Counter(
        (each["attestation"],) for each in records if "attestation" in each
    )
    outside = sum("." not in each["id"] for each in calls)
    assert numbers("sum(dstack_emu_journal_records_total)") == {(): outside}


def test_durations_are_a_histogram_of_the_calls_that_were_answered(watched: Watched) -> None:
    numbers = watched.prometheus.numbers
    counted = numbers("sum by (service) (dstack_emu_call_duration_seconds_count)")
    assert counted == Counter((each["service"],) for each in watched.records() if "call" in each)
    assert numbers('sum by (service) (dstack_emu_call_duration_seconds_bucket{le="+Inf"})') == counted
    quantile = "histogram_quantile(0.9, sum by (le) (dstack_emu_call_duration_seconds_bucket))"
    assert 0 < numbers(quantile)[()] < 10


def test_openmetrics_is_read_with_types_and_help(watched: Watched) -> None:
    said = watched.prometheus.ask("targets/metadata", match_target='{job="dstack-emu"}')
    types = {each["metric"]: each["type"] for each in said}
    assert all(each["help"] for each in said)
    assert types["dstack_emu_calls"] == "counter"  # in the text format the name has _total
    assert types["dstack_emu_call_duration_seconds"] == "histogram"
    assert types["dstack_emu_trust_domains"] == "gauge"


def test_kms_of_the_stack_is_scraped_as_a_real_one(watched: Watched) -> None:
    numbers, (src, dst) = (
        watched.prometheus.numbers,
        (address_of(watched.stack, f"kms-{each}") for each in ("src", "dst")),
    )
    assert numbers("sum by (instance) (dstack_kms_attestation_failures_total)") == {(src,): 2, (dst,): 0}
    said = watched.prometheus.ask("targets/metadata", match_target='{job="kms"}')
    assert {each["type"] for each in said} == {"counter"}


def test_promtool_has_no_objection_to_the_text_format(watched: Watched) -> None:
    texts = watched.control("/metrics"), watched.stack.curl(f"https://{address_of(watched.stack, 'kms-src')}/metrics")
    for status, text in texts:
        command = [program("promtool"), "check", "metrics"]
        done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
        assert (status, done.returncode, done.stdout + done.stderr) == (200, 0, "")


@pytest.mark.asyncio
async def test_hostile_names_are_labels(tmp_path: Path) -> None:
    hostile = 'a"b\\c\nd{} # EOF\n\N{SNOWMAN}\udcff'
    async with own_stack() as stack:
        journal = stack.context.instrumentation.journal
        journal.end(journal.begin(hostile, "/x", None, 0, OUTSIDE), 200)
        targets = [stack.services["control"].partition("://")[2]]
        with running_prometheus(tmp_path, {"job_name": "x", "static_configs": [{"targets": targets}]}) as prometheus:
            await asyncio.to_thread(prometheus.until_scraped)
            found = prometheus.numbers('sum by (service) (dstack_emu_calls_total{service=~"(?s)a\\".*"})')
    assert found == {(hostile.replace("\udcff", "?"),): 1}
