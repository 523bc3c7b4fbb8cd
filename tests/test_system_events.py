"""No log in which a system event can be read in two ways proves an identity: not to a KMS, nor to anyone else.

A version 1 digest covers `type:name:payload`: `app-id` with the payload `:…` and `app-id:` with its rest have the same
one. The trust domain here measures whatever it wants, on a machine and with an image that the policy allows.
"""

from dataclasses import replace
from typing import Any, Final

import pytest

from dstack_emu.attest import collateral
from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.errors import VerificationError
from dstack_emu.attest.eventlog import RuntimeEvent, TdxEvent, require_unambiguous
from dstack_emu.attest.pcs import Document
from dstack_emu.attest.verify import TrustAnchor, verify_attestation
from dstack_emu.deployment.guest_config import GuestConfig, power_on
from dstack_emu.inspection.checks import Evidence, Expectations, verify_evidence
from dstack_emu.inspection.fields import describe_evidence
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import DEFAULT_SEED, Seed
from dstack_emu.simulator.trust_domain import TrustDomain
from tests import foreign
from tests.commands import ask
from tests.evidence_samples import NOW, world
from tests.foreign import Guest
from tests.running import RunningStack

AMBIGUOUS: Final = (
    "runtime event 0 is ambiguous: 'app-id:' with this payload has the digest of 'app-id' with another one. "
    "Use a name that does not begin with 'app-id:'"
)


def renamed(evidence: Attestation, *names: str) -> Attestation:
    """The same evidence, the first events of these names told under another name with the same digest."""
    events = list(evidence.runtime_events)
    for name in names:
        index = next(index for index, event in enumerate(events) if event.event == name)
        told = RuntimeEvent(f"{name}:", events[index].payload.removeprefix(b":"))
        assert told.digest() == events[index].digest()
        events[index] = told
    log = (*(e for e in evidence.event_log if not e.is_runtime), *map(TdxEvent.of, events))
    return replace(evidence, event_log=log, runtime_events=tuple(events))


class Attack:
    """A domain of an app of its own, whose log tells the identity of the stack's app."""

    def __init__(self) -> None:
        self.victim = power_on(Intel(Seed.of(DEFAULT_SEED)), GuestConfig())
        domain = TrustDomain(
            self.victim.platform,
            self.victim.image,
            GuestConfig().compose,
            instance_seed=b"",
            vm_config=self.victim.vm_config,
        )
        domain.measure("app-id", b":" + bytes(19))
        domain.measure("compose-hash", b":" + bytes(31))
        for event in self.victim.runtime_events:
            if event.event != "system-preparing":
                domain.measure(event.event, event.payload)
        self.domain = domain

    def evidence(self, report_data: bytes) -> Attestation:
        return renamed(self.domain.attest(report_data), "app-id", "compose-hash")


@pytest.fixture(scope="module")
def attack() -> Attack:
    return Attack()


@pytest.fixture
def guest(ready_stack: RunningStack) -> Guest:
    return Guest.of(ready_stack.services["kms-src"], ready_stack.services["app"])


def test_renamed_events_give_no_key_and_no_certificate_and_the_victims_own_do(guest: Guest, attack: Attack) -> None:
    key = foreign.new_key()
    binding = foreign.binding_of(foreign.spki_of(key))
    for evidence, refused in ((attack.evidence(binding), True), (attack.victim.attest(binding), False)):
        answer = guest.get_app_key(guest.temp_ca.issue(key, evidence.encode()))
        with foreign.kms(guest.kms_url, root_ca=guest.root_ca) as connection:
            signed = connection.call("SignCert", **foreign.signing_request(key, evidence.encode(), "a.example"))
        if refused:
            assert answer.error == f"invalid quote: {AMBIGUOUS}"
            assert signed.error == f"Quote verification failed: {AMBIGUOUS}"
        else:
            assert answer.value["k256_key"]
            assert len(signed.value["certificate_chain"]) == 3


def test_renamed_events_are_not_valid_to_the_verifier(ready_stack: RunningStack, attack: Attack) -> None:
    def verify(evidence: Attestation) -> tuple[bool, str | None]:
        body = {"attestation": evidence.encode().hex()}
        answer: Any = ask(ready_stack.services["verifier"], "/verify", body)[1]
        return answer["is_valid"], answer["reason"]

    valid, reason = verify(attack.evidence(bytes(64)))
    assert not valid
    assert reason is not None
    assert AMBIGUOUS in reason
    assert verify(attack.victim.attest(bytes(64))) == (True, None)


def test_inspection_names_the_ambiguity_and_reads_no_identity() -> None:
    w = world()
    events = (RuntimeEvent("app-id", b":x"), *w.evidence.runtime_events)
    told = renamed(replace(w.evidence, runtime_events=events), "app-id")
    checks = verify_evidence(
        Evidence.of_attestation(told), lambda quote: w.collateral, Expectations(w.anchor, "its root", NOW)
    )
    shown = next(check for check in checks if check.name == "system_events")
    assert (shown.ok, shown.got) == (False, AMBIGUOUS)
    assert describe_evidence(Evidence.of_attestation(told))["app_info"] == f"cannot be read: {AMBIGUOUS}"


# ---- the rule


def log(*names: str, version: int = 1) -> tuple[RuntimeEvent, ...]:
    return tuple(RuntimeEvent(name, b"", version) for name in names)


@pytest.mark.parametrize("name", sorted({event.event for event in world().evidence.runtime_events}))
def test_system_event_that_is_continued_or_repeated_is_refused(name: str) -> None:
    for version in (1, 2):
        require_unambiguous(log(name, "app", version=version))
        with pytest.raises(VerificationError, match=f"^runtime event 2 is ambiguous: '{name}' occurs twice"):
            require_unambiguous(log(name, "app", name, version=version))
    for continued in (f"{name}:", f"{name}:x", f"{name}::"):
        with pytest.raises(VerificationError, match=f"^runtime event 1 is ambiguous: '{continued}' with this payload"):
            require_unambiguous(log("app", continued))
        require_unambiguous(log("app", continued, name, version=2))  # its digest covers name and payload apart


def test_other_names_with_colons_and_repeated_names_are_an_apps_own() -> None:
    require_unambiguous(log("app:id", "app:id", ":", "", "app-ids:", "App-Id:", ":app-id", "an-app-id:x", "my-event"))
    require_unambiguous(log("init-script-hash", "init-script-hash"))
    with pytest.raises(VerificationError, match="ambiguous: 'init-script-hash:' with"):
        require_unambiguous(log("init-script-hash:"))


def test_evidence_with_an_apps_own_colons_is_verified() -> None:
    w = world()
    domain = power_on(w.intel, GuestConfig())
    domain.measure("app:chosen", b":payload")
    verify_attestation(domain.attest(bytes(64)), collateral_of(domain, w.intel), TrustAnchor.of(w.intel.root), NOW)
    domain.measure("app-id", domain.app_id)
    with pytest.raises(VerificationError, match="'app-id' occurs twice, and once was expected"):
        verify_attestation(domain.attest(bytes(64)), collateral_of(domain, w.intel), TrustAnchor.of(w.intel.root), NOW)


def collateral_of(domain: TrustDomain, intel: Intel) -> Any:
    """The collateral of a domain's platform."""
    tcb_info = intel.tcb_info(domain.platform.fmspc)
    root_crl = Document(intel.root_ca_crl.hex().encode())
    return collateral.assemble(intel.pck_crl, tcb_info, intel.qe_identity, root_crl)
