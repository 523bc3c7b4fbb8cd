"""TCB evaluation data numbers and the date of issue of collateral, as `dcap-qvl` and openssl judge both."""

import datetime
import hashlib
import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import dcap_qvl
import pytest
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from dstack_emu.attest.collateral import assemble
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.pcs import Document
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.platform import PlatformState
from dstack_emu.simulator.seed import Seed
from dstack_emu.simulator.trust_domain import AppCompose, TrustDomain
from dstack_emu.simulator.vendor_state import RecoveryPhase, VendorState, validity_of_issue
from tests.commands import serving
from tests.live_pccs import LivePccs, live_pccs

SEED = "TCB recovery"
NOW = int(datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC).timestamp())
TCB, QE_IDENTITY = "/tdx/certification/v4/tcb", "/tdx/certification/v4/qe/identity"
NUMBERS = "/tdx/certification/v4/tcbevaluationdatanumbers"


@dataclass(frozen=True)
class Answer:
    """An answer of the PCCS over HTTP."""

    status: int
    body: bytes
    chain: str = ""


@pytest.fixture(scope="module")
def listening() -> Iterator[LivePccs]:
    """A PCCS for the file."""
    with live_pccs(SEED) as pccs:
        yield pccs


@pytest.fixture
def pccs(listening: LivePccs) -> Iterator[LivePccs]:
    """The same, whose vendor and platform are as they began."""
    listening.intel.platform("machine")
    before = listening.intel.capture()
    yield listening
    listening.intel.restore(before)


def get(pccs: LivePccs, path: str) -> Answer:
    """Request a document as any client does."""
    try:
        with urllib.request.urlopen(pccs.url + path, timeout=10) as response:
            chains = [value for name, value in response.headers.items() if name.endswith("-Issuer-Chain")]
            return Answer(response.status, response.read(), unquote(chains[0]) if chains else "")
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read())


def verdict(pccs: LivePccs, selected: str, now: int = NOW) -> tuple[str, list[str]]:
    """The status and advisories that `dcap-qvl` finds with the documents that a query selects."""
    platform = pccs.intel.platform("machine")
    seed = Seed.of(SEED)
    domain = TrustDomain(platform, OsImage.from_seed(seed.derive), AppCompose.named("app"), instance_seed=bytes(32))

    def document(path: str) -> Document:
        answer = get(pccs, path)
        assert answer.status == 200, answer
        return Document(answer.body, answer.chain)

    collateral = assemble(
        document("/sgx/certification/v4/pckcrl?ca=platform&encoding=der"),
        document(f"{TCB}?fmspc={platform.fmspc.hex().upper()}{selected and '&'}{selected}"),
        document(f"{QE_IDENTITY}{selected and '?'}{selected}"),
        document("/sgx/certification/v4/rootcacrl"),
    )
    verified = dcap_qvl.verify_with_root_ca(domain.attest(bytes(64)).quote, collateral, pccs.intel.root_der, now)
    return verified.status, list(verified.advisory_ids)


def test_documents_without_parameters_have_the_bytes_that_they_always_had() -> None:
    intel = Intel(Seed.of("collateral of old"))
    documents = (intel.tcb_info(intel.platform("m").fmspc), intel.qe_identity, intel.pck_crl)
    hashes = [hashlib.sha256(each.body + each.issuer_chain.encode()).hexdigest()[:16] for each in documents]
    assert hashes == ["ab44e561db97c66c", "ebe1ef3059dc6e69", "c80e7cce4dfff95f"]
    assert hashlib.sha256(intel.root_ca_crl).hexdigest()[:16] == "af0e80e39cba10db"


def test_parameters_select_the_same_bytes_while_there_is_one_set(pccs: LivePccs) -> None:
    tcb = f"{TCB}?fmspc={pccs.intel.platform('machine').fmspc.hex()}"
    for path in (f"{tcb}&", f"{QE_IDENTITY}?"):
        plain = get(pccs, path)
        assert plain.status == 200
        for query in ("update=standard", "update=early", "tcbEvaluationDataNumber=17"):
            assert get(pccs, path + query) == plain


UP_TO_DATE: tuple[str, list[str]] = ("UpToDate", [])
OUT_OF_DATE = ("OutOfDate", ["INTEL-SA-01036"])


@pytest.mark.parametrize(
    ("phase", "standard", "early"),
    [
        ("none", UP_TO_DATE, UP_TO_DATE),
        ("early", UP_TO_DATE, OUT_OF_DATE),
        ("standard", OUT_OF_DATE, OUT_OF_DATE),
        ("complete", OUT_OF_DATE, OUT_OF_DATE),
    ],
)
def test_platform_has_the_status_of_the_set_that_is_requested(
    pccs: LivePccs, phase: RecoveryPhase, standard: Any, early: Any
) -> None:
    platform = pccs.intel.platform("machine")
    platform.state = PlatformState(recovery_status="OutOfDate", recovery_advisory_ids=("INTEL-SA-01036",))
    pccs.intel.state = VendorState(tcb_recovery=phase)
    assert verdict(pccs, "") == standard
    assert verdict(pccs, "update=standard") == standard
    assert verdict(pccs, "update=early") == early
    if phase in ("early", "standard"):
        assert verdict(pccs, "tcbEvaluationDataNumber=17") == UP_TO_DATE
    if phase != "none":
        assert verdict(pccs, "tcbEvaluationDataNumber=18") == OUT_OF_DATE
    platform.state = replace(platform.state, recovery_status="UpToDate", recovery_advisory_ids=())  # updated
    assert verdict(pccs, "") == verdict(pccs, "update=early") == UP_TO_DATE


def test_quoting_enclave_has_the_status_of_the_set_that_is_requested(pccs: LivePccs) -> None:
    pccs.intel.state = VendorState(
        tcb_recovery="early", recovery_qe_status="OutOfDate", recovery_qe_advisory_ids=("INTEL-SA-01036",)
    )
    assert verdict(pccs, "update=standard") == UP_TO_DATE
    assert verdict(pccs, "update=early") == OUT_OF_DATE


@pytest.mark.parametrize(
    "path", [f"{TCB}?fmspc=FMSPC&", f"{TCB.replace('tdx', 'sgx')}?fmspc=FMSPC&", f"{QE_IDENTITY}?"]
)
@pytest.mark.parametrize(
    ("query", "status", "text"),
    [
        ("update=early&tcbEvaluationDataNumber=18", 400, "update and tcbEvaluationDataNumber exclude each other"),
        ("update=sometimes", 400, "update: `early` or `standard` expected, got 'sometimes'"),
        ("tcbEvaluationDataNumber=newest", 400, "tcbEvaluationDataNumber: a number expected, got 'newest'"),
        ("tcbEvaluationDataNumber=-1", 400, "a number expected, got '-1'"),
        ("tcbEvaluationDataNumber=19", 404, "there is no TCB evaluation data number 19; available: 18, 17"),
        ("tcbEvaluationDataNumber=16", 410, "the TCB evaluation data number 16 is no longer available"),
    ],
)
def test_set_that_cannot_be_selected_is_refused(pccs: LivePccs, path: str, query: str, status: int, text: str) -> None:
    path = path.replace("FMSPC", pccs.intel.platform("machine").fmspc.hex())
    pccs.intel.state = VendorState(tcb_recovery="early")
    answer = get(pccs, path + query)
    assert (answer.status, text in json.loads(answer.body)["error"]) == (status, True), answer
    assert get(pccs, path + "tcbEvaluationDataNumber=18").status == 200


def test_withdrawn_set_is_gone_and_an_unknown_phase_is_refused(pccs: LivePccs) -> None:
    pccs.intel.state = VendorState(tcb_recovery="standard")
    assert get(pccs, f"{QE_IDENTITY}?tcbEvaluationDataNumber=17").status == 200
    pccs.intel.state = VendorState(tcb_recovery="complete")
    assert get(pccs, f"{QE_IDENTITY}?tcbEvaluationDataNumber=17").status == 410
    with pytest.raises(FormatError, match="tcb_recovery: one of none, early, standard, complete expected, got 'late'"):
        VendorState(tcb_recovery="late")  # type: ignore[arg-type]  # that is the point


def test_list_of_the_numbers_is_signed_under_the_root(pccs: LivePccs, tmp_path: Path) -> None:
    pccs.intel.state = VendorState(tcb_recovery="early")
    answer = get(pccs, NUMBERS)
    document = json.loads(answer.body)
    listed = document["tcbEvaluationDataNumbers"]
    assert [entry["tcbEvaluationDataNumber"] for entry in listed["tcbEvalNumbers"]] == [18, 17]
    assert {"id": "TDX", "version": 1}.items() <= listed.items()
    assert set(listed["tcbEvalNumbers"][0]) == {"tcbEvaluationDataNumber", "tcbRecoveryEventDate", "tcbDate"}
    signature = bytes.fromhex(document["signature"])
    numbers = (int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
    (tmp_path / "signature").write_bytes(encode_dss_signature(*numbers))
    (tmp_path / "chain.pem").write_text(answer.chain)
    (tmp_path / "root.pem").write_text(pccs.intel.root_pem)
    inner = answer.body.removeprefix(b'{"tcbEvaluationDataNumbers":').rpartition(b',"signature"')[0]
    (tmp_path / "inner").write_bytes(inner)

    def openssl(*words: str) -> str:
        return subprocess.run(("openssl", *words), cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    (tmp_path / "key.pem").write_text(openssl("x509", "-in", "chain.pem", "-noout", "-pubkey"))
    assert openssl("dgst", "-sha256", "-verify", "key.pem", "-signature", "signature", "inner") == "Verified OK\n"
    assert openssl("verify", "-CAfile", "root.pem", "chain.pem") == "chain.pem: OK\n"


# ---- the date of issue


def test_collateral_of_a_date_holds_for_thirty_days(pccs: LivePccs) -> None:
    pccs.intel.state = VendorState.dated(validity_of_issue("2026-05-20", 0))
    assert verdict(pccs, "", NOW) == UP_TO_DATE
    with pytest.raises(ValueError, match="in the future|not yet valid|NotYetValid"):
        verdict(pccs, "", NOW - 13 * 86_400)
    with pytest.raises(ValueError, match="CrlExpired"):
        verdict(pccs, "", NOW + 19 * 86_400)


def test_command_serves_collateral_of_the_date_with_the_same_bytes() -> None:
    fmspc = Intel(Seed.of(SEED)).fmspc("machine").hex()
    intel = Intel(Seed.of(SEED))
    intel.state = VendorState.dated(validity_of_issue("2026-11-01", 0))
    words = ("--seed", SEED, "--collateral-issued", "2026-11-01")
    with serving("pccs", "--listen", "127.0.0.1:0", *words) as ready:
        served = LivePccs(ready["url"], intel)
        tcb = get(served, f"{TCB}?fmspc={fmspc}")
        crl = get(served, "/sgx/certification/v4/pckcrl?ca=platform&encoding=pem").body
    assert tcb.body == intel.tcb_info(bytes.fromhex(fmspc)).body
    dates = json.loads(tcb.body)["tcbInfo"]
    assert (dates["issueDate"], dates["nextUpdate"]) == ("2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z")
    shown = subprocess.run(
        ("openssl", "crl", "-noout", "-lastupdate", "-nextupdate"), input=crl, capture_output=True, check=True
    )
    assert shown.stdout == b"lastUpdate=Nov  1 00:00:00 2026 GMT\nnextUpdate=Dec  1 00:00:00 2026 GMT\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("yesterday", "a date such as 2026-06-01, or `today`, expected"),
        ("2019-01-01", "both from 2024-01-01T00:00:00Z"),
    ],
)
def test_date_that_is_none_or_out_of_bounds_is_refused(text: str, problem: str) -> None:
    with pytest.raises(FormatError, match=problem):
        validity_of_issue(text, 0)
    assert validity_of_issue("today", NOW + 5).issued == NOW
