"""The encrypted environment: opened, filtered, bounded; and each refusal."""

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dstack_emu.attest.encrypted_env import decrypt_env, environment_file, open_sealed, parse_env
from dstack_emu.attest.errors import AttestError, FormatError, VerificationError
from dstack_emu.attest.release import RELEASES

V0_5, V0_6 = RELEASES["0.5"], RELEASES["0.6"]
SECRET = bytes(range(1, 33))


def seal(text: bytes, secret: bytes = SECRET) -> bytes:
    """Seal as a deployer's tool does, with an ephemeral key and an IV that are fixed here."""
    public = X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
    ephemeral = X25519PrivateKey.from_private_bytes(b"\x07" * 32)
    shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(public))
    iv = b"\x09" * 12
    return ephemeral.public_key().public_bytes_raw() + iv + AESGCM(shared).encrypt(iv, text, None)


def env(*pairs: tuple[str, str]) -> bytes:
    return json.dumps({"env": [{"key": key, "value": value} for key, value in pairs]}).encode()


def refusal(call: Any) -> str:
    with pytest.raises(AttestError) as caught:
        call()
    return str(caught.value)


def test_upstreams_own_vector_opens() -> None:
    # Of dstack-util's unit test.
    secret = bytes.fromhex("7c282bf94b35dc47801dc953bfa0896fc2bd313381d3e8eca4e42f6536d2a96f")
    sealed = bytes.fromhex(
        "0bd18749612f4c8b9dd583c7d6a646b90abd34e3c731a7708d0caf9039095641e1f0948e775f0b7351788db7"
        "f246d51806954626dcccb6a60d64665ca3715c6bef75616cab476d27bba04080361200d6a58cec"
    )
    assert open_sealed(sealed, secret) == b'[{"key":"","value":""}]'


@pytest.mark.parametrize("release", [V0_5, V0_6], ids=lambda each: each.name)
def test_allowed_variables_are_returned_sorted(release: Any) -> None:
    sealed = seal(env(("B", "2"), ("SECRET", "x"), ("A", "1"), ("B", "3")))
    assert list(decrypt_env(sealed, SECRET, {"A", "B", "C"}, release).items()) == [("A", "1"), ("B", "3")]


@pytest.mark.parametrize("release", [V0_5, V0_6], ids=lambda each: each.name)
@pytest.mark.parametrize("key", [SECRET, b""])
def test_without_a_file_there_is_no_environment(key: bytes, release: Any) -> None:
    assert decrypt_env(b"", key, {"A"}, release) == {}


def test_file_without_a_key_ends_the_boot_from_0_6_on() -> None:
    sealed = seal(env(("A", "1")))
    assert decrypt_env(sealed, b"", {"A"}, V0_5) == {}
    words = "encrypted env is present but the key provider gave no valid env crypt key"
    assert refusal(lambda: decrypt_env(sealed, b"", {"A"}, V0_6)) == words
    assert refusal(lambda: decrypt_env(sealed, SECRET[:31], {"A"}, V0_6)) == words
    assert refusal(lambda: decrypt_env(sealed, SECRET[:31], {"A"}, V0_5)) == "Invalid env crypt key length"


@pytest.mark.parametrize(
    ("sealed", "words"),
    [
        (b"\x01", "Invalid ephemeral public key length"),
        (b"\x01" * 31, "Invalid ephemeral public key length"),
        (b"\x01" * 43, "Invalid IV length"),
        (seal(b"{}")[:44], "Decryption failed: aead::Error"),
        (seal(b"{}")[:-1], "Decryption failed: aead::Error"),
        (seal(b"{}", b"\x02" * 32), "Decryption failed: aead::Error"),
        (bytes(32) + seal(b"{}")[32:], "invalid X25519 shared secret"),
    ],
)
def test_file_that_cannot_be_opened_is_refused(sealed: bytes, words: str) -> None:
    with pytest.raises(VerificationError) as caught:
        decrypt_env(sealed, SECRET, {"A"}, V0_6)
    assert str(caught.value) == f"Failed to decrypt env file: {words}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b"\xff", "UTF-8 expected"),
        (b"[]", "object expected"),
        (b"{}", "missing field `env`"),
        (b'{"env":{}}', "env: array expected"),
        (b'{"env":[{"key":"A"}]}', "env: [0]: missing field `value`"),
        (b'{"env":[{"key":"A","value":42}]}', "env: [0]: value: text expected"),
    ],
)
def test_text_that_is_no_environment_is_refused_without_what_it_says(text: bytes, words: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_env(text, {"A"})
    assert str(caught.value) == f"Failed to parse env: {words}"


@pytest.mark.parametrize("name", ["1A", "A-B", "", "A\n", "Ä"])
def test_name_of_an_allowed_variable_has_to_be_one(name: str) -> None:
    assert refusal(lambda: parse_env(env((name, "x")), {name})) == f"Invalid env key: {name}"
    assert parse_env(env((name, "x")), {"A"}) == {}


def test_sizes_are_bounded() -> None:
    assert parse_env(env(("A" * 255, "x" * 128 * 1024)), {"A" * 255}) == {"A" * 255: "x" * 128 * 1024}
    words = refusal(lambda: parse_env(env(("A" * 256, "x")), {"A" * 256}))
    assert words == f"Environment variable name too long: {'A' * 256}"
    words = refusal(lambda: parse_env(env(("A", "x" * (128 * 1024 + 1))), {"A"}))
    assert words == "Environment variable value too long for key: A"


def test_number_of_variables_is_bounded_whether_allowed_or_not() -> None:
    assert parse_env(env(*[("A", "")] * 1024), {"A"}) == {"A": ""}
    assert refusal(lambda: parse_env(env(*[("B", "")] * 1025), {"A"})) == "Too many environment variables: 1025"


def test_total_size_is_bounded() -> None:
    names = [f"V{index}" for index in range(8)]
    fits = env(*((name, "x" * (128 * 1024 - 2)) for name in names))
    assert len(parse_env(fits, set(names))) == 8
    over = env(*((name, "x" * (128 * 1024 - 2)) for name in names), ("W", ""))
    assert refusal(lambda: parse_env(over, {*names, "W"})) == "Environment variables total size too large"


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("simple", "A=simple\n"),
        ("hello world", 'A="hello world"\n'),
        ('say "hello"', 'A="say \\"hello\\""\n'),
        ("line1\nline2", 'A="line1\\nline2"\n'),
        ("price=$100", 'A="price=\\$100"\n'),
        ("command=`date`", 'A="command=\\`date\\`"\n'),
    ],
)
def test_environment_file_quotes_as_upstream(value: str, line: str) -> None:
    assert environment_file({"A": value}) == line
