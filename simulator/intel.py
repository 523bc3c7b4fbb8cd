"""The emulated Intel: root CA, PCK CA, TCB signer, CRLs, QE identity, and the TCB info of each platform.

Everything that a verifier checks is real (chains, signatures, CRLs, TCB matching). Only the root of trust is synthetic,
and every name says so. All keys and documents are derived from the seed, with fixed dates, so they are identical in
every process. What the vendor publishes can be changed at any time: `state` for all platforms, `Platform.state` for
one. Sources: Intel PCK Certificate and CRL Profile 1.5 and Intel PCS API v4 for the formats; `dcap-qvl` src/verify.rs
at 0.7.0 for what is verified.
"""

import functools
import hashlib
import hmac
import json
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from dstack_emu.attest.cache import Memo
from dstack_emu.attest.moment import iso
from dstack_emu.attest.pck import OID_SGX_EXTENSION, PckExtension
from dstack_emu.attest.pcs import Document
from dstack_emu.simulator.platform import (
    CPU_SVN,
    PCE_ID,
    PCE_SVN,
    QE_ATTRIBUTES,
    QE_ISV_SVN,
    QE_PRODUCT,
    TDX_MODULE_SVN,
    TDX_MODULE_VERSION,
    TEE_TCB_SVN,
    PartStatus,
    Platform,
    PlatformState,
    TcbStatus,
    raw_signature,
)
from dstack_emu.simulator.seed import Seed
from dstack_emu.simulator.vendor_state import (
    VALID_FROM,
    VALID_UNTIL,
    Dating,
    Validity,
    VendorState,
    moments,
    recovery_date,
)

EMULATED: Final = "dstack-emu EMULATED (protects nothing)"


@dataclass(frozen=True, slots=True)
class IntelState:
    """What the vendor publishes for all platforms, and for each existing platform by name."""

    vendor: VendorState
    platforms: Mapping[str, PlatformState]


class Intel:
    """The emulated vendor: one root, one PCK CA, one TCB signer, and the platforms that they certify."""

    def __init__(self, seed: Seed) -> None:
        self.seed = seed.child("intel")
        self._root_key = self.seed.p256("root key")
        self._pck_ca_key = self.seed.p256("pck ca key")
        self._tcb_key = self.seed.p256("tcb signing key")
        self.root = self._certify("SGX Root CA", "SGX Root CA", self._root_key.public_key(), self._root_key, ca=1)
        # A verifier that finds "Platform" in this name requests `ca=platform`.
        self.pck_ca = self._certify(
            "SGX PCK Platform CA", "SGX Root CA", self._pck_ca_key.public_key(), self._root_key, ca=0
        )
        self.tcb_signer = self._certify("SGX TCB Signing", "SGX Root CA", self._tcb_key.public_key(), self._root_key)
        self.qe_mr_enclave = self.seed.derive("qe mrenclave", 32)
        self.qe_mr_signer = self.seed.derive("qe mrsigner", 32)
        self.mr_seam = self.seed.derive("mr_seam", 48)
        self.state = VendorState()
        self._platforms: dict[str, Platform] = {}
        self._by_fmspc: dict[bytes, Platform] = {}  # each request for TCB info looks one up among all
        # A document is made once for each state of what it is about, of which there are few.
        self._tcb_info = _made_once(self._make_tcb_info)
        self._qe_identity = _made_once(self._make_qe_identity)
        self._evaluation_numbers = _made_once(self._make_evaluation_numbers)
        self._pck_crl = _made_once(self._make_pck_crl)
        self._root_ca_crl = _made_once(self._make_root_ca_crl)

    @property
    def root_der(self) -> bytes:
        """Return the root certificate (DER): the trust anchor of verifiers of this vendor's platforms."""
        return self.root.public_bytes(Encoding.DER)

    @property
    def root_pem(self) -> str:
        """Return the root certificate (PEM)."""
        return self.root.public_bytes(Encoding.PEM).decode()

    @functools.cached_property
    def untrusted(self) -> "Intel":
        """Return a vendor whose root no verifier trusts, for platforms whose quotes lead to another root."""
        return Intel(self.seed.child("another vendor"))

    # ---- platforms

    def platform(self, name: str) -> Platform:
        """Return the platform of that name: always the same one, with its own PPID and FMSPC."""
        if name not in self._platforms:
            made = Platform(self, name, self.seed.child(f"platform {name}"), self.fmspc(name))
            self._platforms[name] = made
            self._by_fmspc.setdefault(made.fmspc, made)
        return self._platforms[name]

    @contextmanager
    def platform_for(self, name: str) -> Iterator[Platform]:
        """Yield the platform of that name; if the block fails, a platform that was new in it is removed."""
        is_new = name not in self._platforms
        platform = self.platform(name)
        try:
            yield platform
        except BaseException:
            if is_new:
                del self._platforms[name]
                if self._by_fmspc[platform.fmspc] is platform:
                    del self._by_fmspc[platform.fmspc]
            raise

    @property
    def platforms(self) -> dict[str, Platform]:
        """Return every platform that has been requested so far, by name."""
        return dict(self._platforms)

    def capture(self) -> IntelState:
        """Return what it publishes now."""
        return IntelState(self.state, {name: platform.state for name, platform in self._platforms.items()})

    def restore(self, state: IntelState) -> None:
        """Publish what was captured; remove platforms that it does not contain, and create those that are missing."""
        self.state = state.vendor
        self._platforms = {name: self.platform(name) for name in state.platforms}
        self._by_fmspc = {platform.fmspc: platform for platform in reversed(self._platforms.values())}
        for name, platform in self._platforms.items():
            platform.state = state.platforms[name]

    def fmspc(self, name: str) -> bytes:
        """Return a platform's FMSPC (6 bytes); its second half proves to a PCCS that the platform has the same seed."""
        nonce = self.seed.derive(f"fmspc {name}", 3)
        return nonce + self._fmspc_proof(nonce)

    def knows_fmspc(self, fmspc: bytes) -> bool:
        """Return whether a platform of this seed, created in this process or another one, may have that FMSPC."""
        return len(fmspc) == 6 and hmac.compare_digest(fmspc[3:], self._fmspc_proof(fmspc[:3]))

    def state_of(self, fmspc: bytes) -> PlatformState:
        """Return the state of the platform with that FMSPC; the default state if this process did not create it."""
        platform = self._by_fmspc.get(fmspc)
        return PlatformState() if platform is None else platform.state

    def _fmspc_proof(self, nonce: bytes) -> bytes:
        return hmac.digest(self.seed.material, b"fmspc" + nonce, hashlib.sha256)[:3]

    # ---- collateral of the present state

    def tcb_info(self, fmspc: bytes, evaluation: int | None = None) -> Document:
        """Return the signed TCB info of a platform, of the standard set or the one of that number."""
        evaluation = evaluation or self.state.evaluations.standard
        return self._tcb_info((fmspc, self.state_of(fmspc), self.state.tcb_info_dating, evaluation))

    @property
    def qe_identity(self) -> Document:
        """Return the signed identity of the quoting enclave, of the standard set."""
        return self.qe_identity_in(self.state.evaluations.standard)

    def qe_identity_in(self, evaluation: int) -> Document:
        """Return the signed identity of the quoting enclave in the set of that number."""
        state = self.state
        return self._qe_identity((*state.qe_status_in(evaluation), state.qe_identity_dating, evaluation))

    @property
    def evaluation_numbers(self) -> Document:
        """Return the signed list of the TCB evaluation data numbers that are published."""
        return self._evaluation_numbers((self.state.evaluations.available, self.state.tcb_info_dating))

    @property
    def pck_crl(self) -> Document:
        """Return the PCK CA's CRL (DER) with its issuer chain; it contains the platforms with `pck_revoked`."""
        revoked = tuple(p.pck_certificate.serial_number for p in self._platforms.values() if p.state.pck_revoked)
        return self._pck_crl((revoked, self.state.pck_crl_dating))

    @property
    def root_ca_crl(self) -> bytes:
        """Return the root's CRL (DER); it contains the PCK CA if the state has `pck_ca_revoked`."""
        return self._root_ca_crl((self.state.pck_ca_revoked, self.state.root_ca_crl_dating)).body

    def _make_tcb_info(self, about: tuple[bytes, PlatformState, Dating | Validity, int]) -> Document:
        fmspc, state, dating, evaluation = about
        status, advisory_ids = state.status_in(evaluation)
        module = _level({"isvsvn": TDX_MODULE_SVN}, state.module_status, state.module_advisory_ids)
        tcb = {
            "sgxtcbcomponents": [{"svn": svn} for svn in CPU_SVN],
            "pcesvn": PCE_SVN,
            "tdxtcbcomponents": [{"svn": svn} for svn in TEE_TCB_SVN],
        }
        body = {
            "id": "TDX",
            "version": 3,
            **_dates(dating),
            "fmspc": fmspc.hex().upper(),
            "pceId": PCE_ID.hex(),
            "tcbType": 0,
            "tcbEvaluationDataNumber": evaluation,
            "tdxModule": _module(),
            "tdxModuleIdentities": [{"id": f"TDX_{TDX_MODULE_VERSION:02X}", **_module(), "tcbLevels": [module]}],
            "tcbLevels": [_level(tcb, status, advisory_ids)],
        }
        return self._signed("tcbInfo", body)

    def _make_qe_identity(self, about: tuple[PartStatus, tuple[str, ...], Dating | Validity, int]) -> Document:
        status, advisory_ids, dating, evaluation = about
        body = {
            "id": "TD_QE",
            "version": 2,
            **_dates(dating),
            "tcbEvaluationDataNumber": evaluation,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": QE_ATTRIBUTES.hex().upper(),
            "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
            "mrsigner": self.qe_mr_signer.hex().upper(),
            "isvprodid": QE_PRODUCT,
            "tcbLevels": [_level({"isvsvn": QE_ISV_SVN}, status, advisory_ids)],
        }
        return self._signed("enclaveIdentity", body)

    def _make_evaluation_numbers(self, about: tuple[tuple[int, ...], Dating | Validity]) -> Document:
        numbers, dating = about
        listed = [
            {"tcbEvaluationDataNumber": number, "tcbRecoveryEventDate": date, "tcbDate": date}
            for number, date in ((number, iso(recovery_date(number))) for number in numbers)
        ]
        body = {"id": "TDX", "version": 1, **_dates(dating), "tcbEvalNumbers": listed}
        return self._signed("tcbEvaluationDataNumbers", body)

    def _make_pck_crl(self, about: tuple[tuple[int, ...], Dating | Validity]) -> Document:
        revoked, dating = about
        return Document(_crl(self.pck_ca, self._pck_ca_key, revoked, dating), self.chain(self.pck_ca))

    def _make_root_ca_crl(self, about: tuple[bool, Dating | Validity]) -> Document:
        pck_ca_revoked, dating = about
        revoked = (self.pck_ca.serial_number,) if pck_ca_revoked else ()
        return Document(_crl(self.root, self._root_key, revoked, dating))

    # ---- certificates

    def chain(self, *certificates: x509.Certificate) -> str:
        """Return the certificates in order, followed by the root (PEM)."""
        return "".join(c.public_bytes(Encoding.PEM).decode() for c in (*certificates, self.root))

    def pck_chain(self, certificate: x509.Certificate) -> str:
        """Return a PCK certificate with its issuers, up to the root (PEM)."""
        return self.chain(certificate, self.pck_ca)

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

    def _signed(self, key: str, body: dict[str, Any]) -> Document:
        # The verifier serialises the inner object again before it checks the signature, in exactly this form.
        inner = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
        signature = raw_signature(self._tcb_key, inner.encode())
        return Document(f'{{"{key}":{inner},"signature":"{signature.hex()}"}}'.encode(), self.chain(self.tcb_signer))


K = TypeVar("K", bound=Hashable)


def _made_once(make: Callable[[K], Document]) -> Memo[K, Document]:
    """Keep the documents that a function made; each takes 1 to 4 KiB."""

    def size(_about: K, document: Document) -> int:
        return len(document.body) + len(document.issuer_chain)

    return Memo(make, size, max_entries=256, max_bytes=1 << 20)


def _crl(
    issuer: x509.Certificate, key: ec.EllipticCurvePrivateKey, revoked: tuple[int, ...], dating: Dating | Validity
) -> bytes:
    issued, next_update = moments(dating)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(issued)
        .next_update(next_update)
        .add_extension(x509.CRLNumber(1), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), False)
    )
    for serial in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(VALID_FROM).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(key, hashes.SHA256(), ecdsa_deterministic=True).public_bytes(Encoding.DER)


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(x509.NameOID.COMMON_NAME, f"EMULATED Intel {common_name}"),
            x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, EMULATED),
        ]
    )


def _module() -> dict[str, str]:
    return {"mrsigner": bytes(48).hex(), "attributes": bytes(8).hex(), "attributesMask": "F" * 16}


def _dates(dating: Dating | Validity) -> dict[str, str]:
    issued, next_update = moments(dating)
    return {"issueDate": iso(issued), "nextUpdate": iso(next_update)}


def _level(tcb: dict[str, Any], status: TcbStatus, advisory_ids: tuple[str, ...] = ()) -> dict[str, Any]:
    level: dict[str, Any] = {"tcb": tcb, "tcbDate": iso(VALID_FROM), "tcbStatus": status}
    if advisory_ids:
        level["advisoryIDs"] = list(advisory_ids)
    return level
