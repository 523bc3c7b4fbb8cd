"""240 random calls of KMS of both releases: no key is released that the documents do not release.

`decision_model` says what a real KMS does, `decision_cases` draws policies, images, platform states and evidence, and
the KMS, webhooks, contracts and PCCS of a stack decide over their sockets. A release that the model refuses fails. A
refusal where the model releases is only accepted for a reason of `STRICTER`, and each is a row of docs/fidelity.md.

`make decisions` draws more (`CASES=20000 SEED=…`), and .ci/run 4,000.
"""

import http.client
import os
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

import pytest
from cryptography import x509

from dstack_emu.attest.release import RELEASES
from dstack_emu.testing import LiveStack
from tests import foreign
from tests.contract_cases import ContractDraw, DecisionChain
from tests.decision_cases import Draw, Forger
from tests.decision_model import BootInfo, Case, Evidence, Webhook, app_key, denials
from tests.foreign import Answer, Guest
from tests.repository import ROOT
from tests.webhook_switch import WebhookSwitch, webhook_switch

CASES: Final = int(os.environ.get("DSTACK_EMU_DECISIONS", "240"))
"""How many cases are drawn, half of them for each release."""
CONTRACT_TURNS: Final = 12
"""Of so many cases the webhook of one asks the contracts on the stack's chain, which takes longer."""
SEED: Final = os.environ.get("DSTACK_EMU_DECISIONS_SEED", "decisions")
OID_APP_ID: Final = x509.ObjectIdentifier("1.3.6.1.4.1.62397.1.3")
EVERYTHING: Final = Webhook("mock", "allow-all")


@dataclass(frozen=True)
class Stricter:
    """A rule that the emulator has beside a real KMS's: its row in docs/fidelity.md, its refusal, and when it holds."""

    row: str
    text: str
    holds: Callable[[Evidence, str], bool]
    """Whether it may refuse evidence, given the release of the KMS that verifies it."""


SYSTEM_EVENTS: Final = ("app-id", "compose-hash", "instance-id", "system-ready")


def is_ambiguous(evidence: Evidence) -> bool:
    """Tell whether a log has a system event twice, or an event whose name continues one's with a colon."""
    names = [name for name, _ in evidence.logged]
    return any(names.count(name) > 1 or f"{name}:" in names for name in SYSTEM_EVENTS)


def has_other_widths(evidence: Evidence, release: str) -> bool:
    """Tell whether an identity has a compose hash or an instance id of another length than 0.6 accepts."""
    payloads = dict(reversed(evidence.logged))
    if release != "0.6":
        return False
    return len(payloads.get("compose-hash", b"")) != 32 or len(payloads.get("instance-id", b"")) not in (0, 20)


STRICTER: Final = (
    Stricter("names of runtime events", " is ambiguous: ", lambda evidence, _: is_ambiguous(evidence)),
    Stricter("widths of an identity", " must be ", has_other_widths),
)


def test_each_stricter_rule_is_a_row_of_the_fidelity_page() -> None:
    page = (ROOT / "docs/fidelity.md").read_text()
    assert all(f"\n| {rule.row} | " in page for rule in STRICTER)


class Kms:
    """The KMS of one release, one of which verifies OS images, and everything around them that a case may change."""

    def __init__(self, stack: LiveStack, switch: WebhookSwitch, release: str) -> None:
        self._stack, self._switch, self.release = stack, switch, release
        self.forger = stack.in_thread(lambda running: Forger(running.intel, running.context.seed.derive))
        settings = {True: {}, False: {"image": {"verify": False}}}
        self._guests = {verifies: self._start(f"gate-{verifies}".lower(), s) for verifies, s in settings.items()}
        self._bare = {g.kms_url: foreign.KmsConnection(g.kms_url, root_ca=g.root_ca) for g, _ in self._guests.values()}
        described = stack.description["chain"]
        self.chain = DecisionChain(described, stack.services["chain"], RELEASES[release].auth_eth_revision)
        self.chain.prepare(self.forger, (info for _, info in self._guests.values()))
        switch.chain = self.chain
        self.root_k256 = (stack.kms("src").root_ca.parent / "root-k256.key").read_bytes()

    def close(self) -> None:
        """Hang up."""
        for connection in self._bare.values():
            connection.close()

    def _start(self, name: str, settings: dict[str, Any]) -> tuple[Guest, BootInfo]:
        kms = self._stack.kms(name, webhook=self._switch.url, settings=settings, platform="host of the gate")
        measured = kms.rpc("GetAttestationInfo")
        own = BootInfo(
            mr_aggregated=measured["mr_aggregated"],
            os_image_hash=measured["os_image_hash"],
            app_id="",
            compose_hash="",
            instance_id="",
            device_id=measured["device_id"],
            tcb_statuses=("UpToDate",),
            advisory_ids=(),
        )
        self._stack.policy("src").allow(kms)
        kms.onboard("src")
        return Guest.of(kms.url, ""), own

    def draw(self, number: int) -> Case:
        """Draw the case of a number."""
        own = {verifies: info for verifies, (_, info) in self._guests.items()}
        arguments = self.forger, own, self.release, f"{SEED}/{number}"
        return Draw(*arguments).case() if number % CONTRACT_TURNS else ContractDraw(self.chain, *arguments).case()

    def answers(self, case: Case) -> tuple[bool, str]:
        """Put a case to the KMS: whether it released something, and its refusal if not."""
        self._switch.set(case.webhook)
        self._stack.in_thread(lambda _: self.forger.publish(case.vendor, case.evidence.platform))
        guest, _ = self._guests[case.verifies_images]
        try:
            answer = self._call(case, guest)
        except (ssl.SSLError, ConnectionError, http.client.RemoteDisconnected) as error:
            return False, f"TLS: {error}"
        if answer.status != 200:
            return False, answer.error
        self._verify_release(case, answer.value)
        return True, ""

    def _call(self, case: Case, guest: Guest) -> Answer:
        if case.rpc == "SignCert":  # anybody may call it: one connection is enough
            return self._bare[guest.kms_url].call("SignCert", **self.forger.signing_request(case))
        arguments: dict[str, Any] = {"vm_config": case.vm_config}
        if case.rpc == "GetAppKey":
            arguments["api_version"] = case.api_version
        identity = self.forger.identity(case, guest.temp_ca)
        with foreign.kms(guest.kms_url, identity=identity, root_ca=guest.root_ca) as connection:
            return connection.call(case.rpc, **arguments)

    def _verify_release(self, case: Case, released: dict[str, Any]) -> None:
        """Hold what was released against the identity that the evidence proves."""
        app_id = next((payload for name, payload in case.evidence.logged if name == "app-id"), b"")
        match case.rpc:
            case "GetAppKey":
                assert released["k256_key"] == app_key(self.root_k256, app_id).hex()
            case "GetKmsKey":
                assert released["keys"][0]["k256_key"] == self.root_k256.hex()
            case "SignCert":
                leaf = x509.load_pem_x509_certificate(released["certificate_chain"][0].encode())
                extension = leaf.extensions.get_extension_for_oid(OID_APP_ID).value
                assert isinstance(extension, x509.UnrecognizedExtension)
                assert extension.value == foreign.der_octet_string(app_id)


@pytest.fixture(scope="module", params=["0.5", "0.6"])
def kms(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kms]:
    release, folder = str(request.param), tmp_path_factory.mktemp("webhooks")
    with (
        webhook_switch(folder) as switch,
        LiveStack(release=release, auth={"dst": "eth"}) as stack,
        closing(Kms(stack, switch, release)) as kms,
    ):
        yield kms


def test_nothing_is_released_that_the_documents_do_not_release(kms: Kms) -> None:
    laxer, stricter, outcomes, of_contract = [], [], Counter[tuple[str, bool]](), Counter[bool]()
    for number in range(CASES // 2):
        case = kms.draw(number)
        expected, (released, refusal) = denials(case), kms.answers(case)
        outcomes[case.rpc, released] += 1
        of_contract[released] += case.webhook.contract == "contract"
        if released and expected:
            laxer.append((number, expected, case))
        elif (
            not released
            and not expected
            and not any(s.text in refusal and s.holds(case.evidence, case.release) for s in STRICTER)
        ):
            stricter.append((number, refusal, case))
    assert not laxer, f"{len(laxer)} released: {laxer[:3]}"
    assert not stricter, f"{len(stricter)} refused: {stricter[:3]}"
    assert min(outcomes[rpc, released] for rpc, released in outcomes) > CASES // 100, outcomes
    assert min(of_contract[True], of_contract[False]) >= CASES // 200, of_contract
