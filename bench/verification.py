"""The speed at which the library verifies evidence, beside `dcap-qvl` alone, which does the cryptography."""

import time
from collections.abc import Iterator

import dcap_qvl

from bench.figure import Bar, Effort, Figure, alternate, median, rate_of, ratio
from bench.processes import SERVER_CORE, on_core
from bench.quotes import booted_domain
from dstack_emu.attest.collateral import assemble
from dstack_emu.attest.pcs import Document
from dstack_emu.attest.verify import TrustAnchor, verify_attestation

BAR = 0.75


def measure(effort: Effort) -> Iterator[Figure]:
    """Measure verifications per second on one core, and their ratio to `dcap-qvl`'s."""
    intel, domain = booted_domain()
    root_ca_crl = Document(intel.root_ca_crl.hex().encode())
    collateral = assemble(intel.pck_crl, intel.tcb_info(domain.platform.fmspc), intel.qe_identity, root_ca_crl)
    evidence, root, now = domain.attest(bytes(64)), intel.root_der, int(time.time())
    anchor = TrustAnchor(root)
    with on_core(SERVER_CORE):
        ours, bare = alternate(
            effort,
            rate_of(lambda: verify_attestation(evidence, collateral, anchor, now)),
            rate_of(lambda: dcap_qvl.verify_with_root_ca(evidence.quote, collateral, root, now)),
        )
    yield Figure("verify_per_second", median(ours), "verifications/s")
    yield Figure("verify_to_dcap_qvl", ratio(ours, bare), "x bare dcap-qvl", Bar(BAR))
