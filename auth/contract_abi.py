"""The four calls of a DstackKms contract that a webhook makes, as bytes: arguments in, and answers out. Pure.

Answers are decoded strictly: they must be, to the byte, the encoding of what is decoded, as every compiler writes it.
Whatever else a chain returns is an error and never a decision.

Source: dstack next 312dc605, `kms/auth-eth/contracts/IAppAuth.sol` and `DstackKms.sol`; Solidity's ABI specification.
"""

from dataclasses import dataclass
from typing import Final

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eth_address import ADDRESS_SIZE, encode_address

IS_APP_ALLOWED: Final = bytes.fromhex("1e079198")
IS_KMS_ALLOWED: Final = bytes.fromhex("e067ec9d")
GATEWAY_APP_ID: Final = bytes.fromhex("95f51931")
APP_IMPLEMENTATION: Final = bytes.fromhex("25a992da")
"""The selectors of the calls: the first 4 bytes of the Keccak-256 of their signatures."""

WORD: Final = 32
"""Bytes of a word, of which every encoding is made."""


@dataclass(frozen=True, slots=True)
class AppBootInfo:
    """The argument of isAppAllowed and isKmsAllowed, in the contract's order.

    `app_id` and `instance_id` are 20 bytes (addresses), the other byte strings 32.
    """

    app_id: bytes
    compose_hash: bytes
    instance_id: bytes
    device_id: bytes
    mr_aggregated: bytes
    mr_system: bytes
    os_image_hash: bytes
    tcb_status: str
    advisory_ids: tuple[str, ...]


def encode_question(selector: bytes, boot_info: AppBootInfo) -> bytes:
    """Encode a call of isAppAllowed or isKmsAllowed."""
    status, advisories = _encode_text(boot_info.tcb_status), _encode_texts(boot_info.advisory_ids)
    fixed = (
        boot_info.app_id,
        boot_info.compose_hash,
        boot_info.instance_id,
        boot_info.device_id,
        boot_info.mr_aggregated,
        boot_info.mr_system,
        boot_info.os_image_hash,
    )
    head = (len(fixed) + 2) * WORD
    offsets = _number(head) + _number(head + len(status))
    words = b"".join(value.rjust(WORD, b"\0") for value in fixed)
    return selector + _number(WORD) + words + offsets + status + advisories


def decode_decision(data: bytes) -> tuple[bool, str]:
    """Decode what isAppAllowed and isKmsAllowed return: whether it is allowed, and the reason."""
    _require(len(data) >= 2 * WORD, f"two words expected at least, got {len(data)} bytes")
    flag = data[:WORD]
    _require(flag in (_TRUE, _FALSE), f"a bool expected, 0 or 1 in a word, got {flag.hex()}")
    return flag == _TRUE, _decode_text(data, WORD)


def decode_text(data: bytes) -> str:
    """Decode what gatewayAppId returns."""
    return _decode_text(data, 0)


def decode_contract_address(data: bytes) -> str:
    """Decode what appImplementation returns, with the checksum in its letters."""
    padding = data[: WORD - ADDRESS_SIZE]
    _require(len(data) == WORD and not any(padding), f"one word with an address expected, got {data[:WORD].hex()!r}")
    return encode_address(data[WORD - ADDRESS_SIZE :])


def _decode_text(data: bytes, place: int) -> str:
    """Decode a text, which is the last value of `data`; its offset is at `place`, in bytes."""
    start = place + WORD
    _require(len(data) >= start + WORD, f"a text expected, got {len(data)} bytes")
    size = int.from_bytes(data[start : start + WORD])
    content = data[start + WORD : start + WORD + size]
    is_whole = len(content) == size and data[place:] == _number(start) + _number(size) + _padded(content)
    _require(is_whole, f"a text of {size:#x} bytes, padded with zeros, expected, got other {len(data) - start} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"text in UTF-8 expected: {error.reason} at byte {error.start}") from error


def _require(is_met: bool, complaint: str) -> None:
    if not is_met:
        raise FormatError(f"the contract's answer cannot be decoded: {complaint}")


def _encode_text(text: str) -> bytes:
    # Half of a surrogate pair, which JSON can spell, becomes U+FFFD, as in JavaScript's TextEncoder.
    content = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    return _number(len(content)) + _padded(content)


def _encode_texts(texts: tuple[str, ...]) -> bytes:
    encoded = [_encode_text(text) for text in texts]
    offsets, place = b"", len(texts) * WORD
    for each in encoded:
        offsets += _number(place)
        place += len(each)
    return _number(len(texts)) + offsets + b"".join(encoded)


def _number(value: int) -> bytes:
    return value.to_bytes(WORD)


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % WORD)


_TRUE: Final = _number(1)
_FALSE: Final = _number(0)
