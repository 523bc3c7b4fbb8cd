# pragma version ~=0.4.3
"""
@notice Reads the argument of isKmsAllowed and isAppAllowed where it is, in the call's data.
@dev As an argument of the usual kind it would be copied, which takes most of the time of a call, and its strings would
     have bounds that they do not have in a contract made by solc.
"""

# Where the members of the tuple are, in bytes. The last two are where a string and a list begin.
APP_ID: constant(uint256) = 0
COMPOSE_HASH: constant(uint256) = 32
INSTANCE_ID: constant(uint256) = 64
DEVICE_ID: constant(uint256) = 96
MR_AGGREGATED: constant(uint256) = 128
MR_SYSTEM: constant(uint256) = 160
OS_IMAGE_HASH: constant(uint256) = 192
TCB_STATUS: constant(uint256) = 224
ADVISORY_IDS: constant(uint256) = 256
SIZE: constant(uint256) = 288


@internal
@view
def _members() -> Bytes[SIZE]:
    """
    @notice Return the words of the tuple, and refuse one that the data cannot hold.
    """
    return slice(msg.data, self._start(), SIZE)


@internal
@view
def _start() -> uint256:
    offset: uint256 = extract32(slice(msg.data, 4, 32), 0, output_type=uint256)
    if offset > len(msg.data):
        raw_revert(b"")
    return unsafe_add(offset, 4)


@internal
@view
def _is_up_to_date() -> bool:
    """
    @notice Return whether tcbStatus is `UpToDate`.
    """
    start: uint256 = self._start()
    offset: uint256 = extract32(slice(msg.data, unsafe_add(start, TCB_STATUS), 32), 0, output_type=uint256)
    if offset > len(msg.data):
        raw_revert(b"")
    place: uint256 = unsafe_add(start, offset)
    size: uint256 = extract32(slice(msg.data, place, 32), 0, output_type=uint256)
    if size > len(msg.data) or unsafe_add(place, 32 + size) > len(msg.data):
        raw_revert(b"")
    if size != 8:
        return False
    return convert(slice(msg.data, unsafe_add(place, 32), 8), bytes8) == 0x5570546F44617465
