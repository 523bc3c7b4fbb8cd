"""What goes wrong while something is stored: the process is killed, calls fail, the disk is full, a permission is lost.

An action runs in a process of its own. A step is a line of the modules that store, or a call that reaches the file
system from there; nothing of them is replaced.
"""

import errno
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, Literal

Action = Callable[[], object]
Ending = Literal["killed", "refused", "done"]

REACHES_DISK: Final = frozenset(
    [
        "open",
        "os.chmod",
        "os.chown",
        "os.listdir",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.scandir",
        "os.truncate",
        "shutil.rmtree",
        "tempfile.mkdtemp",
        "tempfile.mkstemp",
    ]
)
WRITES: Final = frozenset(["open", "os.mkdir", "os.rename", "os.truncate", "tempfile.mkdtemp", "tempfile.mkstemp"])
NOBODY: Final = 65534
MAX_STEPS: Final = 100_000
_DONE, _REFUSED, _BROKEN = 0, 3, 4


@dataclass(frozen=True, slots=True)
class Ended:
    """How an action ended, the text of its refusal, and how many steps it had."""

    how: Ending
    text: str = ""
    steps: int = 0


def run(
    action: Action, fault: Mapping[str, Any], traced: frozenset[str], refusals: tuple[type[Exception], ...]
) -> Ended:
    """Run an action with a fault in a process of its own; raise `RuntimeError` for an error that is no refusal."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        steps = [0]
        try:
            _arm(fault, traced, steps)
            action()
            code, text = _DONE, ""
        except refusals as error:
            code, text = _REFUSED, str(error)
        except BaseException:  # said by the parent
            code, text = _BROKEN, traceback.format_exc()
        sys.settrace(None)
        os.write(writing, f"{steps[0]} {text}"[:60_000].encode(errors="replace"))
        os._exit(code)
    os.close(writing)
    with open(reading, "rb") as pipe:
        steps_text, _, text = pipe.read().decode().partition(" ")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            raise RuntimeError(f"ended by signal {os.WTERMSIG(status)}")
        return Ended("killed")
    code = os.waitstatus_to_exitcode(status)
    if code == _BROKEN:
        raise RuntimeError(text)
    return Ended("refused" if code == _REFUSED else "done", text, int(steps_text or 0))


def _arm(fault: Mapping[str, Any], traced: frozenset[str], steps: list[int]) -> None:
    match fault.get("fault"):
        case "kill":
            _count(traced, steps, int(fault["step"]))
        case "error":
            _fail(int(fault["call"]), int(fault["calls"]), getattr(errno, fault["errno"]))
        case "full":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault["bytes"]),) * 2)
        case "permission" if os.geteuid() == 0:  # root ignores permissions
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        case None:
            _count(traced, steps, MAX_STEPS)


def _count(traced: frozenset[str], steps: list[int], last: int) -> None:
    def count() -> None:
        steps[0] += 1
        if steps[0] > last:
            os.kill(os.getpid(), signal.SIGKILL)

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        if frame.f_code.co_filename not in traced:
            return None
        if event == "line":
            count()
        return trace

    def audit(event: str, _arguments: tuple[Any, ...]) -> None:
        if event in REACHES_DISK:
            count()

    sys.addaudithook(audit)
    sys.settrace(trace)


def _fail(first: int, calls: int, number: int) -> None:
    seen = -1

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in WRITES or (event == "open" and not _is_stored(arguments)):
            return
        seen += 1
        if first <= seen < first + calls:
            raise OSError(number, os.strerror(number), str(arguments[0]) if arguments else None)

    sys.addaudithook(audit)


def _is_stored(arguments: tuple[Any, ...]) -> bool:
    """Return whether a file is opened to write it, and is no module that Python imports."""
    flags = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) and not str(arguments[0]).endswith((".py", ".pyc"))


def take_permission(folder: Path, mode: int) -> None:
    """Give a folder and those in it a mode; as root, to nobody."""
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        if os.geteuid() == 0:
            os.chown(path, NOBODY, NOBODY)
    for path in folder.rglob("*"):
        if os.geteuid() == 0:
            os.chown(path, NOBODY, NOBODY)
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        path.chmod(mode)


def give_permission(folder: Path) -> None:
    """Undo it."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
