"""The bytes of a contract's call and of its answers. The arguments are compared with those of eth-abi 6.0.0."""

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eth_address import decode_address, encode_address
from dstack_emu.attest.keccak import keccak
from dstack_emu.auth.contract_abi import (
    APP_IMPLEMENTATION,
    GATEWAY_APP_ID,
    IS_APP_ALLOWED,
    IS_KMS_ALLOWED,
    AppBootInfo,
    decode_contract_address,
    decode_decision,
    decode_text,
    encode_question,
)
from tests.json_rpc_server import abi_decision, abi_text, word

TUPLE = "(address,bytes32,address,bytes32,bytes32,bytes32,bytes32,string,string[])"
FILLED = AppBootInfo(
    app_id=b"\xa0" * 20,
    compose_hash=b"\xc0" * 32,
    instance_id=b"\x10" * 20,
    device_id=b"\xd0" * 32,
    mr_aggregated=b"\xab" * 32,
    mr_system=b"\x5e" * 32,
    os_image_hash=b"\x0f" * 32,
    tcb_status="UpToDate",
    advisory_ids=("INTEL-SA-00837", "", "é" * 20),
)
EMPTY = AppBootInfo(bytes(20), bytes(32), bytes(20), bytes(32), bytes(32), bytes(32), bytes(32), "", ())


@pytest.mark.parametrize(
    ("boot_info", "size", "digest"),
    [
        (FILLED, 704, "c670467fdde0585b1d97b0297659276d87b0e0f70a3e31890b1e76c63d45c85f"),
        (EMPTY, 384, "ce2150c6d5f8a82baa35edd5514dd101d91ec2b0912b3f44cbdbe68af39ce3b7"),
    ],
)
def test_arguments_are_the_bytes_of_eth_abi(boot_info: AppBootInfo, size: int, digest: str) -> None:
    encoded = encode_question(IS_APP_ALLOWED, boot_info)
    assert (len(encoded), hashlib.sha256(encoded[4:]).hexdigest()) == (4 + size, digest)
    assert encode_question(IS_KMS_ALLOWED, boot_info) == IS_KMS_ALLOWED + encoded[4:]


@pytest.mark.parametrize(
    ("selector", "signature"),
    [
        (IS_APP_ALLOWED, f"isAppAllowed({TUPLE})"),
        (IS_KMS_ALLOWED, f"isKmsAllowed({TUPLE})"),
        (GATEWAY_APP_ID, "gatewayAppId()"),
        (APP_IMPLEMENTATION, "appImplementation()"),
    ],
)
def test_selectors_are_the_beginnings_of_the_hashes(selector: bytes, signature: str) -> None:
    assert selector == keccak(signature.encode())[:4]


def test_half_of_a_surrogate_pair_is_sent_as_javascript_sends_it() -> None:
    lone, replaced = replace(EMPTY, tcb_status="\ud800"), replace(EMPTY, tcb_status="\ufffd")
    assert encode_question(IS_APP_ALLOWED, lone) == encode_question(IS_APP_ALLOWED, replaced)


# ---- answers


@given(st.booleans(), st.text())
def test_a_decision_is_decoded(is_allowed: bool, reason: str) -> None:
    encoded = bytes.fromhex(abi_decision(is_allowed, reason)[2:])
    assert decode_decision(encoded) == (is_allowed, reason)


ALLOWED = bytes.fromhex(abi_decision(True, "because")[2:])
REASON = 64
"""Where the length of the reason begins, and then its text: behind the boolean and the place of the reason."""


@given(st.one_of(st.binary(max_size=300), st.builds(lambda tail: word_bytes(1) + tail, st.binary(max_size=200))))
def test_arbitrary_bytes_never_allow(data: bytes) -> None:
    """They are refused, or they are the one encoding of what they say."""
    try:
        is_allowed, reason = decode_decision(data)
    except FormatError:
        return
    assert data.hex() == abi_decision(is_allowed, reason)[2:]


@given(st.integers(0, len(ALLOWED) - 1), st.integers(1, 255))
def test_an_allowing_answer_with_one_byte_changed_allows_only_with_another_reason(place: int, change: int) -> None:
    data = bytearray(ALLOWED)
    data[place] ^= change
    try:
        is_allowed, reason = decode_decision(bytes(data))
    except FormatError:
        return
    assert data.hex() == abi_decision(is_allowed, reason)[2:]
    assert not is_allowed or place >= REASON


@given(st.integers(0, len(ALLOWED) - 1))
def test_a_cut_answer_is_refused(size: int) -> None:
    with pytest.raises(FormatError):
        decode_decision(ALLOWED[:size])


def word_bytes(value: int) -> bytes:
    return bytes.fromhex(word(value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        word_bytes(1),
        word_bytes(1) + word_bytes(64),
        word_bytes(2) + ALLOWED[32:],  # no bool
        word_bytes(1 << 255) + ALLOWED[32:],
        (1).to_bytes(32, "little") + ALLOWED[32:],
        ALLOWED + bytes(32),
        ALLOWED + b"\0",
        ALLOWED[:-1],
        ALLOWED[:-1] + b"\1",  # padding that is not zero
        word_bytes(1) + word_bytes(32) + ALLOWED[64:],  # the offset of something else
        word_bytes(1) + word_bytes((1 << 256) - 32) + ALLOWED[64:],
        word_bytes(1) + word_bytes(64) + word_bytes(1 << 200) + b"x" * 32,
        word_bytes(1) + word_bytes(64) + word_bytes((1 << 256) - 1),
        word_bytes(1) + word_bytes(64) + word_bytes(2) + b"\xff\xfe" + bytes(30),  # no UTF-8
        word_bytes(1) + word_bytes(96) + bytes(32) + ALLOWED[64:],
        bytes.fromhex("08c379a0") + ALLOWED,  # Error(string)
    ],
)
def test_an_answer_that_is_not_the_one_encoding_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="cannot be decoded|UTF-8"):
        decode_decision(data)


@given(st.text())
def test_a_text_is_decoded(text: str) -> None:
    assert decode_text(bytes.fromhex(abi_text(text))) == text


@pytest.mark.parametrize("data", [b"", bytes(32), word_bytes(32), word_bytes(32) + word_bytes(1), ALLOWED])
def test_what_is_no_text_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="cannot be decoded"):
        decode_text(data)


@pytest.mark.parametrize("data", [b"", bytes(20), bytes(33), b"\1" + bytes(31), b"\0" * 11 + b"\1" * 21])
def test_what_is_no_address_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="one word with an address"):
        decode_contract_address(data)


# ---- addresses: the examples of EIP-55


EXAMPLES = [
    "0x52908400098527886E0F7030069857D2E4169EE7",
    "0xde709f2102306220921060314715629080e2fb77",
    "0x27b1fdb04752bbc536007a920d24acb045561c26",
    "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
    "0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359",
    "0xdbF03B407c01E7cD3CBea99509d93f8DDDC8C6FB",
    "0xD1220A0cf47c7B9Be7A2E6BA89F429762e7b9aDb",
]


@pytest.mark.parametrize("text", EXAMPLES)
def test_addresses_have_the_checksum_of_eip_55(text: str) -> None:
    address = bytes.fromhex(text[2:])
    assert encode_address(address) == text
    assert decode_address(text) == decode_address(text.lower()) == address
    assert decode_contract_address(bytes(12) + address) == text


@pytest.mark.parametrize(
    "text",
    [
        EXAMPLES[3].replace("A", "a", 1),
        "0x" + EXAMPLES[3][2:].upper(),
        EXAMPLES[3][2:],
        EXAMPLES[3] + "00",
        EXAMPLES[3][:-1],
        "0X" + EXAMPLES[3][2:],
        "0x" + "g" * 40,
        "",
    ],
)
def test_what_is_no_address_or_has_another_checksum_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="an address expected|wrong checksum"):
        decode_address(text)
