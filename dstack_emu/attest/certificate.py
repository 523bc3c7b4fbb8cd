"""dstack's X.509 certificates: the RA-TLS extensions, and reading them.

Each extension's value is the payload in a DER OCTET STRING, not critical. `issuing` makes certificates. Parsing a
certificate does not verify its signature. Source: upstream's `ra-tls/src/{cert,oids,traits}.rs` (312dc605).
"""

import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from dstack_emu.attest import der
from dstack_emu.attest.app_info import AppInfo
from dstack_emu.attest.attestation import Attestation, decode, from_quote_and_log
from dstack_emu.attest.errors import FormatError, VerificationError

_PREFIX: Final = "1.3.6.1.4.1.62397.1"
OID_TDX_QUOTE: Final = x509.ObjectIdentifier(f"{_PREFIX}.1")
OID_EVENT_LOG: Final = x509.ObjectIdentifier(f"{_PREFIX}.2")
OID_APP_ID: Final = x509.ObjectIdentifier(f"{_PREFIX}.3")
OID_USAGE: Final = x509.ObjectIdentifier(f"{_PREFIX}.4")
OID_ATTESTATION: Final = x509.ObjectIdentifier(f"{_PREFIX}.8")
OID_APP_INFO: Final = x509.ObjectIdentifier(f"{_PREFIX}.9")
_ENCODED_OIDS: Final[Mapping[x509.ObjectIdentifier, bytes]] = MappingProxyType(
    {
        oid: der.oid(oid.dotted_string)
        for oid in (OID_TDX_QUOTE, OID_EVENT_LOG, OID_APP_ID, OID_USAGE, OID_ATTESTATION, OID_APP_INFO)
    }
)
USAGE_KMS_RPC: Final = "kms:rpc"
USAGE_APP_CA: Final = "app:ca"
USAGE_APP_LEAF: Final = "app:custom"
MAX_EXTENSIONS: Final = 64
"""The maximum number of extensions of a certificate; one with evidence has up to ten."""
_EC_PUBLIC_KEY: Final = der.oid("1.2.840.10045.2.1")
_VERSION_TAG: Final = 0xA0
VALIDITY: Final = 3
_SPKI: Final = 5
_EXTENSIONS_TAG: Final = 0xA3
"""Places among serial number, signature algorithm, issuer, validity, subject and key; an optional version is first."""
EvidenceForm = Literal["versioned", "legacy", "legacy-gzip"]
"""The form of the evidence in a certificate."""
GZIP_MAGIC: Final = b"ELGZv1"
MAX_INFLATED_LOG: Final = 16 * 1024
"""The maximum size of a decompressed event log in bytes."""
UNREADABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""The exceptions that `cryptography` raises for invalid X.509, when it is loaded or when a field is used."""


def spki_der(key: ec.EllipticCurvePublicKey) -> bytes:
    """Serialise a public key as SubjectPublicKeyInfo DER (91 bytes for P-256)."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def load_spki(data: bytes) -> ec.EllipticCurvePublicKey:
    """Load a P-256 public key from SubjectPublicKeyInfo DER; raise `FormatError`."""
    try:
        key = load_der_public_key(data)
    except UNREADABLE as error:
        raise FormatError(f"SubjectPublicKeyInfo of a P-256 key expected, got {len(data)} bytes") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise FormatError("SubjectPublicKeyInfo of a P-256 key expected, got another key's")
    return key


def verification_key(data: bytes) -> ec.EllipticCurvePublicKey:
    """Load the P-256 key that a signing request is verified with, from the DER of a SubjectPublicKeyInfo.

    Raises `FormatError` with upstream's words for a structure or an algorithm that is none, and `VerificationError` for
    an elliptic curve key that P-256 signatures cannot be verified with: of another curve, or not as an uncompressed
    point. What follows the structure is not looked at, as upstream.
    """
    what = "Failed to parse pubkey"
    start, end = der.span(data, 0, what)
    algorithm, after_algorithm = der.span(data, start, what)
    if (data[0], data[start]) != (der.SEQUENCE, der.SEQUENCE):
        raise FormatError(f"{what}: SubjectPublicKeyInfo expected, got {len(data)} bytes")
    _, oid_end = der.span(data, algorithm, what)
    if data[algorithm:oid_end] != _EC_PUBLIC_KEY:
        raise FormatError("Unsupported algorithm")
    bits, _ = der.span(data, after_algorithm, what)
    if data[bits : bits + 2] != b"\0\x04":  # no unused bits, then an uncompressed point
        raise VerificationError("Invalid signature")
    try:
        return load_spki(data[:end])
    except FormatError as error:
        raise VerificationError("Invalid signature") from error


def pem(certificate: x509.Certificate) -> str:
    """Serialise a certificate as PEM."""
    return certificate.public_bytes(Encoding.PEM).decode()


def load_pem(text: str, what: str) -> x509.Certificate:
    """Load one certificate from PEM; raise `FormatError`, which names `what`."""
    try:
        return x509.load_pem_x509_certificate(text.encode())
    except UNREADABLE as error:
        raise FormatError(f"{what}: PEM certificate expected ({error})") from error


def load_der(data: bytes) -> x509.Certificate:
    """Load a certificate from DER; raise `FormatError` if it is invalid."""
    try:
        return x509.load_der_x509_certificate(data)
    except UNREADABLE as error:
        raise FormatError(f"Failed to parse certificate: {error}") from error


def certificate_spki(certificate: x509.Certificate) -> bytes:
    """Return the SubjectPublicKeyInfo (DER) in a certificate, byte for byte."""
    return spki_of_der(certificate.public_bytes(Encoding.DER))


def spki_of_der(data: bytes) -> bytes:
    """Return the SubjectPublicKeyInfo in a certificate in DER (RFC 5280, section 4.1); nothing else is parsed."""
    tbs, _ = der.span(data, 0, "certificate")
    start, _, end = tbs_field(data, tbs, _SPKI)
    return data[start:end]


def tbs_field(data: bytes, tbs: int, index: int) -> tuple[int, int, int]:
    """Return where a field begins, its content begins, and it ends; `tbs` is where the signed part begins."""
    at, _ = der.span(data, tbs, "certificate")
    for _ in range(index + (data[at] == _VERSION_TAG)):
        _, at = der.span(data, at, "certificate")
    return at, *der.span(data, at, "certificate")


def extension_payload(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> bytes | None:
    """Read the payload of one of dstack's extensions, or None where the certificate has it not.

    The values of other extensions are not parsed.
    """
    data, wanted = certificate.public_bytes(Encoding.DER), _ENCODED_OIDS[oid]
    if wanted not in data:  # as in most certificates for most of these extensions
        return None
    try:
        value = _raw_extensions(data).get(wanted)
    except FormatError as error:
        raise FormatError(f"Failed to parse certificate: {error}") from error
    if value is None:
        return None
    try:
        return der.read_octet_string(value, "extension")
    except FormatError as error:
        arcs = ", ".join(oid.dotted_string.split("."))
        raise FormatError(f"Failed to get extension for [{arcs}]: {error}") from error


def _raw_extensions(data: bytes) -> dict[bytes, bytes]:
    """Return the values of a certificate's extensions by OID (DER); raise `FormatError` if there are too many."""
    found: dict[bytes, bytes] = {}
    start, _ = der.span(data, 0, "certificate")
    _, end = der.span(data, start, "certificate")
    _, _, at = tbs_field(data, start, _SPKI)
    while at < end and data[at] != _EXTENSIONS_TAG:
        _, at = der.span(data, at, "certificate")
    if at >= end:
        return found
    outer, _ = der.span(data, at, "extensions")
    at, end = der.span(data, outer, "extensions")
    while at < end:
        if len(found) == MAX_EXTENSIONS:
            raise FormatError(f"at most {MAX_EXTENSIONS} extensions expected, got more")
        content, following = der.span(data, at, "extension")
        _, oid_end = der.span(data, content, "extension")
        value, value_end = der.span(data, oid_end, "extension")
        if data[oid_end] == der.BOOLEAN:  # whether it is critical
            value, value_end = der.span(data, value_end, "extension")
        oid = data[content:oid_end]
        if oid in found:
            raise FormatError(f"each extension once expected, got {oid.hex()} again")
        found[oid] = data[value:value_end]
        at = following
    return found


def attestation_of(certificate: x509.Certificate) -> Attestation | None:
    """Read the evidence inside a certificate: the versioned attestation, else the legacy pair of quote and event log.

    Nothing is verified: verify the evidence, and that it binds the certificate's key, before you rely on it.
    """
    if (data := extension_payload(certificate, OID_ATTESTATION)) is not None:
        try:
            return decode(data)
        except FormatError as error:
            raise FormatError(f"Failed to decode attestation from cert extension: {error}") from error
    quote = extension_payload(certificate, OID_TDX_QUOTE)
    if quote is None:
        return None
    event_log = extension_payload(certificate, OID_EVENT_LOG)
    if event_log is None:
        raise FormatError("TDX event log missing")
    try:
        return from_quote_and_log(quote, inflate_log(event_log))
    except FormatError as error:
        raise FormatError(f"Failed to create attestation from TDX quote: {error}") from error


def inflate_log(data: bytes) -> bytes:
    """Decompress a legacy event log that is gzip after the magic word; return any other one unchanged."""
    if not data.startswith(GZIP_MAGIC):
        return data
    inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        log = inflater.decompress(data[len(GZIP_MAGIC) :], MAX_INFLATED_LOG + 1)
    except zlib.error as error:
        raise FormatError(f"failed to decompress event log: {error}") from error
    if len(log) > MAX_INFLATED_LOG:
        raise FormatError(f"event log extension too large (>{MAX_INFLATED_LOG} bytes)")
    if not inflater.eof:
        raise FormatError("failed to decompress event log: it is cut short")
    return log


def usage_of(certificate: x509.Certificate) -> str | None:
    """Read the special usage of a certificate (`kms:rpc`, `app:ca`, `app:custom`); raise `FormatError`."""
    payload = extension_payload(certificate, OID_USAGE)
    try:
        return None if payload is None else payload.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"Failed to decode special usage as utf8: {error}") from error


def app_id_of(certificate: x509.Certificate) -> bytes | None:
    """Read the app id of a certificate; raise `FormatError`."""
    return extension_payload(certificate, OID_APP_ID)


def app_info_of(certificate: x509.Certificate) -> AppInfo | None:
    """Read the app info of a certificate; raise `FormatError`. It is what the issuer says, and no evidence."""
    payload = extension_payload(certificate, OID_APP_INFO)
    try:
        return None if payload is None else AppInfo.decode(payload)
    except FormatError as error:  # it is msgpack; "json" is upstream's word
        raise FormatError(f"Failed to decode app info as json: {error}") from error
