"""The KMS's configuration: upstream's kms.toml, with the keys of 0.5.x and of next.

Source: dstack `kms/kms.toml` and `kms/src/config.rs` at 312dc605 and 40eaf35e. Every known key is accepted; an unknown
one is an error that names it. What a key is for and this KMS does not do is said where it is used, or in
docs/fidelity.md. The section `emulator` is ours. How the environment overrides keys: `kms_emu/environment.py`.
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dstack_emu.attest.certificate import EvidenceForm
from dstack_emu.kms_emu import environment
from dstack_emu.kms_emu.errors import KmsConfigError

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def _seconds(value: Any) -> Any:
    """Read `2m`, `500ms`, `5s`, or a bare number of seconds."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)", value)):
        return float(match[1]) * _UNITS[match[2]]
    return value


def _token_hash(value: Any) -> Any:
    """Read the SHA-256 of a token in hex, as upstream: upper case and a leading 0x are fine."""
    if not isinstance(value, str) or not value:
        return value
    digits = value.removeprefix("0x").lower()
    if not re.fullmatch("[0-9a-f]{64}", digits):
        raise ValueError("the SHA-256 of the token in hex expected: 64 digits")
    return digits


TokenHash = Annotated[str, BeforeValidator(_token_hash)]
Seconds = Annotated[float, BeforeValidator(_seconds)]
Port = Annotated[int, Field(ge=0, le=65535)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MutualTls(_Section):
    """[rpc.tls.mutual]: who may issue client certificates."""

    ca_certs: Path = Path("/etc/kms/certs/tmp-ca.crt")
    mandatory: bool = False


class Tls(_Section):
    """[rpc.tls]."""

    key: Path = Path("/etc/kms/certs/rpc.key")
    certs: Path = Path("/etc/kms/certs/rpc.crt")
    mutual: MutualTls = MutualTls()


class RpcSection(_Section):
    """[rpc]: where the runtime phase listens."""

    address: str = "0.0.0.0"  # noqa: S104 - upstream's default; the emulator's own commands bind loopback
    port: Port = 8000
    tls: Tls = Tls()


class AttestationUrls(_Section):
    """[core.attestation.urls]."""

    pccs: str = ""
    amd_kds: str = ""


class RootCaPaths(_Section):
    """[core.attestation.root_ca]: only `tdx` has a meaning here."""

    tdx: Path | None = None
    gcp_tpm: Path | None = None
    aws_nitro_enclave: Path | None = None
    aws_nitro_tpm: Path | None = None
    sev_snp_milan: Path | None = None
    sev_snp_genoa: Path | None = None
    sev_snp_turin: Path | None = None


class AttestationConfig(_Section):
    """[core.attestation] (next): another root than Intel's needs the insecure opt-in. `collateral_ttl` is our own."""

    insecure_allow_external_trust_anchors: bool = False
    collateral_ttl: Annotated[Seconds, Field(ge=0, allow_inf_nan=False)] = 0.0
    urls: AttestationUrls = AttestationUrls()
    root_ca: RootCaPaths = RootCaPaths()


class ImageSection(_Section):
    """[core.image]."""

    verify: bool = True
    cache_dir: Path = Path("/usr/share/dstack/images")
    download_url: str = "http://localhost:8000/{OS_IMAGE_HASH}.tar.gz"
    download_timeout: Seconds = 120.0


class Metrics(_Section):
    """[core.metrics]."""

    enabled: bool = True


class Webhook(_Section):
    """[core.auth_api.webhook]."""

    url: str = "http://auth-api:8000"


class Dev(_Section):
    """[core.auth_api.dev]."""

    gateway_app_id: str = "any"


class AuthApiConfig(_Section):
    """[core.auth_api]."""

    type: Literal["webhook", "dev"] = "webhook"
    webhook: Webhook = Webhook()
    dev: Dev = Dev()


class OnboardConfig(_Section):
    """[core.onboard]: where the onboard phase listens (upstream: the same port as [rpc])."""

    enabled: bool = True
    auto_bootstrap_domain: str = ""
    address: str = "0.0.0.0"  # noqa: S104 - as above
    port: Port = 8000
    quote_enabled: bool = True


class AdminSection(_Section):
    """[core.admin] (next)."""

    enabled: bool = False
    address: str = "127.0.0.1"
    port: Port = 8001
    auth_token: str = ""
    htpasswd_file: str = ""
    insecure_no_auth: bool = False


class Core(_Section):
    """[core]."""

    cert_dir: Path = Path("/etc/kms/certs")
    subject_postfix: str = ".dstack"
    site_name: str = ""
    enforce_self_authorization: bool = True
    attest_rpc_cert: bool = True
    sev_snp_key_release: bool = False
    aws_nitro_tpm_key_release: bool = False
    pccs_url: str = ""
    admin_token_hash: TokenHash = ""
    attestation: AttestationConfig = AttestationConfig()
    image: ImageSection = ImageSection()
    metrics: Metrics = Metrics()
    auth_api: AuthApiConfig = AuthApiConfig()
    onboard: OnboardConfig = OnboardConfig()
    admin: AdminSection = AdminSection()

    @property
    def pccs(self) -> str:
        """The PCCS of next's key, else of 0.5.x's."""
        return self.attestation.urls.pccs or self.pccs_url


class Grpc(_Section):
    """[emulator.grpc]: where gRPC is served, if it is."""

    enabled: bool = False
    address: str = "127.0.0.1"
    port: Port = 8002
    mtls_port: Port = 8003
    admin_port: Port = 8004


class Emulator(_Section):
    """[emulator], our own: what no upstream KMS of today does, and none minds in its file."""

    rpc_cert_evidence: EvidenceForm = "versioned"
    grpc: Grpc = Grpc()


class KmsConfig(_Section):
    """The whole file. `default` is the web server's own section upstream: known, and without effect here."""

    default: dict[str, Any] = {}
    rpc: RpcSection = RpcSection()
    core: Core = Core()
    emulator: Emulator = Emulator()

    @classmethod
    def load(cls, path: Path, variables: Mapping[str, str] | None = None) -> Self:
        """Read a kms.toml, with the keys that `variables` override.

        Raises `KmsConfigError` naming the file and each key that is wrong, or the variable.
        """
        try:
            document = tomllib.loads(path.read_text())
        except OSError as error:
            raise KmsConfigError(f"cannot read {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise KmsConfigError(f"{path} is no TOML: {error}") from error
        return cls.from_document(environment.merged(document, environment.overrides(cls, variables or {})), str(path))

    @classmethod
    def from_document(cls, document: dict[str, Any], source: str) -> Self:
        """Check a parsed document; `source` names it in errors."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
            raise KmsConfigError(f"{source}: {problems}") from error

    def listening_at(self, host: str, port: int) -> Self:
        """The same, with both phases at one address."""
        where = {"address": host, "port": port}
        onboard = self.core.onboard.model_copy(update=where)
        core = self.core.model_copy(update={"onboard": onboard})
        return self.model_copy(update={"rpc": self.rpc.model_copy(update=where), "core": core})
