"""An answer of the auth webhook that a KMS uses again for a moment, as one of 0.6 does with two of them.

Only successes are kept: a denial or an error is the answer to those who waited for it, and to nobody after them.
Source: dstack PR 1311 and `kms/src/main_service.rs` at 0441b5ac (`short_lived_cache`).
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class ShortLived(Generic[T]):
    """The latest success of one kind of request.

    It is used for `seconds` after it came, by the clock `now` (seconds with their fraction). Callers that arrive while
    a request is under way share its result, whatever it is. With 0 seconds each caller makes its own request.
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
            if 0 <= self._now() - came < self._seconds:  # a clock that was set back makes it no younger
                return value
        task = self._under_way
        if task is None:
            task = self._under_way = asyncio.create_task(self._request(request))
            task.add_done_callback(_retrieve)
        return await asyncio.shield(task)  # which others may be waiting for

    def forget(self) -> None:
        """Forget what is kept; a request that is under way answers those who wait, and is not kept."""
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
    """Look at a failure that nobody may be waiting for any more, so that the event loop does not report it."""
    if not task.cancelled():
        task.exception()
