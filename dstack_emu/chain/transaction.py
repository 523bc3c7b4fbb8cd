"""Transactions: their three forms, their signatures, and who sent them.

Legacy transactions (EIP-155, or without a chain id), those with an access list (EIP-2930) and those with a dynamic fee
(EIP-1559). Blobs and delegations are refused. Executes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

from coincurve import PrivateKey, PublicKey

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.keccak import keccak
from dstack_emu.chain import rlp
from dstack_emu.chain.errors import InvalidTransactionError

LEGACY, ACCESS_LIST, DYNAMIC_FEE = 0, 1, 2
ADDRESS_SIZE: Final = 20
ORDER: Final = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
"""The order of secp256k1; a signature's s is at most half of it (EIP-2)."""
_WORD: Final = 2**256
_FIELDS: Final = {LEGACY: 9, ACCESS_LIST: 11, DYNAMIC_FEE: 12}

AccessList = tuple[tuple[bytes, tuple[bytes, ...]], ...]


@dataclass(frozen=True, slots=True)
class Transaction:
    """A transaction, and the address of its sender.

    Amounts are in wei. A legacy transaction and one with an access list have one gas price, which is both fees.
    `chain_id` is None for a legacy transaction that is valid on every chain. `raw` is the encoding, with the signature.
    """

    kind: int
    chain_id: int | None
    nonce: int
    max_priority_fee: int
    max_fee: int
    gas: int
    to: bytes | None
    value: int
    data: bytes
    access_list: AccessList = ()
    signature: tuple[int, int, int] = (0, 0, 0)
    sender: bytes = b""
    raw: bytes = b""

    @property
    def hash(self) -> bytes:
        """The hash of the encoding."""
        return keccak(self.raw)

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Decode a signed transaction, and recover its sender; raise `InvalidTransactionError`."""
        try:
            transaction = cls._decoded(raw)
            return replace(transaction, sender=transaction._recovered(), raw=raw)
        except (FormatError, ValueError) as error:
            raise InvalidTransactionError(f"invalid transaction: {error}") from error

    @classmethod
    def decode_impersonated(cls, raw: bytes, sender: bytes) -> Self:
        """Decode what `impersonating` made."""
        try:
            return replace(cls._decoded(raw), sender=sender, raw=raw)
        except (FormatError, ValueError) as error:
            raise InvalidTransactionError(f"invalid transaction: {error}") from error

    @property
    def is_impersonated(self) -> bool:
        """Whether nobody signed it: its signature has the sender's address in the place of both numbers."""
        number = int.from_bytes(self.sender, "big")
        return self.signature == (0, number, number)

    @classmethod
    def _decoded(cls, raw: bytes) -> Self:
        kind = raw[0] if raw and raw[0] < 0x80 else LEGACY
        if kind not in _FIELDS:
            raise FormatError(f"transactions of type 0, 1 and 2 are supported, got type {kind}")
        fields = rlp.decode(raw[1:] if kind else raw)
        if isinstance(fields, bytes) or len(fields) != _FIELDS[kind]:
            raise FormatError(f"a list of {_FIELDS[kind]} members expected in a transaction of type {kind}")
        if kind == LEGACY:
            return cls._legacy(fields)
        chain_id, nonce, *fees = (_number(each) for each in fields[: 3 if kind == ACCESS_LIST else 4])
        rest = fields[len(fees) + 2 :]
        signature = (_number(rest[5]), _number(rest[6]), _number(rest[7]))
        gas, to, value, data = _body(rest)
        return cls(kind, chain_id, nonce, fees[0], fees[-1], gas, to, value, data, _access_list(rest[4]), signature)

    @classmethod
    def _legacy(cls, fields: Sequence[rlp.Item]) -> Self:
        nonce, price, v, r, s = (_number(fields[place]) for place in (0, 1, 6, 7, 8))
        gas, to, value, data = _body(fields[2:])
        if v not in (27, 28) and v < 35:
            raise FormatError(f"v of 27, 28 or at least 35 expected, got {v}")
        chain_id = None if v in (27, 28) else (v - 35) // 2
        parity = v - 27 if chain_id is None else (v - 35) % 2
        return cls(LEGACY, chain_id, nonce, price, price, gas, to, value, data, (), (parity, r, s))

    def signed(self, private_key: bytes) -> Self:
        """Sign it with a private key of 32 bytes (RFC 6979, so that the same content has the same bytes)."""
        signature = PrivateKey(private_key).sign_recoverable(self._digest(), hasher=None)
        r, s = (int.from_bytes(signature[place : place + 32], "big") for place in (0, 32))
        made = replace(self, signature=(signature[64], r, s), sender=address_of(private_key))
        return replace(made, raw=made._encoded())

    def impersonating(self, sender: bytes) -> Self:
        """Return it as if an account of which nobody has the key had sent it.

        The sender takes the place of the signature: two accounts that send the same content would otherwise share a
        hash.
        """
        number = int.from_bytes(sender, "big")
        made = replace(self, signature=(0, number, number), sender=sender)
        return replace(made, raw=made._encoded())

    def _fields(self) -> list[rlp.Item]:
        fees = (self.max_fee,) if self.kind != DYNAMIC_FEE else (self.max_priority_fee, self.max_fee)
        numbers = [rlp.number(each) for each in (self.nonce, *fees, self.gas)]
        fields: list[rlp.Item] = [*numbers, self.to or b"", rlp.number(self.value), self.data]
        return fields if self.kind == LEGACY else [rlp.number(self.chain_id or 0), *fields, self.access_list]

    def _digest(self) -> bytes:
        if self.kind:
            return keccak(bytes([self.kind]) + rlp.encode(self._fields()))
        replay: list[rlp.Item] = [] if self.chain_id is None else [rlp.number(self.chain_id), b"", b""]
        return keccak(rlp.encode([*self._fields(), *replay]))

    def _encoded(self) -> bytes:
        numbers = map(rlp.number, (self.v, *self.signature[1:]))
        return (bytes([self.kind]) if self.kind else b"") + rlp.encode([*self._fields(), *numbers])

    @property
    def v(self) -> int:
        """What a signature's v is in JSON: the parity, or for a legacy transaction the number with the chain id."""
        parity = self.signature[0]
        if self.kind:
            return parity
        return 27 + parity if self.chain_id is None else 35 + 2 * self.chain_id + parity

    def _recovered(self) -> bytes:
        parity, r, s = self.signature
        if parity > 1 or not 0 < r < ORDER or not 0 < s <= ORDER // 2:
            raise FormatError("the signature is not valid: parity, r or s is out of its range")
        signature = r.to_bytes(32, "big") + s.to_bytes(32, "big") + bytes([parity])
        try:
            key = PublicKey.from_signature_and_message(signature, self._digest(), hasher=None)
        except Exception as error:  # coincurve raises a bare one
            raise FormatError("no key has made the signature") from error
        return keccak(key.format(compressed=False)[1:])[-ADDRESS_SIZE:]


def address_of(private_key: bytes) -> bytes:
    """Return the address of a private key of 32 bytes; raise `ValueError` if it is none."""
    return keccak(PrivateKey(private_key).public_key.format(compressed=False)[1:])[-ADDRESS_SIZE:]


def created_address(sender: bytes, nonce: int) -> bytes:
    """Return the address of the contract that an account creates with a nonce."""
    return keccak(rlp.encode([sender, rlp.number(nonce)]))[-ADDRESS_SIZE:]


def _number(item: rlp.Item) -> int:
    if not isinstance(item, bytes) or item[:1] == b"\0" or len(item) > 32:
        raise FormatError("a number of at most 32 bytes without leading zeros expected")
    return int.from_bytes(item, "big")


def _body(fields: Sequence[rlp.Item]) -> tuple[int, bytes | None, int, bytes]:
    gas, to, value, data = _number(fields[0]), fields[1], _number(fields[2]), fields[3]
    if not isinstance(to, bytes) or len(to) not in (0, ADDRESS_SIZE):
        raise FormatError(f"to: an address of {ADDRESS_SIZE} bytes, or none, expected")
    if not isinstance(data, bytes):
        raise FormatError("data: bytes expected, got a list")
    return gas, to or None, value, data


def _access_list(item: rlp.Item) -> AccessList:
    if isinstance(item, bytes):
        raise FormatError("access list: a list expected")
    return tuple(map(_access, item))


def _access(item: rlp.Item) -> tuple[bytes, tuple[bytes, ...]]:
    if isinstance(item, bytes) or len(item) != 2:
        raise FormatError("access list: pairs of an address and a list of slots expected")
    address, slots = item
    if not isinstance(address, bytes) or len(address) != ADDRESS_SIZE or isinstance(slots, bytes):
        raise FormatError("access list: pairs of an address and a list of slots expected")
    keys = tuple(slot for slot in slots if isinstance(slot, bytes) and len(slot) == 32)
    if len(keys) != len(slots):
        raise FormatError("access list: slots of 32 bytes expected")
    return address, keys
