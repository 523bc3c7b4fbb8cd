"""One line on stderr that says what is being done, if stderr is a terminal."""

import sys


class ProgressLine:
    """The line; it is replaced, and at last removed."""

    def __init__(self) -> None:
        self.is_shown = sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Replace the line."""
        if self.is_shown:
            print(f"\r\033[K{text:.78}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Remove the line."""
        if self.is_shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
