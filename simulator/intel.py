"""The emulated Intel: root CA, PCK CA, TCB signer, CRLs, QE identity, and platforms that sign quotes.

What a verifier checks is real (chains, signatures, CRLs, TCB matching); only the root of trust is made up, and every
name says so. All of it grows from the seed, with fixed dates, so it is byte-identical in every process. Source of the
formats: Intel PCK Certificate and CRL Profile 1.5; Intel PCS API v4; `dcap-qvl` src/verify.rs at 0.7.0 for what is
looked at.
"""

import datetime
import json
from dataclasses import dataclass
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from attest.collateral import Document
from attest.errors import FormatError
from attest.pck import OID_SGX_EXTENSION, PckExtension, device_id
from attest.quote import QuoteHeader, QuoteSignature, TdReport, qe_report_data
from simulator.seed import Seed

EMULATED: Final = "dstack-emu EMULATED (protects nothing)"
VALID_FROM: Final = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
VALID_UNTIL: Final = datetime.datetime(2099, 12, 31, tzinfo=datetime.UTC)

TCB_STATUSES: Final = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "Revoked",
)

TDX_MODULE_VERSION, TDX_MODULE_SVN = 1, 11
TEE_TCB_SVN: Final = bytes((TDX_MODULE_SVN, TDX_MODULE_VERSION, 4)).ljust(16, b"\0")
CPU_SVN: Final = bytes((3, 3, 2, 2, 4, 1, 0, 5)).ljust(16, b"\0")
PCE_SVN: Final = 13
PCE_ID: Final = bytes(2)
QE_SVN, QE_PRODUCT, QE_ISV_SVN = 0, 2, 4
QE_ATTRIBUTES: Final = bytes.fromhex("1500000000000000e700000000000000")
QE_AUTH_DATA: Final = bytes(range(32))
TCB_EVALUATION: Final = 17


@dataclass(frozen=True, slots=True)
class PlatformState:
    """What Intel says about a platform's TCB: a status of `TCB_STATUSES` and the advisories that go with it."""

    tcb_status: str = "UpToDate"
    advisory_ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tcb_status not in TCB_STATUSES:
            raise FormatError(f"TCB status: one of {', '.join(TCB_STATUSES)} expected, got {self.tcb_status!r}")


class Intel:
    """The made-up vendor: one root, one PCK CA, one TCB signer, and the platforms they certify."""

    def __init__(self, seed: Seed) -> None:
        self._seed = seed.child("intel")
        self._root_key = self._seed.p256("root key")
        self._pck_ca_key = self._seed.p256("pck ca key")
        self._tcb_key = self._seed.p256("tcb signing key")
        self.root = self._certify("SGX Root CA", "SGX Root CA", self._root_key.public_key(), self._root_key, ca=1)
        # A verifier reads "Platform" in this name and asks for `ca=platform`.
        self.pck_ca = self._certify(
            "SGX PCK Platform CA", "SGX Root CA", self._pck_ca_key.public_key(), self._root_key, ca=0
        )
        self.tcb_signer = self._certify("SGX TCB Signing", "SGX Root CA", self._tcb_key.public_key(), self._root_key)
        self.qe_mr_enclave = self._seed.derive("qe mrenclave", 32)
        self.qe_mr_signer = self._seed.derive("qe mrsigner", 32)
        self.mr_seam = self._seed.derive("mr_seam", 48)
        self._platforms: dict[str, Platform] = {}
        self._tcb_infos: dict[tuple[str, PlatformState], Document] = {}
        self.root_ca_crl = self._crl(self.root, self._root_key)
        self.pck_crl = self._crl(self.pck_ca, self._pck_ca_key)
        self.qe_identity = self._qe_identity()

    @property
    def root_der(self) -> bytes:
        """The root certificate, what a verifier of this world has to believe."""
        return self.root.public_bytes(Encoding.DER)

    @property
    def root_pem(self) -> str:
        """The root certificate in PEM."""
        return self.root.public_bytes(Encoding.PEM).decode()

    def platform(self, name: str) -> "Platform":
        """The platform of that name: always the same machine, with its own PPID and FMSPC."""
        if name not in self._platforms:
            self._platforms[name] = Platform(self, name, self._seed.child(f"platform {name}"))
        return self._platforms[name]

    def platform_of_fmspc(self, fmspc: str) -> "Platform | None":
        """The platform with that FMSPC (hex), if it was made."""
        return next((p for p in self._platforms.values() if p.fmspc.hex() == fmspc.lower()), None)

    def tcb_info(self, platform: "Platform") -> Document:
        """What the vendor says of a platform now: TCB info, signed."""
        key = platform.name, platform.state
        if key not in self._tcb_infos:
            self._tcb_infos[key] = self._tcb_info(platform)
        return self._tcb_infos[key]

    def _tcb_info(self, platform: "Platform") -> Document:
        body = {
            "id": "TDX",
            "version": 3,
            "issueDate": _iso(VALID_FROM),
            "nextUpdate": _iso(VALID_UNTIL),
            "fmspc": platform.fmspc.hex().upper(),
            "pceId": PCE_ID.hex(),
            "tcbType": 0,
            "tcbEvaluationDataNumber": TCB_EVALUATION,
            "tdxModule": _module(),
            "tdxModuleIdentities": [
                {"id": f"TDX_{TDX_MODULE_VERSION:02X}", **_module(), "tcbLevels": [_level({"isvsvn": 1}, "UpToDate")]}
            ],
            "tcbLevels": [
                _level(
                    {
                        "sgxtcbcomponents": [{"svn": svn} for svn in CPU_SVN],
                        "pcesvn": PCE_SVN,
                        "tdxtcbcomponents": [{"svn": svn} for svn in TEE_TCB_SVN],
                    },
                    platform.state.tcb_status,
                    platform.state.advisory_ids,
                )
            ],
        }
        return self._signed("tcbInfo", body)

    def _qe_identity(self) -> Document:
        """The identity of the quoting enclave, signed."""
        body = {
            "id": "TD_QE",
            "version": 2,
            "issueDate": _iso(VALID_FROM),
            "nextUpdate": _iso(VALID_UNTIL),
            "tcbEvaluationDataNumber": TCB_EVALUATION,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": QE_ATTRIBUTES.hex().upper(),
            "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
            "mrsigner": self.qe_mr_signer.hex().upper(),
            "isvprodid": QE_PRODUCT,
            "tcbLevels": [_level({"isvsvn": QE_ISV_SVN}, "UpToDate")],
        }
        return self._signed("enclaveIdentity", body)

    def chain(self, *certificates: x509.Certificate) -> str:
        """PEM of certificates in order, closed by the root."""
        return "".join(c.public_bytes(Encoding.PEM).decode() for c in (*certificates, self.root))

    def certify_pck(self, key: ec.EllipticCurvePublicKey, extension: PckExtension) -> x509.Certificate:
        """Issue a platform's PCK certificate."""
        sgx = x509.UnrecognizedExtension(OID_SGX_EXTENSION, extension.encode())
        return self._certify("SGX PCK Certificate", "SGX PCK Platform CA", key, self._pck_ca_key, extra=sgx)

    def _certify(
        self,
        subject: str,
        issuer: str,
        key: ec.EllipticCurvePublicKey,
        issuer_key: ec.EllipticCurvePrivateKey,
        *,
        ca: int | None = None,
        extra: x509.ExtensionType | None = None,
    ) -> x509.Certificate:
        usage = x509.KeyUsage(
            digital_signature=ca is None,
            content_commitment=ca is None,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=ca is not None,
            crl_sign=ca is not None,
            encipher_only=False,
            decipher_only=False,
        )
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(subject))
            .issuer_name(_name(issuer))
            .public_key(key)
            .serial_number(int.from_bytes(x509.SubjectKeyIdentifier.from_public_key(key).digest, "big") >> 1)
            .not_valid_before(VALID_FROM)
            .not_valid_after(VALID_UNTIL)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
            .add_extension(usage, True)
            .add_extension(x509.BasicConstraints(ca is not None, ca), True)
        )
        if extra is not None:
            builder = builder.add_extension(extra, False)
        return builder.sign(issuer_key, hashes.SHA256(), ecdsa_deterministic=True)

    def _crl(self, issuer: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> bytes:
        crl = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(issuer.subject)
            .last_update(VALID_FROM)
            .next_update(VALID_UNTIL)
            .add_extension(x509.CRLNumber(1), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), False)
            .sign(key, hashes.SHA256(), ecdsa_deterministic=True)
        )
        return crl.public_bytes(Encoding.DER)

    def _signed(self, key: str, body: dict[str, Any]) -> Document:
        # The verifier re-serialises the inner object before it checks the signature: exactly this form.
        inner = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
        signature = _sign(self._tcb_key, inner.encode())
        return Document(f'{{"{key}":{inner},"signature":"{signature.hex()}"}}'.encode(), self.chain(self.tcb_signer))


class Platform:
    """One emulated machine: its PCK certificate, its quoting enclave, and what Intel says about it.

    That `state` may be changed while it runs: collateral follows at once.
    """

    def __init__(self, intel: Intel, name: str, seed: Seed) -> None:
        self.name = name
        self.ppid = seed.derive("ppid", 16)
        self.fmspc = seed.derive("fmspc", 6)
        self.state = PlatformState()
        pck_key = seed.p256("pck key")
        instance_id = seed.derive("platform instance id", 16)
        extension = PckExtension(self.ppid, CPU_SVN, PCE_SVN, PCE_ID, self.fmspc, instance_id)
        self.pck_certificate = intel.certify_pck(pck_key.public_key(), extension)
        self.mr_seam = intel.mr_seam
        self._attestation_key = seed.p256("attestation key")
        public = self._attestation_key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]
        qe_report = _qe_report(intel, public)
        self._header = QuoteHeader(qe_svn=QE_SVN, pce_svn=PCE_SVN).encode()
        # All of the signature data but the signature itself is the same in every quote of this platform.
        self._after_signature = QuoteSignature(
            signature=bytes(64),
            attestation_key=public,
            qe_report=qe_report,
            qe_report_signature=_sign(pck_key, qe_report),
            qe_authentication_data=QE_AUTH_DATA,
            pck_chain=intel.chain(self.pck_certificate, intel.pck_ca).encode(),
        ).encode()

    @property
    def device_id(self) -> bytes:
        """SHA-256 of the PPID, 32 bytes."""
        return device_id(self.ppid)

    def quote(self, report: TdReport) -> bytes:
        """Sign a TD report of this platform: a v4 quote."""
        signed = self._header + report.encode()
        signature_data = self._after_signature
        return b"".join((signed, signature_data[:4], _sign(self._attestation_key, signed), signature_data[68:]))


def _qe_report(intel: Intel, attestation_key: bytes) -> bytes:
    """The report of the quoting enclave, 384 bytes.

    0 cpusvn[16], 48 attributes[16], 64 mrenclave[32], 128 mrsigner[32], 256 isvprodid u16, 258 isvsvn u16,
    320 report_data[64].
    """
    report = bytearray(384)
    report[0:16] = CPU_SVN
    report[48:64] = QE_ATTRIBUTES
    report[64:96] = intel.qe_mr_enclave
    report[128:160] = intel.qe_mr_signer
    report[256:258] = QE_PRODUCT.to_bytes(2, "little")
    report[258:260] = QE_ISV_SVN.to_bytes(2, "little")
    report[320:384] = qe_report_data(attestation_key, QE_AUTH_DATA)
    return bytes(report)


def _sign(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(x509.NameOID.COMMON_NAME, f"EMULATED Intel {common_name}"),
            x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, EMULATED),
        ]
    )


def _module() -> dict[str, str]:
    return {"mrsigner": bytes(48).hex(), "attributes": bytes(8).hex(), "attributesMask": "F" * 16}


def _level(tcb: dict[str, Any], status: str, advisory_ids: tuple[str, ...] = ()) -> dict[str, Any]:
    level: dict[str, Any] = {"tcb": tcb, "tcbDate": _iso(VALID_FROM), "tcbStatus": status}
    if advisory_ids:
        level["advisoryIDs"] = list(advisory_ids)
    return level


def _iso(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
