"""The entry point of the command: what must hold before the other modules are imported, and after they have ended."""

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line.

    While Python imports and ends, Ctrl-C ends the process at once, as it does every program that does not handle it:
    Python's own handler would print a traceback. `cli.main` restores that handler while a command runs.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dstack_emu.cli.main import main as run

    run()
