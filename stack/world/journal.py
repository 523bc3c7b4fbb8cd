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
from typing import Any, Final, TextIO

from stack.config import JOURNAL_SIZE
from stack.world.trace import Attestation, Call, Child, take_place

RELEASED: Final = {
    "GetAppKey": ("disk_crypt_key", "env_crypt_key", "k256_key"),
    "GetKmsKey": ("temp_ca_key", "ca_key", "k256_key"),
    "GetTempCaCert": ("temp_ca_key",),
    "SignCert": ("certificate_chain",),
}
"""What a KMS gives away by which call, by the names of the answer's fields."""

_FOLLOWED: Final = 1000
"""Records that may wait for someone who follows; a slower one loses the oldest."""

Record = dict[str, Any]


class JournalError(Exception):
    """A journal that cannot be written."""


class Journal:
    """The records of one stack, in the order in which their calls ended.

    While `enabled` is False nothing is noted, and nothing is paid. `now` gives Unix seconds. `scrub` takes from an
    error's text what differs from run to run: ports and folders.
    """

    def __init__(self, now: Callable[[], float], *, kept: int = JOURNAL_SIZE, file: Path | None = None) -> None:
        self.enabled = True
        self.scrub: Callable[[str], str] = str
        self._now = now
        self._ended: deque[Call] = deque(maxlen=kept)
        self._open: dict[str, Child] = {}
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

    # ---- noting

    def begin(self, service: str, call: str, parent: str, place: int, caller: str) -> Call:
        """Note that a call came; `parent` is the span that asks, if there is one and it still waits."""
        asking = self._open.get(parent) if place else None
        if asking is None:
            self._begun += 1
            made = Call(str(self._begun), service, call, caller, self._now())
        else:
            made = Call(f"{parent}.{place}", service, call, caller, self._now())
            asking.put(place, made)
        self._open[made.id] = made
        return made

    def end(self, call: Call, status: int | None, error: str = "") -> None:
        """Note how it ended: its status, or None where the connection was dropped."""
        if self._open.get(call.id) is not call:
            return  # whoever asked has given up, and been noted
        del self._open[call.id]
        call.status, call.error, call.ended = status, error, self._now()
        if "." in call.id:
            return
        if self._open:
            within = f"{call.id}."
            for late in [span for span in self._open if span.startswith(within)]:
                del self._open[late]
        self._ended.append(call)
        if self._file is not None or self._followers:
            self._publish(record_of(call))

    def begin_judging(self, asking: Child) -> Attestation:
        """Note that evidence is judged for a span; `end_judging` follows in any case."""
        place = take_place(asking)
        made = Attestation(f"{asking.id}.{place}")
        asking.put(place, made)
        self._open[made.id] = made
        return made

    def end_judging(self, made: Attestation) -> None:
        """Note that the verdict is there."""
        self._open.pop(made.id, None)

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

    def rewind(self, position: int) -> None:
        """Forget what came after a position; what comes next is numbered from there."""
        if position == self._begun:
            return
        while self._ended and int(self._ended[-1].id) > position:
            self._ended.pop()
        self._begun = position
        self._publish({"rewound_to": position})

    def clear(self) -> None:
        """Forget every record; numbers go on."""
        self._ended.clear()

    # ---- asking

    def records(self, *, since: int = 0, limit: int | None = None) -> list[Record]:
        """The records after a position, oldest first; the last `limit` of them."""
        found = [call for call in self._ended if int(call.id) > since]
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


def record_of(span: Child) -> Record:
    """A span as JSON says it."""
    if isinstance(span, Attestation):
        record: Record = {"id": span.id, **copy.deepcopy(span.notes)}
    else:
        record = {
            "id": span.id,
            "time": _moment(span.time),
            "service": span.service,
            "call": span.call,
            "caller": span.caller,
            "status": span.status,
            "outcome": _outcome(span),
            "ms": None if span.ended is None else round(1000 * (span.ended - span.time)),
        }
        if span.error:
            record["error"] = span.error
        record |= copy.deepcopy(span.notes)
        if span.status == 200 and span.call in RELEASED and span.service.startswith("kms"):
            record["released"] = {"fields": list(RELEASED[span.call]), "to": _receiver(span)}
    if span.inner:
        record["inner"] = [record_of(span.inner[place]) for place in sorted(span.inner)]
    return record


def _outcome(call: Call) -> str:
    if call.status is None:
        return "unanswered"
    if call.status >= 400:
        return "refused"
    decision, verdict = call.notes.get("decision"), call.notes.get("verdict")
    denied = decision is not None and decision["allowed"] is not True
    return "denied" if denied or (verdict is not None and not verdict["is_valid"]) else "ok"


def _receiver(call: Call) -> dict[str, str] | None:
    """Whom the last decision behind a release was about: an app, or another KMS."""
    if call.call == "GetTempCaCert":
        return None  # whoever asks gets it; the decision was about the KMS itself
    decisions = [i.notes["decision"] for i in call.inner.values() if isinstance(i, Call) and "decision" in i.notes]
    asked = decisions[-1].get("asked") if decisions else None
    return None if asked is None else {key: asked.get(key, "") for key in ("app_id", "instance_id", "mr_aggregated")}


def _moment(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
