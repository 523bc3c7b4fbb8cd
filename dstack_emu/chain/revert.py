"""What a revert says: the text of `require`, the number of a panic, or the name of a custom error stays in the data."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from dstack_emu.chain import abi
from dstack_emu.chain.quantities import checksummed

PREFIX: Final = "execution reverted"
ERROR: Final = bytes.fromhex("08c379a0")
"""The selector of Error(string)."""
PANIC: Final = bytes.fromhex("4e487b71")
"""The selector of Panic(uint256)."""

_CUSTOM: Final[Mapping[bytes, str]] = MappingProxyType(
    {
        abi.selector(signature): signature
        for signature in (
            "OwnableUnauthorizedAccount(address)",
            "OwnableInvalidOwner(address)",
            "InvalidInitialization()",
            "NotInitializing()",
            "ERC1967InvalidImplementation(address)",
            "ERC1967NonPayable()",
            "UUPSUnauthorizedCallContext()",
            "UUPSUnsupportedProxiableUUID(bytes32)",
            "AddressEmptyCode(address)",
            "FailedCall()",
        )
    }
)
"""The custom errors of dstack's contracts, by their selectors."""


def revert_message(data: bytes) -> str:
    """Return the message of a JSON-RPC error, as other nodes have it."""
    text = reason(data)
    return PREFIX if text is None else f"{PREFIX}: {text}"


def reason(data: bytes) -> str | None:
    """Return the text of a revert with Error(string) or Panic(uint256), None for any other."""
    if data[:4] == PANIC and len(data) == 36:
        return f"panic: code 0x{int.from_bytes(data[4:], 'big'):02x}"
    if data[:4] != ERROR or len(data) < 68:
        return None
    size = int.from_bytes(data[36:68], "big")
    return data[68 : 68 + size].decode(errors="replace")


def custom_error(data: bytes) -> str | None:
    """Return the custom error of one of dstack's contracts, with the address that it names; None for any other."""
    signature = _CUSTOM.get(data[:4])
    if signature is None:
        return None
    name = signature.partition("(")[0]
    return f"{name}({checksummed(data[16:36])})" if signature.endswith("(address)") else signature
