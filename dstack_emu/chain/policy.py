"""What a DstackKms and its apps allow, as a policy in auth-simple's form, and the acts that lead from one to another.

A policy is read from the events of the contracts, through any node. auth-simple's form says more and less than the
contracts: they allow no KMS on any device, and no app is ever unregistered; it has no requirement of a TCB status.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dstack_emu.attest.errors import FormatError
from dstack_emu.chain import abi
from dstack_emu.chain.contracts import INITIALIZE_APP, AppContract, Ask, ContractError, KmsContract, Sender, Sent
from dstack_emu.chain.quantities import checksummed, data
from dstack_emu.chain.transaction import created_address

NONE: Final = bytes(32)
"""What the factory takes for no device, or no compose hash."""
FIRST_APP_NONCE: Final = 1
"""The nonce of a contract that has created no other one (EIP-161)."""

Hashes = frozenset[bytes]


@dataclass(frozen=True, slots=True)
class AppPolicy:
    """What an app's contract allows: compose hashes and devices of 32 bytes each."""

    compose_hashes: Hashes = frozenset()
    devices: Hashes = frozenset()
    allow_any_device: bool = False


@dataclass(frozen=True, slots=True)
class ContractPolicy:
    """What the contracts allow; `apps` are the registered ones, by their addresses of 20 bytes."""

    os_images: Hashes = frozenset()
    kms_measurements: Hashes = frozenset()
    kms_devices: Hashes = frozenset()
    gateway_app_id: str = ""
    apps: Mapping[bytes, AppPolicy] = field(default_factory=dict)

    @classmethod
    def of_document(cls, document: Mapping[str, Any], any_device: Iterable[bytes]) -> "ContractPolicy":
        """Read auth-simple's form; raise `FormatError`. With `allowAnyDevice` of KMS these devices are allowed, too."""
        kms, apps = _members(document, "kms"), _members(document, "apps")
        devices = _hashes(kms, "devices") | frozenset(any_device if kms.get("allowAnyDevice", False) is True else ())
        return cls(
            _hashes(document, "osImages"),
            _hashes(kms, "mrAggregated"),
            devices,
            str(document.get("gatewayAppId", "")),
            {_bytes(name, 20): _app_policy(_members(apps, name)) for name in apps},
        )

    def document(self) -> dict[str, Any]:
        """Return it in auth-simple's form."""
        return {
            "osImages": _texts(self.os_images),
            "gatewayAppId": self.gateway_app_id,
            "kms": {
                "mrAggregated": _texts(self.kms_measurements),
                "devices": _texts(self.kms_devices),
                "allowAnyDevice": False,
            },
            "apps": {
                data(app_id): {
                    "composeHashes": _texts(app.compose_hashes),
                    "devices": _texts(app.devices),
                    "allowAnyDevice": app.allow_any_device,
                }
                for app_id, app in self.apps.items()
            },
        }


@dataclass(frozen=True, slots=True)
class PlannedAct:
    """A call that is to be sent to a contract."""

    to: bytes
    signature: str
    values: tuple[Any, ...]

    @property
    def data(self) -> bytes:
        """The encoded call."""
        return abi.call(self.signature, *self.values)

    @property
    def text(self) -> str:
        """The call in words, such as `addDevice(0x…)`."""
        return f"{self.signature.partition('(')[0]}({', '.join(map(_shown, self.values))})"

    async def send(self, sender: Sender) -> Sent:
        """Send it; raise `ContractError` if the contract refuses."""
        try:
            return await sender.send(self.to, self.data)
        except ContractError as error:
            raise ContractError(f"{self.text}: {error}") from error


# ---- reading


async def read_policy(ask: Ask, kms: bytes) -> ContractPolicy:
    """Read from the events of a DstackKms and its apps what they allow; raise `ChainError`."""
    found = KmsContract(ask, kms)
    own = _Listed.of(await _logs(ask, [kms]))
    apps = dict.fromkeys(each[-20:] for each in own.values("AppRegistered(address)"))
    of_apps = await _logs(ask, list(apps)) if apps else []
    return ContractPolicy(
        own.present("OsImageHashAdded(bytes32)", "OsImageHashRemoved(bytes32)"),
        own.present("KmsAggregatedMrAdded(bytes32)", "KmsAggregatedMrRemoved(bytes32)"),
        own.present("KmsDeviceAdded(bytes32)", "KmsDeviceRemoved(bytes32)"),
        await found.gateway_app_id(),
        {app: await _read_app(AppContract(ask, app), of_apps) for app in apps},
    )


async def read_document(ask: Ask, kms: bytes) -> dict[str, Any]:
    """Return what is allowed in auth-simple's form, and what that lacks: owners, and requirements of a TCB status."""
    policy = await read_policy(ask, kms)
    document = policy.document() | {"owner": checksummed(await KmsContract(ask, kms).owner())}
    for address, app in zip(policy.apps, document["apps"].values(), strict=True):
        app |= await _beside(AppContract(ask, address))
    return document


async def _beside(app: AppContract) -> dict[str, Any]:
    try:
        requires = bool(await app.view("requireTcbUpToDate()", "(bool)"))
        return {"requireTcbUpToDate": requires, "owner": checksummed(await app.owner())}
    except ContractError:  # a registered app may be any contract
        return {}


async def _read_app(app: AppContract, logs: list[Mapping[str, Any]]) -> AppPolicy:
    own = _Listed.of(log for log in logs if bytes.fromhex(log["address"][2:]) == app.address)
    try:
        any_device = bool(await app.view("allowAnyDevice()", "(bool)"))
    except ContractError:  # a registered app may be any contract
        any_device = False
    return AppPolicy(
        own.present("ComposeHashAdded(bytes32)", "ComposeHashRemoved(bytes32)"),
        own.present("DeviceAdded(bytes32)", "DeviceRemoved(bytes32)"),
        any_device,
    )


async def _logs(ask: Ask, addresses: list[bytes]) -> list[Mapping[str, Any]]:
    wanted = {"fromBlock": "0x0", "toBlock": "latest", "address": [data(each) for each in addresses]}
    found: list[Mapping[str, Any]] = await ask("eth_getLogs", [wanted])
    return found


@dataclass(frozen=True, slots=True)
class _Listed:
    """The events of a contract, in their order: the first topic, and the data."""

    events: tuple[tuple[str, bytes], ...]

    @classmethod
    def of(cls, logs: Iterable[Mapping[str, Any]]) -> "_Listed":
        return cls(tuple((log["topics"][0], bytes.fromhex(log["data"][2:])) for log in logs))

    def values(self, event: str) -> list[bytes]:
        wanted = data(abi.topic(event))
        return [value for topic, value in self.events if topic == wanted]

    def present(self, added: str, removed: str) -> Hashes:
        kinds = {data(abi.topic(added)): True, data(abi.topic(removed)): False}
        last = {value: kinds[topic] for topic, value in self.events if topic in kinds}
        return frozenset(value for value, is_there in last.items() if is_there)


# ---- from one policy to another


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans acts of an owner on a DstackKms.

    The next app that its factory creates has the address that follows from `app_nonce`; at the addresses `occupied` is
    a contract already.
    """

    kms: bytes
    owner: bytes
    app_nonce: int = FIRST_APP_NONCE
    occupied: Collection[bytes] = ()

    @classmethod
    async def at(cls, ask: Ask, kms: bytes, owner: bytes, apps: Iterable[bytes]) -> "Planner":
        """Ask a node what the next app's address follows from, and at which of these addresses is a contract."""
        nonce = int(await ask("eth_getTransactionCount", [data(kms), "latest"]), 16)
        codes = {app: await ask("eth_getCode", [data(app), "latest"]) for app in apps}
        return cls(kms, owner, nonce, frozenset(app for app, code in codes.items() if code != "0x"))

    def acts(self, now: ContractPolicy, wanted: ContractPolicy) -> list[PlannedAct]:
        """Return the acts that lead from one policy to another; raise `ContractError` for an app that cannot be."""
        return [*self._of_kms(now, wanted), *self._of_apps(now, wanted)]

    def _of_kms(self, now: ContractPolicy, wanted: ContractPolicy) -> Iterator[PlannedAct]:
        yield from self._listed(self.kms, "OsImageHash", now.os_images, wanted.os_images)
        yield from self._listed(self.kms, "KmsAggregatedMr", now.kms_measurements, wanted.kms_measurements)
        yield from self._listed(self.kms, "KmsDevice", now.kms_devices, wanted.kms_devices)
        if now.gateway_app_id != wanted.gateway_app_id:
            yield PlannedAct(self.kms, "setGatewayAppId(string)", (wanted.gateway_app_id,))

    def _of_apps(self, now: ContractPolicy, wanted: ContractPolicy) -> Iterator[PlannedAct]:
        nonce = self.app_nonce
        for app_id, app in wanted.apps.items():
            present = now.apps.get(app_id)
            if present is None and app_id in self.occupied:
                yield PlannedAct(self.kms, "registerApp(address)", (app_id,))
                present = AppPolicy()
            elif present is None:
                self._require_next(app_id, nonce)
                nonce += 1
                present = _created(app)
                yield self._creation(present)
            yield from self._of_app(app_id, present, app)
        for app_id in sorted(now.apps.keys() - wanted.apps.keys()):
            yield from self._listed(app_id, "ComposeHash", now.apps[app_id].compose_hashes, frozenset())

    def _require_next(self, app_id: bytes, nonce: int) -> None:
        address = created_address(self.kms, nonce)
        if app_id != address:
            raise ContractError(
                f"the app id {data(app_id)} is no contract on this chain. On a chain an app's id is the address of its "
                f"contract: the next one that the factory creates is {data(address)}. Give the app that id"
            )

    def _creation(self, app: AppPolicy) -> PlannedAct:
        device, compose_hash = (next(iter(each), NONE) for each in (app.devices, app.compose_hashes))
        values = (self.owner, False, False, app.allow_any_device, device, compose_hash)
        return PlannedAct(self.kms, f"deployAndRegisterApp{INITIALIZE_APP}", values)

    def _of_app(self, app_id: bytes, now: AppPolicy, wanted: AppPolicy) -> Iterator[PlannedAct]:
        yield from self._listed(app_id, "ComposeHash", now.compose_hashes, wanted.compose_hashes)
        yield from self._listed(app_id, "Device", now.devices, wanted.devices)
        if now.allow_any_device != wanted.allow_any_device:
            yield PlannedAct(app_id, "setAllowAnyDevice(bool)", (wanted.allow_any_device,))

    def _listed(self, to: bytes, what: str, now: Hashes, wanted: Hashes) -> Iterator[PlannedAct]:
        for verb, values in (("remove", now - wanted), ("add", wanted - now)):
            for value in sorted(values):
                yield PlannedAct(to, f"{verb}{what}(bytes32)", (value,))


def _created(app: AppPolicy) -> AppPolicy:
    """Return what the factory lets a new app allow: one compose hash and one device of those that it is to allow."""
    hashes, devices = (frozenset(sorted(each)[:1]) for each in (app.compose_hashes, app.devices))
    return AppPolicy(hashes, devices, app.allow_any_device)


# ---- auth-simple's form


def _members(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = document.get(name, {})
    if not isinstance(found, dict):
        raise FormatError(f"policy: {name}: an object expected, got {found!r:.60}")
    return found


def _app_policy(app: Mapping[str, Any]) -> AppPolicy:
    return AppPolicy(_hashes(app, "composeHashes"), _hashes(app, "devices"), app.get("allowAnyDevice", False) is True)


def _hashes(document: Mapping[str, Any], name: str) -> Hashes:
    found = document.get(name, [])
    if not isinstance(found, list):
        raise FormatError(f"policy: {name}: a list expected, got {found!r:.60}")
    return frozenset(_bytes(each, 32) for each in found)


def _bytes(text: object, size: int) -> bytes:
    """Read hex of at most that many bytes, and pad it on the left, as the webhook does."""
    try:
        found = bytes.fromhex(text.lower().removeprefix("0x")) if isinstance(text, str) else b""
    except ValueError:
        found = b""
    if not 0 < len(found) <= size:
        raise FormatError(f"policy: hex of {size} bytes expected, got {text!r:.80}")
    return found.rjust(size, b"\0")


def _texts(values: Hashes) -> list[str]:
    return [data(each) for each in sorted(values)]


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        return checksummed(value) if len(value) == 20 else data(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
