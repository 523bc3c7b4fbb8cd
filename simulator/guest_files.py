"""The files of a real guest, in their own formats: its keys, its system configuration, its environment.

Formats: dstack `dstack-types/src/lib.rs` (`AppKeys`, `KeyProvider`, `SysConfig`) at 312dc605; upstream's simulator
reads the same (`sdk/simulator/appkeys.json`, `sys-config.json`). The environment: `dstack-util/src/system_setup.rs` and
`dstack-types/src/shared_filenames.rs`.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from dstack_emu.attest.certificate import load_pem
from dstack_emu.attest.encrypted_env import MAX_FILE_SIZE, decrypt_env, environment_file
from dstack_emu.attest.errors import AttestError, FormatError
from dstack_emu.attest.issuing import CertificateAuthority, load_authority
from dstack_emu.attest.kdf import load_p256_pem
from dstack_emu.simulator.app_keys import AppKeys
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.trust_domain import KeyProvider, TrustDomain
from dstack_emu.transport.urls import shown_url

DECRYPTED_ENV: Final = ".decrypted-env"
DECRYPTED_ENV_JSON: Final = ".decrypted-env.json"


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
                raise FormatError(
                    f"{path}: key_provider.Kms.url: https://host:port/prpc expected, got {shown_url(url)!r:.200}"
                )
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


def load_encrypted_env(path: Path) -> bytes:
    """Load the encrypted environment of a deployment: the bytes themselves, or their hex, as deployers' tools print it.

    Raises `FormatError`, which names the file, if it cannot be read or is larger than a guest copies.
    """
    try:
        sealed = path.read_bytes()
    except OSError as error:
        raise FormatError(f"encrypted environment {path}: {error.strerror}") from error
    with contextlib.suppress(ValueError):  # what is not hex is the bytes themselves
        sealed = bytes.fromhex(sealed.decode("ascii").strip().removeprefix("0x"))
    require_env_size(sealed, str(path))
    return sealed


def require_env_size(sealed: bytes, where: str) -> None:
    """Raise `FormatError` if an encrypted environment is larger than a guest copies."""
    if len(sealed) > MAX_FILE_SIZE:
        raise FormatError(f"{where}: encrypted environment: at most {MAX_FILE_SIZE} bytes expected, got {len(sealed)}")


def decrypt_environment(domain: TrustDomain, sealed: bytes, keys: AppKeys) -> dict[str, str]:
    """Decrypt a domain's environment with its keys, as its release does; return what its app-compose allows.

    Raises `GuestError`, which ends the boot.
    """
    try:
        return decrypt_env(sealed, keys.env_crypt_key, domain.manifest.allowed_envs, domain.release)
    except AttestError as error:
        raise GuestError(str(error)) from error


def write_environment(folder: Path, environment: Mapping[str, str]) -> Path:
    """Write the two files of an app's environment, for their owner alone; return that of systemd's format."""
    document = json.dumps(environment, separators=(",", ":"), ensure_ascii=False)
    write_private(folder / DECRYPTED_ENV, environment_file(environment))
    write_private(folder / DECRYPTED_ENV_JSON, document)
    return folder / DECRYPTED_ENV


def write_private(path: Path, text: str) -> None:
    """Write a new file for its owner alone, in the place of one that may exist; raise `OSError`."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def remove_environment(folder: Path) -> None:
    """Remove what `write_environment` wrote, if it did."""
    for name in (DECRYPTED_ENV, DECRYPTED_ENV_JSON):
        (folder / name).unlink(missing_ok=True)


def read_text_file(path: Path, what: str) -> str:
    """Read a text file to the byte; raise `FormatError` that names the file and what it should be."""
    try:
        return path.read_bytes().decode()  # read_text would replace line ends
    except OSError as error:
        raise FormatError(f"{what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{what} {path}: UTF-8 text expected ({error.reason} at byte {error.start})") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text_file(path, "file"))
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
