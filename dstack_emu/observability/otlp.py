"""Sends the journal's calls to a collector of OpenTelemetry, from a thread of its own.

The stack never waits for it: a call is put into a queue, and dropped if that is full. What is dropped is counted, and
said. A collector that does not answer is reported once, and once more when it answers again.

Import this module only if spans are exported: it needs the extra `otel`. The exporter is OpenTelemetry's own, so the
variables OTEL_EXPORTER_OTLP_* set its headers, certificates, compression and timeout.

Source of truth: OpenTelemetry Protocol 1.9, OTLP/HTTP (https://opentelemetry.io/docs/specs/otlp/).
"""

import asyncio
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.trace.export import SpanExportResult

from dstack_emu.observability.otel_spans import SpanMaker, UrlOf
from dstack_emu.observability.spans import CallSpan
from dstack_emu.transport.urls import shown_url, without_credentials

QUEUE: Final = 2048
"""Calls from outside that wait to be sent. Further ones are dropped."""
BATCH: Final = 128
"""Calls from outside that are sent in one request, with everything inside them."""
PAUSE: Final = 0.2
"""Seconds in which calls gather before they are sent."""
DEADLINE: Final = 3.0
"""Seconds that the end of a stack waits for what is still in the queue."""

_OF_SYSTEM: Final = re.compile(r"\[Errno -?\d+\] ([^\"')]+)")

log = logging.getLogger("dstack_emu.otlp")
_EXPORTER_LOG: Final = logging.getLogger(trace_exporter.__name__)


class OtlpExport:
    """The export of one stack. `sent` counts spans that the collector took, `lost` those that it did not take.

    `dropped` counts the calls from outside for which the queue had no place.
    """

    def __init__(self, endpoint: str, release: str, url_of: UrlOf) -> None:
        self.sent = self.lost = self.dropped = 0
        self._shown = shown_url(endpoint)
        self._exporter = trace_exporter.OTLPSpanExporter(endpoint)
        self._spans = SpanMaker(release, url_of)
        self._waiting: deque[CallSpan] = deque()
        self._in_hand = 0
        self._is_answered, self._is_full = True, False
        self._is_ending = self._is_over = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
        self._thread.start()
        self._messages = _Messages(self._thread, self._failed)
        _EXPORTER_LOG.addFilter(self._messages)

    def put(self, call: CallSpan) -> None:
        """Send a call that has ended, soon."""
        if len(self._waiting) < QUEUE:
            self._waiting.append(call)
            self._is_full = False
            if not self._wake.is_set():
                self._wake.set()
            return
        self.dropped += 1
        if not self._is_full:
            self._is_full = True
            log.warning("--otlp: %d calls wait to be sent to %s: further ones are dropped", QUEUE, self._shown)

    async def close(self) -> None:
        """Send what waits, for at most DEADLINE seconds, and report what was not sent."""
        self._is_ending = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join, DEADLINE if self._is_answered else PAUSE)
        self._is_over = True
        self._exporter.shutdown()  # type: ignore[no-untyped-call]  # it ends its wait for another attempt
        await asyncio.to_thread(self._thread.join, PAUSE)
        missing = self.dropped + len(self._waiting) + self._in_hand
        if missing or self.lost:
            log.warning(
                "--otlp: %s took %d spans; %d spans, and %d calls with all their spans, were lost",
                self._shown,
                self.sent,
                self.lost,
                missing,
            )

    def _run(self) -> None:
        try:
            while not self._is_ending:
                self._wake.wait()
                if not self._is_ending:
                    time.sleep(PAUSE)
                self._wake.clear()
                self._send_waiting()
            self._send_waiting()
        finally:  # until here the exporter may say something
            _EXPORTER_LOG.removeFilter(self._messages)

    def _send_waiting(self) -> None:
        while self._waiting and not self._is_over:
            try:
                self._send()
            except Exception:  # the thread's edge: a call that cannot be sent must not keep the others
                log.exception("--otlp: calls cannot be sent")
                self.dropped += self._in_hand
            self._in_hand = 0

    def _send(self) -> None:
        self._in_hand = min(BATCH, len(self._waiting))
        calls = [self._waiting.popleft() for _ in range(self._in_hand)]
        spans = [span for call in calls for span in self._spans.spans_of(call)]
        if not spans:
            return  # OTEL_SDK_DISABLED is set
        if self._exporter.export(spans) is not SpanExportResult.SUCCESS:
            self.lost += len(spans)
            return
        self.sent += len(spans)
        if not self._is_answered:
            self._is_answered = True
            log.warning("--otlp: %s takes spans again; %d were lost so far", self._shown, self.lost)

    def _failed(self, why: str) -> None:
        """Report that the collector took no spans, unless that is known already."""
        if self._is_answered and not self._is_over:  # the end's own report says what was not sent
            self._is_answered = False
            log.warning("--otlp: %s takes no spans: %s", self._shown, _short(without_credentials(why)))


def _short(why: str) -> str:
    """Return what the system said, if the exporter's text has it in the words of its libraries; else the text."""
    said = _OF_SYSTEM.search(why)
    return said[1] if said else why


class _Messages(logging.Filter):
    """Takes what the exporter logs in a thread, of each of its attempts, out of the log, and reports it to `failed`."""

    def __init__(self, thread: threading.Thread, failed: Callable[[str], None]) -> None:
        super().__init__()
        self._thread, self._failed = thread, failed

    def filter(self, record: logging.LogRecord) -> bool:
        if threading.current_thread() is not self._thread:
            return True  # of another stack
        self._failed(record.getMessage())
        return False
