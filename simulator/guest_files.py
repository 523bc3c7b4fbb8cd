"""The files of a real guest, in their own formats: its keys, its system configuration.

Formats: dstack `dstack-types/src/lib.rs` (`AppKeys`, `KeyProvider`, `SysConfig`) at 312dc605; upstream's simulator
reads the same (`sdk/simulator/appkeys.json`, `sys-config.json`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dstack_emu.attest.certificate import CertificateAuthority, load_authority, load_pem
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.kdf import load_p256_pem
from dstack_emu.simulator.app_keys import AppKeys
from dstack_emu.simulator.trust_domain import KeyProvider


@dataclass(frozen=True, slots=True)
class KmsAccess:
    """The KMS that issues certificates for a guest: its URL, and the CA for client certificates."""

    url: str
    temp_ca: CertificateAuthority


@dataclass(frozen=True, slots=True)
class KeyFile:
    """An agent's key file: the keys, and the issuer of certificates, either the app's own CA or a KMS."""

    keys: AppKeys
    issuer: CertificateAuthority | KmsAccess

    @classmethod
    def load(cls, path: Path) -> Self:
        """Load the file; raise `FormatError` that names file and key."""
        source = _Object(_read_json(path), str(path))
        kind, provider = _single(source.object("key_provider"))
        ca_cert = source.text("ca_cert")
        issuer: CertificateAuthority | KmsAccess
        if kind == "Kms":
            temp_key = load_p256_pem(provider.text("tmp_ca_key"), f"{path}: key_provider.Kms.tmp_ca_key")
            temp_ca = load_authority(provider.text("tmp_ca_cert"), temp_key, f"{path}: key_provider.Kms.tmp_ca_cert")
            load_pem(ca_cert, f"{path}: ca_cert")
            url = provider.text("url")
            if not url.startswith("https://"):
                raise FormatError(f"{path}: key_provider.Kms.url: https://host:port/prpc expected, got {url!r:.200}")
            issuer = KmsAccess(url, temp_ca)
            named = KeyProvider("kms", provider.octets("pubkey").hex())
        elif kind in ("None", "Local", "Tpm"):
            key = load_p256_pem(provider.text("key"), f"{path}: key_provider.{kind}.key")
            issuer = load_authority(ca_cert, key, f"{path}: ca_cert")
            named = KeyProvider("local-sgx", provider.octets("mr").hex()) if kind == "Local" else KeyProvider("none")
        else:
            raise FormatError(f"{path}: key_provider: None, Local, Tpm or Kms expected, got {kind:.40}")
        keys = AppKeys(
            disk_crypt_key=source.octets("disk_crypt_key"),
            env_crypt_key=source.octets("env_crypt_key", b""),
            k256_key=source.octets("k256_key"),
            k256_signature=source.octets("k256_signature"),
            gateway_app_id=source.text("gateway_app_id"),
            ca_cert=ca_cert,
            provider=named,
        )
        return cls(keys, issuer)


def load_vm_config(path: Path) -> str:
    """Load the `vm_config` text of a system configuration file; raise `FormatError` that names file and key."""
    return _Object(_read_json(path), str(path)).text("vm_config")


def read_text(path: Path, what: str) -> str:
    """Read a text file; raise `FormatError` that names the file and what it should be."""
    try:
        return path.read_text()
    except OSError as error:
        raise FormatError(f"{what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{what} {path}: UTF-8 text expected ({error.reason} at byte {error.start})") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path, "file"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: JSON expected ({error})") from error


class _Object:
    """Typed access to a JSON object; each error names file and key."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(f"{where}: object expected, got {type(value).__name__}")
        self.value, self.where = value, where

    def text(self, key: str) -> str:
        value = self.value.get(key)
        if not isinstance(value, str):
            raise FormatError(f"{self.where}: {key}: text expected, got {type(value).__name__}")
        return value

    def octets(self, key: str, default: bytes | None = None) -> bytes:
        if default is not None and key not in self.value:
            return default
        try:
            return bytes.fromhex(self.text(key))
        except ValueError as error:
            raise FormatError(f"{self.where}: {key}: hex expected") from error

    def object(self, key: str) -> "_Object":
        return _Object(self.value.get(key), f"{self.where}: {key}")


def _single(source: _Object) -> tuple[str, _Object]:
    """Return tag and content of a tagged value as serde writes it: an object with one key."""
    if len(source.value) != 1:
        raise FormatError(f"{source.where}: an object with one key expected, got {len(source.value)}")
    kind = next(iter(source.value))
    return kind, source.object(kind)
