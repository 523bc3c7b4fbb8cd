"""Intel's provisioning certification service (PCS v4), as a PCCS speaks it: paths, headers, and what an answer is.

A server of these documents needs no more than this; `attest.collateral` puts them together for a verifier. Source:
Intel PCS API v4; `dcap-qvl` src/collateral.rs at 0.7.0.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

PCK_CRL_PATH: Final = "/sgx/certification/v4/pckcrl"
TCB_INFO_PATH: Final = "/tdx/certification/v4/tcb"
QE_IDENTITY_PATH: Final = "/tdx/certification/v4/qe/identity"
ROOT_CA_CRL_PATH: Final = "/sgx/certification/v4/rootcacrl"

PCK_CRL_ISSUER_HEADER: Final = "SGX-PCK-CRL-Issuer-Chain"
TCB_INFO_ISSUER_HEADERS: Final = ("TCB-Info-Issuer-Chain", "SGX-TCB-Info-Issuer-Chain")
QE_IDENTITY_ISSUER_HEADER: Final = "SGX-Enclave-Identity-Issuer-Chain"

REVALIDATION_PATH: Final = "/collateral/revalidation"
"""Where a PCCS of this emulator says whether one of a platform's four documents changed: 304 to their combined ETag."""


@dataclass(frozen=True, slots=True)
class Document:
    """One answer of a PCCS: the body, and the issuer chain from its header (percent-encoded PEM; empty without one)."""

    body: bytes
    issuer_chain: str = ""


def combined_etag(etags: Sequence[str]) -> str:
    """Make the ETag of documents together from theirs, in the order of `CollateralKey.requests`.

    The client makes it of what it holds, the server of what there is now: if both are equal, nothing has changed.
    """
    lines = "\n".join(etags).encode(errors="surrogateescape")
    return f'"{hashlib.sha256(lines).hexdigest()}"'
