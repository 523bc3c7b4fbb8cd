"""Results that are kept because working them out again costs more: at most so many, and at most so many bytes.

A cache belongs to an object that has a lifetime, such as a client or a service, and ends with it. docs/caches.md lists
each one with its bounds and what it saves.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BoundedCache(Generic[K, V]):
    """Values by key. If there is no room, those that were used longest ago make some.

    `max_entries` is how many are kept, `max_bytes` how much they may take together, by what `put` is told. An entry
    that is larger than `max_bytes` is not kept: a sender of data must not be able to fill memory.
    """

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Return how many bytes the entries take together."""
        return self._bytes

    def get(self, key: K) -> V | None:
        """Return a value, or None if there is none."""
        found = self._entries.get(key)
        if found is None:
            return None
        self._entries.move_to_end(key)
        return found[0]

    def put(self, key: K, value: V, size: int) -> None:
        """Keep a value that takes `size` bytes with its key, in place of an older one."""
        self.discard(key)
        if size > self._max_bytes:
            return
        self._entries[key] = value, size
        self._bytes += size
        while len(self._entries) > self._max_entries or self._bytes > self._max_bytes:
            self._bytes -= self._entries.popitem(last=False)[1][1]

    def discard(self, key: K) -> None:
        """Forget a value, if it is there."""
        dropped = self._entries.pop(key, None)
        if dropped is not None:
            self._bytes -= dropped[1]

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._bytes = 0


class Memo(Generic[K, V]):
    """A pure function of one hashable argument, whose latest results are kept.

    `size_of` says how many bytes an argument and its result take. What raises is worked out anew each time.
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
    """A pure function whose last result is kept for as long as its argument is the same.

    For what hardly ever changes, such as a trust domain's log: it is one tuple until something more is measured.
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
