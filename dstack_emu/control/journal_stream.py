"""The journal as a stream over HTTP: each record when its call ends, as JSON lines or as server-sent events.

A record is made into JSON once, however many follow. A follower that does not read as fast as calls end loses the
oldest records, and is told how many, by `{"lost": N}` in their place.
"""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from aiohttp import web

from dstack_emu.control.route import number
from dstack_emu.observability.backlog import Backlog
from dstack_emu.observability.journal import Journal
from dstack_emu.observability.record import Published, json_of

_WAITING: Final = 1000
"""Records that wait for one follower."""

_PAUSE: Final = 0.03
"""Seconds between two writes to a follower: records that end meanwhile are written at once, which takes less of the
stack's time than a write for each.
"""

HEARTBEAT: Final = 15.0
"""Seconds without a record after which a follower of events is sent a comment, because proxies end silent connections.

The HTML standard advises this time. Lines of JSON have no comment.
"""
_COMMENT: Final = b":\n\n"


class JournalStream:
    """The stream of one journal, for any number of followers; `heartbeat` is in seconds."""

    def __init__(self, journal: Journal, heartbeat: float = HEARTBEAT) -> None:
        self._journal, self._heartbeat = journal, heartbeat
        self._ended: Backlog[Published] = Backlog(_WAITING)
        self._followers: set[Backlog[str]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def end(self, _app: web.Application) -> None:
        """End the answer to every follower, because the server stops."""
        for task in list(self._tasks):
            task.cancel()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer with the records after `since`, if it is in the query, and with all from now on."""
        since = number(dict(request.query), "since", 0) if "since" in request.query else None
        is_events = "text/event-stream" in request.headers.get("Accept", "")
        kind = "text/event-stream" if is_events else "application/x-ndjson"
        response = web.StreamResponse(headers={"Content-Type": kind, "Cache-Control": "no-store"})
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a handler runs in one
        self._tasks.add(task)
        try:
            with self._following() as mine:
                before = [] if since is None else self._journal.records(since=since)
                await response.prepare(request)
                if before:
                    await response.write(_written(map(json_of, before), is_events))
                while True:
                    try:
                        coming = await asyncio.wait_for(self._coming(mine), self._heartbeat if is_events else None)
                    except TimeoutError:
                        await response.write(_COMMENT)
                        continue
                    await response.write(_written(coming, is_events))
                    await asyncio.sleep(_PAUSE)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
        return response

    @contextmanager
    def _following(self) -> Iterator[Backlog[str]]:
        """Collect everything that ends from now on for one more follower."""
        self._pass_on()  # what ended until now is not for it
        mine: Backlog[str] = Backlog(_WAITING)
        self._followers.add(mine)
        self._journal.listen(self._ended)
        try:
            yield mine
        finally:
            self._followers.discard(mine)
            if not self._followers:
                self._journal.unlisten(self._ended)
                self._ended.take()

    async def _coming(self, mine: Backlog[str]) -> list[str]:
        """Wait until there is something for a follower, and return it."""
        while not mine:
            await self._ended.wait()
            self._pass_on()
        lost, texts = mine.take()
        return [json_of({"lost": lost}), *texts] if lost else texts

    def _pass_on(self) -> None:
        lost, ended = self._ended.take()
        texts = [json_of(each) for each in ended]
        for follower in self._followers:
            follower.lose(lost)
            for text in texts:
                follower.put(text)


def _written(texts: Iterable[str], is_events: bool) -> bytes:
    return "".join(f"data: {text}\n\n" if is_events else f"{text}\n" for text in texts).encode()
