"""A stack that is started again: from a state folder with trust domains, and from one with CVMs."""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.scale.cvms import Vmm
from bench.scale.growth import Effort, Quantity, Subject, Values
from bench.scale.trust_domains import add_trust_domain
from bench.scale.usage import Spent, growing_stack


def measure(effort: Effort) -> Iterator[tuple[int, Values]]:
    """Start a stack with what its state folder has, add as much, and stop it, for each size and each kind of part."""
    with TemporaryDirectory(prefix="scale-") as with_domains, TemporaryDirectory(prefix="scale-") as with_cvms:
        ids = list[str]()
        sizes = [0, *effort.sizes()]
        for size, following in pairwise([*sizes, sizes[-1]]):
            domains = _trust_domains(Path(with_domains), size, following)
            yield size, domains | _cvms(Path(with_cvms), ids, following)


def _trust_domains(state: Path, size: int, following: int) -> Values:
    """Start a stack with so many trust domains; return what that needed. Add more for the following start."""
    with ExitStack() as closing:
        spent = Spent()
        stack = growing_stack(closing, spent, "--state", str(state))
        values = _values("domains", spent, state / "added")
        guests = stack.call("GET", "/guests").items()
        if sum(guest["has_keys"] for name, guest in guests if name.startswith("guest-")) != size:
            raise RuntimeError(f"not all of {size} trust domains have keys after the start")
        for number in range(size, following):
            add_trust_domain(stack, number, stack.description["app"]["app_id"])
        return values


def _cvms(state: Path, ids: list[str], following: int) -> Values:
    """Start a stack with CVMs of these ids; return what that needed. Add more for the following start."""
    with ExitStack() as closing:
        spent = Spent()
        stack = growing_stack(closing, spent, "--vmm", "--state", str(state))
        vmm = Vmm(stack, ids)
        with spent.counting():
            vmm.wait()
        values = _values("cvms", spent, state / "vms")
        vmm.grow(following)
        return values


def _values(kind: str, spent: Spent, folder: Path) -> Values:
    values = spent.values()
    files = sum(each.is_file() for each in folder.rglob("*"))
    return {f"{kind}_{key}": values[key] for key in ("wall", "cpu", "memory")} | {f"{kind}_files": float(files)}


SUBJECT = Subject(
    "restart",
    "A stack that is started again with its state folder",
    "trust domains, or CVMs, in the state folder",
    largest=256,
    largest_quick=4,
    quantities=(
        Quantity("domains_wall", "Trust domains: time until all have keys again", "s"),
        Quantity("cvms_wall", "CVMs: time until all run and have keys again", "s"),
        Quantity("domains_cpu", "Trust domains: processor time", "CPU s"),
        Quantity("cvms_cpu", "CVMs: processor time", "CPU s"),
        Quantity("domains_memory", "Trust domains: memory then", "MiB"),
        Quantity("cvms_memory", "CVMs: memory then", "MiB"),
        Quantity("domains_files", "Files of trust domains", "number", is_counted=True),
        Quantity("cvms_files", "Files of CVMs", "number", is_counted=True),
    ),
    measure=measure,
    rounds=1,
)
