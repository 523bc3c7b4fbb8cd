"""dstack's own certificate signing request: SCALE, with the requester's evidence.

Source: dstack `ra-tls/src/cert.rs:134-330` at 312dc605. Version 2 carries a versioned attestation, version 1 a bare
quote and its event log. A valid signature proves that the requester has the key. It does not prove that the evidence
holds or binds that key: `attest.verify` verifies this.
"""

from dataclasses import dataclass, replace
from typing import Final, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from dstack_emu.attest import scale
from dstack_emu.attest.app_info import decode_app_info
from dstack_emu.attest.attestation import Attestation, decode, from_quote_and_log
from dstack_emu.attest.certificate import load_spki, verification_key
from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.issuing import CertificateRequest
from dstack_emu.attest.scale import Decoder

CONFIRM: Final = "please sign cert:"
MAX_ALT_NAMES: Final = 1024
"""The maximum number of alternative names of a certificate; an app has a few."""
MAX_NAMES_SIZE: Final = 256 * 1024
"""The maximum size of all names of a certificate in bytes: 1024 of the length that DNS allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateConfig:
    """The requested contents of the certificate. Times are Unix seconds (u64). Version 1 has no last three fields.

    Raises `FormatError` for more names than MAX_ALT_NAMES, or of more bytes than MAX_NAMES_SIZE.
    """

    subject: str
    organization: str | None = None
    alt_names: tuple[str, ...] = ()
    server_auth: bool = False
    client_auth: bool = False
    with_attestation: bool = False
    with_app_info: bool = False
    not_before: int | None = None
    not_after: int | None = None

    def __post_init__(self) -> None:
        if len(self.alt_names) > MAX_ALT_NAMES:
            raise FormatError(f"alternative names: at most {MAX_ALT_NAMES} expected, got {len(self.alt_names)}")
        size = sum(len(name.encode()) for name in (self.subject, self.organization or "", *self.alt_names))
        if size > MAX_NAMES_SIZE:
            raise FormatError(f"names of a certificate: at most {MAX_NAMES_SIZE} bytes expected, got {size}")


def require_validity_order(not_before: int | None, not_after: int | None) -> None:
    """Raise `FormatError` if a certificate is requested that would end before it begins (Unix seconds)."""
    if not_before is not None and not_after is not None and not_before >= not_after:
        raise FormatError("not_before must be earlier than not_after")


@dataclass(frozen=True, slots=True)
class _SignedRequest:
    """What both versions have; `encoded` are the signed bytes."""

    confirm: str
    public_key: bytes
    config: CertificateConfig
    encoded: bytes

    def verify_signature(self, signature: bytes) -> None:
        """Verify signature and confirm word; raise `FormatError` or `VerificationError` with upstream's words."""
        try:
            verification_key(self.public_key).verify(signature, self.encoded, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature as error:
            raise VerificationError("Invalid signature") from error
        if self.confirm != CONFIRM:
            raise VerificationError("Invalid confirm word")


@dataclass(frozen=True, slots=True)
class SigningRequestV1(_SignedRequest):
    """A decoded request of version 1. Upstream verifies its signature before it reads quote and event log."""

    quote: bytes
    event_log: bytes

    def upgrade(self) -> "SigningRequest":
        """Read quote and event log, and return the request with them as evidence; raise `FormatError`."""
        evidence = from_quote_and_log(self.quote, self.event_log)
        return SigningRequest(self.confirm, self.public_key, self.config, self.encoded, evidence)


@dataclass(frozen=True, slots=True)
class SigningRequest(_SignedRequest):
    """A decoded request with its evidence."""

    attestation: Attestation

    @classmethod
    def make(cls, public_key: bytes, config: CertificateConfig, attestation: Attestation) -> Self:
        """Make a version 2 request for a key (SPKI DER)."""
        encoded = b"".join(
            (
                scale.text(CONFIRM),
                scale.vec(public_key),
                scale.option(None if config.organization is None else scale.text(config.organization)),
                scale.text(config.subject),
                scale.compact(len(config.alt_names)),
                *(scale.text(name) for name in config.alt_names),
                bytes((config.server_auth, config.client_auth, config.with_attestation, config.with_app_info)),
                scale.option(None if config.not_before is None else config.not_before.to_bytes(8, "little")),
                scale.option(None if config.not_after is None else config.not_after.to_bytes(8, "little")),
                attestation.encode(),
            )
        )
        return cls(CONFIRM, public_key, config, encoded, attestation)

    @classmethod
    def parse(cls, data: bytes, version: int) -> "SigningRequest":
        """Decode version 1 or 2 with its evidence; raise `FormatError`."""
        return parse_request(data, version).upgrade()

    def upgrade(self) -> Self:
        """Return itself: its evidence is read already."""
        return self

    def certificate_request(self, *, usage: str, app_id: bytes | None = None) -> CertificateRequest:
        """Return the certificate to issue for this request; its evidence must have been verified before."""
        config = self.config
        try:
            key = load_spki(self.public_key)
        except FormatError as error:
            raise FormatError(f"Failed to parse signature: {error}") from error  # upstream's word for the key
        return CertificateRequest(
            public_key=key,
            subject=config.subject,
            organization=config.organization,
            alt_names=config.alt_names,
            server_auth=config.server_auth,
            client_auth=config.client_auth,
            app_id=app_id,
            app_info=decode_app_info(self.attestation) if config.with_app_info else None,
            usage=usage,
            attestation=self.attestation if config.with_attestation else None,
            not_before=config.not_before,
            not_after=config.not_after,
        )

    def sign(self, key: ec.EllipticCurvePrivateKey) -> bytes:
        """Sign with the key of the certificate: DER ECDSA, SHA-256, RFC 6979."""
        return key.sign(self.encoded, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))


def parse_request(data: bytes, version: int) -> SigningRequest | SigningRequestV1:
    """Decode version 1 or 2; raise `FormatError`. What a version 1 has in place of an attestation is not looked at."""
    decoder = Decoder(data)
    confirm = decoder.text("confirm")
    public_key = decoder.vec("pubkey")
    organization = decoder.option(decoder.text, "org_name")
    subject = decoder.text("subject")
    alt_names = decoder.many(lambda: decoder.text("subject_alt_names"), "subject_alt_names", MAX_ALT_NAMES)
    server_auth, client_auth = decoder.boolean("usage_server_auth"), decoder.boolean("usage_client_auth")
    with_attestation = decoder.boolean("ext_quote")
    config = CertificateConfig(
        subject=subject,
        organization=organization,
        alt_names=alt_names,
        server_auth=server_auth,
        client_auth=client_auth,
        with_attestation=with_attestation,
    )
    if version == 1:
        quote, event_log = decoder.vec("quote"), decoder.vec("event_log")
        # SCALE stops at the end of the structure: what follows is neither read nor signed.
        return SigningRequestV1(confirm, public_key, config, data[: decoder.offset], quote, event_log)
    config = replace(
        config,
        with_app_info=decoder.boolean("ext_app_info"),
        not_before=decoder.option(decoder.u64, "not_before"),
        not_after=decoder.option(decoder.u64, "not_after"),
    )
    return SigningRequest(confirm, public_key, config, data, decode(decoder.rest()))
