"""The section `attestation` of a configuration file: the root certificate of verification, and the PCCS.

The KMS and the verifier have the same section. Source: dstack `kms/src/config.rs` and
`verifier/src/main.rs` at 40eaf35e. `collateral_ttl` and `emulated_pccs` are this emulator's own keys.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final

from cryptography import x509
from pydantic import Field

from dstack_emu.attest import der
from dstack_emu.attest.certificate import UNREADABLE
from dstack_emu.attest.errors import FormatError
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


_PLATFORMS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "tdx": "TDX",
        "gcp_tpm": "GCP TPM",
        "sev_snp_milan": "SEV-SNP Milan",
        "sev_snp_genoa": "SEV-SNP Genoa",
        "sev_snp_turin": "SEV-SNP Turin",
        "aws_nitro_enclave": "AWS Nitro Enclave",
        "aws_nitro_tpm": "AWS NitroTPM",
    }
)
"""What dstack's messages call the platform of each root, in the order in which it reads them."""


def trust_anchor(attestation: AttestationConfig, section: str = "") -> TrustAnchor:
    """Return Intel's root, or the configured one, which needs the insecure opt-in.

    The roots of other platforms are read, too, as dstack does, and have no effect. `section` is the prefix of
    `attestation` in the names of the keys, such as `core.`. Raises `ConfigError` with dstack's text; if the opt-in is
    missing, it names the key.
    """
    roots = attestation.root_ca
    given = {name: path for name in _PLATFORMS if (path := getattr(roots, name)) is not None}
    if given and not attestation.insecure_allow_external_trust_anchors:
        raise ConfigError(
            "external attestation trust anchors are configured but insecure_allow_external_trust_anchors is false "
            f"({section}attestation.root_ca.{next(iter(given))} is set, which needs "
            f"{section}attestation.insecure_allow_external_trust_anchors = true)"
        )
    certificates = {name: read_root(path, _PLATFORMS[name]) for name, path in given.items()}
    return TrustAnchor.of(certificates["tdx"]) if "tdx" in certificates else TrustAnchor.intel()


def read_root(path: Path, platform: str = "TDX") -> x509.Certificate:
    """Read a root certificate in PEM or DER; raise `ConfigError` with dstack's text, for one that is no CA, too."""
    what = f"{platform} root CA"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"failed to read {what} from {path}: {error.strerror}") from error
    is_pem = data.startswith(b"-----BEGIN")
    try:
        end = len(data) if is_pem else der.span(data, 0, what)[1]
        certificate = x509.load_pem_x509_certificate(data) if is_pem else x509.load_der_x509_certificate(data[:end])
        if end < len(data):
            raise ConfigError(f"trailing data in {what}: {path}")
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        constraints = x509.BasicConstraints(ca=False, path_length=None)
    except (FormatError, *UNREADABLE) as error:
        form = "PEM" if is_pem else "certificate"
        raise ConfigError(f"failed to parse {what} {form}: {path} is no certificate in PEM or DER: {error}") from error
    if not constraints.ca:
        raise ConfigError(f"{platform} root certificate is not a CA: {path}")
    return certificate
