# pragma version ~=0.4.3
"""
@notice What is particular to the contracts after dstack 0.5.11: a new owner has to accept, and an event tells each
        policy.
"""

import slots

uses: slots

# 0x9016d09d72d40fdae2fd8ceac6b6234c7706214fd39c1cd1e609a0528c199300; a literal in hex would not be a number
OWNER_SLOT: constant(uint256) = 65173360639460082030725920392146925864023520599682862633725751242436743107328
# 0x237e158222e3e6968b72b9db0d8043aacf074ad9f650f0d1606b4d82ee432c00; a literal in hex would not be a number
PENDING_OWNER_SLOT: constant(uint256) = 16053720875717120191110171845200109550086765943194951757191984851604933389312

event OwnershipTransferStarted:
    previousOwner: indexed(address)
    newOwner: indexed(address)

event OwnershipTransferred:
    previousOwner: indexed(address)
    newOwner: indexed(address)

event PolicyChanged:
    actor: indexed(address)
    policy: indexed(bytes32)
    value: indexed(bytes32)
    enabled: bool


@external
@view
def owner() -> address:
    return slots._address(OWNER_SLOT)


@external
@view
def pendingOwner() -> address:
    return slots._address(PENDING_OWNER_SLOT)


@external
def transferOwnership(newOwner: address):
    self._check_owner()
    slots._set_address(PENDING_OWNER_SLOT, newOwner)
    log OwnershipTransferStarted(previousOwner=slots._address(OWNER_SLOT), newOwner=newOwner)


@external
def acceptOwnership():
    if slots._address(PENDING_OWNER_SLOT) != msg.sender:
        raw_revert(abi_encode(msg.sender, method_id=method_id("OwnableUnauthorizedAccount(address)")))
    self._set_owner(msg.sender)


@external
def renounceOwnership():
    self._check_owner()
    self._set_owner(empty(address))


@internal
@view
def _check_owner():
    if slots._address(OWNER_SLOT) != msg.sender:
        raw_revert(abi_encode(msg.sender, method_id=method_id("OwnableUnauthorizedAccount(address)")))


@internal
def _set_first_owner(owner: address):
    if owner == empty(address):
        raw_revert(abi_encode(owner, method_id=method_id("OwnableInvalidOwner(address)")))
    self._set_owner(owner)


@internal
def _set_owner(owner: address):
    previous: address = slots._address(OWNER_SLOT)
    slots._set_address(PENDING_OWNER_SLOT, empty(address))
    slots._set_address(OWNER_SLOT, owner)
    log OwnershipTransferred(previousOwner=previous, newOwner=owner)


@internal
def _log_policy(policy: bytes32, subject: bytes32, enabled: bool):
    log PolicyChanged(actor=msg.sender, policy=policy, value=subject, enabled=enabled)
