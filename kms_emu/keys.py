"""The root keys, what is derived from them, and the certificates that carry them.

Every function that gives a secret away takes a grant of `kms_emu.gate`: without a decision there is nothing to call it
with. Source: dstack `kms/src/main_service.rs`, `kms/src/onboard_service.rs` (`Keys`) at 312dc605.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Self

from coincurve import PrivateKey
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from dstack_emu.attest import certificate as cert
from dstack_emu.attest import issuing
from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.cache import BoundedCache
from dstack_emu.attest.csr import SigningRequest
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.kdf import (
    derive_dh_secret,
    derive_key,
    derive_p256,
    load_p256_pem,
    p256_from_uniform,
    p256_scalar,
    pkcs8_pem,
)
from dstack_emu.attest.signature import app_key_message, env_key_message, k256_key, k256_point, sign_recoverable
from dstack_emu.kms_emu import cert_dir as files
from dstack_emu.kms_emu.gate import AppGrant, KmsGrant, SelfGrant

Entropy = Callable[[int], bytes]
"""A source of random bytes."""

SECRETS_SIZE: Final = 512
"""Bytes of memory that an app instance's keys take, roughly."""


@dataclass(frozen=True, eq=False)
class RootKeys:
    """The secrets that identify a KMS: root CA, temporary client CA, and the root secp256k1 key.

    Of what follows from them it keeps what every call needs: its own scalar, and the keys of apps that called lately,
    in the same memory as the root keys that they follow from.
    """

    root_ca: issuing.CertificateAuthority
    temp_ca: issuing.CertificateAuthority
    k256: PrivateKey
    _secrets: "BoundedCache[tuple[bytes, bytes], AppSecrets]" = field(
        default_factory=lambda: BoundedCache(1024, 1 << 20), init=False, repr=False
    )

    @classmethod
    def of(
        cls, temp_key: ec.EllipticCurvePrivateKey, root_key: ec.EllipticCurvePrivateKey, k256: PrivateKey, now: int
    ) -> Self:
        """Issue both CA certificates for keys that are new, or were taken over from another KMS."""
        temp = issuing.CertificateRequest(
            public_key=temp_key.public_key(),
            subject="Dstack Client Temp CA",
            organization=issuing.ORGANIZATION,
            ca_path_length=0,
        )
        root = issuing.CertificateRequest(
            public_key=root_key.public_key(),
            subject="Dstack KMS CA",
            organization=issuing.ORGANIZATION,
            ca_path_length=1,
        )
        return cls(issuing.self_signed(root, root_key, now), issuing.self_signed(temp, temp_key, now), k256)

    @functools.cached_property
    def root_scalar(self) -> bytes:
        """Return the root CA's key as 32 bytes, what apps' keys are derived from."""
        return p256_scalar(self.root_ca.key)

    @property
    def ca_pubkey(self) -> bytes:
        """Return the SubjectPublicKeyInfo DER of the root CA."""
        return cert.spki_der(self.root_ca.key.public_key())

    @property
    def k256_pubkey(self) -> bytes:
        """Return the root secp256k1 key's point, compressed: 33 bytes."""
        return self.k256.public_key.format()

    def issue_rpc_certificate(
        self,
        key: ec.EllipticCurvePrivateKey,
        domain: str,
        attestation: Attestation | None,
        now: int,
        evidence_form: cert.EvidenceForm = "versioned",
        *,
        more_names: Sequence[str] = (),
        keeps_log_digests: bool = False,
    ) -> str:
        """Issue the certificate of the RPC listener (PEM), for its domain and `more_names`."""
        request = issuing.CertificateRequest(
            public_key=key.public_key(),
            subject=domain,
            alt_names=tuple(dict.fromkeys((domain, *more_names))),
            usage=cert.USAGE_KMS_RPC,
            attestation=attestation,
            evidence_form=evidence_form,
            keeps_log_digests=keeps_log_digests,
        )
        return cert.pem(self.root_ca.issue(request, now))


@dataclass(frozen=True, slots=True)
class KmsKeys:
    """Root keys, RPC key and domain: all that a KMS stores."""

    roots: RootKeys
    rpc_key: ec.EllipticCurvePrivateKey
    domain: str

    @classmethod
    def generate(cls, domain: str, entropy: Entropy, now: int) -> Self:
        """Make new keys."""
        temp, root, rpc = (p256_from_uniform(entropy(48)) for _ in range(3))
        return cls(RootKeys.of(temp, root, _new_k256(entropy), now), rpc, domain)

    @classmethod
    def load(cls, folder: files.CertDir, domain: str = "") -> Self:
        """Read stored keys; raise `ConfigError` or `FormatError` naming the file that is missing or broken.

        Whether a CA certificate belongs to its key is not verified: `require_own_certificates`. `domain`, where it is
        given, goes before the stored one.
        """
        temp_key, root_key, rpc_key = (
            load_p256_pem(folder.read_text(name), name) for name in (files.TMP_CA_KEY, files.ROOT_CA_KEY, files.RPC_KEY)
        )
        secret = folder.read(files.K256_KEY)
        if 24 <= len(secret) < 32:
            secret = secret.rjust(32, b"\0")  # as upstream's library reads a scalar without its leading zeros
        k256 = k256_key(secret, files.K256_KEY)
        domain = domain or folder.read_text(files.RPC_DOMAIN)
        root_ca, temp_ca = (
            issuing.CertificateAuthority(cert.load_pem(folder.read_text(name), name), key)
            for name, key in ((files.ROOT_CA_CERT, root_key), (files.TMP_CA_CERT, temp_key))
        )
        return cls(RootKeys(root_ca, temp_ca, k256), rpc_key, domain.strip())

    def require_own_certificates(self) -> None:
        """Refuse stored CA certificates that are another key's."""
        for authority, what in ((self.roots.root_ca, "root CA"), (self.roots.temp_ca, "temp ca")):
            if cert.certificate_spki(authority.certificate) != cert.spki_der(authority.key.public_key()):
                raise FormatError(f"Failed to load {what} certificate: CA certificate does not match private key")

    def files(self, rpc_certificate: str) -> dict[str, bytes]:
        """Return what is stored, by upstream's file names."""
        return {
            files.TMP_CA_KEY: pkcs8_pem(self.roots.temp_ca.key).encode(),
            files.TMP_CA_CERT: self.roots.temp_ca.pem.encode(),
            files.ROOT_CA_KEY: pkcs8_pem(self.roots.root_ca.key).encode(),
            files.ROOT_CA_CERT: self.roots.root_ca.pem.encode(),
            files.RPC_KEY: pkcs8_pem(self.rpc_key).encode(),
            files.RPC_CERT: rpc_certificate.encode(),
            files.K256_KEY: self.roots.k256.secret,
            files.RPC_DOMAIN: self.domain.encode(),
        }


@dataclass(frozen=True, slots=True)
class AppSecrets:
    """What an app instance gets. Sizes: keys 32 bytes, k256_signature 65."""

    disk_crypt_key: bytes
    env_crypt_key: bytes
    k256_key: bytes
    k256_signature: bytes


def app_secrets(roots: RootKeys, grant: AppGrant) -> AppSecrets:
    """Derive an app's keys: the disk key is the instance's own, the others are shared by the app's instances."""
    app_id, instance_id = grant.boot_info.app_id, grant.boot_info.instance_id
    secrets = roots._secrets.get((app_id, instance_id))
    if secrets is None:
        secrets = _derive_app_secrets(roots, app_id, instance_id)
        roots._secrets.put((app_id, instance_id), secrets, SECRETS_SIZE)
    return secrets


def _derive_app_secrets(roots: RootKeys, app_id: bytes, instance_id: bytes) -> AppSecrets:
    app_key = derive_key(roots.k256.secret, [app_id, b"app-key"])
    return AppSecrets(
        disk_crypt_key=derive_dh_secret(roots.root_scalar, [app_id, instance_id, b"app-disk-crypt-key"]),
        env_crypt_key=_env_secret(roots, app_id),
        k256_key=app_key,
        k256_signature=sign_recoverable(roots.k256, app_key_message(app_id, k256_point(app_key))),
    )


@dataclass(frozen=True, slots=True)
class EnvPublicKey:
    """An app's X25519 public key (32 bytes) with the root key's two signatures over it (65 bytes each)."""

    public_key: bytes
    signature: bytes
    signature_v1: bytes


def env_public_key(roots: RootKeys, grant: SelfGrant, app_id: bytes, timestamp: int) -> EnvPublicKey:
    """Derive the key that a deployer encrypts environment variables to; `timestamp` is Unix seconds."""
    del grant  # holding it is the point: nobody signs for a KMS that may not run
    public = X25519PrivateKey.from_private_bytes(_env_secret(roots, app_id)).public_key().public_bytes_raw()
    return EnvPublicKey(
        public,
        sign_recoverable(roots.k256, env_key_message(app_id, public)),
        sign_recoverable(roots.k256, env_key_message(app_id, public, timestamp)),
    )


def temp_ca_secret(roots: RootKeys, grant: SelfGrant) -> str:
    """Return the temporary CA's key (PEM), under which callers make their certificates."""
    del grant
    return pkcs8_pem(roots.temp_ca.key)


@dataclass(frozen=True, slots=True)
class RootSecrets:
    """What another KMS gets: keys in PEM, and the 32 bytes of the root secp256k1 key."""

    temp_ca_key: str
    ca_key: str
    k256_key: bytes


def root_secrets(roots: RootKeys, grant: KmsGrant) -> RootSecrets:
    """Hand the root keys over to another KMS."""
    del grant
    return RootSecrets(pkcs8_pem(roots.temp_ca.key), pkcs8_pem(roots.root_ca.key), roots.k256.secret)


def sign_certificate(
    roots: RootKeys,
    grant: AppGrant,
    request: SigningRequest,
    now: int,
    *,
    keeps_log_digests: bool = False,
    has_verified_app_info: bool = False,
) -> list[str]:
    """Issue an app's certificate: leaf, app CA, root CA (PEM). The log in its evidence may keep the events' digests.

    App info, if it is requested, is what the evidence says of itself, or the identity that was verified.
    """
    app_id = grant.boot_info.app_id
    key = derive_p256(roots.root_scalar, [app_id, b"app-ca"])
    ca_request = issuing.CertificateRequest(
        public_key=key.public_key(),
        subject="Dstack App CA",
        organization=issuing.ORGANIZATION,
        ca_path_length=0,
        app_id=app_id,
        usage=cert.USAGE_APP_CA,
    )
    app_ca = issuing.CertificateAuthority(roots.root_ca.issue(ca_request, now), key)
    leaf_request = request.certificate_request(usage=cert.USAGE_APP_LEAF, app_id=app_id)
    if has_verified_app_info and leaf_request.app_info is not None:
        leaf_request = replace(leaf_request, app_info=grant.app_info())
    leaf = app_ca.issue(replace(leaf_request, keeps_log_digests=keeps_log_digests), now)
    return [cert.pem(leaf), app_ca.pem, roots.root_ca.pem]


def _env_secret(roots: RootKeys, app_id: bytes) -> bytes:
    return derive_dh_secret(roots.root_scalar, [app_id, b"env-encrypt-key"])


def _new_k256(entropy: Entropy) -> PrivateKey:
    while True:  # one draw in 2^128 is out of range
        try:
            return PrivateKey(entropy(32))
        except ValueError:
            continue
