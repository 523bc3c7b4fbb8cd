"""`python -m bench.scale`: let a stack grow, measure it at each size, and draw it into docs/.

`--quick` stops at small sizes and writes nothing; it fails if a count grows faster than the size. No time is judged.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from bench.processes import ROOT
from bench.scale import apps, cvms, kms, restart, stacks, trust_domains
from bench.scale.chart import draw, number
from bench.scale.growth import Effort, Series, Subject, from_json, medians, slope, to_json
from bench.scale.page import run_of, table_of, with_tables
from dstack_emu.attest.release import DEFAULT

SUBJECTS: Final = {each.SUBJECT.name: each.SUBJECT for each in (trust_domains, cvms, kms, apps, stacks, restart)}
DATA: Final = ROOT / "docs" / "scale.json"
PAGE: Final = ROOT / "docs" / "scale.md"
PICTURES: Final = ROOT / "docs" / "pictures"
TOO_FAST: Final = 1.5
"""What grows with the square of the size has a factor of 3 here; connections that close later make some difference."""


def main() -> None:
    """Measure the named subjects, and write data, pictures and tables of all."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=SUBJECTS, metavar="NAME", help=f"one of {', '.join(SUBJECTS)}"
    )
    parser.add_argument(
        "--rounds", type=int, help="how often each is measured, for the median (1 to 3, less for what takes longer)"
    )
    parser.add_argument("--largest", type=int, help="the largest size, at most that of the subject")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round; nothing is written")
    parser.add_argument("--draw", action="store_true", help="measure nothing: draw docs/scale.json again")
    arguments = parser.parse_args()
    if arguments.draw:
        write(json.loads(DATA.read_text()))
        return
    began, faults = time.monotonic(), list[str]()
    for name in arguments.only or SUBJECTS:
        subject = SUBJECTS[name]
        limit = subject.largest_quick if arguments.quick else min(arguments.largest or subject.largest, subject.largest)
        effort = Effort(limit, seconds=0.1 if arguments.quick else 0.5)
        rounds = 1 if arguments.quick else arguments.rounds or subject.rounds
        load = os.getloadavg()[0]
        series = _measured(subject, effort, rounds)
        faults += faster_than_the_size(subject, series)
        if not arguments.quick:
            write(_with(name, {"rounds": rounds, "load": f"{load:.1f} before, {os.getloadavg()[0]:.1f} after"}, series))
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    print("\n".join(faults), file=sys.stderr)
    sys.exit(1 if faults else 0)


def _measured(subject: Subject, effort: Effort, rounds: int) -> Series:
    print(f"\n{subject.title}")
    print("".join(f"{head:>16}" for head in ("size", *(each.key for each in subject.quantities))), flush=True)
    measured: list[Series] = []
    for _ in range(rounds):
        measured.append({})
        for size, values in subject.measure(effort):
            measured[-1][size] = values
            shown = [number(values[each.key]) if each.key in values else "" for each in subject.quantities]
            print("".join(f"{cell:>16}" for cell in (size, *shown)), flush=True)
    series = medians(measured)
    slopes = [slope(series, each) for each in subject.quantities]
    print("".join(f"{cell:>16}" for cell in ("slope", *("" if s is None else f"{s:.2f}" for s in slopes))), flush=True)
    return series


def faster_than_the_size(subject: Subject, series: Series) -> list[str]:
    """Say of which counts each item of the last doubling has added `TOO_FAST` times what each before has, or more."""
    sizes = [size for size in series if size]
    found = []
    for quantity in subject.quantities:
        if not quantity.is_counted or len(sizes) < 2:
            continue
        count = {size: values[quantity.key] for size, values in series.items()}
        half, last = sizes[-2:]
        before = (count[half] - count.get(0, 0.0)) / half
        added = (count[last] - count[half]) / (last - half)
        if added > 0 and added >= TOO_FAST * before:
            found.append(f"{subject.name}: {quantity.title}: {number(added)} for each one more, after {number(before)}")
    return found


def _with(name: str, run: dict[str, Any], series: Series) -> dict[str, Any]:
    """Return the data with one subject measured anew."""
    version = importlib.metadata.version("dstack-emu")
    known = json.loads(DATA.read_text()) if DATA.exists() else {"subjects": {}}
    data: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": _machine(),
        "versions": f"dstack-emu {version}, dstack {DEFAULT.version}, Python {platform.python_version()}",
        "subjects": {**known["subjects"], name: {**run, "points": to_json(series)}},
    }
    return {**data, "subjects": {each: data["subjects"][each] for each in SUBJECTS if each in data["subjects"]}}


def _machine() -> str:
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{os.cpu_count()} cores ({cpu}), {memory:.0f} GiB, {platform.system()} {platform.release().partition('-')[0]}"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def write(data: dict[str, Any]) -> None:
    """Write the data, and of each subject in it the picture and the table."""
    DATA.write_text(json.dumps(data, indent=1) + "\n")
    tables = {"run": run_of(data)}
    for name, each in data["subjects"].items():
        series = from_json(each["points"])
        (PICTURES / f"scale-{name}.svg").write_text(draw(SUBJECTS[name], series))
        tables[name] = table_of(SUBJECTS[name], series)
    PAGE.write_text(with_tables(PAGE.read_text(), tables))


if __name__ == "__main__":
    main()
