"""A refusal as an exception, and the block that expects one."""

from collections.abc import Iterator
from contextlib import contextmanager


class Refused(Exception):
    """A refusal by a KMS or an agent; the text is its own, `status` HTTP's."""

    def __init__(self, text: str, status: int = 403) -> None:
        super().__init__(text)
        self.status = status


class Refusal:
    """The refusal that a block expects; `text` is the refusal's, once the block has ended."""

    def __init__(self) -> None:
        self.text = ""


@contextmanager
def refused(text: str = "") -> Iterator[Refusal]:
    """Expect a refusal in the block whose text contains `text`.

    Raises `AssertionError` if nothing is refused, or the text is another one. Other errors, such as that of an unknown
    name, are not caught.
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
