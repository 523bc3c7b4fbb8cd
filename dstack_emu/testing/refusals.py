"""A refusal as an exception, and the block that expects one."""

from collections.abc import Iterator
from contextlib import contextmanager


class Refused(Exception):
    """A KMS, or an agent, said no; the text is its own, `status` HTTP's."""

    def __init__(self, text: str, status: int = 403) -> None:
        super().__init__(text)
        self.status = status


class Refusal:
    """What a block that expected a refusal met; `text` is the refusal's, once the block has ended."""

    def __init__(self) -> None:
        self.text = ""


@contextmanager
def refused(text: str = "") -> Iterator[Refusal]:
    """Expect the block to be refused in words that have `text` among them.

    Raises `AssertionError` where nothing is refused, or something is in other words. What is no refusal, such as a
    name that there is not, goes through.
    """
    met = Refusal()
    try:
        yield met
    except Refused as error:
        met.text = str(error)
        if text not in met.text:
            raise AssertionError(f"refused in other words: {met.text!r}, expected {text!r} among them") from error
    else:
        raise AssertionError(f"nothing was refused: a refusal with {text!r} expected")
