"""Run a `dstack-emu` command out of a shell by the process that forks commands: `python -I -S command_shim.py …`.

The variable `COMMAND_SERVER` has the descriptor of the socket of `command_server`. The command has this process's
streams, folder and environment without that variable: what the command itself starts does not have the descriptor.
With `--at ADDRESS MODULE …` the socket with that address is used instead, and `main` of that module, if one is named.
This process passes on signals, and ends as the command ends; if it is killed, so is the command. Only what starts
quickly is imported.
"""

import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def main() -> None:
    """Start the command, wait for it, and end with its status, or by the signal that ended it."""
    module, arguments = "", sys.argv[1:]
    if arguments[:1] == ["--at"]:
        _, address, module, *arguments = arguments
        server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        server.connect("\0" + address)
    else:
        server = socket.socket(fileno=int(os.environ.pop("COMMAND_SERVER")))
    reading, writing = os.pipe()
    finalizes = os.environ.pop("COMMAND_FINALIZES", "") != ""
    message = {
        "arguments": arguments,
        "module": module,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "finalizes": finalizes,
    }
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until it is known where they are passed on to
    socket.send_fds(server, [json.dumps(message).encode()], (0, 1, 2, writing))
    os.close(writing)
    with os.fdopen(reading) as status:
        command = int(status.readline())
        for number in PASSED_ON:
            signal.signal(number, lambda received, _: os.kill(command, received))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        code = int(status.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


main()
