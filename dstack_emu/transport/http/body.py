"""The body of a request while it arrives, without I/O."""

from collections.abc import Callable


class BodyError(Exception):
    """A body cannot be read; the text says why."""


class BodyTooLargeError(BodyError):
    """A body is longer than the application's limit."""


class BodyBrokenError(BodyError):
    """A body ended early, or its framing is invalid."""


class Body:
    """Collects one body, up to `limit` bytes.

    A longer one fails with `BodyTooLargeError` as soon as that is known, and the rest of it is dropped.
    """

    __slots__ = ("_content", "_limit", "_on_settled", "error", "has_ended", "is_settled")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._content = bytearray()  # not the pieces: a chunk of one byte would take fifty
        self._on_settled: Callable[[], None] | None = None
        self.error: BodyError | None = None
        self.is_settled = False
        """Whether it is complete or has failed, so that `take` may be called."""
        self.has_ended = False
        """Whether all of it has arrived."""

    def expect(self, length: int) -> None:
        """Handle the length that the head announces: fail if it is over the limit."""
        if length > self._limit:
            self.fail(BodyTooLargeError(f"the body is longer than {self._limit} bytes"))

    def add(self, piece: bytes) -> None:
        """Add bytes as they arrive."""
        if self.error is not None:
            return
        if len(self._content) + len(piece) > self._limit:
            self.fail(BodyTooLargeError(f"the body is longer than {self._limit} bytes"))
        else:
            self._content += piece

    def end(self) -> None:
        """Complete the body."""
        self.has_ended = True
        self._settle()

    def fail(self, error: BodyError) -> None:
        """Fail the body, unless it has ended; the first error counts. All of it, also what comes later, is dropped."""
        if self.error is None and not self.has_ended:
            self.error = error
            self._content.clear()
            self._settle()

    def when_settled(self, call: Callable[[], None]) -> None:
        """Call a function when the body is settled, or at once if it is."""
        if self.is_settled:
            call()
        else:
            self._on_settled = call

    def take(self) -> bytes:
        """Return the bytes of a settled body; raise its `BodyError` if it has failed."""
        if self.error is not None:
            raise self.error
        return bytes(self._content)

    def _settle(self) -> None:
        if not self.is_settled:
            self.is_settled = True
            if self._on_settled is not None:
                self._on_settled()
