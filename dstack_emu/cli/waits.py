"""What this process waits for, on stderr, when SIGUSR1 asks: the open calls, and the stack of each task and thread.

Nothing stops, and nothing is shown but places in the code and addresses: no values, so no secrets. The threads come
first, written by `faulthandler` even if the event loop does not run.
"""

import asyncio
import contextlib
import faulthandler
import linecache
import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Final

from dstack_emu.transport.open_calls import open_calls

SIGNAL: Final = signal.SIGUSR1
MAX_CALLS: Final = 100
"""Calls that are shown, the oldest ones."""
MAX_STACKS: Final = 100
"""Different stacks that are shown."""
MAX_FRAMES: Final = 30
"""Places of one stack that are shown, the innermost ones."""

_ROOT: Final = f"{Path(__file__).resolve().parents[2]}{os.sep}"


def answer_signal(then: Callable[[], None] | None = None) -> None:
    """Print what this process waits for whenever it gets SIGUSR1, which would end it otherwise; call `then` after that.

    Leaves a signal alone that is ignored. Without a stderr nothing is printed.
    """
    if signal.getsignal(SIGNAL) == signal.SIG_IGN:
        return
    has_errors = _has_errors()
    if not has_errors and then is None:
        return

    def asked(_number: int, _frame: FrameType | None) -> None:
        if has_errors:
            _print()
        if then is not None:
            then()

    faulthandler.unregister(SIGNAL)  # its handler is below Python's, and has to be set again after that
    signal.signal(SIGNAL, asked)
    if has_errors:
        faulthandler.register(SIGNAL, all_threads=True, chain=True)


def _has_errors() -> bool:
    if sys.stderr is None:
        return False
    try:
        sys.stderr.fileno()
    except (OSError, ValueError):
        return False
    return True


def _print() -> None:
    with contextlib.suppress(OSError):  # nobody reads
        os.write(sys.stderr.fileno(), report().encode(errors="replace"))  # print() may be under way in this thread


def report() -> str:
    """Return what this process waits for, in at most some 3,000 lines."""
    lines = [f"process {os.getpid()} at {datetime.now(UTC).isoformat(timespec='seconds')}", *_calls(), *_tasks()]
    return "".join([f"{line}\n" for line in [*lines, "end of what the process waits for"]])


def _calls() -> Iterator[str]:
    found = open_calls()
    yield f"open calls: {len(found)}"
    for seconds, said in found[:MAX_CALLS]:
        text = "".join([character if character.isprintable() else "?" for character in said])
        yield f"  since {seconds:.1f} s: {text:.400}"
    if len(found) > MAX_CALLS:
        yield f"  … and {len(found) - MAX_CALLS} newer ones"


def _tasks() -> Iterator[str]:
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        yield "tasks: no event loop runs"
        return
    tasks = asyncio.all_tasks(loop)
    stacks: dict[tuple[str, ...], list[str]] = {}
    for task in tasks:
        running = ("it runs now: see the threads",) if task is asyncio.current_task(loop) else ()
        stacks.setdefault((*_places(task.get_coro()), *running), []).append(task.get_name())
    yield f"tasks: {len(tasks)}, in {len(stacks)} different places"
    for stack, names in sorted(stacks.items(), key=lambda item: (-len(item[1]), item[0]))[:MAX_STACKS]:
        yield f"  {len(names)} x {min(names):.60}, which awaits:"
        yield from (f"    {place}" for place in stack)
    if len(stacks) > MAX_STACKS:
        yield f"  … and {len(stacks) - MAX_STACKS} other places"


def _places(coroutine: Any) -> list[str]:
    """Return where a coroutine is, and where what it awaits is, the outermost first."""
    found: list[str] = []
    while coroutine is not None:
        kind = next((kind for kind in ("cr", "gi", "ag") if hasattr(coroutine, f"{kind}_frame")), None)
        if kind is None:
            break
        frame: FrameType | None = getattr(coroutine, f"{kind}_frame")
        if frame is not None:
            found.append(_place(frame))
        coroutine = getattr(coroutine, {"cr": "cr_await", "gi": "gi_yieldfrom", "ag": "ag_await"}[kind])
    if coroutine is not None:
        found.append(type(coroutine).__qualname__)
    return found if len(found) <= MAX_FRAMES else [f"… {len(found) - MAX_FRAMES} more", *found[-MAX_FRAMES:]]


def _place(frame: FrameType) -> str:
    path = frame.f_code.co_filename
    line: int | None = frame.f_lineno  # None: Cython's coroutines, such as those of grpcio, have no line
    shown = path.removeprefix(_ROOT) if path.startswith(_ROOT) else "/".join(path.split("/")[-2:])
    if line is None:
        return f"{shown} {frame.f_code.co_qualname}"
    source = linecache.getline(path, line).strip()
    return f"{shown}:{line} {frame.f_code.co_qualname}: {source:.100}"
