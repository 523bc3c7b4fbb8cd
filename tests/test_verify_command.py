"""`dstack-emu verify`: every check on evidence that holds and on evidence that does not, beside the KMS's verifier."""

import json
import ssl
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from dcap_qvl import QuoteCollateralV3
from hypothesis import given
from hypothesis import strategies as st

from dstack_emu.attest import certificate, collateral, der, eventlog, issuing
from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.csr import CONFIRM
from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.eventlog import RuntimeEvent
from dstack_emu.attest.pcs import Document
from dstack_emu.attest.quote import TD10_FIELDS, TdReport, TdReport15
from dstack_emu.attest.report_data import bootstrap_report_data, pad_report_data
from dstack_emu.attest.verify import TrustAnchor, VerifiedQuote, require_bound_to_key, verify_attestation, verify_quote
from dstack_emu.cli.commands.inspect import WIDTH
from dstack_emu.inspection.checks import Check, Evidence, Expectations, all_hold, verify_evidence
from dstack_emu.inspection.identify import inspect_input
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.platform import PART_STATUSES, TCB_STATUSES, PlatformState
from dstack_emu.simulator.seed import Seed
from dstack_emu.simulator.vendor_state import DATES, Dating, VendorState
from tests.commands import run_command, run_inside, serving, usage_error
from tests.evidence_samples import (
    NOW,
    issued,
    legacy_certificate,
    pod,
    signing_request,
    signing_requests_v1,
    with_events_of_version_2,
    with_extensions,
    world,
)
from tests.hardware import BOOTS, INTEL_COLLATERAL, INTEL_QUOTE, LITE, LITE_GET_QUOTE, VERSIONED, boot
from tests.recorded import external_path, golden
from tests.running import RunningStack
from tests.test_attest_properties import THOROUGH, mutated
from tests.test_inspect import kinds

SKIPPED: Final = None


def policy(**changes: Any) -> Expectations:
    return replace(Expectations(world().anchor, "the emulated root", NOW), **changes)


def collect(quote: bytes) -> QuoteCollateralV3:
    """Collateral as our PCCS would give it for that quote, from what the vendor says now."""
    intel = world().intel
    key = collateral.CollateralKey.of_quote(quote)
    return collateral.assemble(
        intel.pck_crl,
        intel.tcb_info(bytes.fromhex(key.fmspc)),
        intel.qe_identity,
        Document(intel.root_ca_crl.hex().encode()),
    )


def check(evidence: Evidence | bytes, **changes: Any) -> dict[str, Check]:
    """Run every check; by name."""
    if isinstance(evidence, bytes):
        found = inspect_input(evidence)
        assert found.evidence is not None
        evidence = found.evidence
    checks = verify_evidence(evidence, collect, policy(**changes))
    assert len({one.name for one in checks}) == len(checks)
    return {one.name: one for one in checks}


def outcomes(checks: dict[str, Check]) -> dict[str, bool | None]:
    return {name: one.ok for name, one in checks.items()}


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, one in checks.items() if one.ok is False}


def quoted_as(report: TdReport, version: int = 4) -> Evidence:
    """Our domain's evidence, its quote of another report."""
    w = world()
    quote = w.domain.platform.quote(report, version)
    return Evidence.of_attestation(replace(w.evidence, quote=quote, report_data=report.report_data))


# ---- what holds


def test_evidence_that_holds_passes_every_check_in_the_verifiers_order() -> None:
    assert list(outcomes(check(world().evidence.encode())).items()) == [
        ("collateral", True),
        ("quote", True),
        ("tcb_status", True),
        ("not_debug", True),
        ("signer_seam", True),
        ("rtmr3", True),
        ("rtmr0", True),
        ("rtmr1", True),
        ("rtmr2", True),
        ("report_data", True),
        ("system_events", True),
        ("event_preimages", SKIPPED),
    ]


def test_every_form_of_evidence_that_holds_passes() -> None:
    w = world()
    evidence, request = w.evidence, signing_request()
    signature = request.sign(w.key)
    answer = {
        "quote": evidence.quote.hex(),
        "event_log": eventlog.log_to_json(evidence.event_log),
        "report_data": evidence.report_data.hex(),
        "vm_config": evidence.config,
        "attestation": evidence.as_v1().encode().hex(),
    }
    sign_cert = {"api_version": 2, "csr": request.encoded.hex(), "signature": signature.hex()}
    keys = {"ca_pubkey": b"ca".hex(), "k256_pubkey": b"k256".hex()}
    bootstrap = w.domain.attest(bootstrap_report_data(b"ca", b"k256")).encode().hex()
    # Which checks each form adds, and which cannot be asked of it.
    forms: list[tuple[bytes, set[str], set[str]]] = [
        (evidence.quote, set(), {"rtmr0", "rtmr1", "rtmr2", "rtmr3", "report_data"}),
        (evidence.as_v1().encode(), set(), set()),
        (evidence.stripped().encode(), set(), {"rtmr0", "rtmr1", "rtmr2"}),
        (json.dumps(answer).encode(), {"attestation_quote", "attestation_events"}, set()),
        (request.encoded, {"confirm_word", "binding"}, {"csr_signature"}),
        (json.dumps(sign_cert).encode(), {"confirm_word", "csr_signature", "binding"}, set()),
        (signing_requests_v1()[0], {"confirm_word", "binding"}, {"csr_signature", "report_data"}),
        (issued().public_bytes(Encoding.PEM), {"binding"}, {"rtmr0", "rtmr1", "rtmr2"}),
        (legacy_certificate().public_bytes(Encoding.DER), {"binding"}, {"report_data"}),
        (json.dumps(keys | {"attestation": bootstrap}).encode(), {"binding"}, set()),
    ]
    for data, added, skipped in forms:
        checks = check(data)
        assert failed(checks) == set()
        assert added <= {name for name, one in checks.items() if one.ok}
        assert {name for name, one in checks.items() if one.ok is SKIPPED} - {"event_preimages"} == skipped


def test_pod_evidence_and_events_of_version_2_have_checks_of_their_own() -> None:
    w = world()
    payload = pod(w.evidence)
    evidence = Evidence.of_attestation(replace(payload, quote=w.domain.attest(payload.report_data).quote))
    checks = check(evidence)
    assert next(iter(checks)) == "pod_payload"
    assert (failed(checks), checks["pod_payload"].ok) == (set(), True)
    second = with_events_of_version_2(w.evidence)
    report = replace(w.domain.report(bytes(64)), rt_mr3=eventlog.replay_runtime(second.runtime_events))
    quoted = replace(second, quote=w.domain.platform.quote(report), report_data=bytes(64))
    checks = check(Evidence.of_attestation(quoted))
    assert (failed(checks), checks["event_preimages"].ok) == (set(), True)


# ---- what the vendor says


@pytest.fixture(autouse=True)
def _vendor_and_platform_as_before() -> Iterator[None]:
    yield
    world().intel.state, world().domain.platform.state = VendorState(), PlatformState()


def judged(evidence: Attestation) -> VerifiedQuote | str:
    """What dcap-qvl itself says of a quote now, or why it refuses it."""
    try:
        return verify_quote(evidence.quote, collect(evidence.quote), world().anchor, NOW)
    except VerificationError as error:
        return str(error)


ADVISORIES = ("INTEL-SA-00001",)


@pytest.mark.parametrize(
    "state",
    [
        *(PlatformState(tcb_status=status, advisory_ids=ADVISORIES) for status in TCB_STATUSES),
        *(PlatformState(module_status=status, module_advisory_ids=ADVISORIES) for status in PART_STATUSES),
        *(VendorState(qe_status=status, qe_advisory_ids=ADVISORIES) for status in PART_STATUSES),
    ],
    ids=str,
)
def test_tcb_status_is_the_verifiers_and_refused_under_strict_alone(state: PlatformState | VendorState) -> None:
    w = world()
    if isinstance(state, PlatformState):
        w.domain.platform.state = state
        stated = {state.tcb_status, state.module_status}
    else:
        w.intel.state = state
        stated = {state.qe_status}
    verdict = judged(w.evidence)
    checks, strict = check(w.evidence.encode()), check(w.evidence.encode(), strict=True)
    if isinstance(verdict, str):
        assert "Revoked" in stated
        assert failed(checks) == failed(strict) == {"quote"}
        assert (checks["quote"].got, checks["tcb_status"].ok) == (verdict, SKIPPED)
        return
    assert {verdict.tcb_status, "UpToDate"} == stated | {"UpToDate"}
    assert failed(checks) == set()
    assert (checks["tcb_status"].got, checks["quote"].ok) == (verdict.tcb_status, True)
    assert checks["tcb_status"].detail.startswith(f"advisories: {', '.join(verdict.advisory_ids) or 'none'}")
    assert failed(strict) == (set() if verdict.tcb_status == "UpToDate" else {"tcb_status"})
    assert strict["tcb_status"].got == verdict.tcb_status


REVOCATIONS = {
    "platform": (PlatformState(pck_revoked=True), VendorState(), "CertRevoked"),
    "PCK CA": (PlatformState(), VendorState(pck_ca_revoked=True), "CertRevoked"),
    "another root": (PlatformState(other_root=True), VendorState(), "UnknownIssuer|InvalidSignature|Signature"),
}


@pytest.mark.parametrize("what", REVOCATIONS)
def test_revoked_or_foreign_platform_fails_the_quote_alone(what: str) -> None:
    w = world()
    w.domain.platform.state, w.intel.state, cause = REVOCATIONS[what]
    evidence = w.domain.attest(bytes(64))
    checks = check(evidence.encode())
    assert failed(checks) == {"quote"}
    assert any(word in checks["quote"].got for word in cause.split("|")), checks["quote"].got
    assert checks["quote"].expected == "a quote that dcap-qvl accepts under the emulated root"
    assert checks["rtmr3"].ok is True


@pytest.mark.parametrize("field", ["tcb_info_dating", "qe_identity_dating", "pck_crl_dating", "root_ca_crl_dating"])
@pytest.mark.parametrize("dating", [dating for dating in DATES if dating != "current"])
def test_document_out_of_date_fails_the_quote_where_the_verifier_looks(field: str, dating: Dating) -> None:
    w = world()
    w.intel.state = VendorState(**{field: dating})  # type: ignore[arg-type]  # a dating each
    verdict, checks = judged(w.evidence), check(w.evidence.encode())
    assert checks["collateral"].ok is True
    if "crl" in field and dating == "not-yet-valid":
        assert not isinstance(verdict, str)  # of a CRL dcap-qvl reads nextUpdate alone
        assert failed(checks) == set()
    else:
        assert failed(checks) == {"quote"}
        assert checks["quote"].got == verdict


# ---- each failing check


def reports() -> dict[str, tuple[Evidence, set[str]]]:
    """Quotes whose report is not as it should be, and what fails then (the verifier itself refuses debug domains)."""
    report = world().domain.report(bytes(64))
    values = {name: getattr(report, name) for name, _ in TD10_FIELDS}
    return {
        "debug": (quoted_as(replace(report, td_attributes=b"\x01" + report.td_attributes[1:])), {"quote", "not_debug"}),
        "signer of the module": (quoted_as(replace(report, mr_signer_seam=b"\x01" * 48)), {"quote", "signer_seam"}),
        "service TD": (quoted_as(TdReport15(**values, mr_service_td=b"\x01" * 48), 5), {"quote", "service_td"}),
        "rtmr3": (quoted_as(replace(report, rt_mr3=bytes(48))), {"rtmr3"}),
        "rtmr0": (quoted_as(replace(report, rt_mr0=bytes(48))), {"rtmr0"}),
        "rtmr1": (quoted_as(replace(report, rt_mr1=bytes(48))), {"rtmr1"}),
        "rtmr2": (quoted_as(replace(report, rt_mr2=bytes(48))), {"rtmr2"}),
    }


@pytest.mark.parametrize("name", reports())
def test_report_that_is_not_as_it_should_be_fails_its_check(name: str) -> None:
    evidence, wanted = reports()[name]
    assert failed(check(evidence)) == wanted


def test_register_that_differs_is_shown_beside_the_replayed_one() -> None:
    evidence = world().evidence
    other = (*evidence.runtime_events, RuntimeEvent("more", b""))
    shown = check(Evidence.of_attestation(replace(evidence, runtime_events=other)))["rtmr3"]
    quoted = world().domain.report(bytes(64)).rt_mr3.hex()
    assert (shown.ok, shown.got, shown.expected) == (False, eventlog.replay_runtime(other).hex(), quoted)


def test_report_data_is_held_against_what_is_named_asked_and_bound() -> None:
    w = world()
    evidence = w.evidence
    named = check(Evidence.of_attestation(replace(evidence, report_data=bytes(64))))["report_data"]
    assert (named.ok, named.got, named.expected) == (False, evidence.report_data.hex(), bytes(64).hex())
    assert check(evidence.encode(), report_data=evidence.report_data)["report_data_expected"].ok is True
    asked = check(evidence.encode(), report_data=pad_report_data(b"nonce"))["report_data_expected"]
    assert (asked.ok, asked.expected) == (False, b"nonce".hex().ljust(128, "0"))
    unbound = authority_issues(w.domain.attest(b"\x01" * 64))
    checks = check(unbound)
    assert failed(checks) == {"binding"}
    assert checks["binding"].got == "01" * 64


def authority_issues(evidence: Attestation) -> bytes:
    """A certificate with that evidence, for a key that it may not bind."""
    key = world().intel.seed.p256("a CA of the tests")
    request = issuing.CertificateRequest(
        public_key=key.public_key(), subject="x", attestation=evidence.stripped(), server_auth=True
    )
    return issuing.self_signed(request, key, NOW).certificate.public_bytes(Encoding.PEM)


def test_signing_request_is_held_against_signature_and_confirm_word() -> None:
    w, request = world(), signing_request()
    key = w.key
    assert failed(check(Evidence.of_request(request, 2, request.sign(key)))) == set()
    checks = check(Evidence.of_request(request, 2, request.sign(key)[:-1] + b"\x00"))
    assert failed(checks) == {"csr_signature"}
    assert checks["csr_signature"].got == "Invalid signature"
    wrong = replace(request, confirm="please sing cert:")
    checks = check(Evidence.of_request(wrong, 2, wrong.sign(key)))
    assert failed(checks) == {"confirm_word", "csr_signature"}
    assert checks["csr_signature"].got == "Invalid confirm word"
    assert (checks["confirm_word"].got, checks["confirm_word"].expected) == ("please sing cert:", CONFIRM)


def test_pod_payload_that_is_not_quoted_fails_its_check() -> None:
    w = world()
    checks = check(Evidence.of_attestation(replace(w.evidence, report_data_payload="another claim", wire=1)))
    assert failed(checks) == {"pod_payload"}


def test_preimage_of_another_event_fails_its_check() -> None:
    second = with_events_of_version_2(world().evidence)
    *log, last = second.event_log
    wrong = replace(second, event_log=(*log, replace(last, preimage=b"{}".hex())))
    checks = check(Evidence.of_attestation(wrong))
    assert failed(checks) == {"rtmr3", "event_preimages"}
    assert checks["event_preimages"].got == f"V2 runtime event {len(log)} digest does not match its preimage"


def test_attestation_of_another_boot_beside_the_quote_fails_its_checks() -> None:
    w = world()
    evidence = Evidence.of_attestation(w.evidence)
    other = replace(w.evidence, quote=w.domain.attest(bytes(64)).quote, runtime_events=())
    checks = check(replace(evidence, other=other))
    assert failed(checks) == {"attestation_quote", "attestation_events"}
    assert checks["attestation_events"].expected.startswith("system-preparing , app-id ")


def test_without_collateral_the_other_checks_still_run() -> None:
    def nothing(quote: bytes) -> QuoteCollateralV3:
        raise FormatError("none for this one")

    evidence = Evidence.of_attestation(replace(world().evidence, runtime_events=()))
    checks = {one.name: one for one in verify_evidence(evidence, nothing, policy())}
    assert failed(checks) == {"collateral", "rtmr3"}
    assert checks["collateral"].got == "none for this one"
    assert (checks["quote"].ok, checks["quote"].detail) == (SKIPPED, "there is no collateral")
    assert (checks["tcb_status"].ok, checks["rtmr0"].ok) == (SKIPPED, True)


def test_quote_that_cannot_be_read_skips_what_needs_it() -> None:
    evidence = Evidence.of_attestation(replace(world().evidence, quote=b"\x04\0 no quote"))
    checks = check(evidence)
    assert failed(checks) == {"collateral"}
    assert checks["td_report"].ok is SKIPPED
    assert checks["td_report"].detail.startswith("the quote cannot be read: quote: 48 bytes expected")


# ---- agreement with the verifier that the KMS uses


def damaged() -> Iterator[Evidence]:
    w = world()
    yield Evidence.of_attestation(w.evidence)
    yield from (evidence for evidence, _ in reports().values())
    yield Evidence.of_attestation(replace(w.evidence, runtime_events=w.evidence.runtime_events[1:]))
    yield Evidence.of_attestation(replace(w.evidence, report_data=bytes(64)))
    yield Evidence.of_attestation(replace(w.evidence, report_data_payload="another claim", wire=1))
    yield Evidence.of_attestation(with_events_of_version_2(w.evidence))
    yield Evidence.of_attestation(replace(w.evidence, quote=w.evidence.quote[:900]))


LEFT_TO_OTHERS = {"rtmr0", "rtmr1", "rtmr2"}
"""Checks that the KMS does not make."""


def test_checks_fail_where_the_verifier_refuses_and_only_there() -> None:
    for evidence in damaged():
        assert evidence.attestation is not None
        try:
            verify_attestation(evidence.attestation, world().collateral, world().anchor, NOW)
        except VerificationError:
            refused = True
        else:
            refused = False
        assert bool(failed(check(evidence)) - LEFT_TO_OTHERS) is refused


@pytest.mark.parametrize("bound", [True, False])
def test_binding_fails_where_the_verifier_refuses_the_key(bound: bool) -> None:
    w = world()
    data = issued().public_bytes(Encoding.PEM) if bound else authority_issues(w.evidence)
    evidence = inspect_input(data).evidence
    assert evidence is not None
    assert evidence.attestation is not None
    spki = certificate.certificate_spki(certificate.load_pem(data.decode(), "certificate"))
    if bound:
        require_bound_to_key(evidence.attestation, spki)
    else:
        with pytest.raises(VerificationError):
            require_bound_to_key(evidence.attestation, spki)
    assert check(evidence)["binding"].ok is bound


# ---- recorded evidence


def one_day_after_issue() -> tuple[str, int]:
    """A time at which Intel's recorded collateral was current, in both spellings."""
    document = json.loads(json.loads(external_path(INTEL_COLLATERAL).read_text())["tcb_info"])
    issued_at = datetime.fromisoformat(document["issueDate"])
    moment = issued_at.replace(day=issued_at.day + 1)
    return moment.isoformat(), int(moment.timestamp())


def test_quote_of_hardware_holds_under_intels_root_and_not_under_ours() -> None:
    iso, seconds = one_day_after_issue()
    common = ("verify", str(external_path(INTEL_QUOTE)), "--collateral", str(external_path(INTEL_COLLATERAL)), "--json")
    for when in (iso, str(seconds)):
        done = run_command(*common, "--intel", "--strict", "--time", when)
        shown = json.loads(done.stdout)
        assert (done.returncode, shown["ok"], shown["time"], done.stderr) == (0, True, seconds, b"")
        assert {one["name"] for one in shown["checks"] if one["ok"]} == {
            "collateral",
            "quote",
            "tcb_status",
            "not_debug",
            "signer_seam",
        }
    done = run_command(*common, "--time", iso)
    shown = json.loads(done.stdout)
    assert (done.returncode, shown["ok"]) == (1, False)
    assert [one["name"] for one in shown["checks"] if one["ok"] is False] == ["quote"]
    later = run_command(*common, "--intel", "--time", "2026-01-01")
    assert "expired" in next(one["got"] for one in json.loads(later.stdout)["checks"] if one["name"] == "quote")


@pytest.mark.parametrize("name", BOOTS)
def test_recorded_hardware_evidence_holds_but_for_collateral_of_its_time(name: str) -> None:
    quoted = QuoteCollateralV3.from_json(external_path(INTEL_COLLATERAL).read_text())
    evidence = inspect_input(external_path(name).read_bytes()).evidence
    assert evidence is not None
    under_intel = Expectations(TrustAnchor.intel(), "Intel's production root", one_day_after_issue()[1])
    checks = {one.name: one for one in verify_evidence(evidence, lambda quote: quoted, under_intel)}
    assert failed(checks) == {"quote"}  # its certificate is younger than the recorded collateral
    assert "CertNotValidYet" in checks["quote"].got
    assert checks["rtmr3"].ok is True
    assert checks["rtmr0"].ok is (SKIPPED if name == LITE else True)


@pytest.mark.parametrize("name", [VERSIONED, LITE, LITE_GET_QUOTE])
def test_hardware_boot_under_an_emulated_signature_holds_but_for_its_unknown_platform(name: str) -> None:
    checks = {
        one.name: one
        for one in verify_evidence(
            Evidence.of_attestation(boot(name).attestation()), lambda quote: world().collateral, policy()
        )
    }
    assert failed(checks) == {"quote"}
    assert checks["rtmr3"].ok is True
    assert checks["rtmr0"].ok is (SKIPPED if name == LITE else True)


def golden_evidence() -> Iterator[tuple[str, bytes]]:
    for case in golden("attestations.json")["attestations"]:
        yield "attestation", bytes.fromhex(case["full_bytes"])
        yield "stripped attestation", bytes.fromhex(case["stripped_bytes"])
    for case in golden("csr.json")["csrs"]:
        body = {"api_version": case["api_version"], "csr": case["csr"], "signature": case["signature"]}
        yield "request", json.dumps(body).encode()
    for name, entry in golden("certificates.json")["certificates"].items():
        if "rpc.crt" in name or "id1ev2" in name:
            yield "certificate", entry["pem"].encode()


def test_recorded_evidence_of_the_real_programs_holds_but_for_its_mock_platform() -> None:
    kinds = set()
    for kind, data in golden_evidence():
        kinds.add(kind)
        evidence = inspect_input(data).evidence
        assert evidence is not None
        checks = {one.name: one for one in verify_evidence(evidence, lambda quote: world().collateral, policy())}
        boot_log_made_up = {"rtmr0", "rtmr1", "rtmr2"} if checks["rtmr1"].ok is False else set()
        # Stripping empties the digests that the preimages of version 2 are of: upstream refuses these too.
        stripped_v2 = {"event_preimages"} if checks["event_preimages"].ok is False else set()
        assert failed(checks) == {"quote"} | boot_log_made_up | stripped_v2, kind
        assert checks["rtmr3"].ok is True
        if kind in ("request", "certificate"):
            assert checks["binding"].ok is True
        if kind == "request":
            assert checks["csr_signature"].ok is True
    assert kinds == {"attestation", "stripped attestation", "request", "certificate"}


# ---- the command


def test_running_stack_gives_evidence_that_verifies(ready_stack: RunningStack, tmp_path: Path) -> None:
    services = ready_stack.services
    pccs = ("--pccs", services["pccs"])
    status, answer = ready_stack.curl(f"{services['app']}/prpc/Tappd.TdxQuote?report_data=01")
    assert status == 200
    done = run_command("verify", "-", *pccs, "--strict", stdin=answer.encode())
    assert (done.returncode, done.stderr) == (0, b""), done.stdout.decode()
    host, _, port = services["kms-src"].rpartition("//")[2].rpartition(":")
    pem = ssl.get_server_certificate((host, int(port)))
    done = run_command("verify", "-", *pccs, "--json", stdin=pem.encode())
    shown = {one["name"]: one["ok"] for one in json.loads(done.stdout)["checks"]}
    assert (done.returncode, shown["quote"], shown["binding"], shown["rtmr3"]) == (0, True, True, True)
    root = tmp_path / "root.pem"
    assert ready_stack.curl(f"{services['pccs']}/root-ca.pem", "-o", str(root))[0] == 200
    done = run_command("verify", "-", *pccs, "--root", str(root), stdin=pem.encode())
    assert done.returncode == 0
    assert f"signedundertherootin{root}" in "".join(done.stdout.decode().split())
    done = run_command("verify", "-", *pccs, "--seed", "another", stdin=pem.encode())
    assert done.returncode == 1


def test_pccs_of_the_command_line_says_what_verify_shows() -> None:
    quote = run_command("quote", "--seed", "s", "--platform", "p", "--json").stdout
    states = ("--platform", "p", "--tcb-status", "OutOfDate", "--advisory", "INTEL-SA-00002")
    with serving("pccs", "--seed", "s", "--listen", "127.0.0.1:0", *states) as pccs:
        verify = ("verify", "-", "--seed", "s", "--pccs", pccs["url"])
        done = run_command(*verify, stdin=quote)
        assert done.returncode == 0
        assert (
            "tcb_status       OutOfDate; advisories: INTEL-SA-00002; whoever relies on it must decide"
            in done.stdout.decode()
        )
        done = run_command(*verify, "--strict", stdin=quote)
        assert done.returncode == 1
        text = done.stdout.decode()
        assert "1 of 12 checks failed, 1 skipped." in text
        assert max(map(len, text.splitlines())) <= 100


def test_pccs_that_is_down_fails_the_collateral_check_with_its_url() -> None:
    done = run_command("verify", "-", "--pccs", "http://127.0.0.1:1", "--json", stdin=world().evidence.quote)
    first = json.loads(done.stdout)["checks"][0]
    assert (done.returncode, first["name"], first["ok"]) == (1, "collateral", False)
    assert first["got"].startswith("error sending request for url (http://127.0.0.1:1/")
    done = run_command("verify", "-", "--pccs", "nonsense", stdin=world().evidence.quote)
    assert (done.returncode, done.stderr) == (1, b"")
    assert "The quote is not proven: what holds beside it proves nothing.\n--pccs URL names" in done.stdout.decode()


def test_json_has_every_check_with_its_five_fields() -> None:
    done = run_command("verify", "-", "--pccs", "http://127.0.0.1:1", "--json", stdin=world().evidence.encode())
    shown = json.loads(done.stdout)
    assert set(shown) == {"ok", "what", "root", "time", "checks"}
    assert all(set(one) == {"name", "ok", "got", "expected", "detail"} for one in shown["checks"])
    assert {one["ok"] for one in shown["checks"]} == {True, False, None}


def test_unusable_input_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    files = {
        "nothing": b"",
        "damaged": world().evidence.quote[:700],
        "root": world().intel.root_pem.encode(),
        "crl": world().intel.root_ca_crl,
        "log": eventlog.log_to_json(world().evidence.event_log).encode(),
        "quote": world().evidence.quote,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)

    assert usage_error("verify", str(tmp_path / "root")) == f"{tmp_path}/root: X.509 certificate: no evidence in it"

    def refusal(name: str, *options: str) -> str:
        status, out, err = run_inside("verify", str(tmp_path / name), *options)
        assert (status, out, err.count("\n")) == (2, "", 1)
        return err.strip().removeprefix("Error: ").removeprefix(f"{tmp_path}/")

    assert refusal("nothing").startswith("nothing: unknown input: ")
    assert refusal("damaged").startswith("damaged: looks like a quote, but quote: ")
    assert refusal("root") == "root: X.509 certificate: no evidence in it"
    assert refusal("crl") == "crl: certificate revocation list (CRL): no evidence in it"
    assert refusal("log") == "log: event log: no evidence in it"
    log, none = tmp_path / "log", tmp_path / "none"
    assert refusal("quote", "--root", str(log)).startswith(f"failed to parse TDX root CA certificate: {log} is no ")
    assert refusal("quote", "--root", str(none)) == f"failed to read TDX root CA from {none}: No such file or directory"
    assert refusal("quote", "--collateral", str(tmp_path / "log")).startswith("log: ")
    assert refusal("quote", "--collateral", str(tmp_path / "crl")).startswith("crl: ")
    assert refusal("quote", "--report-data", "00" * 65) == "--report-data: Report data is too long"


@pytest.mark.parametrize("when", ["yesterday", "-1", "10000000000000", "2025-13-01", "1969-01-01", "٣"])
def test_time_that_is_none_is_refused(when: str) -> None:
    status, _, err = run_inside("verify", "-", f"--time={when}")
    assert status == 2
    assert "Unix seconds or ISO 8601 from 1970 to 9999 expected" in err


def test_options_that_exclude_each_other_are_refused() -> None:
    for options in (("--intel", "--seed", "x"), ("--intel", "--root", "x"), ("--pccs", "x", "--collateral", "x")):
        status, _, err = run_inside("verify", "-", *options)
        assert status == 2
        assert "not allowed with argument" in err


def test_certificate_with_half_of_the_legacy_evidence_is_unusable_and_says_why(tmp_path: Path) -> None:
    half = with_extensions({certificate.OID_TDX_QUOTE: der.octet_string(world().evidence.quote)})
    file = tmp_path / "half"
    file.write_bytes(half.public_bytes(Encoding.DER))
    what = "RA-TLS certificate (legacy: quote and event log)"
    assert run_inside("verify", str(file)) == (2, "", f"Error: {file}: {what}: TDX event log missing\n")
    file.write_bytes(half.public_bytes(Encoding.PEM) + issued().public_bytes(Encoding.PEM))
    status, _, err = run_inside("verify", str(file))
    assert (status, err.endswith(": TDX event log missing\n")) == (2, True)  # the second's does not stand in for it


def test_emulated_root_is_that_of_the_seed() -> None:
    other = Expectations(TrustAnchor.of(Intel(Seed.of("another")).root), "another root", NOW)
    checks = verify_evidence(Evidence(quote=world().evidence.quote), collect, other)
    assert not all_hold(checks)
    assert [one.name for one in checks if one.ok is False] == ["quote"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    (folder / "collateral").write_text(world().collateral.to_json())
    (folder / "root").write_text(world().intel.root_pem)
    return folder


@THOROUGH
@given(mutated(lambda: [data for data, _ in kinds().values()]), st.sampled_from(((), ("--json",))))
def test_mutated_samples_end_with_0_or_1_or_2(folder: Path, data: bytes, options: tuple[str, ...]) -> None:
    file = folder / "input"
    file.write_bytes(data)
    given_root = ("--collateral", str(folder / "collateral"), "--root", str(folder / "root"))
    status, out, err = run_inside("verify", str(file), *given_root, *options)
    if status == 2:
        assert (out, err.count("\n")) == ("", 1)
    else:
        assert (status in (0, 1), err) == (True, "")
        if options:
            assert json.loads(out)["ok"] is (status == 0)
        else:
            assert max(map(len, out.splitlines())) <= WIDTH
