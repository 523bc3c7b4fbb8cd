"""A client with evidence, as an app has it when it boots: its certificate, under a KMS's temporary CA, has a quote."""

from dataclasses import dataclass, replace
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.certificate import pem, spki_der
from dstack_emu.attest.csr import CertificateConfig, SigningRequest
from dstack_emu.attest.issuing import CertificateAuthority, CertificateRequest, load_authority
from dstack_emu.attest.kdf import load_p256_pem, p256_from_uniform, pkcs8_pem
from dstack_emu.attest.report_data import ratls_report_data
from dstack_emu.kms_emu.agent_client import GuestAgentClient
from dstack_emu.simulator.seed import Entropy
from dstack_emu.transport.pccs_client import Clock
from dstack_emu.transport.ratls import CLIENT_SUBJECT
from dstack_emu.transport.tls import Identity

CSR_VERSION: Final = 2
CSR_NAME: Final = "runbook.example.test"
IN_MRTD: Final = 200
"""The offset of a byte of MRTD in a quote; it is the same in every version."""


@dataclass(frozen=True, slots=True)
class AttestedClient:
    """Makes client identities of an app: the app's agent quotes, and the KMS's temporary CA signs."""

    agent: GuestAgentClient
    temp_ca: CertificateAuthority
    entropy: Entropy
    clock: Clock

    @classmethod
    def of(cls, answer: dict[str, Any], agent: GuestAgentClient, entropy: Entropy, clock: Clock) -> "AttestedClient":
        """Make a client with the CA in an answer of GetTempCaCert; raise `FormatError` if it cannot be read."""
        key = load_p256_pem(str(answer.get("temp_ca_key")), "temporary CA key")
        temp_ca = load_authority(str(answer.get("temp_ca_cert")), key, "temporary CA certificate")
        return cls(agent, temp_ca, entropy, clock)

    async def identity(self, *, forged: bool = False) -> Identity:
        """Make a new key, and a certificate with evidence for it; with `forged`, one bit of the quote is changed.

        This and the other methods raise `KmsError` if the agent gives no evidence.
        """
        key = self._key()
        evidence = await self._evidence(key)
        return self._issue(key, altered(evidence) if forged else evidence)

    async def identity_with_stolen_evidence(self) -> Identity:
        """Make a new key, and a certificate with evidence for another key."""
        return self._issue(self._key(), await self._evidence(self._key()))

    def identity_without_evidence(self) -> Identity:
        """Make a new key, and a certificate without evidence."""
        return self._issue(self._key(), None)

    async def signing_request(self, *, forged: bool = False) -> dict[str, Any]:
        """Return SignCert's arguments for a new key with evidence; with `forged`, one bit of the quote is changed."""
        key = self._key()
        evidence = await self._evidence(key)
        config = CertificateConfig(subject=CSR_NAME, alt_names=(CSR_NAME,), server_auth=True)
        request = SigningRequest.make(spki_der(key.public_key()), config, altered(evidence) if forged else evidence)
        return {"api_version": CSR_VERSION, "csr": request.encoded.hex(), "signature": request.sign(key).hex()}

    def _key(self) -> ec.EllipticCurvePrivateKey:
        return p256_from_uniform(self.entropy(48))

    async def _evidence(self, key: ec.EllipticCurvePrivateKey) -> Attestation:
        return await self.agent.evidence(ratls_report_data(spki_der(key.public_key())))

    def _issue(self, key: ec.EllipticCurvePrivateKey, attestation: Attestation | None) -> Identity:
        request = CertificateRequest(public_key=key.public_key(), subject=CLIENT_SUBJECT, attestation=attestation)
        return Identity(pem(self.temp_ca.issue(request, self.clock())), pkcs8_pem(key))


def altered(attestation: Attestation) -> Attestation:
    """Return evidence with one bit of its quote changed."""
    quote = bytearray(attestation.quote)
    quote[IN_MRTD] ^= 1
    return replace(attestation, quote=bytes(quote))
