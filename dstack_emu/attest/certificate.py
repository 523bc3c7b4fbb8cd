"""dstack's X.509 certificates: what the KMS and agents issue, and the RA-TLS extensions inside.

Each extension's value is the payload in a DER OCTET STRING, not critical. Names, serial numbers, validity, key usage
and the order of extensions follow what upstream's `ra-tls/src/cert.rs` (312dc605, over rcgen) writes. The
simulator makes certificates of Intel's hierarchy. Parsing a certificate does not verify its signature.
"""

import datetime
import hashlib
import ipaddress
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from dstack_emu.attest import der
from dstack_emu.attest.app_info import AppInfo
from dstack_emu.attest.attestation import Attestation, decode, from_quote_and_log
from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.eventlog import log_to_json

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

ORGANIZATION: Final = "Dstack"
NOT_BEFORE: Final = datetime.datetime(1975, 1, 1, tzinfo=datetime.UTC)
LIFETIME: Final = 10 * 365 * 86400
"""Seconds from the time of issue to not_after, unless another time is requested."""

MAX_EXTENSIONS: Final = 64
"""The maximum number of extensions of a certificate; one with evidence has up to ten."""

_DIGITAL_SIGNATURE: Final = 0x80
_KEY_CERT_SIGN: Final = 0x04
_CRL_SIGN: Final = 0x02
"""Bits of the first byte of a key usage (RFC 5280, section 4.2.1.3)."""

_EC_PUBLIC_KEY: Final = der.oid("1.2.840.10045.2.1")
_VERSION_TAG: Final = 0xA0
_VALIDITY: Final = 3
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateRequest:
    """The contents of a certificate to issue. Times are Unix seconds; `not_after` is ten years from now by default."""

    public_key: ec.EllipticCurvePublicKey
    subject: str
    organization: str | None = None
    alt_names: Sequence[str] = ()
    ca_path_length: int | None = None
    server_auth: bool = False
    client_auth: bool = False
    app_id: bytes | None = None
    app_info: AppInfo | None = None
    usage: str | None = None
    attestation: Attestation | None = None
    evidence_form: EvidenceForm = "versioned"
    keeps_log_digests: bool = False
    not_before: int | None = None
    not_after: int | None = None


@dataclass(frozen=True, slots=True)
class CertificateAuthority:
    """A CA certificate and its P-256 key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> str:
        """Return the CA certificate in PEM."""
        return pem(self.certificate)

    def issue(self, request: CertificateRequest, now: int) -> x509.Certificate:
        """Sign a certificate. The same request, key and time give the same bytes (RFC 6979)."""
        return _sign(request, self.certificate.subject, self.key, now)


def self_signed(request: CertificateRequest, key: ec.EllipticCurvePrivateKey, now: int) -> CertificateAuthority:
    """Make a CA: sign the request with its own key."""
    return CertificateAuthority(_sign(request, _name(request), key, now), key)


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


def load_authority(certificate_pem: str, key: ec.EllipticCurvePrivateKey, what: str) -> CertificateAuthority:
    """Make a CA from its parts; raise `FormatError` if the certificate is for another key."""
    certificate = load_pem(certificate_pem, what)
    if certificate_spki(certificate) != spki_der(key.public_key()):
        raise FormatError("CA certificate does not match private key")
    return CertificateAuthority(certificate, key)


def certificate_spki(certificate: x509.Certificate) -> bytes:
    """Return the SubjectPublicKeyInfo (DER) in a certificate, byte for byte."""
    return spki_of_der(certificate.public_bytes(Encoding.DER))


def spki_of_der(data: bytes) -> bytes:
    """Return the SubjectPublicKeyInfo in a certificate in DER (RFC 5280, section 4.1); nothing else is parsed."""
    tbs, _ = der.span(data, 0, "certificate")
    start, _, end = _field(data, tbs, _SPKI)
    return data[start:end]


def _field(data: bytes, tbs: int, index: int) -> tuple[int, int, int]:
    """Return where a field begins, its content begins, and it ends; `tbs` is where the part that is signed begins."""
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
    _, _, at = _field(data, start, _SPKI)
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


def _deflate_log(log: bytes) -> bytes:
    packer = zlib.compressobj(
        level=9, wbits=zlib.MAX_WBITS | 16
    )  # gzip without a time, so that equal logs have equal bytes
    return GZIP_MAGIC + packer.compress(log) + packer.flush()


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


def _name(request: CertificateRequest) -> x509.Name:
    attributes = [_attribute(x509.NameOID.COMMON_NAME, request.subject)]
    if request.organization is not None:
        attributes.insert(0, _attribute(x509.NameOID.ORGANIZATION_NAME, request.organization))
    return x509.Name(attributes)


def _attribute(oid: x509.ObjectIdentifier, text: str) -> x509.NameAttribute[str]:
    """Make an attribute from any text, as upstream does, also if it is empty or has more than X.520's 64 characters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # cryptography warns about the length
        return x509.NameAttribute(oid, text, _validate=False)


def _serial(key: ec.EllipticCurvePublicKey) -> int:
    """Return the first 20 bytes of the SHA-256 of the uncompressed point, top bit cleared."""
    point = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return int.from_bytes(hashlib.sha256(point).digest()[:20], "big") & ~(1 << 159)


def _moment(seconds: int, what: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (OverflowError, ValueError, OSError) as error:
        raise FormatError(
            f"{what}: a time that X.509 can hold expected (before the year 10000), got {seconds}"
        ) from error


def _sign(
    request: CertificateRequest, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: int
) -> x509.Certificate:
    try:
        not_before = NOT_BEFORE if request.not_before is None else _moment(request.not_before, "not_before")
        not_after = _moment(now + LIFETIME if request.not_after is None else request.not_after, "not_after")
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(request))
            .issuer_name(issuer)
            .public_key(request.public_key)
            .serial_number(_serial(request.public_key))
            .not_valid_before(min(not_before, not_after))
            .not_valid_after(max(not_before, not_after))
        )
        for extension, critical in _extensions(request):
            builder = builder.add_extension(extension, critical)
        certificate = builder.sign(key, hashes.SHA256(), ecdsa_deterministic=True)
    except (FormatError, ValueError) as error:
        raise FormatError(f"Failed to sign certificate: {error}") from error
    return certificate if not_before <= not_after else _with_dates_swapped(certificate, key)


def _with_dates_swapped(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """Sign a certificate again that ends before it begins: rcgen issues such a one, and `cryptography` does not."""
    whole, tbs = certificate.public_bytes(Encoding.DER), certificate.tbs_certificate_bytes
    _, validity, end = _field(tbs, 0, _VALIDITY)
    first_end = der.span(tbs, validity, "validity")[1]
    tbs = tbs[:validity] + tbs[first_end:end] + tbs[validity:first_end] + tbs[end:]
    start, _ = der.span(whole, 0, "certificate")
    algorithm_at = start + len(tbs)
    algorithm = whole[algorithm_at : der.span(whole, algorithm_at, "certificate")[1]]
    signature = key.sign(tbs, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    return load_der(der.sequence(tbs, algorithm, der.tlv(der.BIT_STRING, b"\0" + signature)))


def _extensions(request: CertificateRequest) -> list[tuple[x509.ExtensionType, bool]]:
    """Return the extensions in upstream's order, each with its criticality; none if the leaf requests nothing."""
    is_ca = request.ca_path_length is not None
    out: list[tuple[x509.ExtensionType, bool]] = []
    if request.alt_names:
        out.append((x509.SubjectAlternativeName([_alt_name(name) for name in request.alt_names]), False))
    purposes = [
        oid
        for oid, wanted in (
            (ExtendedKeyUsageOID.SERVER_AUTH, request.server_auth),
            (ExtendedKeyUsageOID.CLIENT_AUTH, request.client_auth),
        )
        if wanted
    ]
    own = _own_extensions(request)
    if not (out or purposes or own or is_ca):
        return []
    out.append((_key_usage(is_ca), True))
    if purposes:
        out.append((x509.ExtendedKeyUsage(purposes), False))
    if is_ca:
        out.append((x509.SubjectKeyIdentifier(_key_identifier(request.public_key)), False))
        out.append((x509.BasicConstraints(ca=True, path_length=request.ca_path_length), True))
    return out + [(extension, False) for extension in own]


def _own_extensions(request: CertificateRequest) -> list[x509.ExtensionType]:
    payloads = (
        (OID_APP_ID, request.app_id),
        (OID_APP_INFO, None if request.app_info is None else request.app_info.encode()),
        (OID_USAGE, None if request.usage is None else request.usage.encode()),
        *_evidence(request),
    )
    return [x509.UnrecognizedExtension(oid, der.octet_string(p)) for oid, p in payloads if p is not None]


def _evidence(request: CertificateRequest) -> tuple[tuple[x509.ObjectIdentifier, bytes], ...]:
    attestation, form = request.attestation, request.evidence_form
    if attestation is None:
        return ()
    if form == "versioned":
        stripped = attestation.stripped(keep_digests=request.keeps_log_digests)
        return ((OID_ATTESTATION, stripped.encode()),)
    log = log_to_json(attestation.event_log).encode()
    return ((OID_TDX_QUOTE, attestation.quote), (OID_EVENT_LOG, log if form == "legacy" else _deflate_log(log)))


def _key_usage(is_ca: bool) -> x509.UnrecognizedExtension:
    """Return the key usage as rcgen encodes it: a BIT STRING of 16 bits, of which the last nine are not counted.

    DER would leave the empty second byte out, so `x509.KeyUsage` cannot write it.
    """
    bits = _DIGITAL_SIGNATURE | (_KEY_CERT_SIGN | _CRL_SIGN if is_ca else 0)
    return x509.UnrecognizedExtension(ExtensionOID.KEY_USAGE, b"\x03\x03\x07" + bytes((bits, 0)))


def _key_identifier(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return rcgen's default: the first 20 bytes of the SHA-256 of the SubjectPublicKeyInfo."""
    return hashlib.sha256(spki_der(key)).digest()[:20]


def _alt_name(name: str) -> x509.GeneralName:
    """Encode an IP literal as an IP address, anything else unchanged as a DNS name."""
    if "%" not in name:  # an address with a zone is a name for Rust
        try:
            return x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise FormatError(f"Invalid IA5String: ASCII text expected, got {name!r:.80}") from error
