"""Commands of `dstack-emu` as a user runs them: servers that print one line of JSON, and commands that end."""

import contextlib
import http.client
import io
import json
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.cli.main import main
from tests.processes import start
from tests.repository import ROOT

COMMAND_TIMEOUT = 250


def run_command(
    *arguments: str, stdin: bytes = b"", environment: dict[str, str] | None = None, folder: Path = ROOT
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin)
        given.seek(0)
        command = start(*arguments, stdin=given, stdout=out, stderr=err, environment=environment, folder=folder)
        try:
            status = command.wait(COMMAND_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            command.send_signal(signal.SIGUSR1)  # it says what it waits for
            command.poll(1)
            err.seek(0)
            raise AssertionError(f"{arguments} did not end: {err.read().decode()}") from error
        finally:
            command.end(signal.SIGKILL)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(arguments, status, out.read(), err.read())


def usage_error(*arguments: str, environment: dict[str, str] | None = None) -> str:
    """Run a command that must end with status 2 and one line on stderr; return that line without `Error: `."""
    done = run_command(*arguments, environment=environment)
    lines = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (2, b"", 1), done
    return lines[0].removeprefix("Error: ")


def run_inside(*arguments: str) -> tuple[int, str, str]:
    """Run the command in this process; return exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        main(arguments)
    assert isinstance(end.value.code, int)
    return end.value.code, out.getvalue(), err.getvalue()


@contextmanager
def serving(*arguments: str, environment: dict[str, str] | None = None, log: Path | None = None) -> Iterator[Any]:
    """Run a serving command with --json until the block ends; yield what its line says.

    Its stderr goes to `log`, for commands that say more there than a pipe holds.
    """
    with tempfile.TemporaryFile("w+") if log is None else log.open("w+") as errors:
        command = start(*arguments, "--json", stderr=errors, environment=environment)
        try:
            line = command.stdout.readline()
            if not line:
                command.wait()
                errors.seek(0)
                raise AssertionError(f"{arguments} ended with {command.returncode}: {errors.read()}")
            yield json.loads(line)
        finally:
            rest = command.end()
        errors.seek(0)
        assert (command.returncode, rest) == (0, ""), errors.read()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=20)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


def ask(address: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Ask a socket path or an http URL: POST a JSON body, or GET without one; return status and parsed answer."""
    connection = (
        _UnixConnection(address) if address.startswith("/") else http.client.HTTPConnection(address[7:], timeout=20)
    )
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()
