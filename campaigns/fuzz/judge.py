"""Judge what a target does with an input: which error, how long, how much memory, and whether it does so again."""

import dataclasses
import gc
import re
import resource
import sys
import time
import traceback
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any, Final

from pydantic import BaseModel

from campaigns.fuzz.target import Target

SECONDS: Final = 0.25
"""CPU time that any input may take, with the tracing of a coverage-guided run."""
SECONDS_PER_BYTE: Final = 20e-6
MEMORY: Final = 32 * 1024 * 1024
"""Bytes that any input may take; its use is measured exactly if the process has never had so much more before."""
MEMORY_PER_BYTE: Final = 1024
ONE_OF: Final = 16
"""Of so many inputs one is run twice, chosen by its checksum."""
ROOM: Final = 900
"""So many calls may be within each other when an answer is made that is compared with another process's."""
_ADDRESS: Final = re.compile(r" at 0x[0-9a-f]{8,16}>")
"""What Python writes of an object that has no text of its own, which is another one in each process."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What must not be. Findings of one target with the same `rule` and `place` are the same."""

    target: str
    rule: str
    place: str
    text: str
    data: bytes

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two findings the same."""
        return self.target, self.rule, self.place

    def to_json(self) -> dict[str, str]:
        """Return it as JSON, the input in hex."""
        return {**dataclasses.asdict(self), "data": self.data.hex()}


@dataclasses.dataclass(frozen=True)
class Ran:
    """One run of an input: its answer, an undocumented error, seconds of CPU time, and bytes of new memory at most."""

    said: Callable[[], str]
    finding: Finding | None
    seconds: float
    risen: int


def judge(target: Target, data: bytes, *, thoroughly: bool = False, ran: Ran | None = None) -> Finding | None:
    """Run an input, unless it was `ran`; return what is wrong, None if nothing is."""
    ran = ran or run(target, data)
    if ran.finding is not None:
        return ran.finding
    if not target.is_of_the_user and ran.seconds > _bound(data) and (seconds := _least(target, data)) > _bound(data):
        return Finding(target.name, "slow", "", f"{seconds:.2f} s for {len(data)} bytes", data)
    if (thoroughly or ran.risen > MEMORY) and (used := _memory(target, data)) > MEMORY + MEMORY_PER_BYTE * len(data):
        return Finding(target.name, "memory", "", f"{used} bytes of memory for {len(data)} bytes", data)
    if not thoroughly and zlib.crc32(data) % ONE_OF:
        return None
    first, again = ran.said(), run(target, data).said()
    if first != again:
        return Finding(target.name, "another answer", "", f"{first:.200} and then {again:.200}", data)
    if (address := _ADDRESS.search(first)) and address[0].encode() not in data:
        return Finding(target.name, "an address", "", first[max(0, address.start() - 200) : address.end()], data)
    if len(first) > target.growth * len(data) + 65536:
        return Finding(target.name, "long answer", "", f"{len(first)} characters for {len(data)} bytes", data)
    return None


def answer(target: Target, data: bytes) -> str:
    """Return the answer to an input as a text that is the same in each process.

    How deep a document may be depends on the calls that are left, and these on how the process came here.
    """
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + ROOM - _calls_left())
    try:
        ran = run(target, data)
    finally:
        sys.setrecursionlimit(limit)
    return ran.said() if ran.finding is None else f"{ran.finding.rule}: {ran.finding.place}"


def _calls_left(calls: int = 0) -> int:
    try:
        return _calls_left(calls + 1)
    except RecursionError:
        return calls


def run(target: Target, data: bytes) -> Ran:
    """Run an input."""
    peak, began = _peak(), time.thread_time()
    said, finding = _run(target, data)
    return Ran(said, finding, time.thread_time() - began, _peak() - peak)


def run_without_collector(target: Target, data: bytes) -> Ran:
    """Run an input without Python's garbage collector.

    What the collector takes depends on all objects of the process, and comes in steps: a full collection begins when
    the new objects are a quarter of the old ones.
    """
    gc.disable()
    try:
        return run(target, data)
    finally:
        gc.enable()


def _run(target: Target, data: bytes) -> tuple[Callable[[], str], Finding | None]:
    try:
        result = target.read(data)
    except target.refusals as error:
        text = f"{type(error).__name__}: {error}"
        return lambda: text, None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of Rust are no Exception
        text = f"{type(error).__name__}: {error}"[:300]
        return lambda: text, Finding(target.name, type(error).__name__, _place(error), text, data)
    return lambda: _text(result), None


def _text(result: object) -> str:
    """Return the canonical text of a result, which may be as deep as its decoder could go."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(8 * limit)
    try:
        return canonical(result)
    finally:
        sys.setrecursionlimit(limit)


def canonical(value: Any) -> str:
    """Return a text of a value that depends on nothing but the value: sets are sorted."""
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(canonical, value)))}}}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{canonical(key)}: {canonical(each)}' for key, each in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(canonical, value))}]"
    if isinstance(value, BaseModel):
        return type(value).__name__ + canonical(dict(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__ + canonical([getattr(value, each.name) for each in dataclasses.fields(value)])
    return repr(value)


def _place(error: BaseException) -> str:
    """Return the innermost function of the emulator that an error came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/dstack_emu/" in frame.filename]
    if not frames:
        return ""
    return f"{frames[-1].filename.rpartition('/dstack_emu/')[2]}:{frames[-1].name}"


def _bound(data: bytes) -> float:
    return SECONDS + SECONDS_PER_BYTE * len(data)


def _least(target: Target, data: bytes) -> float:
    """Return the least CPU time of an input in three runs: another process may have had the caches of one."""
    return min(run_without_collector(target, data).seconds for _ in range(3))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory(target: Target, data: bytes) -> int:
    tracemalloc.start()
    try:
        _run(target, data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
