"""`python -m campaigns.fuzz`: fuzz all decoders, or those that are named; the status is 1 if something was found."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from campaigns.fuzz.judge import answer, judge
from campaigns.fuzz.target import Target
from campaigns.fuzz.targets import TARGETS
from campaigns.fuzz.worker import Share
from campaigns.report import versions


def shared_out(names: Sequence[str], inputs: int, together: int) -> list[tuple[list[str], int]]:
    """Return which targets each process has, and its number of inputs."""
    if together:
        groups = [list(names[start::together]) for start in range(min(together, len(names)))]
        return [(group, inputs * len(group) // len(names)) for group in groups]
    whole = sum(TARGETS[name].weight for name in names)
    return [([name], max(1, round(inputs * TARGETS[name].weight / whole))) for name in names]


def share_of(names: Sequence[str], inputs: int, seed: str) -> Share:
    """Return what one process runs; its mutations are drawn from the seed and the names of its targets."""
    label = names[0] if len(names) == 1 else f"{names[0]}-and-{len(names) - 1}"
    number = int.from_bytes(hashlib.sha256(f"{seed}:{label}".encode()).digest()[:4], "big") >> 1
    return Share(label, names, inputs, number)


def run_shares(shares: Sequence[Share], folder: Path, jobs: int, seconds: float) -> list[dict[str, Any]]:
    """Run all shares; return their results. If the process of one ends early, that is a finding."""
    command = [sys.executable, "-m", "campaigns.fuzz.worker", "--jobs", str(jobs), "--folder", str(folder)]
    command += ["--seconds", str(seconds)]
    plan = json.dumps([asdict(share) for share in shares])
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary, (folder / "worker.log").open("w") as log:
        # The processes end without removing their temporary files.
        environment = os.environ | {"PYTHONHASHSEED": "0", "TMPDIR": temporary}
        ended = subprocess.run(
            command, input=plan, stdout=subprocess.PIPE, stderr=log, check=False, text=True, env=environment
        )
    statuses = json.loads(ended.stdout) if ended.returncode == 0 else {}
    return [result_of(share, statuses.get(share.label, ended.returncode), folder) for share in shares]


def result_of(share: Share, status: int, folder: Path) -> dict[str, Any]:
    """Return the result of a process that ended."""
    label, result = share.label, folder / f"{share.label}.json"
    found: dict[str, Any] = {"inputs": {}, "found": [], "kept": [], "guided": False, "cpu seconds": 0}
    if result.exists():
        found = json.loads(result.read_text())
    if status or not found.get("whole"):
        crash = next(iter(sorted(folder.glob(f"{label}-crash-*"))), None)
        data = crash.read_bytes().hex() if crash else ""
        logs = [log for log in (folder / f"{label}.log", folder / "worker.log") if log.exists()]
        text = "".join(log.read_text(errors="replace")[-400:] for log in logs)
        end = {"target": ",".join(share.targets), "rule": "the process ended", "place": str(status), "text": text}
        found["found"].append(end | {"data": data, "times": 1})
    return found


def compared(kept: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Return a finding for each kept input whose answer is another in this process, which has another hash seed."""
    found = []
    for each in kept:
        said = answer(TARGETS[each["target"]], bytes.fromhex(each["data"]))
        if hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest() != each["digest"]:
            text = "another answer in another process"
            found.append(each | {"rule": "another answer", "place": "process", "text": text, "times": 1})
    return found


def minimized(target: Target, found: dict[str, Any], seconds: float = 10) -> bytes:
    """Return a shorter input that breaks the same rule in the same place."""
    data, end = bytes.fromhex(found["data"]), time.monotonic() + seconds

    def fails(shorter: bytes) -> bool:
        finding = judge(target, shorter, thoroughly=found["rule"] == "another answer")
        return finding is not None and (finding.rule, finding.place) == (found["rule"], found["place"])

    if not fails(data):
        return data
    size = max(1, len(data) // 2)
    while time.monotonic() < end:
        at, before = 0, len(data)
        while at < len(data) and time.monotonic() < end:
            shorter = data[:at] + data[at + size :]
            if fails(shorter):
                data = shorter
            else:
                at += size
        if size == 1 and len(data) == before:
            break
        size = max(1, size // 2)
    return data


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all, and report."""
    parser = argparse.ArgumentParser(prog="python -m campaigns.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of: {', '.join(TARGETS)}")
    parser.add_argument("--inputs", type=int, default=200_000, help="in all (%(default)s)")
    parser.add_argument("--minutes", type=float, default=1e6, help="for all inputs, at most (no limit)")
    parser.add_argument("--seed", default="1", help="a text, from which mutations are drawn (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (%(default)s)")
    parser.add_argument("--together", type=int, default=0, metavar="N", help="all targets in N processes: a short run")
    parser.add_argument("--folder", type=Path, help="where the corpora are kept, to go on with them the next time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to a file, as JSON")
    given = parser.parse_args(arguments)
    names = given.targets or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"no such target: {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        shares = [
            share_of(group, number, given.seed) for group, number in shared_out(names, given.inputs, given.together)
        ]
        results = run_shares(shares, folder, given.jobs, given.minutes * 60)
    report = reported(results, given.seed, time.monotonic() - began)
    print(shown(report))
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if report["found"] else 0


def reported(results: Sequence[dict[str, Any]], seed: str, seconds: float) -> dict[str, Any]:
    """Put the results of all processes together; what was found is minimized."""
    inputs: Counter[str] = Counter()
    found = [each for result in results for each in result["found"]]
    for result in results:
        inputs.update(result["inputs"])
        found += compared(result["kept"])
    for each in found:
        if each["target"] in TARGETS and each["rule"] not in ("superlinear", "the process ended"):
            each["data"] = minimized(TARGETS[each["target"]], each).hex()
    return {
        "campaign": "fuzz",
        "seed": seed,
        "guided": all(result["guided"] for result in results),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "seconds": round(seconds, 1),
        "cpu seconds": round(sum(result["cpu seconds"] for result in results), 1),
        "inputs": dict(sorted(inputs.items())),
        "in all": inputs.total(),
        "answers compared between processes": sum(len(result["kept"]) for result in results),
        "found": found,
    }


def shown(report: dict[str, Any]) -> str:
    """Return a report as a text."""
    how = "guided by coverage" if report["guided"] else "drawn from the seed, not guided: there is no atheris"
    said = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        f"fuzz: {report['in all']} inputs in {report['seconds']} s, {report['cpu seconds']} s of CPU time, {how}",
        f"seed {report['seed']}, {report['date']}; {said}",
    ]
    lines += [f"  {number:>9}  {name}" for name, number in report["inputs"].items()]
    lines.append(f"  {report['answers compared between processes']} answers compared between processes")
    for each in report["found"]:
        data = each["data"] if len(each["data"]) <= 400 else f"{each['data'][:400]}…"
        lines += [
            f"FOUND: {each['target']}: {each['rule']} {each['place']} ({each['times']} times)",
            f"  {each['text']}",
            f"  input, in hex: {data or 'none'}",
        ]
    return "\n".join([*lines, f"found: {len(report['found']) or 'nothing'}"])


if __name__ == "__main__":
    sys.exit(main())
