# pragma version ~=0.4.3
"""
@notice What is particular to the contracts of dstack 0.5.11: a new owner is owner at once, and no event tells a policy.
"""

import slots

uses: slots

# 0x9016d09d72d40fdae2fd8ceac6b6234c7706214fd39c1cd1e609a0528c199300; a literal in hex would not be a number
OWNER_SLOT: constant(uint256) = 65173360639460082030725920392146925864023520599682862633725751242436743107328

event OwnershipTransferred:
    previousOwner: indexed(address)
    newOwner: indexed(address)


@external
@view
def owner() -> address:
    return slots._address(OWNER_SLOT)


@external
def transferOwnership(newOwner: address):
    self._check_owner()
    self._set_first_owner(newOwner)


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
    slots._set_address(OWNER_SLOT, owner)
    log OwnershipTransferred(previousOwner=previous, newOwner=owner)


@internal
def _log_policy(policy: bytes32, subject: bytes32, enabled: bool):
    pass
