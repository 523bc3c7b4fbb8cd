"""The process that runs inputs: `python -m campaigns.fuzz.worker`, started by `python -m campaigns.fuzz`.

It reads what is to be run, as JSON. Each share of it has a process of its own, a fork, because it takes seconds to
import all targets. With atheris it is guided by coverage; without (there is a wheel for Linux on x86-64 alone) the
mutations are drawn from the seed. It writes its result as JSON, and ends.
"""

import argparse
import gc
import hashlib
import json
import os
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

try:
    import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]  # untyped, and of `make fuzz` alone
except ImportError:
    atheris = None

KEPT: Final = 300
"""Inputs of which the answer is compared at the end, and in another process."""
OBJECTS: Final = 100_000
"""So many more objects at the end than after a quarter of the inputs are a leak."""
WRITE_EVERY: Final = 30.0
"""Seconds after which the result so far is written."""
MAX_INPUT: Final = 64 * 1024


def load() -> Any:
    """Import the targets, traced if there is atheris."""
    if atheris is None:
        from campaigns.fuzz.targets import TARGETS

        return TARGETS
    with atheris.instrument_imports(include=["dstack_emu"]):
        from campaigns.fuzz.targets import TARGETS
    return TARGETS


@dataclass(frozen=True)
class Share:
    """What one process runs: its targets, and a number of inputs."""

    label: str
    targets: Sequence[str]
    inputs: int
    seed: int


class Run:
    """Judges inputs, and keeps what it found."""

    def __init__(self, targets: Sequence[Any], inputs: int, seconds: float, result: Path) -> None:
        from campaigns.fuzz import judge

        self._judge = judge
        self._targets, self._inputs, self._result = targets, inputs, result
        self.slots = slots_of([target.weight for target in targets])
        self._began = self._written = time.monotonic()
        self._end = self._began + seconds
        self._objects = 0
        self._kept: dict[int, tuple[int, bytes, str]] = {}
        self._place = Random(1)
        self.found: dict[tuple[str, str, str], Any] = {}
        self.counts: Counter[str] = Counter()
        self.times: Counter[str] = Counter()
        self.count = 0

    def split(self, data: bytes) -> tuple[int, bytes]:
        """Return the number of the target that an input is for, and the input."""
        if len(self._targets) == 1:
            return 0, data
        return (self.slots[data[0] % len(self.slots)], data[1:]) if data else (0, b"")

    def is_past(self, part: float = 1) -> bool:
        """Return whether a part of the inputs, or of the time, is over."""
        return self.count >= part * self._inputs or time.monotonic() >= self._began + part * (self._end - self._began)

    def one(self, data: bytes) -> None:
        """Judge one input."""
        number, data = self.split(data)
        target = self._targets[number]
        self.counts[target.name] += 1
        self.count += 1
        self.add(self._judge.judge(target, data))
        if not self._objects and self.is_past(0.25):
            self._objects = _objects()
        if time.monotonic() >= self._written + WRITE_EVERY:
            self.write()
        if (at := self._place.randrange(self.count)) < KEPT:
            self._kept[at] = number, data, self._digest(number, data)

    def add(self, finding: Any) -> None:
        """Keep a finding, the shortest input of each."""
        if finding is None:
            return
        self.times[" ".join(finding.key)] += 1
        known = self.found.get(finding.key)
        if known is None or len(finding.data) < len(known.data):
            self.found[finding.key] = finding
            if known is None:
                print(f"FOUND: {finding.target}: {finding.rule} {finding.place}: {finding.text}", file=sys.stderr)
                self.write()

    def _digest(self, number: int, data: bytes) -> str:
        said: str = self._judge.answer(self._targets[number], data)
        return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()

    def stretch(self, samples: Sequence[Sequence[bytes]], number: int, chance: Random) -> None:
        """Judge inputs of growing size in which one piece is repeated, in turn for each target."""
        from campaigns.fuzz import growth

        for turn in range(number):
            which = turn % len(self._targets)
            target = self._targets[which]
            number, found = growth.judge_stretched(target, samples[which], chance)
            self.counts[f"{target.name} stretched"] += number
            for finding in found:
                self.add(finding)

    def end(self) -> None:
        """Compare the kept answers once more, and write the result."""
        for number, data, digest in self._kept.values():
            if self._digest(number, data) != digest:
                target = self._targets[number]
                text = "another answer at the end of the run"
                self.add(self._judge.Finding(target.name, "another answer", "later", text, data))
        if self._objects and (more := _objects() - self._objects) > OBJECTS:
            names = ",".join(target.name for target in self._targets)
            self.add(self._judge.Finding(names, "leak", "", f"{more} more objects at the end", b""))
        self.write(is_whole=True)

    def write(self, *, is_whole: bool = False) -> None:
        """Write the result."""
        self._written = time.monotonic()
        document = {
            "targets": [target.name for target in self._targets],
            "guided": atheris is not None,
            "whole": is_whole,
            "seconds": round(time.monotonic() - self._began, 1),
            "cpu seconds": round(time.process_time(), 1),
            "inputs": dict(self.counts),
            "found": [finding.to_json() | {"times": self.times[" ".join(key)]} for key, finding in self.found.items()],
            "kept": [
                {"target": self._targets[number].name, "data": data.hex(), "digest": digest}
                for number, data, digest in self._kept.values()
            ],
        }
        self._result.write_text(json.dumps(document))


def slots_of(weights: Sequence[float]) -> list[int]:
    """Return the number of the target for each value of an input's first byte: a target has values by its weight."""
    least = min(weights)
    unit = max(least, sum(weights) / 200)
    return [number for number, weight in enumerate(weights) for _ in range(max(1, round(weight / unit)))]


def _objects() -> int:
    gc.collect()
    return len(gc.get_objects())


def dictionary(samples: Sequence[bytes]) -> set[bytes]:
    """Return pieces of samples that a mutation may put in: names and values of JSON, words."""
    found: set[bytes] = set()
    for sample in samples:
        found.update(re.findall(rb'"[A-Za-z_./-]{1,40}"', sample[:MAX_INPUT]))
        found.update(re.findall(rb"\b[A-Za-z][A-Za-z_-]{2,24}\b", sample[:4096]))
    return set(sorted(found)[:400])


def guide(run: Run, corpus: Path, samples: Sequence[Sequence[bytes]], inputs: int, seed: int) -> None:
    """Let libFuzzer make the inputs; this does not return."""
    several = len(samples) > 1
    longest = 0
    for number, each in enumerate(samples):
        for sample in each:
            data = (bytes([run.slots.index(number)]) if several else b"") + sample
            longest = max(longest, len(data))
            (corpus / f"sample-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
    words = sorted(dictionary([sample for each in samples for sample in each]))
    lines = ["".join(f"\\x{octet:02x}" for octet in word) for word in words]
    (corpus.parent / f"{corpus.name}.dict").write_text("".join(f'"{line}"\n' for line in lines))

    def one(data: bytes) -> None:
        run.one(data)
        if run.is_past():
            ended()

    def ended() -> None:
        stretch_and_end()
        sys.stderr.flush()
        os._exit(0)  # atheris would run the interpreter's end inside of libFuzzer

    def stretch_and_end() -> None:
        run.stretch(samples, max(4, min(400, inputs // 5000)), Random(seed))
        run.end()

    arguments = [
        "fuzz",
        f"-seed={seed or 1}",
        f"-max_len={min(MAX_INPUT, 2 * longest + 256)}",
        *([f"-dict={corpus.parent / f'{corpus.name}.dict'}"] if words else []),
        f"-artifact_prefix={corpus}-crash-",
        "-timeout=600",
        "-rss_limit_mb=3072",
        "-verbosity=0",
        "-print_final_stats=0",
        "-handle_int=0",
        "-handle_term=0",
        str(corpus),
    ]
    atheris.Setup(arguments, one)
    atheris.Fuzz()


def draw(run: Run, samples: Sequence[Sequence[bytes]], inputs: int, seed: int) -> None:
    """Draw the inputs from the seed."""
    from campaigns.fuzz.mutation import mutated

    chance = Random(seed)
    several = len(samples) > 1
    while not run.is_past():
        slot = chance.randrange(len(run.slots))
        own = samples[run.slots[slot]]
        data = mutated(chance.choice(own), own, chance)
        run.one((bytes([slot]) if several else b"") + data)
    run.stretch(samples, max(4, min(400, inputs // 5000)), chance)
    run.end()


def work(
    share: Share, targets: Sequence[Any], samples: Sequence[Sequence[bytes]], seconds: float, folder: Path
) -> None:
    """Run one share, and write its result; with atheris this does not return."""
    run = Run(targets, share.inputs, seconds, folder / f"{share.label}.json")
    for number, each in enumerate(samples):
        for sample in each:
            run.add(run._judge.judge(targets[number], sample, thoroughly=True))
    if atheris is None:
        draw(run, samples, share.inputs, share.seed)
    else:
        guide(run, folder / share.label, samples, share.inputs, share.seed)


def forked(
    share: Share, every: Mapping[str, Any], samples: Mapping[str, Sequence[bytes]], seconds: float, folder: Path
) -> int:
    """Run one share in a new process, with a log of its own; return the process's id."""
    if (process := os.fork()) != 0:
        return process
    status = 1
    try:
        (folder / share.label).mkdir(exist_ok=True)
        (folder / f"{share.label}.json").unlink(missing_ok=True)
        log = os.open(folder / f"{share.label}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        targets, own = [every[name] for name in share.targets], [samples[name] for name in share.targets]
        work(share, targets, own, seconds, folder)
        status = 0
    except BaseException:  # the process ends here, whatever it is
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all shares of the standard input; print the status of each as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args(arguments)
    waiting = [Share(**each) for each in json.load(sys.stdin)]
    every = load()
    samples = {name: list(map(bytes, every[name].samples())) for share in waiting for name in share.targets}
    # What is there now stays: without it, each process's collections look at less.
    gc.collect()
    gc.freeze()
    end = time.monotonic() + given.seconds
    running: dict[int, str] = {}
    statuses: dict[str, int] = {}
    while waiting or running:
        while waiting and len(running) < given.jobs:
            # The time that is left is shared out by the inputs that are left: quick targets leave some of it.
            left, inputs = max(0.0, end - time.monotonic()), sum(share.inputs for share in waiting)
            share = waiting.pop(0)
            seconds = min(left, left * given.jobs * share.inputs / inputs)
            running[forked(share, every, samples, seconds, given.folder)] = share.label
        process, status = os.wait()
        statuses[running.pop(process)] = os.waitstatus_to_exitcode(status)
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
