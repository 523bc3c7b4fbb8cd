"""A refusal as an exception, and a `with` block that expects one."""

from collections.abc import Iterator
from contextlib import contextmanager


class Refused(Exception):
    """A KMS or an agent refused a call: the text is that of its answer, `status` the HTTP status."""

    def __init__(self, text: str, status: int = 403) -> None:
        super().__init__(text)
        self.status = status


class Refusal:
    """The refusal that a block expects; `text` is set when the block has ended."""

    def __init__(self) -> None:
        self.text = ""


@contextmanager
def refused(text: str = "") -> Iterator[Refusal]:
    """Expect a refusal in the block whose text contains `text`.

    Raises `AssertionError` if nothing is refused, or if the text is another one. Other errors, such as that about an
    unknown name, are not caught.
    """
    refusal = Refusal()
    try:
        yield refusal
    except Refused as error:
        refusal.text = str(error)
        if text not in refusal.text:
            raise AssertionError(
                f"refused with another text: {refusal.text!r}, expected it to contain {text!r}"
            ) from error
    else:
        raise AssertionError(f"nothing was refused; expected a refusal that contains {text!r}")
