"""The encrypted environment of an app: a deployer encrypts it, and the guest decrypts it with a key from the KMS.

    offset  size
    0       32    ephemeral X25519 public key
    32      12    IV
    44      -     ciphertext and tag (16 bytes) of AES-256-GCM; its key is the shared secret itself, no associated data

The plain text is `{"env": [{"key": …, "value": …}, …]}`. Decryption proves only that the sender knew the app's
public key: the sender is unknown. Errors never show a value.

Source: dstack `dstack-util/src/{crypto,parse_env_file,system_setup}.rs` at 312dc605 and 40eaf35e (0.5.11).
"""

import json
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.json_struct import Reader, list_of, parse_json, read_members, read_text
from dstack_emu.attest.release import Release

KEY_SIZE: Final = 32
SEALING_SIZE: Final = 44
"""The number of random bytes that sealing takes: an ephemeral X25519 secret (32), and an IV (12)."""
IV_OFFSET, CIPHERTEXT_OFFSET = 32, 44
MAX_FILE_SIZE: Final = 256 * 1024
"""The maximum size of the encrypted file in bytes."""
MAX_VARIABLES: Final = 1024
MAX_NAME_SIZE: Final = 255
MAX_VALUE_SIZE: Final = 128 * 1024
MAX_TOTAL_SIZE: Final = 1024 * 1024
_NAME: Final = re.compile("[a-zA-Z_][a-zA-Z0-9_]*")


def decrypt_env(sealed: bytes, env_crypt_key: bytes, allowed: Collection[str], release: Release) -> dict[str, str]:
    """Open a guest's sealed file with its env key and return the variables that the app allows, sorted by name.

    Without a file there are none, and in some releases none without a key. Raises `VerificationError`, in upstream's
    words, if it cannot be opened, and `FormatError` if what it holds is no environment.
    """
    if not sealed or not (env_crypt_key or release.refuses_encrypted_env_without_key):
        return {}
    if len(env_crypt_key) != KEY_SIZE:
        raise VerificationError(
            "encrypted env is present but the key provider gave no valid env crypt key"
            if release.refuses_encrypted_env_without_key
            else "Invalid env crypt key length"
        )
    try:
        text = open_sealed(sealed, env_crypt_key)
    except VerificationError as error:
        raise VerificationError(f"Failed to decrypt env file: {error}") from error
    return parse_env(text, allowed)


def plain_env(variables: Mapping[str, str]) -> bytes:
    """Write variables as the plain text that a deployer encrypts."""
    return json.dumps({"env": [{"key": name, "value": value} for name, value in variables.items()]}).encode()


def seal(text: bytes, public_key: bytes, random: bytes) -> bytes:
    """Encrypt a plain text for an X25519 public key (32 bytes) with SEALING_SIZE random bytes.

    Raises `VerificationError` if the key is none.
    """
    ephemeral, iv = X25519PrivateKey.from_private_bytes(random[:KEY_SIZE]), random[KEY_SIZE:SEALING_SIZE]
    try:
        shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError as error:  # another size, or a point of small order
        raise VerificationError("an X25519 public key of 32 bytes expected") from error
    return ephemeral.public_key().public_bytes_raw() + iv + AESGCM(shared).encrypt(iv, text, None)


def open_sealed(sealed: bytes, secret: bytes) -> bytes:
    """Open sealed bytes with an X25519 secret (32 bytes); raise `VerificationError`."""
    if len(sealed) < IV_OFFSET:
        raise VerificationError("Invalid ephemeral public key length")
    if len(sealed) < CIPHERTEXT_OFFSET:
        raise VerificationError("Invalid IV length")
    try:
        ephemeral = X25519PublicKey.from_public_bytes(sealed[:IV_OFFSET])
        shared = X25519PrivateKey.from_private_bytes(secret).exchange(ephemeral)
    except ValueError as error:  # a point of small order
        raise VerificationError("invalid X25519 shared secret") from error
    try:
        return AESGCM(shared).decrypt(sealed[IV_OFFSET:CIPHERTEXT_OFFSET], sealed[CIPHERTEXT_OFFSET:], None)
    except InvalidTag as error:
        raise VerificationError("Decryption failed: aead::Error") from error


def parse_env(text: bytes, allowed: Collection[str]) -> dict[str, str]:
    """Read a plain environment and return the allowed variables, sorted by name; of one name, the last counts.

    What is not allowed is dropped without a look at it. Raises `FormatError` on anything over upstream's limits.
    """
    try:
        document = read_members(parse_json(text.decode()), {"env": list_of(_read_variable)}, required=("env",))
    except ValueError as error:
        raise FormatError(f"Failed to parse env: {_without_value(error)}") from error
    variables: tuple[tuple[str, str], ...] = document["env"]
    allowed = frozenset(allowed)
    if len(variables) > MAX_VARIABLES:
        raise FormatError(f"Too many environment variables: {len(variables)}")
    environment: dict[str, str] = {}
    total = 0
    for name, value in variables:
        if name not in allowed:
            continue
        _check_variable(name, value)
        total += len(name.encode()) + len(value.encode())
        if total > MAX_TOTAL_SIZE:
            raise FormatError("Environment variables total size too large")
        environment[name] = value
    return dict(sorted(environment.items()))


def environment_file(environment: Mapping[str, str]) -> str:
    """Write variables as the file that systemd reads for the app, one line each."""
    return "".join(f"{name}={_quoted(value)}\n" for name, value in environment.items())


def _check_variable(name: str, value: str) -> None:
    if len(name.encode()) > MAX_NAME_SIZE:
        raise FormatError(f"Environment variable name too long: {name}")
    if len(value.encode()) > MAX_VALUE_SIZE:
        raise FormatError(f"Environment variable value too long for key: {name}")
    if not _NAME.fullmatch(name):
        raise FormatError(f"Invalid env key: {name}")


_VARIABLE: Final[Mapping[str, Reader]] = MappingProxyType({"key": read_text, "value": read_text})


def _read_variable(value: Any) -> tuple[str, str]:
    members = read_members(value, _VARIABLE, required=tuple(_VARIABLE))
    return members["key"], members["value"]


def _without_value(error: ValueError) -> str:
    """Tell an error without what it quotes of the text."""
    return "UTF-8 expected" if isinstance(error, UnicodeError) else str(error).partition(", got ")[0]


_ESCAPES: Final = str.maketrans({"\n": "\\n", '"': '\\"', "$": "\\$", "`": "\\`"})


def _quoted(value: str) -> str:
    escaped = value.translate(_ESCAPES)
    return f'"{escaped}"' if any(letter in " \t|&;<>()$`\\\"'\n" for letter in value) else escaped
