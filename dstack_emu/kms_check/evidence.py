"""Clients of a KMS, honest and forged: certificates and signing requests with evidence of a trust domain.

The evidence is changed only as an attacker could change it: only the platforms that quote use a vendor key.
"""

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from dstack_emu.attest import der, scale
from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.certificate import OID_ATTESTATION, OID_EVENT_LOG, OID_TDX_QUOTE, pem, spki_der
from dstack_emu.attest.csr import CONFIRM, CertificateConfig, SigningRequest
from dstack_emu.attest.eventlog import RuntimeEvent, TdxEvent, log_to_json
from dstack_emu.attest.issuing import CertificateAuthority, CertificateRequest, self_signed
from dstack_emu.attest.kdf import p256_from_uniform, pkcs8_pem
from dstack_emu.attest.report_data import ratls_report_data
from dstack_emu.simulator.trust_domain import TrustDomain
from dstack_emu.transport.ratls import CLIENT_SUBJECT
from dstack_emu.transport.tls import Identity

NAME: Final = "check-kms.example.test"
DAY: Final = 86_400
Key = ec.EllipticCurvePrivateKey

QUOTE_FIELDS: Final[Mapping[str, int]] = {
    "header": 28,
    "tee-tcb-svn": 48,
    "mr-seam": 64,
    "td-attributes": 168,
    "mrtd": 184,
    "mr-config-id": 232,
    "rtmr0": 376,
    "rtmr3": 520,
    "report-data": 568,
    "signature": 636,
    "attestation-key": 700,
    "qe-report": 770,
    "qe-report-signature": 1154,
    "qe-authentication-data": 1220,
}
"""Fields of a version 4 quote, each with the offset of one of its bytes."""


def new_key() -> Key:
    """Make a P-256 key."""
    return p256_from_uniform(os.urandom(48))


def bound(domain: TrustDomain, key: Key) -> Attestation:
    """Return a domain's evidence for a TLS key."""
    return domain.attest(ratls_report_data(spki_der(key.public_key())))


@dataclass(frozen=True, slots=True)
class Issuer:
    """Makes client certificates under a CA; `now` are Unix seconds."""

    authority: CertificateAuthority
    now: int

    def honest(self, domain: TrustDomain) -> Identity:
        """Make a new key, and a certificate with a domain's evidence for it."""
        key = new_key()
        return self.with_evidence(key, bound(domain, key))

    def with_evidence(self, key: Key, attestation: Attestation | None, **options: Any) -> Identity:
        """Make a certificate with any evidence, or with none."""
        request = CertificateRequest(
            public_key=key.public_key(),
            subject=CLIENT_SUBJECT,
            attestation=attestation,
            keeps_log_digests=True,
            **options,
        )
        return Identity(pem(self.authority.issue(request, self.now)), pkcs8_pem(key))

    def self_issued(self, domain: TrustDomain) -> Identity:
        """Make a certificate that its own key has signed."""
        key = new_key()
        request = CertificateRequest(
            public_key=key.public_key(), subject=CLIENT_SUBJECT, client_auth=True, attestation=bound(domain, key)
        )
        return Identity(self_signed(request, key, self.now).pem, pkcs8_pem(key))

    def legacy(self, domain: TrustDomain, log: str | None = None) -> Identity:
        """Make a certificate with the two extensions of old releases, quote and event log, which have no VM config."""
        key = new_key()
        evidence = bound(domain, key)
        text = log_to_json(evidence.event_log) if log is None else log
        return self.with_extensions(key, {OID_TDX_QUOTE: evidence.quote, OID_EVENT_LOG: text.encode()})

    def with_bytes(self, data: bytes) -> Identity:
        """Make a certificate in whose extension for evidence there are any bytes."""
        return self.with_extensions(new_key(), {OID_ATTESTATION: data})

    def with_extensions(self, key: Key, values: Mapping[x509.ObjectIdentifier, bytes]) -> Identity:
        """Make a certificate with any of dstack's extensions."""
        moment = datetime.datetime.fromtimestamp(self.now, datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, CLIENT_SUBJECT)]))
            .issuer_name(self.authority.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(moment - datetime.timedelta(days=1))
            .not_valid_after(moment + datetime.timedelta(days=1))
        )
        for oid, value in values.items():
            builder = builder.add_extension(x509.UnrecognizedExtension(oid, der.octet_string(value)), critical=False)
        return Identity(pem(builder.sign(self.authority.key, hashes.SHA256())), pkcs8_pem(key))


def stranger(name: str, now: int) -> CertificateAuthority:
    """Make a CA of that name, which no KMS knows."""
    key = new_key()
    return self_signed(CertificateRequest(public_key=key.public_key(), subject=name, ca_path_length=0), key, now)


# ---- evidence that is changed


def one_bit(attestation: Attestation, offset: int) -> Attestation:
    """Return evidence with one bit of its quote changed."""
    quote = bytearray(attestation.quote)
    quote[offset] ^= 1
    return replace(attestation, quote=bytes(quote))


def with_events(attestation: Attestation, events: tuple[RuntimeEvent, ...]) -> Attestation:
    """Return evidence that shows other runtime events, in both of its logs."""
    log = (*(event for event in attestation.event_log if not event.is_runtime), *map(TdxEvent.of, events))
    return replace(attestation, event_log=log, runtime_events=events)


def with_payload(attestation: Attestation, name: str, payload: bytes) -> Attestation:
    """Return evidence in which the event of that name has another payload."""
    events = (replace(e, payload=payload) if e.event == name else e for e in attestation.runtime_events)
    return with_events(attestation, tuple(events))


def without_event(attestation: Attestation, name: str) -> Attestation:
    """Return evidence without the event of that name."""
    return with_events(attestation, tuple(e for e in attestation.runtime_events if e.event != name))


def renamed(attestation: Attestation, *names: str) -> Attestation:
    """Return evidence whose first events of these names are shown under another name with the same digest.

    The payload of each must begin with a colon: the digest of a version 1 event covers `type:name:payload`.
    """
    events = list(attestation.runtime_events)
    for name in names:
        index = next(index for index, event in enumerate(events) if event.event == name)
        events[index] = RuntimeEvent(f"{name}:", events[index].payload.removeprefix(b":"))
    return with_events(attestation, tuple(events))


# ---- signing requests


def signing_request(key: Key, attestation: Attestation, *, signer: Key | None = None, **config: Any) -> dict[str, Any]:
    """Return SignCert's arguments, version 2, for a server certificate; `signer` signs if it is not the key itself."""
    wanted = CertificateConfig(subject=NAME, alt_names=(NAME,), server_auth=True, **config)
    request = SigningRequest.make(spki_der(key.public_key()), wanted, attestation)
    return {"api_version": 2, "csr": request.encoded.hex(), "signature": request.sign(signer or key).hex()}


def signing_request_v1(
    key: Key, attestation: Attestation, *, word: str = CONFIRM, log: bytes | None = None
) -> dict[str, Any]:
    """Return SignCert's arguments, version 1: a bare quote and its event log."""
    text = log_to_json(attestation.event_log).encode() if log is None else log
    csr = b"".join(
        (
            scale.text(word),
            scale.vec(spki_der(key.public_key())),
            scale.option(None),
            scale.text(NAME),
            scale.compact(1),
            scale.text(NAME),
            bytes((True, False, True)),
            scale.vec(attestation.quote),
            scale.vec(text),
        )
    )
    signature = key.sign(csr, ec.ECDSA(hashes.SHA256()))
    return {"api_version": 1, "csr": csr.hex(), "signature": signature.hex()}
