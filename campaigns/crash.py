"""Campaign `crash`: whatever happens while something is stored, the next start finds what was before or what is new.

Most acts store one thing in a process that is killed at a step, whose calls fail, whose disk is full, or that has lost
its permission (`crash_faults`). The others kill whole servers with SIGKILL at a moment of a call (`crash_servers`), or
set the clock back between two starts (`crash_clock`).
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any, Final

from campaigns import crash_clock
from campaigns import crash_faults as faults
from campaigns.case import Act, Finding, Outcome, Script, World
from campaigns.crash_servers import SERVERS, Servers
from campaigns.crash_things import REFUSALS, THINGS, TRACED, left, read

STORED: Final = 20
"""Acts of a case that store one thing."""
SERVED: Final = 0.15
"""The share of cases with an act that kills a server, which takes hundreds of times as long."""
CLOCKED: Final = 0.05
"""The share of cases with an act that sets the clock back."""
MEMORY: Final = "/dev/shm"
ERRNOS: Final = ("ENOSPC", "EROFS", "EACCES", "EIO", "EDQUOT")


class Machine:
    """The world: a folder for what is stored, and the servers."""

    def __init__(self, folder: Path, servers: Servers) -> None:
        self._folder, self._servers = folder, servers
        self._steps: dict[str, int] = {}
        self._after: dict[str, Any] = {}

    def run(self, script: Script) -> Outcome:
        """Do each act, and judge what the next start finds."""
        outcome = Outcome()
        for act in script:
            if act.name == "store":
                self._store(act, outcome)
            else:
                self._servers.run(act, outcome)
        return outcome

    def _store(self, act: Act, outcome: Outcome) -> None:
        name, fault = str(act.fields["thing"]), dict(act.fields)
        thing = THINGS[name]
        if fault["fault"] == "kill":
            fault["step"] = int(fault["moment"] * self._steps_of(name))
        folder = self._new(name)
        try:
            before = read(name, folder)
            if fault["fault"] == "permission":
                faults.take_permission(folder, int(fault["mode"], 8))
            ended = faults.run(lambda: thing.store(folder), fault, TRACED, REFUSALS)
            faults.give_permission(folder)
            outcome.counts[f"{fault['fault']}: {ended.how}"] += 1
            for text in self._wrong(name, folder, before, ended):
                outcome.findings.append(Finding(f"{name}, {fault['fault']}: {text.partition(':')[0]}", text))
        finally:
            faults.give_permission(folder)
            shutil.rmtree(folder)

    def _wrong(self, name: str, folder: Path, before: Any, ended: faults.Ended) -> Iterator[str]:
        if ended.how == "refused":
            if THINGS[name].is_named and str(folder) not in ended.text:
                yield f"the refusal names no file: {ended.text}"
            if (unfinished := left(folder)) and name != "machine: remove":  # whose mark lets the next start go on
                yield f"a refusal leaves: {unfinished}"
        try:
            found = read(name, folder)
        except Exception as error:  # whatever the next start says
            yield f"the next start fails: {type(error).__name__}: {error}"
            return
        if (unfinished := left(folder)) and not (ended.how == "killed" and _is_overwritten(unfinished)):
            yield f"the next start leaves: {unfinished}"
        allowed = {"refused": (before,), "done": (self._after[name],), "killed": (before, self._after[name])}[ended.how]
        if name == "machine: remove" and ended.how == "refused":
            allowed = (before, self._after[name])  # it goes on being removed at the next start
        if found not in allowed:
            yield f"something between, after {ended.how}: {found!r:.200}"

    def _steps_of(self, name: str) -> int:
        if name not in self._steps:
            folder = self._new(name)
            self._steps[name] = faults.run(lambda: THINGS[name].store(folder), {}, TRACED, REFUSALS).steps
            shutil.rmtree(folder)
        return self._steps[name]

    def _new(self, name: str) -> Path:
        """Make a folder with what is there at first."""
        if name not in self._after:
            done = Path(tempfile.mkdtemp(dir=self._folder))
            THINGS[name].before(done)
            THINGS[name].store(done)
            self._after[name] = read(name, done)
            shutil.rmtree(done)
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        folder.chmod(0o755)
        THINGS[name].before(folder)
        return folder


def _is_overwritten(names: list[str]) -> bool:
    """Return whether all that is left are temporary files that the next storing writes anew."""
    return all(name.endswith(".new") or name.startswith(".evidence.") for name in names)


class Crash:
    """The campaign."""

    name = "crash"
    about = "what is stored, after kill -9, failing calls, full disks, lost permissions and clocks that are set back"

    def draw(self, chance: Random) -> Script:
        """Draw acts."""
        acts = [_stored(chance) for _ in range(STORED)]
        if chance.random() < SERVED:
            server = chance.choice(sorted(SERVERS))
            call = chance.choice(SERVERS[server])
            acts.append(
                Act(
                    "kill a server",
                    {"server": server, "call": call, "moment": chance.random()},
                    f"kill {server}: {call}",
                )
            )
        if chance.random() < CLOCKED:
            server, back = chance.choice(sorted(crash_clock.SERVERS)), chance.choice(crash_clock.BACK)
            acts.append(Act("set the clock back", {"server": server, "back": back}, f"set the clock back: {server}"))
        return tuple(acts)

    @contextmanager
    def world(self) -> Iterator[World]:
        """Make the folders."""
        with ExitStack() as ending:
            place = MEMORY if os.access(MEMORY, os.W_OK) else None
            folder = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="crash-", dir=place)))
            folder.chmod(0o755)
            yield Machine(folder, ending.enter_context(Servers()))


def _stored(chance: Random) -> Act:
    thing = chance.choice(sorted(THINGS))
    kind = chance.choices(("kill", "error", "full", "permission"), (6, 3, 1, 1))[0]
    fields: dict[str, Any] = {"thing": thing, "fault": kind}
    match kind:
        case "kill":
            fields["moment"] = chance.random()
        case "error":
            fields |= {"call": chance.randrange(16), "calls": chance.choice((1, 1000)), "errno": chance.choice(ERRNOS)}
        case "full":
            fields["bytes"] = chance.choice((0, 1, 40, 200, 1000, 4096))
        case "permission":
            fields["mode"] = chance.choice(("555", "500"))
    return Act("store", fields, f"{kind}: {thing}")


CAMPAIGN: Final = Crash()
