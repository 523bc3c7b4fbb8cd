"""Caches with a limit of entries and of bytes.

A cache belongs to an object with a lifetime, such as a client or a service, and ends with it. docs/caches.md lists all
caches with their limits and the time that they save.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BoundedCache(Generic[K, V]):
    """Values by key; if a limit is exceeded, the least recently used ones are dropped.

    `max_entries` is the limit of entries, `max_bytes` the limit of their total size, as passed to `put`. An entry that
    is larger than `max_bytes` is not kept, so that a sender of data cannot fill the memory.
    """

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """The total size of the entries in bytes."""
        return self._bytes

    def get(self, key: K) -> V | None:
        """Return the value of a key, None if there is none."""
        found = self._entries.get(key)
        if found is None:
            return None
        self._entries.move_to_end(key)
        return found[0]

    def put(self, key: K, value: V, size: int) -> None:
        """Set the value of a key; value and key together take `size` bytes."""
        self.discard(key)
        if size > self._max_bytes:
            return
        self._entries[key] = value, size
        self._bytes += size
        while len(self._entries) > self._max_entries or self._bytes > self._max_bytes:
            self._bytes -= self._entries.popitem(last=False)[1][1]

    def discard(self, key: K) -> None:
        """Drop the value of a key, if there is one."""
        dropped = self._entries.pop(key, None)
        if dropped is not None:
            self._bytes -= dropped[1]

    def clear(self) -> None:
        """Drop all values."""
        self._entries.clear()
        self._bytes = 0


class Memo(Generic[K, V]):
    """A pure function of one hashable argument whose latest results are kept.

    `size_of` returns the size of an argument and its result in bytes. Exceptions are not kept.
    """

    def __init__(
        self, function: Callable[[K], V], size_of: Callable[[K, V], int], *, max_entries: int, max_bytes: int
    ) -> None:
        self._function, self._size_of = function, size_of
        self._results: BoundedCache[K, V] = BoundedCache(max_entries, max_bytes)

    def __call__(self, argument: K) -> V:
        """Return the function's result, which is never None."""
        result = self._results.get(argument)
        if result is None:
            result = self._function(argument)
            self._results.put(argument, result, self._size_of(argument, result))
        return result


A = TypeVar("A")
R = TypeVar("R")


class Latest(Generic[A, R]):
    """A pure function whose last result is kept as long as its argument is the same.

    It is for arguments that hardly ever change, such as the log of a trust domain.
    """

    def __init__(self, function: Callable[[A], R]) -> None:
        self._function = function
        self._last: tuple[A, R] | None = None

    def __call__(self, argument: A) -> R:
        """Return the function's result."""
        last = self._last
        if last is None or (last[0] is not argument and last[0] != argument):
            last = self._last = argument, self._function(argument)
        return last[1]
