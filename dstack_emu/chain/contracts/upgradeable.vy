# pragma version ~=0.4.3
"""
@notice Initialization that is done once, and upgrades of a proxy by its implementation (UUPS, ERC-1822).
"""

import slots

uses: slots

# 0x360894a13ba1a3210667c828492db98dca3e2076cc3735a920a3ca505d382bbc; a literal in hex would not be a number
IMPLEMENTATION_SLOT: constant(uint256) = 24440054405305269366569402256811496959409073762505157381672968839269610695612
# 0xf0c57e16840df040f15088dc2f81fe391c3923bec73e23a9662efc9c229c6a00; a literal in hex would not be a number
INITIALIZATION_SLOT: constant(uint256) = 108904022758810753673719992590105913556127789646572562039383141376366747609600
MAX_CALL: constant(uint256) = 8192

UPGRADE_INTERFACE_VERSION: public(constant(String[5])) = "5.0.0"
IMPLEMENTATION: immutable(address)

event Initialized:
    version: uint64

event Upgraded:
    implementation: indexed(address)


@deploy
def __init__():
    """
    @notice Make the implementation itself impossible to initialize.
    """
    IMPLEMENTATION = self
    slots.words[INITIALIZATION_SLOT] = convert(max_value(uint64), uint256)
    log Initialized(version=max_value(uint64))


@external
@view
def proxiableUUID() -> bytes32:
    if self != IMPLEMENTATION:
        raw_revert(method_id("UUPSUnauthorizedCallContext()"))
    return convert(IMPLEMENTATION_SLOT, bytes32)


@internal
@view
def _check_not_initialized():
    if slots.words[INITIALIZATION_SLOT] != 0:
        raw_revert(method_id("InvalidInitialization()"))


@internal
def _set_initialized():
    slots.words[INITIALIZATION_SLOT] = 1
    log Initialized(version=1)


@internal
@view
def _check_proxy():
    """
    @notice Refuse a call that does not come through a proxy of this implementation.
    """
    if self == IMPLEMENTATION or slots._address(IMPLEMENTATION_SLOT) != IMPLEMENTATION:
        raw_revert(method_id("UUPSUnauthorizedCallContext()"))


@internal
@payable
def _upgrade(implementation: address, data: Bytes[MAX_CALL]):
    """
    @notice Replace the implementation, and call it with the data, if there are any.
    """
    self._check_upgradeable(implementation)
    slots._set_address(IMPLEMENTATION_SLOT, implementation)
    log Upgraded(implementation=implementation)
    if len(data) > 0:
        self._delegate(implementation, data)
    elif msg.value > 0:
        raw_revert(method_id("ERC1967NonPayable()"))


@internal
@view
def _check_upgradeable(implementation: address):
    if not implementation.is_contract:
        raw_revert(b"")  # solc's check before each call has no text
    success: bool = False
    response: Bytes[32] = b""
    success, response = raw_call(
        implementation, method_id("proxiableUUID()"), max_outsize=32, is_static_call=True, revert_on_failure=False
    )
    if not success:
        raw_revert(abi_encode(implementation, method_id=method_id("ERC1967InvalidImplementation(address)")))
    if len(response) < 32:
        raw_revert(b"")
    if convert(response, uint256) != IMPLEMENTATION_SLOT:
        raw_revert(
            abi_encode(convert(response, bytes32), method_id=method_id("UUPSUnsupportedProxiableUUID(bytes32)"))
        )


@internal
@payable
def _delegate(implementation: address, data: Bytes[MAX_CALL]):
    success: bool = False
    response: Bytes[MAX_CALL] = b""
    success, response = raw_call(
        implementation, data, max_outsize=MAX_CALL, is_delegate_call=True, revert_on_failure=False
    )
    if not success:
        if len(response) > 0:
            raw_revert(response)
        raw_revert(method_id("FailedCall()"))
