"""The interface of Intel's provisioning certification service (PCS v4) and of a PCCS: paths, headers, answers.

`attest.collateral` assembles the answers for a verifier. Source:
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
EVALUATION_NUMBERS_PATH: Final = "/tdx/certification/v4/tcbevaluationdatanumbers"

PCK_CRL_ISSUER_HEADER: Final = "SGX-PCK-CRL-Issuer-Chain"
TCB_INFO_ISSUER_HEADERS: Final = ("TCB-Info-Issuer-Chain", "SGX-TCB-Info-Issuer-Chain")
QE_IDENTITY_ISSUER_HEADER: Final = "SGX-Enclave-Identity-Issuer-Chain"
EVALUATION_NUMBERS_ISSUER_HEADER: Final = "TCB-Evaluation-Data-Numbers-Issuer-Chain"


@dataclass(frozen=True, slots=True)
class DocumentKind:
    """How `dcap-qvl` reads the answer to one of its requests.

    `issuer_headers` have the issuer chain, the second one if the first is absent; a kind without them has no chain.
    `text` is its name for a document whose body has to be UTF-8.
    """

    issuer_headers: tuple[str, ...] = ()
    text: str = ""


DOCUMENT_KINDS: Final = (
    DocumentKind((PCK_CRL_ISSUER_HEADER,)),
    DocumentKind(tuple(reversed(TCB_INFO_ISSUER_HEADERS)), "TCB Info"),
    DocumentKind((QE_IDENTITY_ISSUER_HEADER,), "QE Identity"),
    DocumentKind(),
)
"""The kinds of PCK CRL, TCB info, QE identity and root CA CRL, in the order of its requests."""

REVALIDATION_PATH: Final = "/collateral/revalidation"
"""The emulated PCCS's path to confirm all four documents of a platform: 304 if their combined ETag is unchanged."""


@dataclass(frozen=True, slots=True)
class Document:
    """An answer of a PCCS: its body, and the issuer chain in its header (percent-encoded PEM; empty without one)."""

    body: bytes
    issuer_chain: str = ""


def combined_etag(etags: Sequence[str]) -> str:
    """Make the combined ETag of documents from their ETags, in the order of `CollateralKey.requests`.

    The client makes it from its documents, the server from the present ones; if both are equal, nothing has changed.
    """
    lines = "\n".join(etags).encode(errors="surrogateescape")
    return f'"{hashlib.sha256(lines).hexdigest()}"'
