"""The body of a request while it arrives: complete, still coming, or never to be complete. No I/O."""

from collections.abc import Callable


class BodyError(Exception):
    """A body that cannot be read; the text says why."""


class BodyTooLargeError(BodyError):
    """A body that is longer than the application reads."""


class BodyBrokenError(BodyError):
    """A body that ended early, or whose framing was broken."""


class Body:
    """Collects the pieces of one body, up to `limit` bytes.

    A longer one fails with `BodyTooLargeError` as soon as that is known, and what still comes of it is dropped.
    """

    __slots__ = ("_limit", "_on_settled", "_pieces", "_size", "error", "has_ended", "is_settled")

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0
        self._pieces: list[bytes] = []
        self._on_settled: Callable[[], None] | None = None
        self.error: BodyError | None = None
        self.is_settled = False
        """Whether it can be taken: it is complete, or it is known that it will not be."""
        self.has_ended = False
        """Whether nothing of it is still to come."""

    def expect(self, length: int) -> None:
        """Take note of the length that the head announces; fail if it is over the limit."""
        if length > self._limit:
            self.fail(BodyTooLargeError(f"the body is longer than {self._limit} bytes"))

    def add(self, piece: bytes) -> None:
        """Add bytes as they arrive."""
        if self.error is not None:
            return
        self._size += len(piece)
        if self._size > self._limit:
            self.fail(BodyTooLargeError(f"the body is longer than {self._limit} bytes"))
        else:
            self._pieces.append(piece)

    def end(self) -> None:
        """Take note that nothing more comes."""
        self.has_ended = True
        self._settle()

    def fail(self, error: BodyError) -> None:
        """Give the body up; the first error stays. Pieces that came, and those that still come, are dropped."""
        if self.error is None and not self.has_ended:
            self.error = error
            self._pieces.clear()
            self._settle()

    def when_settled(self, call: Callable[[], None]) -> None:
        """Call a function once the body can be taken, at once if it can be already."""
        if self.is_settled:
            call()
        else:
            self._on_settled = call

    def take(self) -> bytes:
        """Return a settled body's bytes; raise its `BodyError` if it has none."""
        if self.error is not None:
            raise self.error
        if len(self._pieces) > 1:
            self._pieces[:] = [b"".join(self._pieces)]
        return self._pieces[0] if self._pieces else b""

    def _settle(self) -> None:
        if not self.is_settled:
            self.is_settled = True
            if self._on_settled is not None:
                self._on_settled()
