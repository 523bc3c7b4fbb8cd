"""`python -m bench`: run the benchmarks, print each figure, and write all of them to bench/latest.json."""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from bench.figure import FULL, QUICK, Effort, Figure, Measure
from dstack_emu.attest.release import DEFAULT, RELEASES

LATEST: Final = Path(__file__).parent / "latest.json"
BENCHMARKS: Final = (
    "quotes",
    "verification",
    "getquote",
    "startup",
    "agent",
    "kms_start",
    "runbook",
    "getappkey",
    "getappkey_new",
    "gettempcacert",
    "auth_eth",
    "auth_eth_chain",
    "image_verify",
    "memory",
    "grpc",
    "journal",
    "console",
    "caches",
    "ingress",
)


def main() -> None:
    """Run the named benchmarks; an error in a benchmark ends the run, a missed bar does not."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    known = ", ".join(BENCHMARKS)
    parser.add_argument("--only", action="append", choices=BENCHMARKS, metavar="NAME", help=f"one of {known}")
    parser.add_argument("--quick", action="store_true", help="shorter rounds, and fewer: rough figures")
    parser.add_argument(
        "--release", choices=RELEASES, default=DEFAULT.name, help="the dstack release of guests and KMS (%(default)s)"
    )
    arguments = parser.parse_args()
    effort = replace(QUICK if arguments.quick else FULL, release=RELEASES[arguments.release])
    print(f"dstack {effort.release.version}; ", end="")
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}; medians of alternating rounds", flush=True)
    began, figures = time.monotonic(), []
    for figure in run(arguments.only or BENCHMARKS, effort):
        print(figure, flush=True)
        figures.append(figure)
    write(figures, LATEST)
    bars = [figure.ok for figure in figures if figure.bar is not None]
    print(f"{time.monotonic() - began:.0f} s; {bars.count(False)} of {len(bars)} bars missed; written to {LATEST}")


def run(names: Sequence[str], effort: Effort) -> Iterator[Figure]:
    """Run benchmarks by name."""
    for name in names:
        measure: Measure = importlib.import_module(f"bench.{name}").measure
        yield from measure(effort)


def write(figures: Sequence[Figure], path: Path) -> None:
    """Replace the figures of the last run."""
    path.write_text(json.dumps({figure.name: figure.to_json() for figure in figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
