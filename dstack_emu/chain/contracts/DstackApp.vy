# pragma version ~=0.4.3
"""
@title DstackApp
@notice The contract of one app: which compose hashes and devices it may boot with.
@dev Written from the interface of dstack's contract of the same name. An emulator: never deploy it on a public chain.
"""

import boot_info
import revision
import slots
import upgradeable

initializes: slots
initializes: revision[slots := slots]
initializes: upgradeable[slots := slots]

exports: (revision.__interface__, upgradeable.__interface__)

COMPOSE_HASHES: constant(uint256) = 0
FLAGS: constant(uint256) = 1
DEVICES: constant(uint256) = 2
REQUIRE_TCB: constant(uint256) = 3

# Bytes of the slot FLAGS.
UPGRADES_DISABLED: constant(uint256) = 0
ALLOW_ANY_DEVICE: constant(uint256) = 1

ANSWER: constant(uint256) = 128  # a boolean and a reason of at most 32 bytes, encoded
IS_APP_ALLOWED: constant(bytes4) = 0x1e079198

event ComposeHashAdded:
    composeHash: bytes32

event ComposeHashRemoved:
    composeHash: bytes32

event DeviceAdded:
    deviceId: bytes32

event DeviceRemoved:
    deviceId: bytes32

event AllowAnyDeviceSet:
    allowAny: bool

event RequireTcbUpToDateSet:
    requireUpToDate: bool

event UpgradesDisabled:
    pass


@deploy
def __init__():
    upgradeable.__init__()


@external
def initialize(
    initialOwner: address,
    _disableUpgrades: bool,
    _requireTcbUpToDate: bool,
    _allowAnyDevice: bool,
    initialDeviceId: bytes32,
    initialComposeHash: bytes32,
):
    self._initialize(
        initialOwner, _disableUpgrades, _requireTcbUpToDate, _allowAnyDevice, initialDeviceId, initialComposeHash
    )


@external
@raw_return
def __default__() -> Bytes[ANSWER]:
    """
    @notice What a function of the usual kind cannot be: see the two below.
    """
    if len(msg.data) < 4:
        raw_revert(b"")
    selector: bytes4 = convert(slice(msg.data, 0, 4), bytes4)
    if selector == IS_APP_ALLOWED:
        return self._is_app_allowed()
    if selector != method_id("initialize(address,bool,bool,bytes32,bytes32)", output_type=bytes4):
        raw_revert(b"")
    self._initialize_older()
    return b""


@internal
@view
def _is_app_allowed() -> Bytes[ANSWER]:
    """
    @notice Decide on a boot; boot_info has the reason why isAppAllowed is no function of the usual kind.
    """
    members: Bytes[boot_info.SIZE] = boot_info._members()
    if slots._bit(REQUIRE_TCB, 0) and not boot_info._is_up_to_date():
        return abi_encode(False, "TCB status is not up to date")
    if not slots._member(COMPOSE_HASHES, extract32(members, boot_info.COMPOSE_HASH)):
        return abi_encode(False, "Compose hash not allowed")
    if not slots._bit(FLAGS, ALLOW_ANY_DEVICE):
        if not slots._member(DEVICES, extract32(members, boot_info.DEVICE_ID)):
            return abi_encode(False, "Device not allowed")
    return abi_encode(True, "")


@internal
def _initialize_older():
    """
    @notice The older `initialize`, which does not know requireTcbUpToDate. Vyper has no two functions of one name.
    """
    if len(msg.data) < 164:
        raw_revert(b"")
    initial_owner: address = empty(address)
    disable_upgrades: bool = False
    allow_any_device: bool = False
    device_id: bytes32 = empty(bytes32)
    compose_hash: bytes32 = empty(bytes32)
    initial_owner, disable_upgrades, allow_any_device, device_id, compose_hash = abi_decode(
        slice(msg.data, 4, 160), (address, bool, bool, bytes32, bytes32)
    )
    self._initialize(initial_owner, disable_upgrades, False, allow_any_device, device_id, compose_hash)


@internal
def _initialize(
    initial_owner: address,
    disable_upgrades: bool,
    require_tcb: bool,
    allow_any_device: bool,
    device_id: bytes32,
    compose_hash: bytes32,
):
    upgradeable._check_not_initialized()
    assert initial_owner != empty(address), "invalid owner address"
    slots._set_bit(REQUIRE_TCB, 0, require_tcb)
    slots._set_bit(FLAGS, UPGRADES_DISABLED, disable_upgrades)
    slots._set_bit(FLAGS, ALLOW_ANY_DEVICE, allow_any_device)
    if device_id != empty(bytes32):
        self._add_device(device_id)
    if compose_hash != empty(bytes32):
        self._add_compose_hash(compose_hash)
    revision._set_first_owner(initial_owner)
    upgradeable._set_initialized()


@external
@payable
def upgradeToAndCall(newImplementation: address, data: Bytes[upgradeable.MAX_CALL]):
    upgradeable._check_proxy()
    revision._check_owner()
    assert not slots._bit(FLAGS, UPGRADES_DISABLED), "Upgrades are permanently disabled"
    revision._log_policy(
        keccak256("implementation-upgrade"), convert(convert(newImplementation, uint160), bytes32), True
    )
    upgradeable._upgrade(newImplementation, data)


@external
@pure
def version() -> uint256:
    return 2


@external
@view
def supportsInterface(interfaceId: bytes4) -> bool:
    return interfaceId in [0x01ffc9a7, 0x1e079198, 0x8fd37527]


@external
@view
def allowedComposeHashes(composeHash: bytes32) -> bool:
    return slots._member(COMPOSE_HASHES, composeHash)


@external
@view
def allowedDeviceIds(deviceId: bytes32) -> bool:
    return slots._member(DEVICES, deviceId)


@external
@view
def allowAnyDevice() -> bool:
    return slots._bit(FLAGS, ALLOW_ANY_DEVICE)


@external
@view
def requireTcbUpToDate() -> bool:
    return slots._bit(REQUIRE_TCB, 0)


@external
def addComposeHash(composeHash: bytes32):
    revision._check_owner()
    self._add_compose_hash(composeHash)


@internal
def _add_compose_hash(compose_hash: bytes32):
    slots._set_member(COMPOSE_HASHES, compose_hash, True)
    log ComposeHashAdded(composeHash=compose_hash)
    revision._log_policy(keccak256("compose-hash"), compose_hash, True)


@external
def removeComposeHash(composeHash: bytes32):
    revision._check_owner()
    slots._set_member(COMPOSE_HASHES, composeHash, False)
    log ComposeHashRemoved(composeHash=composeHash)
    revision._log_policy(keccak256("compose-hash"), composeHash, False)


@external
def addDevice(deviceId: bytes32):
    revision._check_owner()
    self._add_device(deviceId)


@internal
def _add_device(device_id: bytes32):
    slots._set_member(DEVICES, device_id, True)
    log DeviceAdded(deviceId=device_id)
    revision._log_policy(keccak256("device"), device_id, True)


@external
def removeDevice(deviceId: bytes32):
    revision._check_owner()
    slots._set_member(DEVICES, deviceId, False)
    log DeviceRemoved(deviceId=deviceId)
    revision._log_policy(keccak256("device"), deviceId, False)


@external
def setAllowAnyDevice(_allowAnyDevice: bool):
    revision._check_owner()
    slots._set_bit(FLAGS, ALLOW_ANY_DEVICE, _allowAnyDevice)
    log AllowAnyDeviceSet(allowAny=_allowAnyDevice)
    revision._log_policy(keccak256("allow-any-device"), empty(bytes32), _allowAnyDevice)


@external
def setRequireTcbUpToDate(_requireUpToDate: bool):
    revision._check_owner()
    slots._set_bit(REQUIRE_TCB, 0, _requireUpToDate)
    log RequireTcbUpToDateSet(requireUpToDate=_requireUpToDate)
    revision._log_policy(keccak256("require-tcb-up-to-date"), empty(bytes32), _requireUpToDate)


@external
def disableUpgrades():
    revision._check_owner()
    slots._set_bit(FLAGS, UPGRADES_DISABLED, True)
    log UpgradesDisabled()
    revision._log_policy(keccak256("upgrades-disabled"), empty(bytes32), True)
