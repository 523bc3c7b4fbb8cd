"""The state of each part: captured, changed, restored; and what mypy has to accept as restorable."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.deployment.clock import ClockState, StackClock
from dstack_emu.deployment.guests import RunningGuest
from dstack_emu.deployment.policy_files import PolicyContents, PolicyFiles, place
from dstack_emu.deployment.running_kms import RunningKms
from dstack_emu.deployment.state import GuestState, KmsState, Restorable, RestorableService
from dstack_emu.kms_emu.server import KmsServer, KmsServerState
from dstack_emu.observability.fault_rules import FaultRule, FaultRules, FaultRulesState
from dstack_emu.observability.journal import Journal
from dstack_emu.simulator.agent import GuestAgent, ProvidedKeys
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.intel import Intel, IntelState
from dstack_emu.simulator.platform import PlatformState
from dstack_emu.simulator.seed import Seed, Stream
from dstack_emu.simulator.trust_domain import AppCompose, TrustDomain, TrustDomainState
from dstack_emu.simulator.vendor_state import VendorState
from tests.own_stack import own_stack

SEED = Seed.of("state")

# What mypy checks: each part that has state implements the protocol.
_AGENT: Callable[[GuestAgent], Restorable[ProvidedKeys | None]] = lambda part: part  # noqa: E731
_KMS_SERVER: Callable[[KmsServer], RestorableService[KmsServerState]] = lambda part: part  # noqa: E731
_KMS: Callable[[RunningKms], RestorableService[KmsState]] = lambda part: part  # noqa: E731
_GUEST: Callable[[RunningGuest], RestorableService[GuestState]] = lambda part: part  # noqa: E731


def stream() -> tuple[Restorable[int], Callable[[], object]]:
    part = Stream(SEED.derive("stream", 32))
    return part, lambda: part(7)


def clock() -> tuple[Restorable[ClockState], Callable[[], object]]:
    part = StackClock()
    return part, lambda: part.freeze(5)


def faults() -> tuple[Restorable[FaultRulesState], Callable[[], object]]:
    part = FaultRules(SEED)
    part.add(FaultRule(kind="hang", probability=0.5))

    def change() -> None:
        part.meet("a", "b", "c")
        part.add(FaultRule(kind="reset"))

    return part, change


def journal() -> tuple[Restorable[int], Callable[[], object]]:
    part = Journal(StackClock(), kept=10)
    part.end(part.begin("kms-src", "GetMeta", None, 0, "outside"), 200)
    return part, lambda: part.end(part.begin("kms-src", "GetMeta", None, 0, "outside"), 200)


def intel() -> tuple[Restorable[IntelState], Callable[[], object]]:
    part = Intel(SEED)
    part.platform("one").state = PlatformState(tcb_status="OutOfDate")

    def change() -> None:
        part.state = VendorState(qe_status="Revoked")
        part.platform("one").state = PlatformState()
        part.platform("two")

    return part, change


def trust_domain() -> tuple[Restorable[TrustDomainState], Callable[[], object]]:
    part = TrustDomain(
        Intel(SEED).platform("one"), OsImage.from_seed(SEED.derive), AppCompose.named("app"), instance_seed=bytes(32)
    )
    part.boot()
    return part, lambda: part.measure("event", b"payload")


@pytest.mark.parametrize("make", [stream, clock, faults, journal, intel, trust_domain])
def test_restored_part_is_what_it_was_when_it_was_captured(
    make: Callable[[], tuple[Restorable[Any], Callable[[], object]]],
) -> None:
    part, change = make()
    before = part.capture()
    change()
    assert part.capture() != before
    part.restore(before)
    assert part.capture() == before


def test_stream_goes_on_with_the_same_bytes() -> None:
    part = Stream(SEED.derive("stream", 32))
    part(100)
    before = part.capture()
    first = part(100)
    part.restore(before)
    assert part(100) == first


def test_policy_file_that_was_not_there_is_deleted_again(tmp_path: Path) -> None:
    part: Restorable[PolicyContents] = (files := PolicyFiles(tmp_path, ["src", "dst"]))
    place([files.paths["src"]])
    before = part.capture()
    place(files.paths.values())
    files.paths["src"].write_text("{}")
    part.restore(before)
    assert (part.capture(), files.paths["dst"].exists()) == (before, False)


async def test_kms_and_its_trust_domain_are_restored_with_the_same_keys() -> None:
    async with own_stack(fresh=True) as stack:
        kms = stack.kms["src"]
        before, guest_before = kms.capture(), kms.guest.capture()
        stack.control.allow("src", "kms-src")
        await stack.control.onboard_kms("src", None)
        after = kms.capture()
        assert (before.phase, after.phase) == ("onboard", "runtime")
        await kms.restore(before)
        await kms.guest.restore(guest_before)
        assert (kms.capture(), kms.guest.capture()) == (before, guest_before)
        await kms.restore(after)
        assert kms.url.startswith("https://")
