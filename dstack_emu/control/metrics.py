"""The metrics of a stack for Prometheus, in its text format or that of OpenMetrics, as the client asks.

What is measured is in `observability.metrics`; here are names, units and help. Import this module only if metrics are
asked for: the library takes time to import.

Source of truth: https://prometheus.io/docs/practices/naming/, and the formats at
https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from dstack_emu.attest.release import release
from dstack_emu.attest.version import EMULATOR
from dstack_emu.deployment.deployment import Deployment
from dstack_emu.observability.metrics import BUCKETS, Key
from dstack_emu.transport import open_calls
from dstack_emu.transport.connections import open_connections

PREFIX: Final = "dstack_emu_"


class Exposition:
    """The metrics of one deployment as text."""

    def __init__(self, deployment: Deployment) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_StackCollector(deployment))
        ProcessCollector(registry=self._registry)

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics in the format that an Accept header asks for, and their content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class _StackCollector(Collector):
    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment

    def describe(self) -> Iterator[Metric]:
        """Describe nothing: registering must not collect."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield every metric as it is now."""
        config = self._deployment.config
        about = {"version": EMULATOR, "release": config.release, "dstack_version": release(config.release).version}
        yield _gauge(
            "build_info", "The versions of the emulator and of what it emulates.", list(about), {(*about.values(),): 1}
        )
        yield from self._counts()
        yield from self._journal()
        yield from self._parts()
        yield from self._waits()
        yield from self._export()

    def _counts(self) -> Iterator[Metric]:
        found = self._deployment.context.instrumentation.metrics
        outcomes = {
            (*key, outcome): count for key, each in found.calls.items() for outcome, count in each.outcomes.items()
        }
        yield _counter("calls", "Calls by what came of them.", ["service", "call", "outcome"], outcomes)
        durations = HistogramMetricFamily(
            f"{PREFIX}call_duration_seconds",
            "Durations of calls that were answered, by the stack's clock.",
            labels=["service", "call"],
        )
        bounds = [*map(str, BUCKETS), "+Inf"]
        for key, each in found.calls.items():
            buckets = zip(bounds, map(float, itertools.accumulate(each.buckets)), strict=True)
            durations.add_metric([*map(_shown, key)], list(buckets), each.seconds)
        yield durations
        yield _counter(
            "decisions",
            "Decisions of webhooks by the rule that decided; none for a webhook of the user.",
            ["service", "about", "decision", "rule"],
            found.decisions,
        )
        yield _counter(
            "verifications",
            "Verifications of evidence by a part of the stack.",
            ["service", "result", "tcb_status"],
            found.verifications,
        )
        yield _counter("verdicts", "Answers of the verifier.", ["service", "result"], found.verdicts)
        yield _counter("faults_met", "Calls that met a fault.", ["service", "kind"], found.faults)

    def _journal(self) -> Iterator[Metric]:
        journal = self._deployment.context.instrumentation.journal
        numbers = {
            "journal_records": ("Records of the journal: calls from outside that have ended.", journal.ended),
            "journal_forgotten_records": (
                "Records that are no longer in memory, because newer ones took their place.",
                journal.forgotten,
            ),
            "journal_follower_drops": (
                "Records that a follower of the journal missed, because it was too slow.",
                journal.missed,
            ),
        }
        for name, (help_text, number) in numbers.items():
            yield _counter(name, help_text, [], {(): number})
        yield _gauge("journal_kept_records", "Records in memory.", [], {(): journal.kept})
        yield _gauge("journal_enabled", "Whether calls are recorded, and so counted.", [], {(): journal.enabled})

    def _parts(self) -> Iterator[Metric]:
        deployment = self._deployment
        phases: Counter[Key] = Counter((kms.spec.service, kms.phase) for kms in deployment.kms.values())
        yield _gauge("kms_phase", "The phase of each KMS, whose value is 1.", ["service", "phase"], phases)
        yield _gauge("trust_domains", "Trust domains that run.", [], {(): len(deployment.guests)})
        faults = deployment.context.instrumentation.faults.rules
        yield _gauge("faults", "Faults in force.", [], {(): len(faults)})
        yield _gauge(
            "clock_timestamp_seconds",
            "The time of the stack's clock.",
            [],
            {(): deployment.context.instrumentation.clock.now()},
        )
        names = {url: service for service, url in deployment.services.items()}
        names |= {
            f"unix:{path}": guest.service
            for guest in deployment.guests.values()
            for path in (guest.dstack_sock, guest.tappd_sock)
        }
        opened: Counter[Key] = Counter()
        for url, count in open_connections():
            if url in names:
                opened[(names[url],)] += count
        yield _gauge(
            "open_connections", "Open HTTP connections, without those of gRPC and of the ingress.", ["service"], opened
        )

    def _waits(self) -> Iterator[Metric]:
        yield _gauge("tasks", "Tasks of the event loop.", [], {(): len(asyncio.all_tasks())})
        yield _gauge("threads", "Threads of Python.", [], {(): threading.active_count()})
        yield _gauge("open_calls", "Calls that the stack answers or makes now.", [], {(): open_calls.count()})

    def _export(self) -> Iterator[Metric]:
        export = self._deployment.context.instrumentation.exported
        if export is None:
            return
        spans: dict[Key, int] = {("sent",): export.sent, ("lost",): export.lost}
        yield _counter("otlp_spans", "Spans that the collector took, or did not take.", ["result"], spans)
        yield _counter(
            "otlp_dropped_calls", "Calls that were not exported, because too many waited.", [], {(): export.dropped}
        )


def _counter(name: str, help_text: str, labels: list[str], values: Mapping[Key, float]) -> Metric:
    return _filled(CounterMetricFamily(PREFIX + name, help_text, labels=labels), values)


def _gauge(name: str, help_text: str, labels: list[str], values: Mapping[Key, float]) -> Metric:
    return _filled(GaugeMetricFamily(PREFIX + name, help_text, labels=labels), values)


def _filled(family: CounterMetricFamily | GaugeMetricFamily, values: Mapping[Key, float]) -> Metric:
    for key, value in values.items():
        family.add_metric([*map(_shown, key)], float(value))
    return family


def _shown(label: str) -> str:
    """Return a label as valid UTF-8; the library escapes it."""
    return label.encode(errors="replace").decode()
