"""The caller of a KMS, identified by the evidence in the client certificate of its connection.

The transport has verified that the client holds the certificate's key and, before 0.6, that the temporary CA issued it.
Evidence is verified at every call, as upstream, so a platform that was revoked meanwhile is refused. Source: dstack
`ra-rpc/src/rocket_helper.rs` at 312dc605.
"""

from dstack_emu.attest.errors import FormatError
from dstack_emu.kms_emu.errors import NotAttestedError, context
from dstack_emu.kms_emu.service import Caller
from dstack_emu.transport.pccs_client import AttestationVerifier


async def caller_of(certificate_der: bytes | None, verifier: AttestationVerifier) -> Caller:
    """Verify the evidence in a client's certificate (DER, or None without one).

    Raises `NotAttestedError`, or `UnavailableError` if the evidence could not be verified: the refusal of each call.
    """
    if certificate_der is None:
        return Caller()
    try:
        spki, attestation = verifier.read_certificate(certificate_der)
    except FormatError as error:
        raise NotAttestedError(str(error)) from error
    if attestation is None:
        return Caller()
    with context("invalid quote", NotAttestedError):
        return Caller(await verifier.verify_bound(attestation, spki))
