"""The journal: what was asked in a stack, by whom, what for, and why it was refused.

One record for each call from outside, with every call inside that it led to. A record never holds what a call gave
away: of an answer only its status, the text of a refusal and a webhook's decision are noted, and of keys only that they
were released. The last records are kept in memory, and written to a file as JSON lines where one is named.
"""

import asyncio
import copy
import datetime
import fnmatch
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol, TextIO

from dstack_emu.observability.spans import GIVEN_UP, JUDGED, CallSpan, Span, VerificationSpan

RELEASED: Final = {
    "GetAppKey": ("disk_crypt_key", "env_crypt_key", "k256_key"),
    "GetKmsKey": ("temp_ca_key", "ca_key", "k256_key"),
    "GetTempCaCert": ("temp_ca_key",),
    "SignCert": ("certificate_chain",),
}
"""The fields that a KMS releases, by call."""

_FOLLOWED: Final = 1000
"""Records that may wait for someone who follows; a slower one loses the oldest."""

Record = dict[str, Any]


class Clock(Protocol):
    """What the journal reads times from; `now` gives Unix seconds with their fraction."""

    now: Callable[[], float]


class JournalError(Exception):
    """A journal that cannot be written."""


class Journal:
    """The records of one stack, in the order in which their calls ended.

    While `enabled` is False nothing is noted, and nothing is paid. `scrub` takes from an error's text what differs from
    run to run: ports and folders.
    """

    def __init__(self, clock: Clock, *, kept: int, file: Path | None = None) -> None:
        self.enabled = True
        self.scrub: Callable[[str], str] = str
        self._clock = clock
        self._ended: deque[CallSpan] = deque(maxlen=kept)
        self._begun = 0
        self._followers: set[asyncio.Queue[Record]] = set()
        self._file: TextIO | None = None
        if file is not None:
            try:
                self._file = file.open("a", encoding="utf-8")
            except OSError as error:
                raise JournalError(f"the journal {file} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    # ---- recording

    def begin(self, service: str, call: str, asking: Span | None, place: int, caller: str) -> CallSpan:
        """Record that a call came; `asking` is the span that sent it, if there is one, and counts while it waits."""
        if asking is None or asking.outcome is not None:
            self._begun += 1
            return CallSpan(False, self._begun, service, call, caller, self._clock.now())
        made = CallSpan(True, place, service, call, caller, self._clock.now())
        if asking.inner:
            asking.inner.append(made)
        else:
            asking.inner = [made]
        return made

    def end(self, call: CallSpan, status: int | None, error: str = "") -> None:
        """Record how it ended: its status, or None if the connection was dropped."""
        if call.outcome is not None:
            return  # whoever asked has given up, and been noted
        call.outcome = (status, error, self._clock.now())
        for inner in call.inner:
            if inner.outcome is None or inner.inner:
                inner.give_up()
        if call.within:
            return
        self._ended.append(call)
        if self._file is not None or self._followers:
            self._publish(record_of(call))

    def begin_verification(self, asking: Span) -> VerificationSpan:
        """Record that evidence is being verified for a span; its verdict follows in any case."""
        made = VerificationSpan(asking.next_place())
        if asking.outcome is None:
            asking.put(made)
        return made

    def end_verification(self, made: VerificationSpan, verdict: dict[str, Any]) -> None:
        """Record the verdict."""
        if made.outcome is None:
            made.notes, made.outcome = verdict, JUDGED

    def _publish(self, record: Record) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record, separators=(",", ":")) + "\n")
            self._file.flush()
        for follower in self._followers:
            if follower.full():
                follower.get_nowait()
            follower.put_nowait(record)

    # ---- position

    @property
    def position(self) -> int:
        """How many calls from outside have come so far: the number of the last record."""
        return self._begun

    def capture(self) -> int:
        """Return the position."""
        return self._begun

    def restore(self, position: int) -> None:
        """Forget the records after a position; the next one is numbered from there."""
        if position == self._begun:
            return
        while self._ended and self._ended[-1].place > position:
            self._ended.pop()
        self._begun = position
        self._publish({"rewound_to": position})

    def clear(self) -> None:
        """Forget every record; numbers go on."""
        self._ended.clear()

    # ---- asking

    def records(self, *, since: int = 0, limit: int | None = None) -> list[Record]:
        """The records after a position, oldest first; the last `limit` of them."""
        found = [call for call in self._ended if call.place > since]
        return [record_of(call) for call in (found if limit is None else found[max(0, len(found) - limit) :])]

    def find(
        self,
        call: str = "*",
        *,
        service: str = "*",
        caller: str = "*",
        outcome: str = "*",
        since: int = 0,
    ) -> list[Record]:
        """Every call, inner ones too, that matches.

        By its name (`GetAppKey`, `/bootAuth/kms`), service, caller and outcome; each may have wildcards. Outcomes
        are `ok`, `denied`, `refused` and `unanswered`.
        """
        name = call.rpartition(".")[2] if not call.startswith("/") else call
        wanted = {"call": name, "service": service, "caller": caller, "outcome": outcome}
        asked = {key: pattern for key, pattern in wanted.items() if pattern != "*"}
        return [
            found
            for record in self.records(since=since)
            for found in flattened(record)
            if "call" in found and all(fnmatch.fnmatchcase(found[key], pattern) for key, pattern in asked.items())
        ]

    def calls(
        self, call: str = "*", *, service: str = "*", caller: str = "*", outcome: str = "*", since: int = 0
    ) -> int:
        """How many `find` finds."""
        return len(self.find(call, service=service, caller=caller, outcome=outcome, since=since))

    async def follow(self) -> AsyncIterator[Record]:
        """Each record from now on, as its call ends."""
        queue: asyncio.Queue[Record] = asyncio.Queue(_FOLLOWED)
        self._followers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._followers.discard(queue)


def flattened(record: Record) -> Iterator[Record]:
    """A record and everything inside it."""
    yield record
    for inner in record.get("inner", ()):
        yield from flattened(inner)


def record_of(span: Span, around: str = "") -> Record:
    """A span as JSON says it; `around` is the id of the one around it."""
    number = f"{around}.{span.place}" if around else str(span.place)
    if isinstance(span, VerificationSpan):
        record: Record = {"id": number, **copy.deepcopy(span.notes)}
    else:
        status, error, ended = span.outcome or GIVEN_UP
        record = {
            "id": number,
            "time": _moment(span.time),
            "service": span.service,
            "call": span.call,
            "caller": span.caller,
            "status": status,
            "outcome": _outcome(status, span.notes),
            "ms": None if ended is None else round(1000 * (ended - span.time)),
        }
        if error:
            record["error"] = error
        record |= copy.deepcopy(span.notes)
        if status == 200 and span.call in RELEASED and span.service.startswith("kms"):
            record["released"] = {"fields": list(RELEASED[span.call]), "to": _receiver(span)}
    if span.inner:
        by_place = {inner.place: inner for inner in span.inner}  # a question that was sent twice has one place
        record["inner"] = [record_of(by_place[place], number) for place in sorted(by_place)]
    return record


def _outcome(status: int | None, notes: dict[str, Any]) -> str:
    if status is None:
        return "unanswered"
    if status >= 400:
        return "refused"
    decision, verdict = notes.get("decision"), notes.get("verdict")
    denied = decision is not None and decision["allowed"] is not True
    return "denied" if denied or (verdict is not None and not verdict["is_valid"]) else "ok"


def _receiver(call: CallSpan) -> dict[str, str] | None:
    """Whom the last decision behind a release was about: an app, or another KMS."""
    if call.call == "GetTempCaCert":
        return None  # whoever asks gets it; the decision was about the KMS itself
    decisions = [i.notes["decision"] for i in call.inner if isinstance(i, CallSpan) and "decision" in i.notes]
    asked = decisions[-1].get("asked") if decisions else None
    return None if asked is None else {key: asked.get(key, "") for key in ("app_id", "instance_id", "mr_aggregated")}


def _moment(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
