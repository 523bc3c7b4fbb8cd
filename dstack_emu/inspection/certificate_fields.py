"""The contents of certificates and revocation lists, field by field. Nothing is verified here."""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from dstack_emu.attest import certificate as certificates
from dstack_emu.attest.certificate import UNREADABLE
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.pck import OID_SGX_EXTENSION, SGX_TYPES, device_id, pck_extension_of
from dstack_emu.inspection.description import UNKNOWN_NAME, UNREAD, Description, Named, attempt
from dstack_emu.inspection.log_fields import describe_app_info
from dstack_emu.simulator.intel import EMULATED

_OWN_EXTENSIONS: Final = {
    certificates.OID_TDX_QUOTE: "TDX quote (legacy)",
    certificates.OID_EVENT_LOG: "event log (legacy)",
    certificates.OID_APP_ID: "app id",
    certificates.OID_USAGE: "special usage",
    certificates.OID_ATTESTATION: "versioned attestation",
    certificates.OID_APP_INFO: "app info",
    OID_SGX_EXTENSION: "SGX extension",
}
_KEY_USAGES: Final = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
)
_PURPOSES: Final = {ExtendedKeyUsageOID.SERVER_AUTH: "server auth", ExtendedKeyUsageOID.CLIENT_AUTH: "client auth"}


def describe_sgx_extension(certificate: x509.Certificate) -> Description:
    """Describe the platform that the SGX extension of a PCK certificate names."""
    try:
        pck = pck_extension_of(certificate)
    except FormatError as error:
        return {"sgx_extension": f"{UNREAD}{error}"}
    return {
        "ppid": pck.ppid,
        "device_id": device_id(pck.ppid),
        "fmspc": pck.fmspc,
        "cpu_svn": pck.cpu_svn,
        "component_svns": list(pck.component_svns or pck.cpu_svn),
        "pce_svn": pck.pce_svn,
        "pce_id": pck.pce_id,
        "sgx_type": Named(pck.sgx_type, SGX_TYPES[pck.sgx_type] if pck.sgx_type < len(SGX_TYPES) else UNKNOWN_NAME),
        "platform_instance_id": pck.platform_instance_id,
        "dynamic_platform": pck.dynamic_platform,
        "cached_keys": pck.cached_keys,
        "smt_enabled": pck.smt_enabled,
    }


def describe_certificate(certificate: x509.Certificate) -> Description:
    """Describe a certificate without the evidence in it."""
    out: Description = {
        "kind": attempt(lambda: _kind(certificate)),
        "subject": name_of(certificate, "subject"),
        "issuer": name_of(certificate, "issuer"),
        **({"emulated": True} if is_emulated(certificate) else {}),
        "serial_number": f"{certificate.serial_number:x}",
        "not_before": attempt(lambda: certificate.not_valid_before_utc),
        "not_after": attempt(lambda: certificate.not_valid_after_utc),
        "public_key": attempt(lambda: _key_name(certificate)),
        "spki": attempt(lambda: certificates.certificate_spki(certificate)),
        "sha256": certificate.fingerprint(hashes.SHA256()),
    }
    try:
        return out | _describe_extensions(certificate)
    except UNREADABLE as error:
        return out | {"extensions": f"{UNREAD}{error}"}


def _kind(certificate: x509.Certificate) -> str:
    oids = {extension.oid for extension in certificate.extensions}
    if certificates.OID_ATTESTATION in oids:
        return "RA-TLS certificate (versioned attestation)"
    if certificates.OID_TDX_QUOTE in oids:
        return "RA-TLS certificate (legacy: quote and event log)"
    return "PCK certificate" if OID_SGX_EXTENSION in oids else "X.509 certificate"


def _describe_extensions(certificate: x509.Certificate) -> Description:
    """Describe the standard extensions and dstack's small ones by their content, and all in a table."""
    out: Description = {}
    table = []
    for extension in certificate.extensions:
        value = extension.value
        match value:
            case x509.BasicConstraints():
                out |= {"ca": value.ca, "path_length": value.path_length}
            case x509.KeyUsage():
                out["key_usage"] = [name for name in _KEY_USAGES if getattr(value, name)]
            case x509.ExtendedKeyUsage():
                out["extended_key_usage"] = [_PURPOSES.get(oid, oid.dotted_string) for oid in value]
            case x509.SubjectAlternativeName():
                out["alternative_names"] = [str(name.value) for name in value]
            case x509.UnrecognizedExtension() if value.oid == OID_SGX_EXTENSION:
                out |= describe_sgx_extension(certificate)
            case x509.UnrecognizedExtension() if value.oid in _OWN:
                key, read = _OWN[value.oid]
                out[key] = attempt(partial(read, certificate))
        name = _OWN_EXTENSIONS.get(extension.oid, UNKNOWN_NAME)
        table.append(
            {
                "oid": extension.oid.dotted_string,
                "name": name if isinstance(value, x509.UnrecognizedExtension) else type(value).__name__,
                "critical": extension.critical,
                "bytes": len(value.value) if isinstance(value, x509.UnrecognizedExtension) else None,
            }
        )
    return out | {"extensions": table}


def _app_info(certificate: x509.Certificate) -> Description | None:
    info = certificates.app_info_of(certificate)
    return None if info is None else describe_app_info(info)


_OWN: Final[dict[x509.ObjectIdentifier, tuple[str, Callable[[x509.Certificate], Any]]]] = {
    certificates.OID_USAGE: ("usage", certificates.usage_of),
    certificates.OID_APP_ID: ("app_id", certificates.app_id_of),
    certificates.OID_APP_INFO: ("app_info", _app_info),
}


def describe_briefly(certificate: x509.Certificate) -> Description:
    """Describe a certificate by its names, its end and its hash."""
    return {
        "subject": name_of(certificate, "subject"),
        "issuer": name_of(certificate, "issuer"),
        "not_after": attempt(lambda: certificate.not_valid_after_utc),
        "sha256": certificate.fingerprint(hashes.SHA256()),
    }


def describe_crl(crl: x509.CertificateRevocationList) -> Description:
    """Describe a revocation list."""
    return {
        "issuer": name_of(crl, "issuer"),
        "emulated": is_emulated(crl),
        "last_update": attempt(lambda: crl.last_update_utc),
        "next_update": attempt(lambda: crl.next_update_utc),
        "number": attempt(lambda: crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number),
        "sha256": hashlib.sha256(crl.public_bytes(Encoding.DER)).digest(),
        "revoked": attempt(
            lambda: [{"serial_number": f"{one.serial_number:x}", "date": one.revocation_date_utc} for one in crl]
        ),
    }


def name_of(document: x509.Certificate | x509.CertificateRevocationList, which: str) -> str:
    """Return the `subject` or `issuer` of a document, as RFC 4514 writes it."""
    text: str = attempt(lambda: getattr(document, which).rfc4514_string())
    return text


def is_emulated(document: x509.Certificate | x509.CertificateRevocationList) -> bool:
    """Return whether the issuer's name is this emulator's; no signature is checked."""
    return EMULATED in name_of(document, "issuer")


def is_signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Return whether the key of another certificate signed this one."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (*UNREADABLE, InvalidSignature):
        return False
    return True


def _key_name(certificate: x509.Certificate) -> str:
    key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"EC {key.curve.name}"
    return f"RSA {key.key_size}" if isinstance(key, rsa.RSAPublicKey) else type(key).__name__
