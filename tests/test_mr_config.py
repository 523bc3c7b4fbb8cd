"""mr_config_id in its three forms: made, and held against what a guest observed, one thing changed at a time."""

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from Crypto.Hash import keccak

from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.mr_config import (
    MrConfigDocument,
    ObservedConfig,
    compose_hash_config_id,
    document_config_id,
    key_provider_config_id,
    verify_mr_config_id,
)
from dstack_emu.attest.release import RELEASES

OBSERVED = ObservedConfig(
    compose_hash=b"\x22" * 32,
    app_id=b"\x11" * 20,
    instance_id=b"\x44" * 20,
    key_provider="kms",
    key_provider_id=b"\x33" * 32,
    gpu_policy_hash=b"\x55" * 32,
    init_script_hashes=(b"\x66" * 32,),
)
PINNED = MrConfigDocument(
    compose_hash=OBSERVED.compose_hash,
    key_provider="kms",
    app_id=OBSERVED.app_id,
    gpu_policy_hash=OBSERVED.gpu_policy_hash,
    instance_id=OBSERVED.instance_id,
    key_provider_id=OBSERVED.key_provider_id,
)
# The text of upstream's own unit test.
CANONICAL = (
    '{"app_id":"1111111111111111111111111111111111111111",'
    '"compose_hash":"2222222222222222222222222222222222222222222222222222222222222222",'
    '"gpu_policy_hash":"5555555555555555555555555555555555555555555555555555555555555555",'
    '"instance_id":"4444444444444444444444444444444444444444",'
    '"key_provider":"kms",'
    '"key_provider_id":"3333333333333333333333333333333333333333333333333333333333333333",'
    '"version":3}'
)
V0_5, V0_6 = RELEASES["0.5"], RELEASES["0.6"]


def refusal(config_id: bytes, observed: ObservedConfig = OBSERVED, document: str | None = None) -> str:
    with pytest.raises(VerificationError) as caught:
        verify_mr_config_id(config_id, observed, V0_6, document=document)
    return str(caught.value)


def test_version_1_is_the_compose_hash() -> None:
    assert compose_hash_config_id(b"\x22" * 32) == b"\x01" + b"\x22" * 32 + bytes(15)


@pytest.mark.parametrize(("kind", "code"), [("none", 0), ("local", 1), ("kms", 2), ("tpm", 3)])
def test_version_2_is_keccak_over_hash_app_kind_and_provider(kind: Any, code: int) -> None:
    content = b"\x22" * 32 + b"\x11" * 20 + bytes((code,)) + b"\x33" * 91
    digest = keccak.new(digest_bits=256, data=content).digest()
    made = key_provider_config_id(b"\x22" * 32, b"\x11" * 20, kind, b"\x33" * 91)
    assert made == b"\x02" + digest + bytes(15)


def test_version_3_is_the_hash_of_the_very_text() -> None:
    digest = hashlib.sha256(b"dstack-mr-config-v3:\0" + CANONICAL.encode()).digest()
    assert document_config_id(CANONICAL) == b"\x03" + digest + bytes(15)
    assert document_config_id(CANONICAL + " ") != document_config_id(CANONICAL)


def test_document_is_written_canonically_without_what_is_not_pinned() -> None:
    assert PINNED.to_json() == CANONICAL
    bare = MrConfigDocument(compose_hash=b"\x22" * 32, key_provider="none", init_script_hashes=())
    assert (
        bare.to_json() == f'{{"compose_hash":"{"22" * 32}","init_script_hashes":[],"key_provider":"none","version":3}}'
    )


def test_document_is_read_back_from_any_form() -> None:
    assert MrConfigDocument.parse(CANONICAL) == PINNED
    assert MrConfigDocument.parse(CANONICAL.replace(",", " ,\n")) == PINNED


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("[]", r"object expected, got \[\]"),
        ('{"key_provider":"none"}', "missing field `compose_hash`"),
        ('{"compose_hash":"00"}', "missing field `key_provider`"),
        ('{"compose_hash":"00","key_provider":"kms","more":1}', "unknown field `more`"),
        ('{"compose_hash":"0x00","key_provider":"kms"}', "compose_hash: Non-hexadecimal digit"),
        ('{"compose_hash":"00","key_provider":"local-sgx"}', "key_provider: 'none' or 'local' or 'kms' or 'tpm'"),
        ('{"compose_hash":"00","key_provider":"kms","version":"3"}', "version: integer of 8 bits"),
        ('{"compose_hash":"00","compose_hash":"00","key_provider":"kms"}', "duplicate field `compose_hash`"),
        (
            '{"compose_hash":"00","key_provider":"kms","init_script_hashes":["00"]}',
            "each init_script_hash must be 32 bytes",
        ),
        (
            f'{{"compose_hash":"00","key_provider":"kms","init_script_hashes":{["00" * 32] * 6}}}'.replace("'", '"'),
            "init_script_hashes supports at most 5 hashes",
        ),
    ],
)
def test_document_that_is_none_is_refused(text: str, words: str) -> None:
    with pytest.raises(FormatError, match=f"^failed to parse mr_config document: .*{words}"):
        MrConfigDocument.parse(text)


@pytest.mark.parametrize("release", [V0_5, V0_6], ids=lambda each: each.name)
def test_zero_binds_nothing(release: Any) -> None:
    verify_mr_config_id(bytes(48), OBSERVED, release)


@pytest.mark.parametrize("release", [V0_5, V0_6], ids=lambda each: each.name)
def test_versions_1_and_2_of_what_was_observed_pass(release: Any) -> None:
    verify_mr_config_id(compose_hash_config_id(OBSERVED.compose_hash), OBSERVED, release)
    two = key_provider_config_id(OBSERVED.compose_hash, OBSERVED.app_id, "kms", OBSERVED.key_provider_id)
    verify_mr_config_id(two, OBSERVED, release)


@pytest.mark.parametrize(
    "config_id",
    [
        compose_hash_config_id(b"\x23" * 32),
        compose_hash_config_id(OBSERVED.compose_hash)[:-1] + b"\x01",
        key_provider_config_id(b"\x23" * 32, OBSERVED.app_id, "kms", OBSERVED.key_provider_id),
        key_provider_config_id(OBSERVED.compose_hash, bytes(20), "kms", OBSERVED.key_provider_id),
        key_provider_config_id(OBSERVED.compose_hash, OBSERVED.app_id, "local", OBSERVED.key_provider_id),
        key_provider_config_id(OBSERVED.compose_hash, OBSERVED.app_id, "kms", b""),
    ],
)
def test_versions_1_and_2_of_anything_else_are_refused(config_id: bytes) -> None:
    assert refusal(config_id) == "Invalid mr_config_id"


@pytest.mark.parametrize("first", [0, 4, 255])
def test_unknown_version_is_refused(first: int) -> None:
    assert refusal(bytes((first,)) + b"\x01" * 47) == "Invalid mr_config_id version"


def test_version_3_is_known_from_0_6_on() -> None:
    config_id = document_config_id(CANONICAL)
    verify_mr_config_id(config_id, OBSERVED, V0_6, document=CANONICAL)
    with pytest.raises(VerificationError, match="^Invalid mr_config_id version$"):
        verify_mr_config_id(config_id, OBSERVED, V0_5, document=CANONICAL)


def test_version_3_needs_its_document() -> None:
    assert refusal(document_config_id(CANONICAL)) == "Failed to read mr_config: mr_config is required"


def test_version_3_of_another_text_of_the_same_content_is_refused() -> None:
    assert refusal(document_config_id(CANONICAL), document=f"{CANONICAL} ") == "Invalid mr_config_id"


@pytest.mark.parametrize(
    ("change", "member"),
    [
        ({"compose_hash": b"\x23" * 32}, "compose_hash"),
        ({"gpu_policy_hash": b"\x56" * 32}, "gpu_policy_hash"),
        ({"init_script_hashes": ()}, "init_script_hashes"),
        ({"init_script_hashes": (b"\x67" * 32,)}, "init_script_hashes"),
        ({"app_id": b"\x12" * 20}, "app_id"),
        ({"instance_id": b""}, "instance_id"),
        ({"key_provider": "local"}, "key_provider"),
        ({"key_provider_id": b"\x34" * 32}, "key_provider_id"),
    ],
)
def test_document_that_pins_another_thing_is_refused(change: Any, member: str) -> None:
    document = replace(PINNED, init_script_hashes=OBSERVED.init_script_hashes).to_json()
    verify_mr_config_id(document_config_id(document), OBSERVED, V0_6, document=document)
    changed = replace(OBSERVED, **change)
    assert refusal(document_config_id(document), changed, document) == f"Invalid mr_config {member}"


def test_document_that_pins_nothing_but_hash_and_provider_passes_for_any_other() -> None:
    document = MrConfigDocument(compose_hash=OBSERVED.compose_hash, key_provider="kms").to_json()
    verify_mr_config_id(document_config_id(document), OBSERVED, V0_6, document=document)


def test_document_of_another_version_is_refused() -> None:
    document = replace(PINNED, version=2).to_json()
    assert refusal(document_config_id(document), document=document) == "mr_config version must be 3"


def test_document_that_cannot_be_read_is_refused() -> None:
    text = refusal(document_config_id("{}"), document="{}")
    assert text == "Invalid mr_config document: failed to parse mr_config document: missing field `compose_hash`"
