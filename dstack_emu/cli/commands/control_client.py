"""The client of the control API that commands use: where the stack is, its token, and requests to it."""

import contextlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from dstack_emu.cli.commands.common import UsageError
from dstack_emu.deployment.config import DESCRIPTION_FILE, STATE_VARIABLE, TOKEN_FILE, TOKEN_VARIABLE
from dstack_emu.transport.open_calls import Asked
from dstack_emu.transport.ports import PORTS

TIMEOUT: Final = 120.0
"""Seconds for the connection, and for the next bytes of an answer."""
SILENCE: Final = 60.0
"""The same for a stream of events, of which control sends one each 15 s at least."""


class ControlRefusedError(UsageError):
    """The control API refused a call; the text is the reason."""


class Api:
    """The control API at a URL, with the token if it demands one."""

    def __init__(self, url: str, token: str | None) -> None:
        self.token = token
        self._url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        # Use no proxy from the environment: the stack is on this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str) -> Any:
        """GET a path and parse the answer."""
        return self.send("GET", path)

    def send(self, method: str, path: str, body: Any = None) -> Any:
        """Send JSON and parse the answer; raise `ControlRefusedError` for a refusal, `UsageError` if none comes."""
        with self._open(method, path, body, timeout=TIMEOUT) as response:
            return json.load(response)

    def events(self, path: str) -> Iterator[Any]:
        """Yield the events of a stream, parsed, until the stack ends it; raise as `send` does."""
        with self._open("GET", path, timeout=SILENCE, accept="text/event-stream") as stream:
            for line in stream:
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))

    @contextlib.contextmanager
    def _open(self, method: str, path: str, body: Any = None, *, timeout: float, accept: str = "*/*") -> Iterator[Any]:
        """Send JSON and yield the answer as a stream."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 - the URL is http, checked below, and the caller's own
            self._url + path, data, {**self._headers, "Accept": accept}, method=method
        )
        with Asked(method, request.full_url):
            try:
                with self._opener.open(request, timeout=timeout) as response:
                    yield response
            except urllib.error.HTTPError as error:
                raise ControlRefusedError(_refusal(error)) from error
            except TimeoutError as error:
                raise UsageError(f"{self._url}: no answer to {method} {path} within {timeout:g} s") from error
            except (urllib.error.URLError, OSError) as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                advice = "start one with `dstack-emu up`, or name one by --url or --state"
                raise UsageError(f"no stack answers at {self._url} ({reason}): {advice}") from error


def _refusal(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    said = document.get("error") if isinstance(document, dict) else None
    return str(said) if said else f"status {error.code}: {text:.200}"


def find_control(url: str | None, state: Path | None, token: str | None) -> tuple[str, str | None]:
    """Return the URL of the control API, and its token if one is known, from options or else from the environment.

    Raises `UsageError` if no stack is ready in the state folder, or if a value is not usable.
    """
    if url is None and state is None:
        url = os.environ.get("DSTACK_EMU_CONTROL") or None
        if url is None and (named := os.environ.get(STATE_VARIABLE)):
            state = Path(named)
    if state is not None:
        path = state / DESCRIPTION_FILE
        try:
            url = json.loads(path.read_text())["services"]["control"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"no stack is ready in {state}: {path} cannot be read ({error})") from error
        token = token or _token_of(state)
    url = url or f"http://127.0.0.1:{PORTS['control']}"
    if not url.startswith("http://"):
        raise UsageError(f"--url: an http:// URL expected, got {url!r:.100}")
    token = token or os.environ.get(TOKEN_VARIABLE) or None
    if token is not None and not (token.isascii() and token.isprintable()):
        raise UsageError("the token has characters that no token has: expected visible ASCII characters")
    return url, token


def _token_of(state: Path) -> str | None:
    """Return the token in a stack's state folder, None if there is none that this user may read."""
    try:
        return (state / TOKEN_FILE).read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None
