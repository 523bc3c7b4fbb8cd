"""Run the tests again and again beside a load on every core, and say how often in a row nothing failed.

`make repeat TIMES=50` runs it. The load is busy processes, or other runs of the tests, each beside the others
(`--at-once 2 --load 0`). `--disturb 0.5` also stops processes of the tests, and lets threads of them wait, at random
(tools/disturb.py). Each run is a line of `.repeat/runs.jsonl`, so that a series goes on after a pause and over
changes of the code: the line has the commit. What a failed run printed is kept beside it.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from disturb import disturb

ROOT: Final = Path(__file__).resolve().parent.parent
FOLDER: Final = ROOT / ".repeat"
RUNS: Final = FOLDER / "runs.jsonl"
TESTS: Final = ("-m", "pytest", "-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder", "-q")
BUSY: Final = "while True: pass"
MAX_DISTURBANCE: Final = 1
"""Seconds. Limits of time in tests would fail beyond it: some are a second long."""


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=_count, default=50, help="how often the tests run (default: 50)")
    parser.add_argument(
        "--load",
        type=_count,
        default=len(os.sched_getaffinity(0)),
        help="busy processes beside them (default: one for each core)",
    )
    parser.add_argument("--at-once", type=_positive, default=1, help="runs side by side (default: 1)")
    parser.add_argument(
        "--disturb",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="stop processes of the tests at random, each for so long at most (default: 0, none)",
    )
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="for pytest, behind --")
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    results: list[bool] = []
    try:
        with busy(arguments.load):
            asyncio.run(run_all(arguments, results))
    except KeyboardInterrupt:
        print("Interrupted: what had begun is not noted.", file=sys.stderr)
    print(f"{sum(results)} of {len(results)} runs had no failure; without one in a row: {in_a_row()}")
    return 0 if all(results) and len(results) == arguments.times else 1


def _count(text: str) -> int:
    """Read a number of runs or processes, which may be 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number expected, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    """Read how long a disturbance may be."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= MAX_DISTURBANCE:
        raise argparse.ArgumentTypeError(f"seconds from 0 to {MAX_DISTURBANCE} expected, got {text!r}")
    return seconds


def _positive(text: str) -> int:
    """Read a number of runs side by side."""
    if _count(text) == 0:
        raise argparse.ArgumentTypeError("a whole number above 0 expected, got 0")
    return int(text)


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep processes busy, of the tests' own priority, while the block runs."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def run_all(arguments: argparse.Namespace, results: list[bool]) -> None:
    """Run the tests as often as asked, that many at once, and add to the results whether nothing failed."""
    places = asyncio.Semaphore(arguments.at_once)

    async def one() -> None:
        async with places:
            results.append(await run(arguments))

    async with asyncio.TaskGroup() as group:
        for _ in range(arguments.times):
            group.create_task(one())


async def run(arguments: argparse.Namespace) -> bool:
    """Run the tests once, note it, and say whether nothing failed."""
    began = time.monotonic()
    # In a session of their own, so that Ctrl-C reaches them once, by the line below.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *TESTS, *arguments.arguments),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    disturbance = asyncio.create_task(_disturbed(process.pid, arguments.disturb))
    try:
        printed, complained = (each.decode(errors="replace") for each in await process.communicate())
    except asyncio.CancelledError:
        os.killpg(process.pid, signal.SIGINT)
        await process.communicate()
        raise
    disturbances = await disturbance
    seconds = round(time.monotonic() - began)
    said = printed.splitlines()
    ended = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
    noted = {
        "ended": ended,
        "commit": commit(),
        "arguments": arguments.arguments,
        "at_once": arguments.at_once,
        "busy": arguments.load,
        "disturbances": disturbances,
        "load_average": round(os.getloadavg()[0], 1),
        "seconds": seconds,
        "status": process.returncode,
        "result": said[-1] if said else "",
    }
    with RUNS.open("a") as file:
        file.write(json.dumps(noted) + "\n")
    print(f"{ended}  {noted['commit']}  load {noted['load_average']}  {noted['result']}", flush=True)
    if process.returncode != 0:
        kept = FOLDER / f"{ended}-{process.pid}.txt"
        kept.write_text(printed + complained)
        print(f"  what it printed is in {kept.relative_to(ROOT)}", flush=True)
    return process.returncode == 0


async def _disturbed(process: int, longest: float) -> int:
    """Disturb a run until it ends; return how often that was done."""
    return await asyncio.to_thread(disturb, process, longest) if longest else 0


def commit() -> str:
    """Return the present commit, with a plus sign if files differ from it."""
    git = shutil.which("git") or "git"
    told = subprocess.run(
        [git, "describe", "--always", "--dirty=+"], cwd=ROOT, text=True, capture_output=True, check=False
    )
    return told.stdout.strip() or "no commit"


def in_a_row() -> int:
    """Count the latest runs of all tests that had no failure."""
    if not RUNS.exists():
        return 0
    runs: list[dict[str, Any]] = [json.loads(line) for line in RUNS.read_text().splitlines()]
    count = 0
    for each in reversed(runs):
        if each["status"] != 0:
            break
        count += not each["arguments"]
    return count


if __name__ == "__main__":
    sys.exit(main())
