"""An answer of the auth webhook that a KMS reuses for a short time, as a KMS of 0.6 does with two kinds of answers.

Only successes are kept: a denial or an error goes to the callers that waited for it, and to no later one.
Source: dstack PR 1311 and `kms/src/main_service.rs` at 0441b5ac (`short_lived_cache`).
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class ShortLived(Generic[T]):
    """The latest success of one kind of request.

    It is used for `seconds` after it arrived, by the clock `now` (seconds with their fraction). Callers that arrive
    while a request is in progress share its result, success or error. With 0 seconds each caller makes its own request.
    """

    def __init__(self, seconds: float, now: Callable[[], float]) -> None:
        self._seconds, self._now = seconds, now
        self._kept: tuple[T, float] | None = None
        self._under_way: asyncio.Task[T] | None = None

    async def get(self, request: Callable[[], Awaitable[T]]) -> T:
        """Return the kept success, or the result of a request; raise what the request raises."""
        if self._seconds <= 0:
            return await request()
        if self._kept is not None:
            value, came = self._kept
            if 0 <= self._now() - came < self._seconds:  # negative if the clock was set back
                return value
        task = self._under_way
        if task is None:
            task = self._under_way = asyncio.create_task(self._request(request))
            task.add_done_callback(_retrieve)
        return await asyncio.shield(task)  # other callers may be waiting for it

    def forget(self) -> None:
        """Delete the kept success; the result of a request in progress goes to its callers, and is not kept."""
        self._kept = self._under_way = None

    async def _request(self, request: Callable[[], Awaitable[T]]) -> T:
        this = asyncio.current_task()
        try:
            value = await request()
            if self._under_way is this:
                self._kept = value, self._now()
            return value
        finally:
            if self._under_way is this:
                self._under_way = None


def _retrieve(task: asyncio.Task[T]) -> None:
    """Retrieve the exception of a task that no caller may wait for any more; the event loop would report it."""
    if not task.cancelled():
        task.exception()
