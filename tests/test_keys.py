"""Key derivation and signatures: every derived key that upstream's own code gave is ours, byte for byte."""

import json
from typing import Any

import pytest
from coincurve import PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from dstack_emu.attest import kdf
from dstack_emu.attest.certificate import spki_der
from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.eventlog import find_payload
from dstack_emu.attest.keccak import keccak
from dstack_emu.attest.report_data import bootstrap_report_data, report_data
from dstack_emu.attest.signature import app_key_message, env_key_message, k256_key, recover, sign_recoverable
from tests.hardware import APP_KEYS, VERSIONED, boot
from tests.recorded import external_path, golden


def test_dh_secret_of_the_published_parent_scalar_is_the_published_one() -> None:
    parent = kdf.p256_key(bytes.fromhex("f57527cea4ab7ffb49af99b158cdc0e3ec06398f528349ea236b7d2afe19cec1"))
    secret = kdf.derive_dh_secret(parent, [b"context one", b"context two"])
    assert secret.hex() == "663afd58820be8ad645f9c035e93199d114ab16f738db62393bc1d7d623e8813"


def test_golden_hkdf_and_p256_children_are_equal() -> None:
    keys = golden("keys.json")
    for case in keys["derive_key_hkdf"]:
        context = [bytes.fromhex(item) for item in case["context"]]
        assert kdf.derive_key(bytes.fromhex(case["ikm"]), context, case["len"]).hex() == case["okm"]
    for case in keys["derive_p256_from_bytes"]:
        child = kdf.derive_p256(bytes.fromhex(case["sk"]), [bytes.fromhex(item) for item in case["context"]])
        assert kdf.p256_scalar(child).hex() == case["derived_scalar"]
        assert kdf.pkcs8_der(child).hex() == case["derived_pkcs8_der"]
        assert spki_der(child.public_key()).hex() == case["derived_spki_der"]


def _identities() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(roots, case) for roots in golden("keys.json")["root_sets"] for case in roots["cases"]]


def test_golden_keys_of_every_identity_are_equal() -> None:
    for roots, case in _identities():
        root = kdf.load_p256_pem(roots["root_ca_key_pem"], "root CA key")
        assert kdf.p256_scalar(root).hex() == roots["root_ca_p256_scalar"]
        app_id, instance_id = bytes.fromhex(case["app_id"]), bytes.fromhex(case["instance_id"])
        assert kdf.derive_dh_secret(root, [app_id, instance_id, b"app-disk-crypt-key"]).hex() == case["disk_crypt_key"]
        env = kdf.derive_dh_secret(root, [app_id, b"env-encrypt-key"])
        assert env.hex() == case["env_crypt_key"]
        public = X25519PrivateKey.from_private_bytes(env).public_key().public_bytes_raw()
        assert public.hex() == case["env_encrypt_public_key_x25519"]
        app_ca = kdf.derive_p256(kdf.p256_scalar(root), [app_id, b"app-ca"])
        assert kdf.p256_scalar(app_ca).hex() == case["app_ca_p256_scalar"]
        assert kdf.pkcs8_der(app_ca).hex() == case["app_ca_pkcs8_der"]


def test_golden_signatures_of_every_identity_are_equal_and_recover_the_root_key() -> None:
    for roots, case in _identities():
        app_id, root = bytes.fromhex(case["app_id"]), k256_key(bytes.fromhex(roots["root_k256_key"]))
        app_key = k256_key(kdf.derive_key(bytes.fromhex(roots["root_k256_key"]), [app_id, b"app-key"]))
        assert app_key.secret.hex() == case["k256_app_key"]
        message = app_key_message(app_id, app_key.public_key.format())
        signature = sign_recoverable(root, message)
        assert signature.hex() == case["k256_signature"]
        assert recover(signature, message).hex() == roots["root_k256_pubkey"]
        env_key = bytes.fromhex(case["env_encrypt_public_key_x25519"])
        assert sign_recoverable(root, env_key_message(app_id, env_key)).hex() == case["env_pubkey_signature"]
        for row in case["env_pubkey_signature_v1"]:
            signed = sign_recoverable(root, env_key_message(app_id, env_key, row["timestamp"]))
            assert signed.hex() == row["signature_v1"]


def test_golden_messages_signed_with_any_prefix_are_equal() -> None:
    for case in golden("keys.json")["sign_message"]:
        message = case["prefix"].encode() + b":" + bytes.fromhex(case["app_id"]) + bytes.fromhex(case["message"])
        assert sign_recoverable(k256_key(bytes.fromhex(case["key"])), message).hex() == case["signature"]


def test_upstream_simulator_app_key_chain_recovers_one_key_for_its_app_alone() -> None:
    keys = json.loads(external_path(APP_KEYS).read_text())
    public_key = k256_key(bytes.fromhex(keys["k256_key"])).public_key.format()
    signature = bytes.fromhex(keys["k256_signature"])
    # The fixture does not name its app: the attestation recorded beside it does.
    app_id = find_payload(boot(VERSIONED).attestation().runtime_events, "app-id")
    root = recover(signature, app_key_message(app_id, public_key))
    assert (
        PublicKey.from_signature_and_message(
            signature, keccak(b"dstack-kms-issued:" + app_id + public_key), hasher=None
        ).format()
        == root
    )
    assert recover(signature, app_key_message(app_id[::-1], public_key)) != root


def test_golden_report_data_of_every_tag_and_hash_is_equal() -> None:
    vectors = golden("report-data.json")
    for case in vectors["cases"]:
        content = bytes.fromhex(case["content"])
        if case.get("error"):
            with pytest.raises(FormatError, match=case["error"]):
                report_data(case["content_type"], content, case["hash"])
        else:
            assert report_data(case["content_type"], content, case["hash"]).hex() == case["report_data"]
    for case in vectors["kms_bootstrap_keys"]:
        bound = bootstrap_report_data(bytes.fromhex(case["ca_pubkey"]), bytes.fromhex(case["k256_pubkey"]))
        assert bound.hex() == case["report_data"]


def test_report_data_of_the_published_vector() -> None:
    assert report_data("app-data", b"test content").hex() == (
        "7ea0b744ed5e9c0c83ff9f575668e1697652cd349f2027cdf26f918d4c53e8cd"
        "50b5ea9b449b4c3d50e20ae00ec29688d5a214e8daff8a10041f5d624dae8a01"
    )


def test_report_data_with_an_unknown_hash_or_a_short_raw_content_is_refused() -> None:
    with pytest.raises(FormatError, match="^invalid hash algorithm$"):
        report_data("app-data", b"x", "md5")
    with pytest.raises(FormatError, match="^invalid content length$"):
        report_data("app-data", b"x", "raw")


def test_signature_of_another_length_or_of_no_key_is_refused() -> None:
    with pytest.raises(FormatError, match="^recoverable signature: 65 bytes expected, got 64$"):
        recover(bytes(64), b"")
    with pytest.raises(VerificationError, match="^recoverable signature: no key recovers"):
        recover(bytes(65), b"")


def test_scalar_out_of_range_is_refused() -> None:
    with pytest.raises(FormatError, match="^P-256 scalar: "):
        kdf.p256_key(bytes(32))
    with pytest.raises(FormatError, match="^secp256k1 key: a scalar"):
        k256_key(b"\xff" * 32)
