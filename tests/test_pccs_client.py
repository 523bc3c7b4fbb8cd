"""Judging evidence with collateral of a PCCS: callers at the same time, one after another, and time that passes."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest
from aiohttp import web

from attest.attestation import Attestation
from attest.collateral import TCB_INFO_PATH
from attest.errors import VerificationError
from attest.verify import TrustAnchor
from simulator.image import OsImage
from simulator.intel import Intel
from simulator.pccs import pccs_app
from simulator.seed import Seed
from simulator.trust_domain import AppCompose, KeyProvider, TrustDomain
from transport.listen import bind_tcp, serve
from transport.pccs_client import AttestationVerifier, PccsClient

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
TIMEOUT = 10


class Pccs:
    """A PCCS that notes what it is asked, and can keep its first answers to itself for a while."""

    def __init__(self) -> None:
        seed = Seed.of("pccs client")
        self.intel = Intel(seed)
        self.platform = self.intel.platform("host")
        compose = AppCompose.named("app")
        self.domain = TrustDomain(self.platform, OsImage.from_seed(seed.derive), compose, instance_seed=bytes(32))
        self.domain.boot()
        self.domain.complete(KeyProvider("none"))
        self.asked: list[str] = []
        self.held = 0
        self.reached, self.released = asyncio.Event(), asyncio.Event()
        self.now = int(time.time())
        self.app = pccs_app(self.intel)
        self.app.middlewares.append(self._observe)

    @property
    def rounds(self) -> int:
        """How often TCB info was asked for: once for each time that all four documents were."""
        return self.asked.count(TCB_INFO_PATH)

    def evidence(self) -> Attestation:
        """Fresh evidence of the domain on the platform."""
        return self.domain.attest(bytes(64))

    @web.middleware
    async def _observe(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self.asked.append(request.path)
        answer = await handler(request)  # by the state as it is now, even if it leaves later
        if len(self.asked) <= self.held:
            if len(self.asked) == self.held:
                self.reached.set()
            await self.released.wait()
        return answer


@pytest.fixture
async def pccs() -> Pccs:
    return Pccs()


@pytest.fixture
async def verifier(pccs: Pccs) -> AsyncIterator[AttestationVerifier]:
    server = await serve(pccs.app, bind_tcp("127.0.0.1", 0))
    client = PccsClient(server.url)
    yield AttestationVerifier(client, TrustAnchor(pccs.intel.root_der), lambda: pccs.now)
    pccs.released.set()
    await client.close()
    await server.close()


async def _status(verifier: AttestationVerifier, evidence: Attestation) -> str:
    return (await asyncio.wait_for(verifier.verify(evidence), TIMEOUT)).quote.tcb_status


async def test_each_call_asks_for_all_four_documents_one_after_another(
    pccs: Pccs, verifier: AttestationVerifier
) -> None:
    evidence = pccs.evidence()
    assert [await _status(verifier, evidence) for _ in range(3)] == ["UpToDate"] * 3
    assert len(pccs.asked) == 12
    assert pccs.rounds == 3


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


async def test_a_pccs_that_is_down_is_a_refusal_for_everyone_who_waits(pccs: Pccs) -> None:
    socket = bind_tcp("127.0.0.1", 0)
    port = socket.getsockname()[1]
    socket.close()
    client = PccsClient(f"http://127.0.0.1:{port}")
    verifier = AttestationVerifier(client, TrustAnchor(pccs.intel.root_der), lambda: pccs.now)
    refusals = await asyncio.gather(*(_status(verifier, pccs.evidence()) for _ in range(3)), return_exceptions=True)
    assert [type(refusal) for refusal in refusals] == [VerificationError] * 3
    assert all("Connection refused" in str(refusal) for refusal in refusals)
    await client.close()
