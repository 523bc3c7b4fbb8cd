"""dstack's own certificate signing request: SCALE, with the requester's evidence.

Source: dstack `ra-tls/src/cert.rs:134-330` at 312dc605. Version 2 carries a versioned attestation, version 1 a bare
quote and its event log. A valid signature proves that the requester has the key. It does not prove that the evidence
holds or binds that key: `attest.verify` verifies this.
"""

from dataclasses import dataclass
from typing import Final, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from dstack_emu.attest import scale
from dstack_emu.attest.app_info import decode_app_info
from dstack_emu.attest.attestation import Attestation, decode, from_quote_and_log
from dstack_emu.attest.certificate import CertificateRequest, load_spki
from dstack_emu.attest.errors import VerificationError
from dstack_emu.attest.scale import Decoder

CONFIRM: Final = "please sign cert:"


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateConfig:
    """The requested contents of the certificate. Times are Unix seconds (u64). Version 1 has no last three fields."""

    subject: str
    organization: str | None = None
    alt_names: tuple[str, ...] = ()
    server_auth: bool = False
    client_auth: bool = False
    with_attestation: bool = False
    with_app_info: bool = False
    not_before: int | None = None
    not_after: int | None = None


@dataclass(frozen=True, slots=True)
class SigningRequest:
    """A decoded request; `encoded` are the signed bytes."""

    confirm: str
    public_key: bytes
    config: CertificateConfig
    attestation: Attestation
    encoded: bytes

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
        return cls(CONFIRM, public_key, config, attestation, encoded)

    @classmethod
    def parse(cls, data: bytes, version: int) -> Self:
        """Decode version 1 or 2; raise `FormatError`."""
        decoder = Decoder(data)
        confirm = decoder.text("confirm")
        public_key = decoder.vec("pubkey")
        organization = decoder.option(decoder.text, "org_name")
        subject = decoder.text("subject")
        alt_names = decoder.many(lambda: decoder.text("subject_alt_names"), "subject_alt_names")
        server_auth, client_auth = decoder.boolean("usage_server_auth"), decoder.boolean("usage_client_auth")
        with_attestation = decoder.boolean("ext_quote")
        with_app_info, not_before, not_after = False, None, None
        if version == 2:
            with_app_info = decoder.boolean("ext_app_info")
            not_before = decoder.option(decoder.u64, "not_before")
            not_after = decoder.option(decoder.u64, "not_after")
            attestation = decode(decoder.rest())
            encoded = data
        else:
            quote, event_log = decoder.vec("quote"), decoder.vec("event_log")
            # SCALE stops at the end of the structure: bytes after it are neither parsed nor signed.
            encoded = data[: decoder.offset]
            attestation = from_quote_and_log(quote, event_log)
        config = CertificateConfig(
            subject=subject,
            organization=organization,
            alt_names=alt_names,
            server_auth=server_auth,
            client_auth=client_auth,
            with_attestation=with_attestation,
            with_app_info=with_app_info,
            not_before=not_before,
            not_after=not_after,
        )
        return cls(confirm, public_key, config, attestation, encoded)

    def certificate_request(self, *, usage: str, app_id: bytes | None = None) -> CertificateRequest:
        """Return the certificate to issue for this request; its evidence must have been verified before."""
        config = self.config
        return CertificateRequest(
            public_key=load_spki(self.public_key),
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

    def verify_signature(self, signature: bytes) -> None:
        """Verify the signature and the confirm word; raise `VerificationError` with upstream's text."""
        key = load_spki(self.public_key)
        try:
            key.verify(signature, self.encoded, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature as error:
            raise VerificationError("Invalid signature") from error
        if self.confirm != CONFIRM:
            raise VerificationError("Invalid confirm word")
