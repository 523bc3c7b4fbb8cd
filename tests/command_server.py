"""Fork commands of `dstack-emu` out of one process that has imported them all.

A command takes half a second to import what it needs, and the tests start hundreds. Each message on the socket, whose
descriptor is argument 1, is JSON with `arguments`, `module`, `environment`, `folder` and `finalizes`. It brings four
descriptors: the three streams of the command, and where its process id and then its exit status are written, each on a
line; a command whose status nobody can read any more is killed. Messages also come to the socket of argument 2, which
has an address. This process runs no command itself and has no thread, so what it forks is as good as new. It ends with
the first socket.
"""

import contextlib
import gc
import importlib
import io
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from dstack_emu.cli.main import COMMANDS, main

EAGER = (
    "dstack_emu.control.admission",
    "dstack_emu.kms_emu.grpc_server",
    "dstack_emu.observability.interceptor",
    "dstack_emu.runbook.grpc_kms_client",
    "dstack_emu.stack",
    "dstack_emu.testing",
    "dstack_emu.transport.ratls_server",
    "grpc.aio",
    "uvloop",
    "yaml",
)
"""What commands import when they run."""
MAX_MESSAGE = 1 << 20


def serve(*sockets: socket.socket) -> dict[str, Any] | None:
    """Fork a process for each message, in which this returns with the message; return None here at the end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # what it forks first is nobody's to wait for
    while True:
        ready, _, _ = select.select(sockets, [], [])
        message, descriptors, _, _ = socket.recv_fds(ready[0], MAX_MESSAGE, 4)
        if not message:
            return None
        if os.fork() == 0:
            for each in sockets:
                each.close()
            return _begin(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _begin(message: dict[str, Any], stdin: int, stdout: int, stderr: int, status: int) -> dict[str, Any]:
    """Fork the command, which returns with the message; wait for it, tell its exit status, and end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    command = os.fork()
    if command != 0:
        os.write(status, b"%d\n" % command)
        os.closerange(0, status)
        either = select.poll()
        either.register(os.pidfd_open(command), select.POLLIN)
        either.register(status, 0)  # an error: the other end is closed
        if status in dict(either.poll()):
            os.kill(command, signal.SIGKILL)
        _, ended = os.waitpid(command, 0)
        with contextlib.suppress(BrokenPipeError):
            os.write(status, b"%d\n" % os.waitstatus_to_exitcode(ended))
        os._exit(0)
    os.close(status)
    for number, descriptor in enumerate((stdin, stdout, stderr)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8")
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w", closefd=False)), "utf-8", errors="backslashreplace", line_buffering=True
    )
    os.chdir(message["folder"])
    os.environ.clear()
    os.environ.update(message["environment"])
    return message


def _run(program: Callable[[list[str]], object], arguments: list[str]) -> NoReturn:
    """Run a command, and end at once with its status, its output written.

    The interpreter's own end would take twenty times as long as the fork: it visits every object of the modules.
    """
    try:
        program(arguments)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    listening = [socket.socket(fileno=int(number)) for number in sys.argv[1:]]
    ready, _, _ = select.select(listening, [], [])
    if listening[0] in ready and not listening[0].recv(1, socket.MSG_PEEK):
        sys.exit()  # no test needed a command
    for module in (*(f"dstack_emu.cli.commands.{name.replace('-', '_')}" for name in COMMANDS), *EAGER):
        importlib.import_module(module)
    gc.freeze()  # so that a collection in a command touches none of the pages that they share
    command = serve(*listening)
    if command is not None:
        program = importlib.import_module(command["module"]).main if command["module"] else main
        if command["finalizes"]:
            program(command["arguments"])
        _run(program, command["arguments"])
