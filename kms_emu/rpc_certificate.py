"""The attested certificate of the RPC listener, and the renewal of the CA certificates above it.

The RPC certificate is issued anew at each start, over fresh evidence; a CA certificate only if it is about to expire.
Source: dstack `kms/src/main.rs` at 312dc605.
"""

from typing import Final

from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.certificate import spki_der
from dstack_emu.attest.issuing import CertificateAuthority
from dstack_emu.attest.report_data import ratls_report_data
from dstack_emu.kms_emu.cert_dir import ROOT_CA_CERT, RPC_CERT, TMP_CA_CERT
from dstack_emu.kms_emu.dependencies import KmsDependencies
from dstack_emu.kms_emu.errors import KmsConfigError, context
from dstack_emu.kms_emu.keys import KmsKeys, RootKeys

CA_RENEWAL_WINDOW: Final = 365 * 86400
"""Seconds before its end at which a stored CA certificate is issued anew."""

_REISSUE_FAILED: Final = (
    "Failed to reissue the attested KMS RPC certificate; refusing to start with a potentially unattested certificate"
)
_STATE_FAILED: Final = "Failed to initialize KMS state"


async def issue_rpc_certificate(deps: KmsDependencies, kms_keys: KmsKeys) -> str:
    """Issue the RPC listener's certificate over fresh evidence; return it in PEM."""
    evidence = await _rpc_evidence(deps, kms_keys)
    return kms_keys.roots.issue_rpc_certificate(
        kms_keys.rpc_key,
        kms_keys.domain,
        evidence,
        deps.issue_clock(),
        deps.evidence_form,
        more_names=deps.rpc_cert_names,
        keeps_log_digests=deps.release.certificate_log_has_digests,
    )


async def _rpc_evidence(deps: KmsDependencies, kms_keys: KmsKeys) -> Attestation | None:
    """Attest the RPC listener's key; return None if `attest_rpc_cert` is switched off."""
    if not deps.core.attest_rpc_cert:
        return None
    with context("failed to get a quote for the KMS RPC certificate"):
        return await deps.agent.evidence(ratls_report_data(spki_der(kms_keys.rpc_key.public_key())))


async def reissue_certificates(deps: KmsDependencies) -> KmsKeys:
    """Load the stored keys, issue the RPC certificate anew, and store it; renew each CA certificate that needs it.

    Raises `KmsConfigError` if the stored files cannot be used, or the refusal of the agent that did not answer.
    """
    with context(_REISSUE_FAILED, KmsConfigError):
        stored = KmsKeys.load(deps.folder, deps.core.onboard.auto_bootstrap_domain)
    with context(_STATE_FAILED, KmsConfigError):
        stored.require_own_certificates()
    kms_keys = KmsKeys(_renewed(deps, stored.roots), stored.rpc_key, stored.domain)
    with context(f"{_REISSUE_FAILED}: Failed to regenerate certificates"):
        certificate = await issue_rpc_certificate(deps, kms_keys)
    _store_if_renewed(deps, ROOT_CA_CERT, kms_keys.roots.root_ca, stored.roots.root_ca)
    _store_if_renewed(deps, TMP_CA_CERT, kms_keys.roots.temp_ca, stored.roots.temp_ca)
    deps.folder.replace(RPC_CERT, certificate.encode())
    return kms_keys


def _renewed(deps: KmsDependencies, old: RootKeys) -> RootKeys:
    """Return the same keys with a new certificate for each CA that is about to expire."""
    new = RootKeys.of(old.temp_ca.key, old.root_ca.key, old.k256, deps.issue_clock())
    limit = deps.clock() + CA_RENEWAL_WINDOW
    root_ca = new.root_ca if _expires_by(old.root_ca, limit) else old.root_ca
    temp_ca = new.temp_ca if _expires_by(old.temp_ca, limit) else old.temp_ca
    return RootKeys(root_ca, temp_ca, old.k256)


def _store_if_renewed(
    deps: KmsDependencies, name: str, authority: CertificateAuthority, stored: CertificateAuthority
) -> None:
    if authority is not stored:
        deps.folder.replace(name, authority.pem.encode())
        deps.log.info("renewed", file=name)


def _expires_by(authority: CertificateAuthority, limit: int) -> bool:
    return authority.certificate.not_valid_after_utc.timestamp() <= limit
