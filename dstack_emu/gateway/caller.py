"""The caller of the RPC listener, identified by its client certificate.

The transport has verified that the certificate is under the KMS's root, and that the client holds its key. Evidence in
it is verified at every call. Source: dstack `ra-rpc/src/rocket_helper.rs` at 312dc605.
"""

from dataclasses import dataclass

from dstack_emu.attest.app_info import AppInfo
from dstack_emu.attest.certificate import app_id_of, app_info_of, load_der
from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.verify import VerifiedAttestation
from dstack_emu.gateway.errors import GatewayError
from dstack_emu.transport.pccs_client import AttestationVerifier


@dataclass(frozen=True, slots=True)
class Caller:
    """What a client certificate says; all None without one."""

    app_id: bytes | None = None
    app_info: AppInfo | None = None
    attestation: VerifiedAttestation | None = None

    def identity(self) -> AppInfo:
        """Return who calls, which the KMS or else the evidence says; raise `GatewayError` if neither does."""
        if self.app_info is not None:
            return self.app_info
        if self.attestation is None:
            raise GatewayError("neither app-info nor attestation provided")
        try:
            return self.attestation.app_info()
        except AttestError as error:
            raise GatewayError(f"failed to decode app-info from attestation: {error}") from error


async def caller_of(certificate_der: bytes | None, verifier: AttestationVerifier) -> Caller:
    """Read a client's certificate (DER), and verify the evidence in it; raise `GatewayError`."""
    if certificate_der is None:
        return Caller()
    try:
        certificate = load_der(certificate_der)
        app_id, app_info = app_id_of(certificate), app_info_of(certificate)
        spki, evidence = verifier.read_certificate(certificate_der)
    except AttestError as error:
        raise GatewayError(str(error)) from error
    if evidence is None:
        return Caller(app_id, app_info)
    try:
        return Caller(app_id, app_info, await verifier.verify_bound(evidence, spki))
    except AttestError as error:
        raise GatewayError(f"invalid quote: {error}") from error
