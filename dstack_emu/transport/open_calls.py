"""The calls that are open in this process: what it answers, what it asks, with whom, and since when.

For people alone, who ask a process what it waits for (`cli.waits`), and for metrics. Nothing here has the content of a
call: an address is without user, password and query.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final, Protocol

from dstack_emu.transport.urls import shown_url


class OpenCall(Protocol):
    """A call as its server or its client has it."""

    def described(self) -> str:
        """Say what it is, and with whom: `answers POST /prpc/KMS.GetMeta at http://127.0.0.1:8001 for 127.0.0.1`."""
        ...


_open: Final[dict[OpenCall, float]] = {}
"""Each open call, and when it began by `time.monotonic`."""
_names: Final[list[Callable[[], Mapping[str, str]]]] = []


def began(call: OpenCall) -> None:
    """Let a call be among the open ones."""
    _open[call] = time.monotonic()


def ended(call: OpenCall) -> None:
    """Forget a call."""
    _open.pop(call, None)


def count() -> int:
    """Return the number of open calls."""
    return len(_open)


def open_calls() -> list[tuple[float, str]]:
    """Return how long each call has been open, in seconds, and what it is; the longest first."""
    now = time.monotonic()
    named = {url: name for names in tuple(_names) for url, name in names().items()}
    return [
        (now - since, " ".join([f"{word} ({named[word]})" if word in named else word for word in said.split(" ")]))
        for call, since in sorted(_open.items(), key=lambda item: item[1])
        for said in (call.described(),)
    ]


@contextlib.contextmanager
def named_by(names: Callable[[], Mapping[str, str]]) -> Iterator[None]:
    """While the block runs, show the names of services beside their URLs; `names` returns them by their URLs."""
    _names.append(names)
    try:
        yield
    finally:
        _names.remove(names)


class Asked:
    """What this process asks another one, and waits for; use it in a `with` block."""

    __slots__ = ("_what", "_whom")

    def __init__(self, what: str, whom: str = "") -> None:
        self._what, self._whom = what, whom

    def __enter__(self) -> None:
        began(self)

    def __exit__(self, *_error: object) -> None:
        ended(self)

    def described(self) -> str:
        """Say what it is, and with whom."""
        whom = f" of {shown_url(self._whom).partition('?')[0]}" if self._whom else ""
        return f"asks {self._what}{whom}"


def shown_peer(name: object) -> str:
    """Return the address of a socket as text: `host:port`, or the path of a socket file."""
    match name:
        case (str() as host, int() as port, *_):
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        case str() | bytes() if name:
            return f"unix:{name if isinstance(name, str) else name.decode(errors='replace')}"
    return "a client"
