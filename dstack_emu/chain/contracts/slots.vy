# pragma version ~=0.4.3
"""
@notice The whole storage of a contract as one array, and in it the layout that solc gives its types.
@dev Vyper would place mappings and byte strings differently. With this layout a proxy can be upgraded between these
     contracts and upstream's, in both directions, and keeps its state. The only variable, so it begins at slot 0.
"""

MAX_BYTES: constant(uint256) = 32768
MAX_WORDS: constant(uint256) = MAX_BYTES // 32
MAX_READ: constant(uint256) = MAX_BYTES + 64  # what the compiler can prove of a string that is read

words: uint256[max_value(uint256)]


@internal
@view
def _member(slot: uint256, key: bytes32) -> bool:
    """
    @notice Read a mapping from a word to a boolean.
    """
    return self.words[convert(keccak256(abi_encode(key, slot)), uint256)] & 255 != 0


@internal
def _set_member(slot: uint256, key: bytes32, content: bool):
    self.words[self._place(slot, key)] = convert(content, uint256)


@internal
@pure
def _place(slot: uint256, key: bytes32) -> uint256:
    return convert(keccak256(abi_encode(key, slot)), uint256)


@internal
@view
def _address(slot: uint256) -> address:
    return convert(self.words[slot] & convert(max_value(uint160), uint256), address)


@internal
def _set_address(slot: uint256, content: address):
    self.words[slot] = convert(content, uint256)


@internal
@view
def _bit(slot: uint256, offset: uint256) -> bool:
    """
    @notice Read a boolean that shares its slot; `offset` is in bytes from the low end.
    """
    return (self.words[slot] >> unsafe_mul(8, offset)) & 255 != 0


@internal
def _set_bit(slot: uint256, offset: uint256, content: bool):
    cleared: uint256 = self.words[slot] & ~(convert(255, uint256) << unsafe_mul(8, offset))
    self.words[slot] = cleared | (convert(content, uint256) << unsafe_mul(8, offset))


@internal
@view
def _size(slot: uint256) -> uint256:
    """
    @notice Return the number of bytes of a byte string.
    """
    word: uint256 = self.words[slot]
    return word >> 1 if word & 1 == 1 else (word & 255) >> 1


@internal
@pure
def _words_outside(size: uint256) -> uint256:
    """
    @notice Return how many slots outside its own a byte string takes: none up to 31 bytes.
    """
    return 0 if size < 32 else (size + 31) // 32


@internal
@view
def _bytes(slot: uint256) -> Bytes[MAX_READ]:
    size: uint256 = self._size(slot)
    if size < 32:
        return slice(convert(self.words[slot], bytes32), 0, size)
    first: uint256 = convert(keccak256(convert(slot, bytes32)), uint256)
    stored: DynArray[bytes32, MAX_WORDS] = []
    for i: uint256 in range(self._words_outside(size), bound=MAX_WORDS):
        stored.append(convert(self.words[unsafe_add(first, i)], bytes32))
    # The encoding of an array has two words in front: its offset and its length.
    return slice(abi_encode(stored), 64, size)


@internal
def _set_bytes(slot: uint256, content: Bytes[MAX_BYTES]):
    """
    @notice Write a byte string, and clear what a longer one before it leaves.
    """
    size: uint256 = len(content)
    padded: Bytes[MAX_BYTES + 32] = concat(content, empty(bytes32))
    before: uint256 = self._words_outside(self._size(slot))
    after: uint256 = self._words_outside(size)
    first: uint256 = convert(keccak256(convert(slot, bytes32)), uint256)
    for i: uint256 in range(after, bound=MAX_WORDS):
        self.words[unsafe_add(first, i)] = extract32(padded, i * 32, output_type=uint256)
    if before > after:
        for i: uint256 in range(before - after, bound=MAX_WORDS):
            self.words[unsafe_add(first, after + i)] = 0
    if size < 32:
        self.words[slot] = extract32(padded, 0, output_type=uint256) | (size << 1)
    else:
        self.words[slot] = (size << 1) | 1
