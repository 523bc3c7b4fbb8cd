"""The bare server beside a measured KMS: it makes the KMS's requests, with the same bytes, and does nothing else."""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dcap_qvl import QuoteCollateralV3

from bench.bare_server import Inner
from bench.kms import TIMEOUT, MeasuredKms
from bench.processes import SERVER_CORE, running
from dstack_emu.attest.attestation import decode
from dstack_emu.attest.collateral import CollateralKey
from dstack_emu.attest.proto import dstack_guest_pb2 as pb
from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.kms_emu.gate import boot_info_of
from dstack_emu.transport.client import PrpcClient
from dstack_emu.transport.pccs_client import AttestationVerifier, PccsClient


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence of a guest, and a KMS's requests for it: four documents of the PCCS, a decision of the webhook."""

    quote: bytes
    collateral: QuoteCollateralV3
    documents: list[str]
    boot_info: str


async def request_evidence(kms: MeasuredKms, agent: str) -> Evidence:
    """Request evidence from a guest agent of the stack, and verify it once."""
    root, pccs = TrustAnchor(kms.root_der), PccsClient(kms.stack["services"]["pccs"])
    try:
        async with PrpcClient(agent, timeout=TIMEOUT) as client:
            answer = await client.call("Attest", pb.RawQuoteArgs(report_data=bytes(64)), pb.AttestResponse)
        attestation = decode(answer.attestation)
        verified = await AttestationVerifier(pccs, root, lambda: int(time.time())).verify(attestation)
        return Evidence(
            attestation.quote,
            await pccs.collateral(attestation.quote),
            [pccs.base_url + path for path in CollateralKey.of_quote(attestation.quote).requests()],
            boot_info_of(verified).to_json().decode(),
        )
    finally:
        await pccs.close()


@contextmanager
def bare_kms(kms: MeasuredKms, *, documents: int, questions: int, answer: bytes) -> Iterator[int]:
    """Run a bare server that makes that many inner calls in each call, on the KMS's core; yield its port."""
    app = asyncio.run(request_evidence(kms, kms.stack["app"]["dstack_sock"]))
    own = asyncio.run(request_evidence(kms, kms.stack["services"]["agent-src"]))
    webhook = kms.stack["services"]["auth-src"]
    requests = [(f"{webhook}/bootAuth/kms", own.boot_info), (f"{webhook}/bootAuth/app", app.boot_info)][:questions]
    inner = Inner(str(kms.certs), requests, app.documents[:documents], answer.decode())
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(inner.to_json())
        file.flush()
        with running((sys.executable, "-m", "bench.bare_server", "kms", file.name), SERVER_CORE) as (_, line):
            yield json.loads(line)["port"]
