"""Issuing dstack's X.509 certificates, as the KMS and agents do.

Names, serial numbers, validity, key usage and the order of extensions follow what upstream's `ra-tls/src/cert.rs`
(312dc605, over rcgen) writes. `certificate` has the extensions, and reads them. The simulator makes certificates of
Intel's hierarchy.
"""

import datetime
import hashlib
import ipaddress
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from dstack_emu.attest import der
from dstack_emu.attest.app_info import AppInfo
from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.certificate import (
    GZIP_MAGIC,
    OID_APP_ID,
    OID_APP_INFO,
    OID_ATTESTATION,
    OID_EVENT_LOG,
    OID_TDX_QUOTE,
    OID_USAGE,
    VALIDITY,
    EvidenceForm,
    certificate_spki,
    load_der,
    load_pem,
    pem,
    spki_der,
    tbs_field,
)
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eventlog import log_to_json

ORGANIZATION: Final = "Dstack"
NOT_BEFORE: Final = datetime.datetime(1975, 1, 1, tzinfo=datetime.UTC)
LIFETIME: Final = 10 * 365 * 86400
"""Seconds from the time of issue to not_after, unless another time is requested."""
_DIGITAL_SIGNATURE: Final = 0x80
_KEY_CERT_SIGN: Final = 0x04
_CRL_SIGN: Final = 0x02
"""Bits of the first byte of a key usage (RFC 5280, section 4.2.1.3)."""


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


def load_authority(certificate_pem: str, key: ec.EllipticCurvePrivateKey, what: str) -> CertificateAuthority:
    """Make a CA from its parts; raise `FormatError` if the certificate is for another key."""
    certificate = load_pem(certificate_pem, what)
    if certificate_spki(certificate) != spki_der(key.public_key()):
        raise FormatError("CA certificate does not match private key")
    return CertificateAuthority(certificate, key)


def _deflate_log(log: bytes) -> bytes:
    packer = zlib.compressobj(
        level=9, wbits=zlib.MAX_WBITS | 16
    )  # gzip without a time, so that equal logs have equal bytes
    return GZIP_MAGIC + packer.compress(log) + packer.flush()


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
    _, validity, end = tbs_field(tbs, 0, VALIDITY)
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
