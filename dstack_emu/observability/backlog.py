"""What a reader has not taken yet: at most some number of items. Of more, the oldest are lost, and are counted."""

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Backlog(Generic[T]):
    """Items in their order, of one event loop; `put` never waits, so a slow reader holds nobody up."""

    def __init__(self, most: int) -> None:
        self._items: deque[T] = deque()
        self._most = most
        self._lost = 0
        self._filled = asyncio.Event()

    def put(self, item: T) -> bool:
        """Add an item; the oldest one is lost if there are too many. Return whether one was lost."""
        is_full = len(self._items) >= self._most
        if is_full:
            self._items.popleft()
            self._lost += 1
        self._items.append(item)
        self._filled.set()
        return is_full

    def lose(self, count: int) -> None:
        """Note that items were lost before they came here."""
        if count:
            self._lost += count
            self._filled.set()

    def take(self) -> tuple[int, list[T]]:
        """Return how many were lost since the last time, and the items after those; none are left."""
        taken = self._lost, list(self._items)
        self._lost = 0
        self._items.clear()
        self._filled.clear()
        return taken

    def __bool__(self) -> bool:
        """Return whether there is something to take."""
        return bool(self._items or self._lost)

    async def wait(self) -> None:
        """Wait until there is something to take."""
        await self._filled.wait()
