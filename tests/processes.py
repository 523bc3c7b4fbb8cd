"""`dstack-emu` commands in processes of their own, forked by `command_server`.

Use `subprocess` where the start of the interpreter is the point.
"""

import atexit
import contextlib
import functools
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tests.repository import ROOT

END_TIMEOUT = 100
COMMAND_SERVER = "COMMAND_SERVER"
"""The variable that names the descriptor to `command_shim`."""
COMMAND_FINALIZES = "COMMAND_FINALIZES"
"""The variable that lets the interpreter of a forked command end as it does for a user."""
SHIM = ROOT / "tests/command_shim.py"
SHARED = "COMMAND_SERVER_ADDRESS"
"""The variable that names the address of the controller's server to the workers."""
ADDRESS = os.environ.get(SHARED) or f"dstack-emu-tests-{os.getpid()}-{secrets.token_hex(4)}"
"""The abstract address of the server."""


class Command:
    """A command that was started, with its stdout as a pipe of text: what tests need of `subprocess.Popen`."""

    def __init__(self, pid: int, status: IO[bytes], stdout: IO[str]) -> None:
        self.pid, self.stdout = pid, stdout
        self.returncode: int | None = None
        self._status = status

    def poll(self, within: float = 0) -> int | None:
        """Return the exit status (negative: the signal that ended it), or None if it still runs after some seconds."""
        if self.returncode is None and select.select([self._status], [], [], within)[0]:
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def wait(self, timeout: float = END_TIMEOUT) -> int:
        """Return the exit status; raise `subprocess.TimeoutExpired` if it still runs after `timeout` seconds."""
        status = self.poll(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def rest(self, timeout: float = END_TIMEOUT) -> str:
        """Wait for the end; return what was not yet read of stdout, which must fit into a pipe."""
        self.wait(timeout)
        if self.stdout.closed:
            return ""
        with self.stdout:
            return self.stdout.read()

    def end(self, number: int = signal.SIGTERM, timeout: float = END_TIMEOUT) -> str:
        """Send a signal, wait for the end and return the rest of stdout; kill what does not end, and raise."""
        self.send_signal(number)
        try:
            return self.rest(timeout)
        except subprocess.TimeoutExpired:
            self.send_signal(signal.SIGKILL)
            self.rest()
            raise


def start(
    *arguments: str,
    stderr: IO[bytes] | IO[str],
    stdin: IO[bytes] | None = None,
    stdout: IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    finalizes: bool = False,
    module: str = "",
) -> Command:
    """Start a command; `environment` is added to the one of the tests. Without `stdin` it reads nothing.

    If a `module` is named, its `main` is run. Once it has run, it ends at once; if it `finalizes`, the interpreter ends
    as it does for a user.
    """
    message = {
        "arguments": arguments,
        "module": module,
        "environment": {**os.environ, **(environment or {})},
        "folder": str(folder),
        "finalizes": finalizes,
    }
    with contextlib.ExitStack() as passed:
        status, theirs = _pipe(passed)
        out, printed = _pipe(passed)
        source = (stdin or passed.enter_context(open(os.devnull, "rb"))).fileno()
        streams = (source, stdout.fileno() if stdout else printed, stderr.fileno(), theirs)
        socket.send_fds(_server(), [json.dumps(message).encode()], streams)
    told = os.fdopen(status, "rb", buffering=0)
    pid = told.readline()
    assert pid, "the process that forks commands has ended"
    return Command(int(pid), told, os.fdopen(out, encoding="utf-8"))


def forked(*arguments: str) -> tuple[list[str], dict[str, Any]]:
    """Return a command line of `dstack-emu` that is forked, and how `subprocess` has to start it.

    For what needs the whole of `subprocess`. It must not be killed: signals that can be handled reach the command.
    """
    server = _server().fileno()
    settings = {"env": {**os.environ, COMMAND_SERVER: str(server), COMMAND_FINALIZES: "1"}, "pass_fds": (server,)}
    return [sys.executable, "-I", "-S", str(SHIM), *arguments], settings


def forked_by_anyone(*arguments: str, module: str = "") -> list[str]:
    """Return the words of a command that forks `dstack-emu`, or `main` of a module, whoever starts it.

    It does not need the descriptor, so it may be started by a command, and may be killed.
    """
    _server()
    return [sys.executable, "-I", "-S", str(SHIM), "--at", ADDRESS, module, *arguments]


def command_for_shells(path: Path) -> int:
    """Write a program that does as `dstack-emu`; return a descriptor.

    A shell that is passed the descriptor, and has its number in the variable `COMMAND_SERVER`, starts the program by
    forking. Anywhere else the program starts as any other does.
    """
    path.write_text(
        "#!/bin/sh\n"
        f'[ -z "${COMMAND_SERVER}" ] || exec {sys.executable} -I -S {SHIM} "$@"\n'
        f'exec {sys.executable} -m dstack_emu "$@"\n'
    )
    path.chmod(0o755)
    return _server().fileno()


def share() -> None:
    """Start the process that forks, for all workers that are started from now on: each would import all by itself."""
    _server()
    os.environ[SHARED] = ADDRESS


def _pipe(passed: contextlib.ExitStack) -> tuple[int, int]:
    """Make a pipe whose writing end is closed with `passed`."""
    reading, writing = os.pipe()
    passed.callback(os.close, writing)
    return reading, writing


@functools.cache
def _server() -> socket.socket:
    """Start the process that forks, or connect to the one that is shared."""
    if SHARED in os.environ:
        shared = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        shared.connect("\0" + ADDRESS)
        return shared
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as named:
        named.bind("\0" + ADDRESS)
        passed = (theirs.fileno(), named.fileno())
        command = [sys.executable, "-m", "tests.command_server", *map(str, passed)]
        server = subprocess.Popen(command, cwd=ROOT, pass_fds=passed)
    atexit.register(server.wait, END_TIMEOUT)
    atexit.register(ours.close)  # the last that is registered is called first
    return ours
