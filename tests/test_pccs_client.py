"""Judging evidence with collateral of a PCCS: callers at the same time, one after another, and time that passes."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Literal, get_args

import dcap_qvl
import pytest

from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.collateral import error_chain
from dstack_emu.attest.errors import UnverifiableError, VerificationError
from dstack_emu.attest.eventlog import RuntimeEvent, TdxEvent
from dstack_emu.attest.pcs import PCK_CRL_PATH, QE_IDENTITY_PATH, REVALIDATION_PATH, ROOT_CA_CRL_PATH, TCB_INFO_PATH
from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.pccs import pccs_app
from dstack_emu.simulator.seed import Seed
from dstack_emu.simulator.trust_domain import AppCompose, KeyProvider, TrustDomain
from dstack_emu.simulator.vendor_state import VendorState
from dstack_emu.transport.http import Handler, Request, Response
from dstack_emu.transport.listen import bind_tcp, serve
from dstack_emu.transport.pccs_client import AttestationVerifier, PccsClient
from tests.ports import refusing_port

TIMEOUT = 10


DOCUMENTS = sorted([PCK_CRL_PATH, TCB_INFO_PATH, QE_IDENTITY_PATH, ROOT_CA_CRL_PATH])
"""They are asked for at the same time, in no order."""

Kind = Literal["ours", "with ETags", "without ETags"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Pccs:
    """A PCCS that notes what it is asked, and can keep its first answers to itself for a while.

    Clients are told of the first kind alone that it is of this emulator; the third kind's answers have no ETags.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        seed = Seed.of("pccs client")
        self.intel = Intel(seed)
        self.platform = self.intel.platform("host")
        compose = AppCompose.named("app")
        self.domain = TrustDomain(self.platform, OsImage.from_seed(seed.derive), compose, instance_seed=bytes(32))
        self.domain.boot()
        self.domain.complete(KeyProvider("none"))
        self.asked: list[str] = []
        self.held = 0
        self.instead = ""
        """What it answers who asks after all at once, if not as it should: a status, or `closes`."""
        self.reached, self.released = asyncio.Event(), asyncio.Event()
        self.now = int(time.time())
        self.app = pccs_app(self.intel)
        self.app.middlewares.append(self._observe)

    @property
    def rounds(self) -> int:
        """How often it was asked after all of the collateral, document by document or at once."""
        return self.asked.count(TCB_INFO_PATH) + self.asked.count(REVALIDATION_PATH)

    def evidence(self) -> Attestation:
        """Fresh evidence of the domain on the platform."""
        return self.domain.attest(bytes(64))

    async def _observe(self, request: Request, handler: Handler) -> Response:
        self.asked.append(request.path)
        if self.instead and request.path == REVALIDATION_PATH:
            if self.instead == "closes":
                request.transport.abort()
            return Response(int(self.instead) if self.instead.isdigit() else 304)
        answer = await handler(request)  # by the state as it is now, even if it leaves later
        if self.kind == "without ETags":
            answer = replace(answer, headers=tuple(header for header in answer.headers if header[0] != "ETag"))
        if len(self.asked) <= self.held:
            if len(self.asked) == self.held:
                self.reached.set()
            await self.released.wait()
        return answer


@pytest.fixture(params=KINDS)
async def pccs(request: pytest.FixtureRequest) -> Pccs:
    return Pccs(request.param)


@pytest.fixture
async def url(pccs: Pccs) -> AsyncIterator[str]:
    server = await serve(pccs.app, bind_tcp("127.0.0.1", 0))
    yield server.url
    pccs.released.set()
    await server.close()


@contextlib.asynccontextmanager
async def _verifier(pccs: Pccs, url: str, ttl: float = 0) -> AsyncIterator[AttestationVerifier]:
    client = PccsClient(url, ttl=ttl, revalidates_at_once=pccs.kind == "ours")
    try:
        yield AttestationVerifier(client, TrustAnchor(pccs.intel.root_der), lambda: pccs.now)
    finally:
        pccs.released.set()
        await client.close()


@pytest.fixture
async def verifier(pccs: Pccs, url: str) -> AsyncIterator[AttestationVerifier]:
    async with _verifier(pccs, url) as made:
        yield made


async def _status(verifier: AttestationVerifier, evidence: Attestation) -> str:
    return (await asyncio.wait_for(verifier.verify(evidence), TIMEOUT)).quote.tcb_status


async def test_each_call_asks_after_all_four_documents_one_after_another(
    pccs: Pccs, verifier: AttestationVerifier
) -> None:
    evidence = pccs.evidence()
    assert [await _status(verifier, evidence) for _ in range(3)] == ["UpToDate"] * 3
    again = [REVALIDATION_PATH] if pccs.kind == "ours" else DOCUMENTS
    assert sorted(pccs.asked[:4]) == DOCUMENTS
    assert sorted(pccs.asked[4 : 4 + len(again)]) == sorted(pccs.asked[4 + len(again) :]) == again


async def test_callers_that_come_while_requests_are_under_way_share_the_next_ones(
    pccs: Pccs, verifier: AttestationVerifier
) -> None:
    pccs.held = 4
    first = asyncio.create_task(_status(verifier, pccs.evidence()))
    await asyncio.wait_for(pccs.reached.wait(), TIMEOUT)
    later = [asyncio.create_task(_status(verifier, pccs.evidence())) for _ in range(5)]
    await asyncio.sleep(0)  # each has come
    pccs.released.set()
    assert await asyncio.gather(first, *later) == ["UpToDate"] * 6
    assert pccs.rounds == 2


async def test_nobody_is_judged_by_collateral_that_was_asked_for_before_he_came(
    pccs: Pccs, verifier: AttestationVerifier
) -> None:
    evidence = pccs.evidence()
    pccs.held = 4
    first = asyncio.create_task(_status(verifier, evidence))
    await asyncio.wait_for(pccs.reached.wait(), TIMEOUT)
    pccs.platform.state = replace(pccs.platform.state, tcb_status="OutOfDate")
    later = asyncio.create_task(_status(verifier, evidence))
    await asyncio.sleep(0)
    pccs.released.set()
    assert await first == "UpToDate"
    assert await later == "OutOfDate"


async def test_requests_that_hang_hold_nobody_else_up(pccs: Pccs, verifier: AttestationVerifier) -> None:
    pccs.held = 4
    first = asyncio.create_task(_status(verifier, pccs.evidence()))
    await asyncio.wait_for(pccs.reached.wait(), TIMEOUT)
    assert await _status(verifier, pccs.evidence()) == "UpToDate"
    assert not first.done()
    pccs.released.set()
    assert await first == "UpToDate"


async def test_a_caller_that_goes_away_takes_no_answer_from_another(pccs: Pccs, verifier: AttestationVerifier) -> None:
    evidence = pccs.evidence()
    gone, staying = (asyncio.create_task(_status(verifier, evidence)) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    assert await staying == "UpToDate"
    assert gone.cancelled()


async def test_a_platform_revoked_within_the_same_second_is_refused_at_the_next_call(
    pccs: Pccs, verifier: AttestationVerifier
) -> None:
    evidence = pccs.evidence()
    assert await _status(verifier, evidence) == "UpToDate"
    pccs.platform.state = replace(pccs.platform.state, pck_revoked=True)
    with pytest.raises(VerificationError, match=r"(?i)revoked"):
        await _status(verifier, evidence)
    pccs.platform.state = replace(pccs.platform.state, pck_revoked=False)
    assert await _status(verifier, evidence) == "UpToDate"


@pytest.mark.parametrize("pccs", ["ours"], indirect=True)
@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda pccs: setattr(pccs.intel, "state", VendorState(pck_ca_revoked=True)), None),
        (lambda pccs: setattr(pccs.intel, "state", VendorState(qe_identity_dating="expired")), None),
        (lambda pccs: setattr(pccs.intel, "state", VendorState(pck_crl_dating="expired")), None),
        (lambda pccs: setattr(pccs.platform, "state", replace(pccs.platform.state, pck_revoked=True)), None),
        (
            lambda pccs: setattr(pccs.platform, "state", replace(pccs.platform.state, tcb_status="OutOfDate")),
            "OutOfDate",
        ),
    ],
    ids=["root CRL", "QE identity", "PCK CRL", "PCK CRL, a platform", "TCB info"],
)
async def test_a_change_of_any_document_is_seen_at_the_next_call(
    pccs: Pccs, verifier: AttestationVerifier, change: Callable[[Pccs], None], status: str | None
) -> None:
    evidence = pccs.evidence()
    assert [await _status(verifier, evidence) for _ in range(2)] == ["UpToDate"] * 2
    change(pccs)
    if status is None:
        with pytest.raises(VerificationError):
            await _status(verifier, evidence)
    else:
        assert await _status(verifier, evidence) == status
    assert pccs.asked[4:6] == [REVALIDATION_PATH] * 2
    assert sorted(pccs.asked[:4]) == sorted(pccs.asked[6:]) == DOCUMENTS


@pytest.mark.parametrize("pccs", ["ours"], indirect=True)
@pytest.mark.parametrize("says", ["404", "500", "200", "closes"])
async def test_a_pccs_that_no_longer_answers_for_all_four_at_once_is_asked_for_each(
    pccs: Pccs, verifier: AttestationVerifier, says: str
) -> None:
    pccs.instead = says
    evidence = pccs.evidence()
    assert [await _status(verifier, evidence) for _ in range(2)] == ["UpToDate"] * 2
    pccs.platform.state = replace(pccs.platform.state, tcb_status="OutOfDate")
    assert await _status(verifier, evidence) == "OutOfDate"
    assert sorted(path for path in pccs.asked if path != REVALIDATION_PATH) == sorted(DOCUMENTS * 3)


@pytest.mark.parametrize("pccs", ["with ETags"], indirect=True)
async def test_server_that_says_that_it_is_our_pccs_is_asked_for_each_document(pccs: Pccs, url: str) -> None:
    """A proxy before a PCCS of ours answers its header, its page and its ETags, and changes a document."""
    header = ("Dstack-Emu-Revalidation", f"{url}{REVALIDATION_PATH}?ca=platform&fmspc={pccs.platform.fmspc.hex()}")

    async def change(request: Request, handler: Handler) -> Response:
        if request.path == REVALIDATION_PATH:
            return Response(304)
        answer = await handler(request)
        return replace(answer, headers=(*answer.headers, header))

    pccs.app.middlewares.insert(0, change)
    async with _verifier(pccs, url) as verifier:
        evidence = pccs.evidence()
        assert [await _status(verifier, evidence) for _ in range(2)] == ["UpToDate"] * 2
        pccs.platform.state = replace(pccs.platform.state, tcb_status="OutOfDate")
        assert await _status(verifier, evidence) == "OutOfDate"
    assert sorted(pccs.asked) == sorted(DOCUMENTS * 3)


@pytest.mark.parametrize(("ttl", "times"), [(3600.0, 1), (1e-9, 3), (0.0, 3)])
async def test_a_time_to_live_spares_requests_where_there_is_no_etag_alone(
    pccs: Pccs, url: str, ttl: float, times: int
) -> None:
    evidence = pccs.evidence()
    async with _verifier(pccs, url, ttl) as verifier:
        assert [await _status(verifier, evidence) for _ in range(3)] == ["UpToDate"] * 3
    assert pccs.rounds == (times if pccs.kind == "without ETags" else 3)


async def test_collateral_that_expires_while_nothing_else_changes_is_refused(
    pccs: Pccs, verifier: AttestationVerifier
) -> None:
    evidence = pccs.evidence()
    assert await _status(verifier, evidence) == "UpToDate"
    pccs.now = 5_000_000_000  # in 2128, after every document and certificate of the emulated vendor
    with pytest.raises(VerificationError, match=r"(?i)expired"):
        await _status(verifier, evidence)


async def test_other_evidence_around_the_same_quote_is_verified_anew(pccs: Pccs, verifier: AttestationVerifier) -> None:
    evidence = pccs.evidence()
    assert await _status(verifier, evidence) == "UpToDate"
    with pytest.raises(VerificationError, match="tdx report_data mismatch"):
        await _status(verifier, replace(evidence, report_data=bytes([1]) * 64))
    with pytest.raises(VerificationError, match="RTMR3 mismatch"):
        await _status(verifier, replace(evidence, runtime_events=evidence.runtime_events[:-1]))


@pytest.mark.parametrize("pccs", ["ours"], indirect=True)
async def test_a_pccs_that_is_down_is_a_refusal_for_everyone_who_waits(pccs: Pccs) -> None:
    with refusing_port() as port:
        client = PccsClient(f"http://127.0.0.1:{port}")
        verifier = AttestationVerifier(client, TrustAnchor(pccs.intel.root_der), lambda: pccs.now)
        refusals = await asyncio.gather(*(_status(verifier, pccs.evidence()) for _ in range(3)), return_exceptions=True)
    assert [type(refusal) for refusal in refusals] == [UnverifiableError] * 3
    assert all("Connection refused" in str(refusal) for refusal in refusals)
    await client.close()


async def test_error_is_that_of_the_first_document_whichever_fails_first() -> None:
    pccs, others = Pccs("ours"), asyncio.Semaphore(0)

    async def refuse(request: Request, _handler: Handler) -> Response:
        if request.path == PCK_CRL_PATH:
            for _ in range(3):
                await others.acquire()
        else:
            others.release()
        return Response(404)

    pccs.app.middlewares.append(refuse)
    server = await serve(pccs.app, bind_tcp("127.0.0.1", 0))
    async with _verifier(pccs, server.url) as verifier, asyncio.timeout(TIMEOUT):
        with pytest.raises(UnverifiableError, match=f"{PCK_CRL_PATH}.*: HTTP 404$"):
            await verifier.verify(pccs.evidence())
    await server.close()


# ---- answers that are no documents, beside what the library says that fetches and verifies by itself

ORDER = (PCK_CRL_PATH, TCB_INFO_PATH, QE_IDENTITY_PATH, ROOT_CA_CRL_PATH)
OTHER_MEMBERS = b'{"tcbInfo":{},"enclaveIdentity":{},"signature":"%s"}'
SPOILT: dict[str, Callable[[Response], Response]] = {
    "500": lambda answer: replace(answer, status=500),
    "404 without a body": lambda answer: Response(404),
    "203": lambda answer: replace(answer, status=203),
    "no chain": lambda answer: replace(answer, headers=()),
    "no document": lambda answer: replace(answer, body=b"nothing of the kind"),
    "empty": lambda answer: replace(answer, body=b""),
    "not UTF-8": lambda answer: replace(answer, body=b"\xff"),
    "{}": lambda answer: replace(answer, body=b"{}"),
    "no hex": lambda answer: replace(answer, body=OTHER_MEMBERS % b"zz"),
    "0x": lambda answer: replace(answer, body=OTHER_MEMBERS % b"0x00"),
    "blanks": lambda answer: replace(answer, body=b"30 00"),
    "no CRL": lambda answer: replace(answer, body=b"3000"),
}


async def _said_by_the_library(pccs: Pccs, url: str, quote: bytes) -> str:
    try:
        collateral = await dcap_qvl.get_collateral(url, quote)
        return str(dcap_qvl.verify_with_root_ca(quote, collateral, pccs.intel.root_der, pccs.now).status)
    except ValueError as error:
        return error_chain(error).removeprefix("Failed to get collateral: ")


@pytest.mark.parametrize("pccs", ["without ETags"], indirect=True)
@pytest.mark.parametrize("form", SPOILT)
async def test_answer_that_is_no_document_is_refused_with_the_text_of_the_library(
    pccs: Pccs, url: str, verifier: AttestationVerifier, form: str
) -> None:
    evidence, spoilt = pccs.evidence(), set[str]()

    async def spoil(request: Request, handler: Handler) -> Response:
        answer = await handler(request)
        return SPOILT[form](answer) if request.path in spoilt else answer

    pccs.app.middlewares.append(spoil)
    server = await serve(pccs.app, bind_tcp("127.0.0.1", 0))
    async with _verifier(pccs, server.url) as through:
        for first, second in itertools.combinations_with_replacement(ORDER, 2):
            spoilt.clear()
            assert await _status(through, evidence) == "UpToDate"
            spoilt.update((first, second))
            expected = await _said_by_the_library(pccs, server.url, evidence.quote)
            # The binding asks for TCB info with one parameter more, and leaves out what the parser says.
            expected = expected.replace("&update=standard: ", ": ") if "/tcb" in expected else expected
            try:
                found = await _status(through, evidence)
            except VerificationError as error:
                found = str(error).removeprefix("failed to verify TDX quote: ")
            assert found.startswith(expected), (first, second)
    await server.close()


@pytest.mark.parametrize("pccs", ["without ETags"], indirect=True)
async def test_document_of_a_mebibyte_is_read_and_one_of_a_byte_more_is_not(pccs: Pccs) -> None:
    size = 1024 * 1024

    async def pad(request: Request, handler: Handler) -> Response:
        answer = await handler(request)
        if request.path != QE_IDENTITY_PATH:
            return answer
        assert isinstance(answer.body, bytes)
        return replace(answer, body=answer.body.ljust(size))

    pccs.app.middlewares.append(pad)
    server = await serve(pccs.app, bind_tcp("127.0.0.1", 0))
    async with _verifier(pccs, server.url) as through:
        assert await _status(through, pccs.evidence()) == "UpToDate"
        size += 1
        with pytest.raises(UnverifiableError, match=f"{QE_IDENTITY_PATH}.*1048576 bytes"):
            await _status(through, pccs.evidence())
        size -= 1
        assert await _status(through, pccs.evidence()) == "UpToDate"
    await server.close()


@pytest.mark.parametrize("pccs", ["without ETags"], indirect=True)
async def test_root_crl_comes_before_tcb_info_and_says_where_it_was_sought(
    pccs: Pccs, url: str, verifier: AttestationVerifier
) -> None:
    evidence = pccs.evidence()

    async def close(request: Request, handler: Handler) -> Response:
        if request.path == ROOT_CA_CRL_PATH:
            request.transport.abort()
        return replace(await handler(request), body=b"nothing of the kind")

    pccs.app.middlewares.append(close)
    server = await serve(pccs.app, bind_tcp("127.0.0.1", 0))
    text = "Could not find CRL distribution point in root certificate"
    assert await _said_by_the_library(pccs, server.url, evidence.quote) == text
    async with _verifier(pccs, server.url) as through:
        with pytest.raises(UnverifiableError) as refusal:
            await _status(through, evidence)
    sought = f"{text} (error sending request for url ({server.url}{ROOT_CA_CRL_PATH}): "
    assert str(refusal.value).startswith(f"failed to verify TDX quote: {sought}")
    await server.close()


@pytest.mark.parametrize("pccs", ["ours"], indirect=True)
async def test_verdict_ends_after_a_second_though_the_clock_stands_still(
    verifier: AttestationVerifier, pccs: Pccs, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence, loop = pccs.evidence(), asyncio.get_running_loop()
    first = await verifier.verify(evidence)
    began = loop.time()
    monkeypatch.setattr(loop, "time", lambda: began)
    assert await verifier.verify(evidence) is first
    monkeypatch.setattr(loop, "time", lambda: began + 1)
    assert await verifier.verify(evidence) is not first


@pytest.mark.parametrize("pccs", ["ours"], indirect=True)
async def test_verdicts_of_one_second_take_no_more_than_eight_mebibytes(
    verifier: AttestationVerifier, pccs: Pccs, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = asyncio.get_running_loop().time()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: began)  # no verdict ends by itself
    for text, is_kept in (("x", True), ("x" * 1_500_000, False)):  # a character counts as four bytes
        first, second = (replace(pccs.domain.attest(bytes((n,)) * 64), config=text) for n in (1, 2))
        verdict = await verifier.verify(first)
        await verifier.verify(second)
        assert (await verifier.verify(first) is verdict) is is_kept


def test_size_of_evidence_counts_what_its_sender_chooses(pccs: Pccs) -> None:
    """Caches are bounded by it: bytes that do not count would fill memory."""
    evidence, text = pccs.evidence(), "x" * 1_000_000
    for changed in (
        replace(evidence, config=text),
        replace(evidence, report_data_payload=text),
        replace(evidence, runtime_events=(RuntimeEvent(text, b""),)),
        replace(evidence, runtime_events=(RuntimeEvent("x", text.encode()),)),
        replace(evidence, event_log=(TdxEvent(0, 1, b"", text, b""),)),
        replace(evidence, event_log=(TdxEvent(0, 1, b"", "x", text.encode()),)),
        replace(evidence, event_log=(TdxEvent(0, 1, text.encode(), "x", b""),)),
        replace(evidence, event_log=(TdxEvent(0, 1, b"", "x", b"", 2, text),)),
    ):
        assert changed.size >= 1_000_000
