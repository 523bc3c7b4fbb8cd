"""The CPU time that each cache of docs/caches.md saves: the time to compute a result minus that to look it up.

Each figure is for one use; docs/caches.md says how often a call uses which.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding

from bench.figure import Effort, Figure
from bench.processes import SERVER_CORE, on_core
from bench.quotes import booted_domain
from dstack_emu.attest.app_info import BootInfo, decode_app_info, vm_config_of
from dstack_emu.attest.attestation import Attestation, V1Encoder
from dstack_emu.attest.cache import BoundedCache
from dstack_emu.attest.certificate import load_pem
from dstack_emu.attest.collateral import CollateralKey, CollateralKeys, assemble
from dstack_emu.attest.eventlog import for_get_quote, log_to_json
from dstack_emu.attest.os_image import verify_lite
from dstack_emu.attest.pcs import Document
from dstack_emu.attest.quote import Quote
from dstack_emu.attest.verify import TrustAnchor, VerifiedAttestation, VerifiedQuote, verify_attestation
from dstack_emu.auth.boot_info import parse_body
from dstack_emu.auth.policy import Policy
from dstack_emu.deployment.policy_files import DENY_ALL
from dstack_emu.kms_emu.gate import AppGrant, SelfGrant
from dstack_emu.kms_emu.keys import KmsKeys, app_secrets
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.trust_domain import TrustDomain
from dstack_emu.simulator.vendor_state import Validity, VendorState
from dstack_emu.transport.pccs_client import read_certificate

CALLS: Final = 100
Work = Callable[[], object]


def measure(effort: Effort) -> Iterator[Figure]:
    """Microseconds of CPU time that one use of each cache saves."""
    with on_core(SERVER_CORE):
        for name, without, found in (*_of_verification(), *_of_kms(), *_of_simulator(), _of_policy()):
            saved = _microseconds(effort, without) - _microseconds(effort, found)
            yield Figure(f"cache_{name}_saves", saved, "us of CPU a use")


def _of_verification() -> Iterator[tuple[str, Work, Work]]:
    """Verdicts, which collateral a quote needs, what a client's certificate holds, and what follows from evidence."""
    intel, domain = booted_domain()
    evidence, now, keys = domain.attest(bytes(64)), int(time.time()), CollateralKeys()
    crl = Document(intel.root_ca_crl.hex().encode())
    collateral = assemble(intel.pck_crl, intel.tcb_info(domain.platform.fmspc), intel.qe_identity, crl)
    anchor = TrustAnchor(intel.root_der)
    verified = verify_attestation(evidence, collateral, anchor, now)
    report = verified.quote.report
    keys_of_kms = _kms_keys()
    pem = keys_of_kms.roots.issue_rpc_certificate(keys_of_kms.rpc_key, "localhost", evidence, now)
    certificate = load_pem(pem, "certificate")
    der = certificate.public_bytes(Encoding.DER)

    def image() -> None:
        verify_lite(vm_config_of(evidence.config), evidence.event_log, report)

    def boot_info() -> object:
        return verified.boot_info(vm_config=evidence.config)

    yield "verdict", lambda: verify_attestation(evidence, collateral, anchor, now), _kept(verified)
    yield "collateral_key", lambda: CollateralKey.of_quote(evidence.quote), lambda: keys.of_quote(evidence.quote)
    yield "client_certificate", lambda: read_certificate(der), _kept(der)
    yield "boot_info", boot_info, _kept(verified)
    yield "image_registers", image, _kept(verified)


def _of_kms() -> Iterator[tuple[str, Work, Work]]:
    """An app instance's keys."""
    _, domain = booted_domain()
    roots, counter, evidence = _kms_keys().roots, itertools.count(), domain.attest(bytes(64))
    # What a grant is made of does not count here.
    boot_info = BootInfo.about(decode_app_info(evidence), "UpToDate", ())
    quote = VerifiedQuote("UpToDate", (), bytes(16), Quote.parse(evidence.quote).report)
    verified = VerifiedAttestation(evidence, quote)

    def grant(instance: int) -> AppGrant:
        own = replace(boot_info, instance_id=instance.to_bytes(20, "big"))
        return AppGrant(SelfGrant(None), own, "", verified, "")

    yield "app_keys", lambda: app_secrets(roots, grant(next(counter))), lambda: app_secrets(roots, grant(0))


def _of_simulator() -> Iterator[tuple[str, Work, Work]]:
    """What a guest agent writes for each quote, and what the emulated Intel signs for each state."""
    intel, domain = booted_domain()
    kept = V1Encoder()
    yield "packed_evidence", lambda: V1Encoder().encode(_attest(domain)), lambda: kept.encode(_attest(domain))
    log = domain.event_log
    yield "shown_log", lambda: log_to_json(for_get_quote(log)), _kept(log)
    yield "vendor_documents", _documents(intel, domain, changes=True), _documents(intel, domain, changes=False)


def _attest(domain: TrustDomain) -> Attestation:
    """Quote other data each time, as an agent's clients do."""
    return domain.attest(next(_COUNTER).to_bytes(64, "big"))


def _documents(intel: Intel, domain: TrustDomain, *, changes: bool) -> Work:
    """Request all four documents; after a change of the state, each is signed again."""

    def request() -> None:
        if changes:
            dates = Validity(1_767_225_600 + next(_COUNTER), 2_000_000_000)
            intel.state = VendorState("UpToDate", (), False, dates, dates, dates, dates)
        _ = intel.tcb_info(domain.platform.fmspc), intel.qe_identity, intel.pck_crl, intel.root_ca_crl

    return request


def _of_policy() -> tuple[str, Work, Work]:
    """A policy file of auth-simple with twenty apps."""
    app = {"composeHashes": ["0x" + "cd" * 32], "devices": [], "allowAnyDevice": True}
    policy = DENY_ALL | {"apps": {f"0x{number:040x}": app for number in range(20)}}
    content = json.dumps(policy, indent=2).encode()

    def read() -> object:
        return parse_body(content), Policy.model_validate_json(content)

    return "policy", read, lambda: content == content[:]


def _kms_keys() -> KmsKeys:
    return KmsKeys.generate("localhost", lambda size: hashlib.shake_256(b"bench").digest(size), int(time.time()))


def _kept(key: Hashable) -> Work:
    """Find something in a cache."""
    cache: BoundedCache[Hashable, bool] = BoundedCache(16, 16)
    cache.put(key, True, 1)
    return lambda: cache.get(key)


def _microseconds(effort: Effort, work: Work) -> float:
    """CPU time of one turn, in the fastest of several rounds."""
    work()
    return min(_round(work) for _ in range(effort.rounds)) / CALLS * 1e6


def _round(work: Work) -> float:
    began = time.process_time()
    for _ in range(CALLS):
        work()
    return time.process_time() - began


_COUNTER = itertools.count(1)
