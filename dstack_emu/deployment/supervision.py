"""A part that fails ends the whole deployment: its `async with` block is cancelled, as a task group cancels it."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from dstack_emu.deployment.errors import PartEndedError


class Supervisor:
    """Waits for parts to end. When one ends with an error, it cancels the task that made the supervisor."""

    def __init__(self, parts: Mapping[str, Callable[[], Awaitable[None]]]) -> None:
        self._owner = asyncio.current_task()
        self._failure: PartEndedError | None = None
        self._tasks = [asyncio.create_task(self._wait_for(name, part)) for name, part in parts.items()]

    async def _wait_for(self, name: str, part: Callable[[], Awaitable[None]]) -> None:
        try:
            await part()
        except Exception as error:  # whatever ended it
            if self._failure is None:
                self._failure = PartEndedError(f"{name} ended: {error}")
                self._failure.__cause__ = error
                if self._owner is not None:
                    self._owner.cancel()

    def stop(self) -> None:
        """Stop watching: from here on parts end because they are stopped."""
        for task in self._tasks:
            task.cancel()

    def raise_failure(self, kind: type[BaseException] | None) -> None:
        """Raise what a part ended with, if one did; `kind` is what the block ends with otherwise."""
        if self._failure is None:
            return
        is_owner = self._owner is not None and self._owner is asyncio.current_task()
        if is_owner and self._owner is not None and self._owner.uncancel() > 0 and kind is asyncio.CancelledError:
            return  # someone else wants it cancelled, too
        raise self._failure
