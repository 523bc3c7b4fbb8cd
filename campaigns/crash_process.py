"""Commands of ours in processes of their own, which are killed in the middle of a call."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from tests.processes import Command, start
from tests.repository import ROOT

PATIENCE: Final = 60


class Process:
    """A command of ours, ready."""

    running: ClassVar[set["Process"]] = set()
    """Those that were not ended."""
    module: ClassVar[str] = ""
    """The module whose `main` is run, if it is another one than that of the emulator."""

    def __init__(self, *arguments: str, log: Path, environment: Mapping[str, str] | None = None) -> None:
        words, more = (*arguments, "--json"), dict(environment or {})
        self._process: Command | subprocess.Popen[str]
        with log.open("w") as errors:
            if "LD_PRELOAD" in more:  # what is forked has its libraries already
                command = [sys.executable, "-m", self.module or "dstack_emu", *words]
                everything = {**os.environ, **more}
                self._process = subprocess.Popen(
                    command, cwd=ROOT, env=everything, stdout=subprocess.PIPE, stderr=errors, text=True
                )
            else:
                self._process = start(*words, stderr=errors, environment=more, module=self.module)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(
                f"`{arguments[0]}` ended with {self._process.wait(PATIENCE)}: {log.read_text()[-1000:]}"
            )
        self.description: dict[str, Any] = json.loads(line)
        self.running.add(self)

    def kill(self) -> None:
        """Kill it, and wait for its end."""
        self.end(signal.SIGKILL)

    def end(self, number: int = signal.SIGTERM) -> None:
        """Send it a signal, and wait for its end."""
        self.running.discard(self)
        self._process.send_signal(number)
        self._process.wait(PATIENCE)
        assert self._process.stdout is not None
        self._process.stdout.close()


def cut_off(process: Process, call: Callable[[], Any], wait: Callable[[], None]) -> Any:
    """Make a call, kill the server in it when `wait` has returned, and return the answer, None if it got none."""
    answers: list[Any] = []

    def ask() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, subprocess.SubprocessError, ValueError):
            answers.append(call())

    asking = threading.Thread(target=ask)
    asking.start()
    wait()
    process.kill()
    asking.join()
    return answers[0] if answers else None


def request(method: str, url: str, body: Any = None) -> Any:
    """Ask for JSON, and return it."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=PATIENCE) as response:
        return json.loads(response.read() or b"null")
