"""Campaign `determinism`: the same seed gives the same bytes, whatever surrounds the process.

An act changes one thing in the surroundings: the interpreter, the hash seed, the time zone, the locale, the umask, the
folders, the date, the load. The files of `campaigns.outputs` are compared with those of plain surroundings, which are
made once in a run, part by part: after a part that differs, the others are left out. A process that fails is a finding,
too.

Other interpreters are those that DSTACK_EMU_PYTHONS names, separated by colons; they must have the dependencies. The
date is changed with libfaketime (Debian: faketime), if it is there.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Final

from campaigns.case import Act, Finding, Outcome, Script, World
from campaigns.outputs import PARTS
from tests.repository import ROOT

Files = Mapping[str, bytes]

FAKETIME: Final = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/lib/faketime/libfaketimeMT.so.1")
TIMEOUT: Final = 600.0
"""Seconds that one part may take, on a busy machine."""
SAID: Final = 4000
"""Characters of what a failed process said that are reported, from the end."""
CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "interpreter": ("1", "2", "3"),
    "hash seed": ("0", "1", "4294967295", "random"),
    "time zone": ("UTC", "Asia/Kathmandu", "America/St_Johns", "Pacific/Kiritimati"),
    "locale": ("C", "POSIX in ASCII", "C.UTF-8", "tr_TR.UTF-8"),
    "umask": ("000", "027", "077"),
    "folders": ("home", "work", "temporary"),
    "date": ("2026-02-03 04:05:06", "2027-12-31 23:59:50", "2031-02-28 12:00:00"),
    "load": ("1", "3"),
    "optimized": ("1", "2"),
}


def pythons() -> list[str]:
    """Return the interpreters."""
    return [sys.executable, *filter(None, os.environ.get("DSTACK_EMU_PYTHONS", "").split(":"))]


def faketime() -> str | None:
    """Return the path of the library that changes the date, None without it."""
    root = Path("/")
    return next((str(path) for pattern in FAKETIME for path in sorted(root.glob(pattern.lstrip("/")))), None)


class Surroundings:
    """The world: it has the files of plain surroundings, and makes those of a script.

    `parts` and `module`, which makes them, are those of `campaigns.outputs`, unless a test has its own.
    """

    def __init__(self, folder: Path, parts: Sequence[str] = (*PARTS,), module: str = "campaigns.outputs") -> None:
        self._folder, self._parts, self._module, self._number = folder, parts, module, 0
        self._plain: dict[str, Files | str] = {}

    def run(self, script: Script) -> Outcome:
        """Make the files, and compare them."""
        outcome = Outcome()
        for act in script:
            if act.name == "date" and faketime() is None:
                outcome.counts["the date is not changed: no libfaketime"] += 1
            if act.name == "interpreter" and len(pythons()) == 1:
                outcome.counts["the interpreter is not changed: DSTACK_EMU_PYTHONS names none"] += 1
        for part in self._parts:
            if part not in self._plain:
                self._plain[part] = self._made((), part)
            plain = self._plain[part]
            if isinstance(plain, str):
                outcome.findings.append(Finding(f"no files in plain surroundings: {part}", plain))
                break
            files = self._made(script, part)
            if isinstance(files, str):
                outcome.findings.append(Finding(f"no files: {part}", files))
                break
            outcome.counts[f"files compared: {part}"] += len(files)
            if found := list(differences(plain, files)):
                outcome.findings += found
                break
        return outcome

    def _made(self, script: Script, part: str) -> Files | str:
        """Return the files of a part, or why there are none."""
        self._number += 1
        folder = self._folder / str(self._number)
        folder.mkdir()
        python, environment, mask, cwd, load = surroundings(script, folder)
        with ExitStack() as ending:
            for _ in range(load):
                busy = ending.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
                ending.callback(busy.kill)
            status, said = finished(
                [*python, "-m", self._module, str(folder / "out"), part], environment, mask, cwd, TIMEOUT
            )
        if status:
            return f"{self._module} {part} ended with {status}: {said[-SAID:]}"
        return {path.name: path.read_bytes() for path in sorted((folder / "out" / "found").iterdir())}


def finished(
    command: list[str], environment: Mapping[str, str], mask: int, cwd: Path, timeout: float
) -> tuple[int | str, str]:
    """Run a command; return its status, or that it took too long, and what it said.

    All processes that it started are ended with it.
    """
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command,
            env=environment,
            umask=mask,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        ) as process,
    ):
        try:
            status: int | str = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = f"no status within {timeout:g} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        return status, log.read().decode(errors="backslashreplace")


def surroundings(script: Script, folder: Path) -> tuple[list[str], dict[str, str], int, Path, int]:
    """Return the interpreter, the variables, the umask, the working folder and the load of a script."""
    every = pythons()
    python, mask, cwd, load = [every[0]], 0o022, ROOT, 0
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": os.environ.get("HOME", "/")}
    for act in script:
        value = act.fields["value"]
        match act.name:
            case "interpreter":
                python[0] = every[int(value) % len(every)]
            case "hash seed":
                environment["PYTHONHASHSEED"] = value
            case "time zone":
                environment["TZ"] = value
            case "locale":
                environment |= {"LC_ALL": value.split()[0], "LANG": value.split()[0]}
                if value == "POSIX in ASCII":
                    environment |= {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
            case "umask":
                mask = int(value, 8)
            case "folders":
                other = folder / "öther folder"
                other.mkdir(exist_ok=True)
                cwd = other if value == "work" else cwd
                environment |= {"home": {"HOME": str(other)}, "temporary": {"TMPDIR": str(other)}}.get(value, {})
            case "date" if (library := faketime()) is not None:
                environment |= {"LD_PRELOAD": library, "FAKETIME": f"@{value}", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
            case "load":
                load = int(value)
            case "optimized":
                python.append("-" + "O" * int(value))
    return python, environment, mask, cwd, load


def differences(one: Files, other: Files) -> Iterator[Finding]:
    """Yield a finding for each file that is in one alone, or has other bytes."""
    for name in sorted(one.keys() | other.keys()):
        first, second = one.get(name), other.get(name)
        if first is None or second is None:
            yield Finding(
                f"file in one alone: {name}", f"in {'plain' if second is None else 'these'} surroundings alone"
            )
        elif first != second:
            at = next(
                (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
            )
            near = slice(max(0, at - 30), at + 50)
            yield Finding(f"other bytes: {name}", f"at {at}: {first[near]!r} and {second[near]!r}")


class Determinism:
    """The campaign."""

    name = "determinism"
    about = "the bytes that a seed determines, in different surroundings, against those of plain ones"

    def draw(self, chance: Random) -> Script:
        """Draw surroundings: each thing is changed in two of three cases."""
        drawn = {name: chance.choice(values) for name, values in CHOICES.items() if chance.random() < 2 / 3}
        return tuple(Act(name, {"value": value}, f"{name} {value}") for name, value in drawn.items())

    @contextmanager
    def world(self) -> Iterator[World]:
        """Make the files of plain surroundings."""
        with tempfile.TemporaryDirectory(prefix="det-") as folder:
            yield Surroundings(Path(folder))


CAMPAIGN: Final = Determinism()
