"""Valid evidence, certificates and documents of every form that `attest` reads, as samples to change.

All are of one seed; recorded files of real hardware join them where they are at hand.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import dcap_qvl
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from dstack_emu.attest import certificate, collateral, der, eventlog, issuing, scale
from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.csr import CertificateConfig, SigningRequest
from dstack_emu.attest.eventlog import RuntimeEvent, TdxEvent
from dstack_emu.attest.pcs import Document
from dstack_emu.attest.quote import TD10_FIELDS, TdReport15
from dstack_emu.attest.report_data import APP_DATA, ratls_report_data, report_data
from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import Seed
from dstack_emu.simulator.trust_domain import AppCompose, KeyProvider, TrustDomain
from tests.recorded import EXTERNAL

NOW: Final = 1_795_264_581


@dataclass(frozen=True)
class World:
    """One emulated vendor, a booted trust domain, and a key that its evidence binds."""

    intel: Intel
    domain: TrustDomain
    key: ec.EllipticCurvePrivateKey
    evidence: Attestation
    collateral: dcap_qvl.QuoteCollateralV3
    documents: tuple[Document, ...]

    @property
    def spki(self) -> bytes:
        return certificate.spki_der(self.key.public_key())

    @property
    def anchor(self) -> TrustAnchor:
        return TrustAnchor.of(self.intel.root)


@functools.cache
def world() -> World:
    seed = Seed.of("properties")
    intel = Intel(seed)
    domain = TrustDomain(
        intel.platform("one"), OsImage.from_seed(seed.derive), AppCompose.named("app"), instance_seed=bytes(32)
    )
    domain.boot()
    domain.complete(KeyProvider("kms", "00"))
    key = seed.p256("tls")
    evidence = domain.attest(ratls_report_data(certificate.spki_der(key.public_key())))
    documents = (
        intel.pck_crl,
        intel.tcb_info(domain.platform.fmspc),
        intel.qe_identity,
        Document(intel.root_ca_crl.hex().encode()),
    )
    return World(intel, domain, key, evidence, collateral.assemble(*documents), documents)


def with_events_of_version_2(evidence: Attestation) -> Attestation:
    """The same evidence, its runtime events told in version 2 with their preimages."""
    events = tuple(RuntimeEvent(e.event, e.payload, 2) for e in evidence.runtime_events)
    lines = tuple(replace(TdxEvent.of(event), preimage=event.preimage().hex()) for event in events)
    log = tuple(line for line in evidence.event_log if not line.is_runtime) + lines
    return replace(evidence, event_log=log, runtime_events=events, wire=1)


def pod(evidence: Attestation) -> Attestation:
    """The same evidence with a pod's payload."""
    text = "a pod's claim"
    return replace(evidence, report_data_payload=text, report_data=report_data(APP_DATA, text.encode()), wire=1)


def recorded(pattern: str) -> Iterator[bytes]:
    """Recorded files as further samples, where they are at hand."""
    return (path.read_bytes() for path in sorted(EXTERNAL.glob(pattern)))


def quotes() -> list[bytes]:
    w = world()
    report = w.domain.report(bytes(64))
    later = TdReport15(**{name: getattr(report, name) for name, _ in TD10_FIELDS})
    platform = w.domain.platform
    return [w.evidence.quote, platform.quote(report, 5), platform.quote(later, 5), *recorded("intel-tdx-quote.bin")]


def attestations() -> list[bytes]:
    evidence = world().evidence
    forms = (evidence, evidence.stripped(), evidence.as_v1(), with_events_of_version_2(evidence), pod(evidence))
    return [*(form.encode() for form in forms), *recorded("hardware-attestation-v0.scale")]


def signing_request(evidence: Attestation | None = None) -> SigningRequest:
    w = world()
    config = CertificateConfig(
        subject="one.example",
        organization="One",
        alt_names=("one.example", "127.0.0.1"),
        server_auth=True,
        with_attestation=True,
        with_app_info=True,
        not_before=0,
        not_after=NOW,
    )
    return SigningRequest.make(w.spki, config, evidence or w.evidence)


def signing_requests_v1() -> list[bytes]:
    w = world()
    head = SigningRequest.make(w.spki, CertificateConfig(subject="one.example"), w.evidence).encoded
    # Version 1 ends its settings one flag and two options earlier, and then has quote and log as two vectors.
    start = head[: -len(w.evidence.encode()) - 3]
    log = eventlog.log_to_json(w.evidence.event_log).encode()
    return [start + scale.vec(w.evidence.quote) + scale.vec(log)]


def certificate_request(evidence: Attestation) -> issuing.CertificateRequest:
    return signing_request(evidence).certificate_request(usage=certificate.USAGE_APP_LEAF, app_id=bytes(20))


@functools.cache
def authority() -> issuing.CertificateAuthority:
    key = world().intel.seed.p256("ca")
    request = issuing.CertificateRequest(public_key=key.public_key(), subject="CA", ca_path_length=0)
    return issuing.self_signed(request, key, NOW)


def issued() -> x509.Certificate:
    return authority().issue(certificate_request(world().evidence.stripped()), NOW)


def certificates() -> list[bytes]:
    w = world()
    chain = (issued(), authority().certificate, w.domain.platform.pck_certificate, w.intel.root, legacy_certificate())
    return [one.public_bytes(Encoding.DER) for one in chain]


def legacy_certificate() -> x509.Certificate:
    evidence = world().evidence
    log = eventlog.log_to_json(evidence.event_log).encode()
    return with_extensions(
        {
            certificate.OID_TDX_QUOTE: der.octet_string(evidence.quote),
            certificate.OID_EVENT_LOG: der.octet_string(log),
        }
    )


def with_extensions(values: dict[x509.ObjectIdentifier, bytes]) -> x509.Certificate:
    """A certificate that carries the given raw extension values."""
    key = world().key
    builder = (
        x509.CertificateBuilder()
        .subject_name(authority().certificate.subject)
        .issuer_name(authority().certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(issuing.NOT_BEFORE)
        .not_valid_after(issuing.NOT_BEFORE)
    )
    for oid, value in values.items():
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, value), critical=False)
    return builder.sign(key, hashes.SHA256(), ecdsa_deterministic=True)
