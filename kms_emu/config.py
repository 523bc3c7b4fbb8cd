"""The KMS's configuration: upstream's kms.toml, with the keys of 0.5.x and of next.

Source: dstack `kms/kms.toml` and `kms/src/config.rs` at 312dc605 and 40eaf35e. Every known key is accepted; an unknown
key is an error that names it. docs/configuration.md lists the keys that have no effect here. The section `emulator` is
ours.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field

from dstack_emu.attest.certificate import EvidenceForm
from dstack_emu.attest.release import Release
from dstack_emu.kms_emu.errors import KmsConfigError
from dstack_emu.transport.settings import (
    Duration,
    FilePath,
    Port,
    StrictSection,
    merge,
    overrides,
    read_toml,
    typed_value,
    validate,
)
from dstack_emu.transport.trust_root import AttestationConfig

LOOPBACK: Final = "127.0.0.1"
"""Where it listens if the file names no address. Upstream's default is all addresses."""
VARIABLES: Final = "DSTACK_EMU_KMS_"
"""The prefix of variables that set a key, such as `DSTACK_EMU_KMS_CORE__AUTH_API__WEBHOOK__URL`.

An addition: upstream's KMS reads no configuration from the environment (`load_config/src/lib.rs` at 40eaf35e merges
files into the web server's defaults, and nothing else).
"""


def _token_hash(value: Any) -> Any:
    """Normalize the SHA-256 of a token in hex; upper case and a leading 0x are accepted, as upstream."""
    if not isinstance(value, str) or not value:
        return value
    digits = value.removeprefix("0x").lower()
    if not re.fullmatch("[0-9a-f]{64}", digits):
        raise ValueError("the SHA-256 of the token in hex expected: 64 digits")
    return digits


TokenHash = Annotated[str, BeforeValidator(_token_hash)]


class MutualTls(StrictSection):
    """[rpc.tls.mutual]: the CA of client certificates."""

    ca_certs: FilePath = Path("/etc/kms/certs/tmp-ca.crt")
    mandatory: bool = False


class Tls(StrictSection):
    """[rpc.tls]."""

    key: FilePath = Path("/etc/kms/certs/rpc.key")
    certs: FilePath = Path("/etc/kms/certs/rpc.crt")
    mutual: MutualTls = MutualTls()


class RpcSection(StrictSection):
    """[rpc]: the address of the runtime phase."""

    address: str = LOOPBACK
    port: Port = 8000
    tls: Tls = Tls()


class ImageSection(StrictSection):
    """[core.image]."""

    verify: bool = True
    cache_dir: FilePath = Path("/usr/share/dstack/images")
    download_url: str = "http://localhost:8000/{OS_IMAGE_HASH}.tar.gz"
    download_timeout: Duration = 120.0


class Metrics(StrictSection):
    """[core.metrics]."""

    enabled: bool = True


class Webhook(StrictSection):
    """[core.auth_api.webhook]."""

    url: str = "http://auth-api:8000"
    timeout: Duration = 10.0


class Dev(StrictSection):
    """[core.auth_api.dev]."""

    gateway_app_id: str = "any"


class AuthApiConfig(StrictSection):
    """[core.auth_api]."""

    type: Literal["webhook", "dev"] = "webhook"
    webhook: Webhook = Webhook()
    dev: Dev = Dev()


class OnboardConfig(StrictSection):
    """[core.onboard]: the address and the rules of the onboard phase (upstream: the same port as [rpc])."""

    enabled: bool = True
    auto_bootstrap_domain: str = ""
    address: str = LOOPBACK
    port: Port = 8000
    quote_enabled: bool = True
    auth_token: str = Field(default="", repr=False)
    htpasswd_file: str = ""
    public_key_handover: bool = True


class AdminTls(StrictSection):
    """[core.admin.tls]: certificate and key of the admin listener, which is plain HTTP without them."""

    key: FilePath | None = None
    certs: FilePath | None = None

    @property
    def files(self) -> tuple[Path, Path] | None:
        """Return the files of certificate chain and key; None if neither is set.

        Raises `KmsConfigError` if only one is set.
        """
        if self.key is None and self.certs is None:
            return None
        if self.key is None or self.certs is None:
            missing = "key" if self.key is None else "certs"
            raise KmsConfigError(f"core.admin.tls has no {missing}: key and certs belong together")
        return self.certs, self.key


class AdminSection(StrictSection):
    """[core.admin] (next)."""

    enabled: bool = False
    address: str = "127.0.0.1"
    port: Port = 8001
    auth_token: str = Field(default="", repr=False)
    htpasswd_file: str = ""
    insecure_no_auth: bool = False
    tls: AdminTls = AdminTls()


class Core(StrictSection):
    """[core]."""

    cert_dir: FilePath = Path("/etc/kms/certs")
    subject_postfix: str = ".dstack"
    site_name: str = ""
    enforce_self_authorization: bool = True
    attest_rpc_cert: bool = True
    sev_snp_key_release: bool = False
    aws_nitro_tpm_key_release: bool = False
    nitro_enclave_key_release: bool = False
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
        """Return the URL of the PCCS: from next's key or, if that is empty, from the key of 0.5.x."""
        return self.attestation.urls.pccs or self.pccs_url


class Grpc(StrictSection):
    """[emulator.grpc]: whether gRPC is served, and at which addresses."""

    enabled: bool = False
    address: str = "127.0.0.1"
    port: Port = 8002
    mtls_port: Port = 8003
    admin_port: Port = 8004


class Emulator(StrictSection):
    """[emulator]: settings of this emulator only; an upstream KMS ignores them."""

    rpc_cert_evidence: EvidenceForm = "versioned"
    rpc_cert_names: list[str] = Field(default_factory=list)
    auth_api_cache: bool = False
    grpc: Grpc = Grpc()


class KmsConfig(StrictSection):
    """The whole file. `default` configures upstream's web server, and has no effect here."""

    default: dict[str, Any] = Field(default_factory=dict)
    rpc: RpcSection = RpcSection()
    core: Core = Core()
    emulator: Emulator = Emulator()

    @classmethod
    def load(cls, path: Path, variables: Mapping[str, str] | None = None) -> Self:
        """Read a kms.toml, with the keys that `variables` override.

        Raises `ConfigError` naming the file and each key that is wrong, or the variable.
        """
        document = read_toml(path)
        return cls.from_document(merge(document, cls.overrides(variables or {})), str(path))

    def require_settings_of(self, release: Release) -> None:
        """Refuse security settings that a release does not know; raise `KmsConfigError`."""
        onboard, words = self.core.onboard, f"is not known to dstack {release.name}, and would protect nothing"
        if not release.onboard_token:
            for name in ("auth_token", "htpasswd_file"):
                if getattr(onboard, name):
                    raise KmsConfigError(f"core.onboard.{name} {words}: leave it out, or run another release")
        if not (release.public_key_handover_option or onboard.public_key_handover):
            raise KmsConfigError(
                f"core.onboard.public_key_handover = false {words}: leave it out, or run another release"
            )

    def ineffective(self, release: Release) -> Iterator[tuple[str, str]]:
        """Yield the settings that ask for something that a KMS of this release does not do, each with the reason."""
        core = self.core
        if core.admin_token_hash and not release.clear_image_cache_with_token:
            yield "core.admin_token_hash", "this release has ClearImageCache on the admin listener alone: core.admin"
        if self.rpc.tls.mutual.mandatory and release.any_client_certificate_issuer:
            yield "rpc.tls.mutual.mandatory = true", "in this release a client certificate is always optional"
        if not core.onboard.quote_enabled:
            yield "core.onboard.quote_enabled = false", "a KMS always quotes, unless core.attest_rpc_cert is false"

    @classmethod
    def overrides(cls, variables: Mapping[str, str]) -> dict[str, Any]:
        """Return the values of the variables with the prefix, in the shape of the file; raise `ConfigError`."""
        return overrides(variables, VARIABLES, typed_value(cls, "kms.toml"))

    @classmethod
    def from_document(cls, document: dict[str, Any], source: str) -> Self:
        """Validate a parsed document; raise `ConfigError` naming `source` and each key that is wrong."""
        return validate(cls, document, source)

    def listening_at(self, host: str, port: int) -> Self:
        """Return a copy with both phases at one address."""
        where = {"address": host, "port": port}
        onboard = self.core.onboard.model_copy(update=where)
        core = self.core.model_copy(update={"onboard": onboard})
        return self.model_copy(update={"rpc": self.rpc.model_copy(update=where), "core": core})

    def with_auth_api_cache(self) -> Self:
        """Return a copy with the cache of the webhook's answers switched on."""
        return self.model_copy(update={"emulator": self.emulator.model_copy(update={"auth_api_cache": True})})
