"""RA-TLS clients: make a certificate with evidence, and verify the evidence of a server.

dstack-util does this when a guest fetches keys, and a KMS when it is onboarded from another one. Source: dstack
`ra-rpc/src/client.rs` and `ra-tls/src/cert.rs` (`generate_ra_cert`) at 312dc605.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import Message

from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.certificate import app_id_of, attestation_of, certificate_spki, load_der, pem, spki_der, usage_of
from dstack_emu.attest.errors import AttestError, FormatError, UnverifiableError, VerificationError
from dstack_emu.attest.issuing import CertificateAuthority, CertificateRequest, self_signed
from dstack_emu.attest.kdf import pkcs8_pem
from dstack_emu.attest.report_data import ratls_report_data
from dstack_emu.attest.verify import VerifiedAttestation
from dstack_emu.transport.client import MoreHeaders, PrpcClient, RpcError, TransportError
from dstack_emu.transport.http_client import Route, direct
from dstack_emu.transport.pccs_client import AttestationVerifier
from dstack_emu.transport.status import status_line
from dstack_emu.transport.tls import Identity, client_context
from dstack_emu.transport.urls import shown_url

CLIENT_SUBJECT: Final = "RA-TLS TEMP Cert"
SELF_ISSUED_SUBJECT: Final = "RA-TLS Self-Signed Cert"
TIMEOUT: Final = 60.0

M = TypeVar("M", bound=Message)
T = TypeVar("T")
Attester = Callable[[bytes], Awaitable[Attestation]]
"""Returns evidence with 64 bytes of report_data, from a guest agent or from the trust domain itself."""


@dataclass(frozen=True, slots=True)
class AttestedServer:
    """What a server's certificate proves; `attestation` is None if it has no evidence.

    `usage` and `app_id` (20 bytes) are what its issuer says, None if it says nothing.
    """

    attestation: VerifiedAttestation | None
    usage: str | None
    app_id: bytes | None = None


async def make_identity(
    temp_ca: CertificateAuthority,
    key: ec.EllipticCurvePrivateKey,
    attester: Attester,
    now: int,
    *,
    keeps_log_digests: bool = False,
) -> Identity:
    """Make a client certificate under a KMS's temporary CA, with evidence that binds its key."""
    request = CertificateRequest(
        public_key=key.public_key(),
        subject=CLIENT_SUBJECT,
        attestation=await attester(ratls_report_data(spki_der(key.public_key()))),
        keeps_log_digests=keeps_log_digests,
    )
    return Identity(pem(temp_ca.issue(request, now)), pkcs8_pem(key))


async def make_self_issued_identity(key: ec.EllipticCurvePrivateKey, attester: Attester, now: int) -> Identity:
    """Make a client certificate that its own key has signed, and that carries evidence bound to that key.

    Servers since 0.6 take one.
    """
    attestation = await attester(ratls_report_data(spki_der(key.public_key())))
    request = CertificateRequest(
        public_key=key.public_key(), subject=SELF_ISSUED_SUBJECT, client_auth=True, attestation=attestation
    )
    return Identity(self_signed(request, key, now).pem, pkcs8_pem(key))


class RaTlsError(Exception):
    """A server gave no usable answer: none came, it refused, or the answer cannot be parsed.

    The texts are those of upstream's client.
    """


class RefusedError(RaTlsError):
    """A server refused the call; its error is in the text."""


class RaTlsUnreachableError(RaTlsError):
    """No answer came: the server cannot be reached, or does not speak TLS."""


class RaTlsClient:
    """pRPC over TLS to one server. Close it.

    `root_ca` (PEM) must be the issuer of the server's certificate, whose name is checked, too. Without it any
    certificate is accepted, and `check_peer` alone decides: it is called with the server of every answer, before the
    answer and its status are read.
    """

    def __init__(
        self,
        url: str,
        *,
        identity: Identity | None = None,
        root_ca: str | None = None,
        verifier: AttestationVerifier | None = None,
        check_peer: Callable[[AttestedServer], None] | None = None,
        timeout: float = TIMEOUT,
        headers: MoreHeaders | None = None,
        route: Route = direct,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise RaTlsError(
                f"Failed to send request: builder error: http(s) URL expected, got {shown_url(url)!r:.200}"
            )
        self.url = url

        async def check(certificate: bytes | None) -> None:
            if check_peer is None:
                return
            try:
                check_peer(await peer_of(certificate, verifier))
            except AttestError as error:
                raise _within(f"failed to validate the server attestation of {shown_url(url)}", error) from error

        tls = client_context(identity, root_ca)
        self._client = PrpcClient(url, timeout=timeout, ssl=tls, check_server=check, headers=headers, route=route)

    async def call(self, method: str, request: Message, answer: type[M]) -> M:
        """Call a method and return its answer.

        Raises `RaTlsError`, or `VerificationError` if the server's evidence does not hold or `check_peer` refuses.
        """
        try:
            return await self._client.call(method, request, answer)
        except TransportError as error:
            raise RaTlsUnreachableError(f"Failed to send request: {error}") from error
        except RpcError as error:
            # pRPC's refusals have status 400.
            kind = RefusedError if error.status == HTTPStatus.BAD_REQUEST else RaTlsError
            raise kind(f"Request failed with status={status_line(error.status)}, error={error.body}") from error
        except FormatError as error:
            raise RaTlsError(f"Failed to deserialize response: {error}") from error

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


async def peer_of(certificate_der: bytes | None, verifier: AttestationVerifier | None) -> AttestedServer:
    """Return what a server's certificate proves; raise `AttestError` if its evidence does not hold."""
    if certificate_der is None:
        raise VerificationError("No TLS info in response")
    certificate = load_der(certificate_der)
    usage = _read("Failed to get special usage", usage_of, certificate)
    app_id = _read("Failed to get app id", app_id_of, certificate)
    if verifier is None:
        return AttestedServer(None, usage, app_id)
    attestation = _read("Failed to parse attestation", attestation_of, certificate)
    if attestation is None:
        return AttestedServer(None, usage, app_id)
    try:
        verified = await verifier.verify_bound(attestation, certificate_spki(certificate))
    except AttestError as error:
        raise _within("failed to verify the attestation report presented by the server", error) from error
    return AttestedServer(verified, usage, app_id)


def _read(text: str, read: Callable[[x509.Certificate], T], certificate: x509.Certificate) -> T:
    try:
        return read(certificate)
    except FormatError as error:
        raise FormatError(f"{text}: {error}") from error


def _within(text: str, error: AttestError) -> VerificationError:
    """Return an error of the verification of a server, with `text` before its own."""
    kind = UnverifiableError if isinstance(error, UnverifiableError) else VerificationError
    return kind(f"{text}: {error}")
