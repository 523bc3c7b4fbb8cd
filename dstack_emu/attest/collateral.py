"""Collateral: the documents that a verifier needs in addition to a quote, in the format of Intel's PCS v4.

Four documents of a provisioning certificate caching service (PCCS), each signed under the Intel-like root: TCB info, QE
identity, and two CRLs. `transport.pccs_client` fetches them from the endpoints in `attest.pcs`, and this module
assembles the answers. Source: Intel PCS API v4; `dcap-qvl` src/collateral.rs at 0.7.0.
"""

import binascii
import datetime
import json
from dataclasses import dataclass
from urllib.parse import unquote

from cryptography import x509
from dcap_qvl import QuoteCollateralV3, parse_quote

from dstack_emu.attest.cache import BoundedCache
from dstack_emu.attest.certificate import UNREADABLE
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.pcs import (
    PCK_CRL_PATH,
    QE_IDENTITY_PATH,
    ROOT_CA_CRL_PATH,
    TCB_INFO_PATH,
    Document,
)
from dstack_emu.attest.quote import Quote, require_size
from dstack_emu.attest.strict_json import read_json


@dataclass(frozen=True, slots=True)
class CollateralKey:
    """What identifies the collateral of a platform: its CA (`platform` or `processor`) and FMSPC (12 hex digits)."""

    ca: str
    fmspc: str

    @classmethod
    def of_quote(cls, quote: bytes) -> "CollateralKey":
        """Return the key for a quote, from its PCK certificate; raise `FormatError` if the quote is invalid."""
        try:
            parsed = parse_quote(quote)
            return cls(parsed.ca(), parsed.fmspc())
        except ValueError as error:
            raise FormatError(error_chain(error)) from error

    def requests(self) -> tuple[str, str, str, str]:
        """Return the paths of PCK CRL, TCB info, QE identity and root CA CRL with queries, in upstream's order."""
        return (
            f"{PCK_CRL_PATH}?ca={self.ca}&encoding=der",
            f"{TCB_INFO_PATH}?fmspc={self.fmspc}",
            f"{QE_IDENTITY_PATH}?update=standard",
            ROOT_CA_CRL_PATH,
        )


class CollateralKeys:
    """Returns the keys of quotes. All quotes of a platform have the same certificate chain, which is parsed once."""

    def __init__(self) -> None:
        self._by_chain: BoundedCache[bytes, CollateralKey] = BoundedCache(64, 1 << 20)

    def of_quote(self, quote: bytes) -> CollateralKey:
        """Return the result of `CollateralKey.of_quote`, from a cache; raise `FormatError`."""
        require_size(quote)
        try:
            chain = Quote.parse(quote).signature.pck_chain
        except FormatError:
            return CollateralKey.of_quote(quote)  # the library reports the error
        known = self._by_chain.get(chain)
        if known is None:
            known = CollateralKey.of_quote(quote)
            self._by_chain.put(chain, known, len(chain))
        return known


def assemble(pck_crl: Document, tcb_info: Document, qe_identity: Document, root_ca_crl: Document) -> QuoteCollateralV3:
    """Assemble four answers for `dcap-qvl`.

    Raises `FormatError` in its order, the CRL of the root first, and with its texts.
    """
    root_crl = _root_crl(root_ca_crl)
    tcb, tcb_signature = _signed(tcb_info, "tcbInfo", "TCB Info")
    qe, qe_signature = _signed(qe_identity, "enclaveIdentity", "QE Identity")
    pck_chain, tcb_chain, qe_chain = (unquote(each.issuer_chain) for each in (pck_crl, tcb_info, qe_identity))
    try:
        return QuoteCollateralV3(
            pck_chain, root_crl, pck_crl.body, tcb_chain, tcb, tcb_signature, qe_chain, qe, qe_signature
        )
    except UnicodeEncodeError as error:  # half a surrogate pair, from a JSON escape or a header
        raise FormatError(f"collateral: text that UTF-8 can hold expected ({error.reason})") from error


def _root_crl(document: Document) -> bytes:
    try:
        text = document.body.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"Failed to convert hex-encoded CRL to string: {error}") from error
    try:
        return binascii.unhexlify(text)
    except ValueError as error:
        raise FormatError("Failed to decode hex-encoded root CA CRL") from error


def earliest_expiry(collateral: QuoteCollateralV3) -> int:
    """Return the earliest nextUpdate of the four documents in Unix seconds; do not use them after it."""
    dates = []
    for text, what in ((collateral.tcb_info, "TCB info"), (collateral.qe_identity, "QE identity")):
        dates.append(_next_update(text, what))
    for crl, what in ((collateral.root_ca_crl, "root CA CRL"), (collateral.pck_crl, "PCK CRL")):
        try:
            next_update = x509.load_der_x509_crl(crl).next_update_utc
        except UNREADABLE as error:
            raise FormatError(f"{what}: DER CRL expected ({error})") from error
        if next_update is not None:
            dates.append(next_update)
    return int(min(dates).timestamp())


def error_chain(error: BaseException) -> str:
    """Return the message of `dcap-qvl` as dstack prints it: without its prefix, with causes joined by `: `."""
    lines = [line.strip() for line in str(error).removeprefix("Verification failed: ").splitlines()]
    causes = [line.removeprefix("Caused by:").strip() for line in lines]
    numbered = [_drop_number(cause) for cause in causes]
    return ": ".join(cause for cause in numbered if cause)


def _drop_number(cause: str) -> str:
    number, colon, rest = cause.partition(": ")
    return rest if colon and number.isdigit() else cause


def _signed(document: Document, key: str, what: str) -> tuple[str, bytes]:
    try:
        outer = read_json(document.body)
        inner, signature = outer[key], outer["signature"]
        if not isinstance(signature, str):
            raise TypeError(f"text expected as signature, got {type(signature).__name__}")
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{what} should be valid JSON: {type(error).__name__}: {error}") from error
    try:
        octets = binascii.unhexlify(signature)
    except ValueError as error:
        raise FormatError(f"{what} signature must be valid hex") from error
    return json.dumps(inner, separators=(",", ":"), ensure_ascii=False), octets


def _next_update(text: str, what: str) -> datetime.datetime:
    try:
        date = datetime.datetime.fromisoformat(read_json(text)["nextUpdate"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{what}: nextUpdate expected as a date ({type(error).__name__}: {error})") from error
    if date.tzinfo is None:
        raise FormatError(f"{what}: nextUpdate expected with its time zone, got {date}")
    return date
