"""Who calls a KMS: the client certificate of the connection, and the evidence inside it.

The transport has checked by then that the certificate is the temporary CA's and the client holds its key. Evidence is
verified at every call, as upstream: a platform that was revoked meanwhile is refused. Source: dstack `ra-rpc/src/
rocket_helper.rs` at 312dc605.
"""

from dstack_emu.attest.errors import FormatError
from dstack_emu.kms_emu.errors import NotAttestedError, context
from dstack_emu.kms_emu.service import Caller
from dstack_emu.transport.pccs_client import AttestationVerifier


async def caller_of(certificate_der: bytes | None, verifier: AttestationVerifier) -> Caller:
    """Verify the certificate that a client showed (DER), or None; raise the refusal that each call of it gets."""
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
