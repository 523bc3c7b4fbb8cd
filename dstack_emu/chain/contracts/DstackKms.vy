# pragma version ~=0.4.3
"""
@title DstackKms
@notice The contract of a KMS: which KMS may boot, which apps are registered, and which OS images may run.
@dev Written from the interface of dstack's contract of the same name. An emulator: never deploy it on a public chain.
"""

import boot_info
import proxy_code
import revision
import slots
import upgradeable

initializes: slots
initializes: revision[slots := slots]
initializes: upgradeable[slots := slots]

exports: (revision.__interface__, upgradeable.__interface__)

MAX_K256: constant(uint256) = 1024
MAX_CA: constant(uint256) = 8192
MAX_GATEWAY_APP_ID: constant(uint256) = 1024
ANSWER: constant(uint256) = 1120  # a boolean and a reason of at most 1,024 bytes, encoded

KMS_INFO: constant(uint256) = 0  # four byte strings, a slot each
CA_PUBKEY: constant(uint256) = 1
QUOTE: constant(uint256) = 2
EVENTLOG: constant(uint256) = 3
GATEWAY_APP_ID: constant(uint256) = 4
REGISTERED_APPS: constant(uint256) = 5
AGGREGATED_MRS: constant(uint256) = 6
DEVICES: constant(uint256) = 7
OS_IMAGES: constant(uint256) = 8
APP_IMPLEMENTATION: constant(uint256) = 9

IS_APP_ALLOWED: constant(bytes4) = 0x1e079198
IS_KMS_ALLOWED: constant(bytes4) = 0xe067ec9d

struct KmsInfo:
    k256Pubkey: Bytes[MAX_K256]
    caPubkey: Bytes[MAX_CA]
    quote: Bytes[slots.MAX_BYTES]
    eventlog: Bytes[slots.MAX_BYTES]

event AppRegistered:
    appId: address

event KmsInfoSet:
    k256Pubkey: Bytes[MAX_K256]

event KmsAggregatedMrAdded:
    mrAggregated: bytes32

event KmsAggregatedMrRemoved:
    mrAggregated: bytes32

event KmsDeviceAdded:
    deviceId: bytes32

event KmsDeviceRemoved:
    deviceId: bytes32

event OsImageHashAdded:
    osImageHash: bytes32

event OsImageHashRemoved:
    osImageHash: bytes32

event GatewayAppIdSet:
    gatewayAppId: String[MAX_GATEWAY_APP_ID]

event AppImplementationSet:
    implementation: address

event AppDeployedViaFactory:
    appId: indexed(address)
    deployer: indexed(address)


@deploy
def __init__():
    upgradeable.__init__()


@external
def initialize(initialOwner: address, _appImplementation: address):
    upgradeable._check_not_initialized()
    revision._set_first_owner(initialOwner)
    if _appImplementation != empty(address):
        self._set_app_implementation(_appImplementation)
    upgradeable._set_initialized()


@external
@raw_return
def __default__() -> Bytes[ANSWER]:
    """
    @notice What a function of the usual kind cannot be: see the three below.
    """
    if len(msg.data) < 4:
        raw_revert(b"")
    selector: bytes4 = convert(slice(msg.data, 0, 4), bytes4)
    if selector == IS_APP_ALLOWED:
        return self._is_app_allowed()
    if selector == IS_KMS_ALLOWED:
        return self._is_kms_allowed()
    if selector != method_id("deployAndRegisterApp(address,bool,bool,bytes32,bytes32)", output_type=bytes4):
        raw_revert(b"")
    return abi_encode(self._deploy_and_register_older())


@internal
@view
def _is_kms_allowed() -> Bytes[ANSWER]:
    """
    @notice Decide on a KMS; boot_info has the reason why isKmsAllowed is no function of the usual kind.
    """
    members: Bytes[boot_info.SIZE] = boot_info._members()
    if not boot_info._is_up_to_date():
        return abi_encode(False, "TCB status is not up to date")
    if not slots._member(OS_IMAGES, extract32(members, boot_info.OS_IMAGE_HASH)):
        return abi_encode(False, "OS image is not allowed")
    if not slots._member(AGGREGATED_MRS, extract32(members, boot_info.MR_AGGREGATED)):
        return abi_encode(False, "Aggregated MR not allowed")
    if not slots._member(DEVICES, extract32(members, boot_info.DEVICE_ID)):
        return abi_encode(False, "KMS is not allowed to boot on this device")
    return abi_encode(True, "")


@internal
@view
def _is_app_allowed() -> Bytes[ANSWER]:
    """
    @notice Decide on an app. The contract at its id is asked the same question, and has the last word.
    """
    members: Bytes[boot_info.SIZE] = boot_info._members()
    app: address = extract32(members, boot_info.APP_ID, output_type=address)
    if not slots._member(REGISTERED_APPS, self._word(app)):
        return abi_encode(False, "App not registered")
    if not slots._member(OS_IMAGES, extract32(members, boot_info.OS_IMAGE_HASH)):
        return abi_encode(False, "OS image is not allowed")
    if not app.is_contract:
        return abi_encode(False, "App not deployed or invalid address")
    answer: Bytes[ANSWER] = raw_call(app, msg.data, max_outsize=ANSWER, is_static_call=True)
    if len(answer) < 96:
        raw_revert(b"")  # it is no pair of a boolean and a string
    return answer


@internal
def _deploy_and_register_older() -> address:
    """
    @notice The older `deployAndRegisterApp`, without requireTcbUpToDate. Vyper has no two functions of one name.
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
    return self._deploy_and_register(
        initial_owner, disable_upgrades, False, allow_any_device, device_id, compose_hash
    )


@external
@payable
def upgradeToAndCall(newImplementation: address, data: Bytes[upgradeable.MAX_CALL]):
    upgradeable._check_proxy()
    revision._check_owner()
    revision._log_policy(keccak256("implementation-upgrade"), self._word(newImplementation), True)
    upgradeable._upgrade(newImplementation, data)


@external
@view
def supportsInterface(interfaceId: bytes4) -> bool:
    return interfaceId in [0x01ffc9a7, 0x1e079198]


@internal
@pure
def _word(account: address) -> bytes32:
    return convert(convert(account, uint160), bytes32)


# ---- views


@external
@view
def kmsInfo() -> (Bytes[slots.MAX_READ], Bytes[slots.MAX_READ], Bytes[slots.MAX_READ], Bytes[slots.MAX_READ]):
    return slots._bytes(KMS_INFO), slots._bytes(CA_PUBKEY), slots._bytes(QUOTE), slots._bytes(EVENTLOG)


@external
@view
def gatewayAppId() -> String[slots.MAX_READ]:
    return convert(slots._bytes(GATEWAY_APP_ID), String[slots.MAX_READ])


@external
@view
def appImplementation() -> address:
    return slots._address(APP_IMPLEMENTATION)


@external
@view
def registeredApps(appId: address) -> bool:
    return slots._member(REGISTERED_APPS, self._word(appId))


@external
@view
def kmsAllowedAggregatedMrs(mrAggregated: bytes32) -> bool:
    return slots._member(AGGREGATED_MRS, mrAggregated)


@external
@view
def kmsAllowedDeviceIds(deviceId: bytes32) -> bool:
    return slots._member(DEVICES, deviceId)


@external
@view
def allowedOsImages(osImageHash: bytes32) -> bool:
    return slots._member(OS_IMAGES, osImageHash)


# ---- what the KMS publishes


@external
def setKmsInfo(info: KmsInfo):
    revision._check_owner()
    slots._set_bytes(KMS_INFO, info.k256Pubkey)
    slots._set_bytes(CA_PUBKEY, info.caPubkey)
    slots._set_bytes(QUOTE, info.quote)
    slots._set_bytes(EVENTLOG, info.eventlog)
    log KmsInfoSet(k256Pubkey=info.k256Pubkey)
    revision._log_policy(keccak256("kms-info"), keccak256(info.k256Pubkey), True)


@external
def setKmsQuote(quote: Bytes[slots.MAX_BYTES]):
    revision._check_owner()
    slots._set_bytes(QUOTE, quote)


@external
def setKmsEventlog(eventlog: Bytes[slots.MAX_BYTES]):
    revision._check_owner()
    slots._set_bytes(EVENTLOG, eventlog)


@external
def setGatewayAppId(appId: String[MAX_GATEWAY_APP_ID]):
    revision._check_owner()
    slots._set_bytes(GATEWAY_APP_ID, convert(appId, Bytes[MAX_GATEWAY_APP_ID]))
    log GatewayAppIdSet(gatewayAppId=appId)
    revision._log_policy(keccak256("gateway-app-id"), keccak256(appId), True)


# ---- apps


@external
def registerApp(appId: address):
    """
    @notice Register an app; everybody may.
    """
    self._register(appId)


@internal
def _register(app: address):
    assert app != empty(address), "Invalid app ID"
    slots._set_member(REGISTERED_APPS, self._word(app), True)
    log AppRegistered(appId=app)
    revision._log_policy(keccak256("registered-app"), self._word(app), True)


@external
def setAppImplementation(_implementation: address):
    revision._check_owner()
    assert _implementation != empty(address), "Invalid implementation address"
    self._set_app_implementation(_implementation)


@internal
def _set_app_implementation(implementation: address):
    slots._set_address(APP_IMPLEMENTATION, implementation)
    log AppImplementationSet(implementation=implementation)
    revision._log_policy(keccak256("app-implementation"), self._word(implementation), True)


@external
def deployAndRegisterApp(
    initialOwner: address,
    disableUpgrades: bool,
    requireTcbUpToDate: bool,
    allowAnyDevice: bool,
    initialDeviceId: bytes32,
    initialComposeHash: bytes32,
) -> address:
    """
    @notice Create the proxy of an app and register it; everybody may.
    """
    return self._deploy_and_register(
        initialOwner, disableUpgrades, requireTcbUpToDate, allowAnyDevice, initialDeviceId, initialComposeHash
    )


@internal
def _deploy_and_register(
    initial_owner: address,
    disable_upgrades: bool,
    require_tcb: bool,
    allow_any_device: bool,
    device_id: bytes32,
    compose_hash: bytes32,
) -> address:
    implementation: address = slots._address(APP_IMPLEMENTATION)
    assert implementation != empty(address), "DstackApp implementation not set"
    assert initial_owner != empty(address), "Invalid owner address"
    call: Bytes[196] = abi_encode(
        initial_owner,
        disable_upgrades,
        require_tcb,
        allow_any_device,
        device_id,
        compose_hash,
        method_id=method_id("initialize(address,bool,bool,bool,bytes32,bytes32)"),
    )
    app: address = raw_create(proxy_code.PROXY, implementation, call)
    self._register(app)
    log AppDeployedViaFactory(appId=app, deployer=msg.sender)
    return app


# ---- policy of KMS and images


@external
def addKmsAggregatedMr(mrAggregated: bytes32):
    revision._check_owner()
    slots._set_member(AGGREGATED_MRS, mrAggregated, True)
    log KmsAggregatedMrAdded(mrAggregated=mrAggregated)
    revision._log_policy(keccak256("kms-aggregated-mr"), mrAggregated, True)


@external
def removeKmsAggregatedMr(mrAggregated: bytes32):
    revision._check_owner()
    slots._set_member(AGGREGATED_MRS, mrAggregated, False)
    log KmsAggregatedMrRemoved(mrAggregated=mrAggregated)
    revision._log_policy(keccak256("kms-aggregated-mr"), mrAggregated, False)


@external
def addKmsDevice(deviceId: bytes32):
    revision._check_owner()
    slots._set_member(DEVICES, deviceId, True)
    log KmsDeviceAdded(deviceId=deviceId)
    revision._log_policy(keccak256("kms-device"), deviceId, True)


@external
def removeKmsDevice(deviceId: bytes32):
    revision._check_owner()
    slots._set_member(DEVICES, deviceId, False)
    log KmsDeviceRemoved(deviceId=deviceId)
    revision._log_policy(keccak256("kms-device"), deviceId, False)


@external
def addOsImageHash(osImageHash: bytes32):
    revision._check_owner()
    slots._set_member(OS_IMAGES, osImageHash, True)
    log OsImageHashAdded(osImageHash=osImageHash)
    revision._log_policy(keccak256("os-image"), osImageHash, True)


@external
def removeOsImageHash(osImageHash: bytes32):
    revision._check_owner()
    slots._set_member(OS_IMAGES, osImageHash, False)
    log OsImageHashRemoved(osImageHash=osImageHash)
    revision._log_policy(keccak256("os-image"), osImageHash, False)
