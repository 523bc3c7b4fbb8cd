"""One emulated platform: its identity, its security versions, and the quoting enclave that signs for it.

A vendor certifies it (`simulator.intel`); trust domains run on it (`simulator.trust_domain`). Sources: Intel TDX DCAP
Quote Generation Library 4.0, appendix A.3, for the formats; `dcap-qvl` src/verify.rs at 0.7.0 for what is verified.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, get_args

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.pck import PckExtension, device_id
from dstack_emu.attest.quote import QuoteHeader, QuoteSignature, TdReport, encode_body, qe_report_data
from dstack_emu.simulator.seed import Seed

TcbStatus = Literal[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "Revoked",
]
TCB_STATUSES: Final[tuple[TcbStatus, ...]] = get_args(TcbStatus)

PartStatus = Literal["UpToDate", "OutOfDate", "Revoked"]
"""The statuses that Intel publishes for a TDX module or a quoting enclave; a verifier accepts no other one there."""
PART_STATUSES: Final[tuple[PartStatus, ...]] = get_args(PartStatus)

TDX_MODULE_VERSION, TDX_MODULE_SVN = 1, 11
TEE_TCB_SVN: Final = bytes((TDX_MODULE_SVN, TDX_MODULE_VERSION, 4)).ljust(16, b"\0")
CPU_SVN: Final = bytes((3, 3, 2, 2, 4, 1, 0, 5)).ljust(16, b"\0")
PCE_SVN: Final = 13
PCE_ID: Final = bytes(2)
QE_SVN, QE_PRODUCT, QE_ISV_SVN = 0, 2, 4
QE_ATTRIBUTES: Final = bytes.fromhex("1500000000000000e700000000000000")
QE_AUTH_DATA: Final = bytes(range(32))

FIRST_EVALUATION: Final = 17
"""The TCB evaluation data number of the documents before a TCB recovery."""


def require_status(status: str, known: Sequence[str], of: str) -> None:
    """Raise `FormatError`, which lists the known statuses, if `status` is not one of them."""
    if status not in known:
        raise FormatError(f"TCB status of {of}: one of {', '.join(known)} expected, got {status!r}")


@dataclass(frozen=True, slots=True)
class PlatformState:
    """One platform's TCB status and its TDX module's, each with advisories, and two ways in which it is not trusted.

    With `pck_revoked` its certificate is on the PCK CA's CRL; with `other_root` its quotes lead to a root that no
    verifier trusts. `recovery_status` and its advisories are those of the platform in the set of a TCB recovery; None:
    the same as before it.
    """

    tcb_status: TcbStatus = "UpToDate"
    advisory_ids: tuple[str, ...] = ()
    module_status: PartStatus = "UpToDate"
    module_advisory_ids: tuple[str, ...] = ()
    pck_revoked: bool = False
    other_root: bool = False
    recovery_status: TcbStatus | None = None
    recovery_advisory_ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_status(self.tcb_status, TCB_STATUSES, "the platform")
        if self.recovery_status is not None:
            require_status(self.recovery_status, TCB_STATUSES, "the platform in the TCB recovery")
        require_status(self.module_status, PART_STATUSES, "the TDX module")

    def status_in(self, evaluation: int) -> tuple[TcbStatus, tuple[str, ...]]:
        """Return the platform's status and advisories in the set of that TCB evaluation data number."""
        if evaluation <= FIRST_EVALUATION or self.recovery_status is None:
            return self.tcb_status, self.advisory_ids
        return self.recovery_status, self.recovery_advisory_ids


class PlatformVendor(Protocol):
    """The vendor as a platform uses it: it certifies the platform's key, and made its quoting enclave.

    `mr_seam` is 48 bytes, `qe_mr_enclave` and `qe_mr_signer` 32.
    """

    mr_seam: bytes
    qe_mr_enclave: bytes
    qe_mr_signer: bytes

    def certify_pck(self, key: ec.EllipticCurvePublicKey, extension: PckExtension) -> x509.Certificate:
        """Issue a platform's PCK certificate."""
        ...

    def pck_chain(self, certificate: x509.Certificate) -> str:
        """Return a PCK certificate with its issuers, up to the root (PEM)."""
        ...

    @property
    def untrusted(self) -> "PlatformVendor":
        """Return a vendor whose root no verifier trusts."""
        ...


class Platform:
    """One emulated platform, with an FMSPC of 6 bytes; everything else about it is derived from `seed`.

    `state` may be changed at any time: collateral and quotes follow at once.
    """

    def __init__(self, vendor: PlatformVendor, name: str, seed: Seed, fmspc: bytes) -> None:
        self.name, self.state, self.fmspc = name, PlatformState(), fmspc
        self.ppid = seed.derive("ppid", 16)
        self.mr_seam = vendor.mr_seam
        self._vendor = vendor
        self._pck_key = seed.p256("pck key")
        self._attestation_key = seed.p256("attestation key")
        # The quoting enclave's own id of the platform, 16 bytes; it is not the PPID, nor made of it.
        self._header_user_data = seed.derive("quoting enclave platform id", 16).ljust(20, b"\0")
        instance_id = seed.derive("platform instance id", 16)
        self._extension = PckExtension(self.ppid, CPU_SVN, PCE_SVN, PCE_ID, self.fmspc, instance_id)
        self.pck_certificate = vendor.certify_pck(self._pck_key.public_key(), self._extension)
        self._signature_data = self._signature_data_under(vendor, self.pck_certificate)
        self._untrusted_signature_data = b""

    @property
    def device_id(self) -> bytes:
        """Return the SHA-256 of the PPID, 32 bytes."""
        return device_id(self.ppid)

    def quote(self, report: TdReport, version: int = 4) -> bytes:
        """Sign a TD report as a quote of version 4 or 5."""
        header = QuoteHeader(version=version, qe_svn=QE_SVN, pce_svn=PCE_SVN, user_data=self._header_user_data)
        signed = header.encode() + encode_body(report, version)
        data = self._untrusted_data() if self.state.other_root else self._signature_data
        return b"".join((signed, data[:4], raw_signature(self._attestation_key, signed), data[68:]))

    def _untrusted_data(self) -> bytes:
        if not self._untrusted_signature_data:
            vendor = self._vendor.untrusted
            certificate = vendor.certify_pck(self._pck_key.public_key(), self._extension)
            self._untrusted_signature_data = self._signature_data_under(vendor, certificate)
        return self._untrusted_signature_data

    def _signature_data_under(self, vendor: PlatformVendor, certificate: x509.Certificate) -> bytes:
        """Return the signature data with 64 zero bytes as the signature; the rest is the same in every quote."""
        public = self._attestation_key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]
        qe_report = _qe_report(vendor, public)
        return QuoteSignature(
            signature=bytes(64),
            attestation_key=public,
            qe_report=qe_report,
            qe_report_signature=raw_signature(self._pck_key, qe_report),
            qe_authentication_data=QE_AUTH_DATA,
            pck_chain=vendor.pck_chain(certificate).encode(),
        ).encode()


_ECDSA: Final = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)


def raw_signature(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    """Sign with SHA-256 and RFC 6979; return r and s, 32 bytes each, big-endian, as Intel's structures hold them."""
    r, s = decode_dss_signature(key.sign(data, _ECDSA))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _qe_report(vendor: PlatformVendor, attestation_key: bytes) -> bytes:
    """Build the report of the quoting enclave, 384 bytes.

    0 cpusvn[16], 48 attributes[16], 64 mrenclave[32], 128 mrsigner[32], 256 isvprodid u16, 258 isvsvn u16,
    320 report_data[64].
    """
    report = bytearray(384)
    report[0:16] = CPU_SVN
    report[48:64] = QE_ATTRIBUTES
    report[64:96] = vendor.qe_mr_enclave
    report[128:160] = vendor.qe_mr_signer
    report[256:258] = QE_PRODUCT.to_bytes(2, "little")
    report[258:260] = QE_ISV_SVN.to_bytes(2, "little")
    report[320:384] = qe_report_data(attestation_key, QE_AUTH_DATA)
    return bytes(report)
