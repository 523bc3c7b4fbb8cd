"""The section `attestation` of a configuration file: the root certificate of verification, and the PCCS.

The KMS and the verifier have the same section. Source: dstack `kms/src/config.rs` and
`verifier/src/main.rs` at 40eaf35e. `collateral_ttl` and `emulated_pccs` are this emulator's own keys.
"""

from pathlib import Path
from typing import Annotated

from cryptography import x509
from pydantic import Field

from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.transport.errors import ConfigError
from dstack_emu.transport.settings import FilePath, Seconds, StrictSection


class AttestationUrls(StrictSection):
    """[attestation.urls]."""

    pccs: str = ""
    amd_kds: str = ""


class RootCaPaths(StrictSection):
    """[attestation.root_ca]; only `tdx` has an effect."""

    tdx: FilePath | None = None
    gcp_tpm: FilePath | None = None
    aws_nitro_enclave: FilePath | None = None
    aws_nitro_tpm: FilePath | None = None
    sev_snp_milan: FilePath | None = None
    sev_snp_genoa: FilePath | None = None
    sev_snp_turin: FilePath | None = None


class AttestationConfig(StrictSection):
    """[attestation]; a root other than Intel's needs the insecure opt-in; `collateral_ttl` is in seconds.

    `emulated_pccs` says that the PCCS is one of this emulator, whose documents are revalidated at once.
    """

    insecure_allow_external_trust_anchors: bool = False
    collateral_ttl: Annotated[Seconds, Field(ge=0, allow_inf_nan=False)] = 0.0
    emulated_pccs: bool = False
    urls: AttestationUrls = AttestationUrls()
    root_ca: RootCaPaths = RootCaPaths()


def trust_anchor(attestation: AttestationConfig, section: str = "") -> TrustAnchor:
    """Return Intel's root, or the configured one, which needs the insecure opt-in.

    `section` is the prefix of `attestation` in the names of the keys, such as `core.`. Raises `ConfigError`, which
    names the key.
    """
    roots = attestation.root_ca
    given = [name for name in type(roots).model_fields if getattr(roots, name) is not None]
    if given and not attestation.insecure_allow_external_trust_anchors:
        raise ConfigError(
            f"failed to load attestation verifier: {section}attestation.root_ca.{given[0]} is set, which needs "
            f"{section}attestation.insecure_allow_external_trust_anchors = true"
        )
    if roots.tdx is None:
        return TrustAnchor.intel()
    return TrustAnchor.of(_read_certificate(roots.tdx, f"{section}attestation.root_ca.tdx"))


def _read_certificate(path: Path, key: str) -> x509.Certificate:
    """Read a certificate in PEM or DER; raise `ConfigError`, which names the setting `key`."""
    try:
        data = path.read_bytes()
        if b"-----BEGIN" in data:
            return x509.load_pem_x509_certificate(data)
        return x509.load_der_x509_certificate(data)
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{key}: {path} is no certificate in PEM or DER: {error}") from error
