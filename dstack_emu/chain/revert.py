"""What a revert says: the text of `require`, the number of a panic, or the name of a custom error stays in the data."""

from typing import Final

PREFIX: Final = "execution reverted"
ERROR: Final = bytes.fromhex("08c379a0")
"""The selector of Error(string)."""
PANIC: Final = bytes.fromhex("4e487b71")
"""The selector of Panic(uint256)."""


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
