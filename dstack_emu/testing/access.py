"""Access to a running stack from a test, which every handle of `testing` has.

A handle, such as `LiveKms`, has a name and this object; it looks up its part at each call.
"""

import json
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from dstack_emu.control.schemas import ControlError
from dstack_emu.stack import Stack
from dstack_emu.testing.refusals import Refused
from dstack_emu.testing.stack_thread import StackThread, SyncControl
from dstack_emu.transport.client import MAX_RESPONSE
from dstack_emu.transport.http_client import HttpClient
from dstack_emu.transport.tls import client_context

T = TypeVar("T")

TIMEOUT: Final = 90.0
"""The timeout of a request in seconds; it is longer than services wait for one another."""


class NamedPart(Protocol):
    """A handle of a part that has a name."""

    name: str


def name_of(part: NamedPart | str) -> str:
    """Return the name of a part; a text is the name itself."""
    return part if isinstance(part, str) else part.name


class StackAccess:
    """One running stack: its thread, its control API without `await`, and requests to its services."""

    def __init__(self, thread: StackThread, stack: Stack) -> None:
        self.thread = thread
        self.control = SyncControl(thread, stack.control)
        self._stack = stack

    def in_thread(self, work: Callable[[Stack], T]) -> T:
        """Call a function with the `Stack`, in the stack's thread."""
        return self.thread.call(lambda: work(self._stack))

    def post(self, url: str, fields: Mapping[str, Any], root: Path | None = None) -> dict[str, Any]:
        """POST JSON and return the answer; raise `Refused` for a status of 400 or above.

        `root` is the file of the root certificate (PEM) under which the server is verified.
        """
        trust = None if root is None else client_context(root_ca=root.read_text())
        return self.thread.wait(_post(url, fields, trust))


def raise_refusals(call: Callable[[], T]) -> T:
    """Make a call of the control API; raise `Refused` if a KMS refuses (status 403)."""
    __tracebackhide__ = True
    try:
        return call()
    except ControlError as error:
        if error.status != 403:
            raise
        raise Refused(str(error)) from None  # without the cause: the test's report needs only the KMS's text


async def _post(url: str, fields: Mapping[str, Any], tls: ssl.SSLContext | None) -> dict[str, Any]:
    client = HttpClient(timeout=TIMEOUT, max_answer=MAX_RESPONSE, tls=tls)
    try:
        headers = {"Content-Type": "application/json"}
        got = await client.send("POST", url, json.dumps(dict(fields)).encode(), headers, follow_redirects=True)
    finally:
        await client.close()
    text = got.body.decode(errors="replace")
    try:
        answer = json.loads(text) if text else {}
    except ValueError:
        answer = {"error": text}
    if got.status >= 400:
        raise Refused(str(answer.get("error", text) if isinstance(answer, dict) else text), got.status)
    return answer if isinstance(answer, dict) else {"": answer}
