"""Reads the config file of a webhook: all of it, again for every request, and only if it is a regular file.

It does not parse: each webhook interprets the bytes itself.
"""

import os
import stat
import time
from typing import Final

from dstack_emu.auth.errors import AuthConfigError

READS: Final = 4
"""How many times a file that changes while it is read is read at most."""
TICK: Final = 0.012
"""Seconds, more than the resolution of a file's times: a file that was changed less than that ago may have been changed
once more without a change of its times."""


def read_config(path: str) -> bytes:
    """Return the whole file's bytes; raise `AuthConfigError`, which names the file.

    The file is read in the event loop's thread, because it is small, and another thread would take longer. A file that
    is written to in place meanwhile is read again, at most `READS` times: a mixture of the old and the new text could
    be a policy that nobody wrote. A file that was just changed is read once more after `TICK`, because its times do not
    show another change before.
    """
    try:
        with open(path, "rb", buffering=0, opener=_open_nonblocking) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise AuthConfigError(f"failed to load config: {path}: Not a regular file")
            for _ in range(READS):
                content: bytes = file.read()
                after = os.fstat(file.fileno())
                is_unchanged = _version(after) == _version(before) and len(content) == after.st_size
                age = time.time() - after.st_ctime
                if is_unchanged and not 0 <= age < TICK:
                    return content
                before = after
                if is_unchanged:
                    time.sleep(TICK - age)
                file.seek(0)
        raise AuthConfigError(f"config is being rewritten: {path}")
    except FileNotFoundError as error:
        raise AuthConfigError(f"config file not found: {path}") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        detail = getattr(error, "strerror", None) or error
        raise AuthConfigError(f"failed to load config: {path}: {detail}") from error


def _version(state: os.stat_result) -> tuple[int, int, int]:
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO would otherwise hold up every request
