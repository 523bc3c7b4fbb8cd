"""An operator's acts on dstack's contracts: each is sent, and says what the contract answered before and after it.

They work through any node's JSON-RPC, with accounts of the node, or with a private key that signs here.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Final

from dstack_emu.attest.release import AuthEthRevision
from dstack_emu.chain.artefacts import app_contract, kms_contract
from dstack_emu.chain.contracts import (
    AppContract,
    Ask,
    Contract,
    ContractError,
    KmsContract,
    KmsInfo,
    Sender,
    Sent,
)
from dstack_emu.chain.quantities import checksummed, data
from dstack_emu.chain.transaction import DYNAMIC_FEE, Transaction, address_of

IMPLEMENTATION: Final = 0x360894A13BA1A3210667C828492DB98DCA3E2076CC3735A920A3CA505D382BBC
"""The slot in which a proxy has the address of its implementation (ERC-1967)."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The functions of a list: the view of an entry, and what adds and removes one."""

    view: str
    add: str
    remove: str


LISTINGS: Final[Mapping[str, Listing]] = MappingProxyType(
    {
        "os-image": Listing("allowedOsImages", "addOsImageHash", "removeOsImageHash"),
        "kms-mr": Listing("kmsAllowedAggregatedMrs", "addKmsAggregatedMr", "removeKmsAggregatedMr"),
        "kms-device": Listing("kmsAllowedDeviceIds", "addKmsDevice", "removeKmsDevice"),
        "compose-hash": Listing("allowedComposeHashes", "addComposeHash", "removeComposeHash"),
        "device": Listing("allowedDeviceIds", "addDevice", "removeDevice"),
    }
)
"""The lists of DstackKms, and of a DstackApp: the last two."""
OF_APP: Final = ("compose-hash", "device")
APP_SETTINGS: Final = MappingProxyType(
    {
        "allow-any-device": ("allowAnyDevice()", "setAllowAnyDevice(bool)"),
        "require-tcb-up-to-date": ("requireTcbUpToDate()", "setRequireTcbUpToDate(bool)"),
    }
)
"""What else a DstackApp has: the view of it, and the function that changes it."""


@dataclass(frozen=True, slots=True)
class Changed:
    """An act that was mined: what it is about, and what the contract answered before and after it."""

    what: str
    before: Any
    after: Any
    transaction: str
    block: int

    @property
    def text(self) -> str:
        """The act in a line."""
        return f"{self.what}: {self.before} before, {self.after} now (block {self.block}, {self.transaction})"


def _changed(what: str, before: Any, after: Any, sent: Sent) -> Changed:
    return Changed(what, before, after, str(sent.receipt["transactionHash"]), int(sent.receipt["blockNumber"], 16))


async def list_entry(contract: Contract, sender: Sender, kind: str, value: bytes, *, allowed: bool) -> Changed:
    """Allow or remove a hash of 32 bytes in one of `LISTINGS`; raise `ChainError`."""
    listing = LISTINGS[kind]

    async def state() -> str:
        listed = await contract.view(f"{listing.view}(bytes32)", "(bool)", value)
        return "allowed" if listed else "not allowed"

    before = await state()
    sent = await contract.act(sender, f"{listing.add if allowed else listing.remove}(bytes32)", value)
    return _changed(f"{kind} {data(value)}", before, await state(), sent)


async def register_app(kms: KmsContract, sender: Sender, app_id: bytes) -> Changed:
    """Register a contract that exists as an app; raise `ChainError`."""

    async def state() -> str:
        registered = await kms.view("registeredApps(address)", "(bool)", app_id)
        return "registered" if registered else "not registered"

    before = await state()
    sent = await kms.register_app(sender, app_id)
    return _changed(f"app {checksummed(app_id)}", before, await state(), sent)


async def deploy_app(kms: KmsContract, sender: Sender, **settings: Any) -> Changed:
    """Create the contract of an app, and register it (settings of `KmsContract.send_deploy_app`); raise `ChainError`.

    What is changed is the app: its address is the app id.
    """
    sent = await kms.send_deploy_app(sender, **settings)
    return _changed(f"app {checksummed(kms.deployed_app(sent).address)}", "not registered", "registered", sent)


async def set_app(app: AppContract, sender: Sender, setting: str, value: bool) -> Changed:
    """Change one of `APP_SETTINGS`; raise `ChainError`."""
    view, function = APP_SETTINGS[setting]
    before = await app.view(view, "(bool)")
    sent = await app.act(sender, function, value)
    return _changed(f"{setting} of {checksummed(app.address)}", before, await app.view(view, "(bool)"), sent)


async def disable_upgrades(app: AppContract, sender: Sender) -> Changed:
    """Forbid upgrades of an app for ever; raise `ChainError`. No view of the contract tells what was before."""
    sent = await app.disable_upgrades(sender)
    return _changed(f"upgrades of {checksummed(app.address)}", None, "disabled", sent)


async def set_gateway_app_id(kms: KmsContract, sender: Sender, app_id: str) -> Changed:
    """Name the app of the gateway; raise `ChainError`."""
    before = await kms.gateway_app_id()
    sent = await kms.set_gateway_app_id(sender, app_id)
    return _changed("gatewayAppId", before, await kms.gateway_app_id(), sent)


async def set_app_implementation(kms: KmsContract, sender: Sender, implementation: bytes) -> Changed:
    """Replace the implementation of the apps that the factory makes from now on; raise `ChainError`."""
    before = checksummed(await kms.app_implementation())
    sent = await kms.set_app_implementation(sender, implementation)
    return _changed("appImplementation", before, checksummed(await kms.app_implementation()), sent)


async def set_info(kms: KmsContract, sender: Sender, info: KmsInfo) -> Changed:
    """Publish keys and evidence of a KMS, which are in hex before and after it; raise `ChainError`."""

    async def state() -> dict[str, str]:
        return {name: value.hex() for name, value in asdict(await kms.info()).items()}

    before = await state()
    sent = await kms.set_info(sender, info)
    return _changed("kmsInfo", before, await state(), sent)


async def transfer_ownership(contract: Contract, sender: Sender, owner: bytes) -> Changed:
    """Hand a contract over; in revision next the new owner has to accept. Raises `ChainError`."""
    before = await contract.owner()
    sent = await contract.transfer_ownership(sender, owner)
    return await _with_owner(contract, before, sent)


async def accept_ownership(contract: Contract, sender: Sender) -> Changed:
    """Become the owner that was named; raise `ChainError`."""
    before = await contract.owner()
    try:
        sent = await contract.accept_ownership(sender)
    except ContractError as error:
        if await _hands_over_at_once(contract):
            raise ContractError(
                f"{checksummed(contract.address)} is of dstack 0.5.11: transferOwnership has handed it over already"
            ) from error
        raise
    return await _with_owner(contract, before, sent)


async def _hands_over_at_once(contract: Contract) -> bool:
    try:
        await contract.view("pendingOwner()", "(address)")
    except ContractError:
        return True
    return False


async def _with_owner(contract: Contract, before: bytes, sent: Sent) -> Changed:
    after, pending = checksummed(await contract.owner()), await pending_owner(contract)
    waiting = "" if pending is None else f" ({checksummed(pending)} once it accepts)"
    return _changed(f"owner of {checksummed(contract.address)}", checksummed(before), f"{after}{waiting}", sent)


async def upgrade(
    contract: Contract, sender: Sender, implementation: bytes | None, revision: AuthEthRevision
) -> Changed:
    """Replace the implementation behind a proxy; without one, by this project's of a revision, which is deployed."""
    if implementation is None:
        made = kms_contract(revision) if isinstance(contract, KmsContract) else app_contract(revision)
        implementation = await sender.create(made.bytecode)

    before = await implementation_of(contract)
    sent = await contract.upgrade(sender, implementation)
    after = await implementation_of(contract)
    return _changed(f"implementation of {checksummed(contract.address)}", before, after, sent)


async def implementation_of(contract: Contract) -> str:
    """Return the address of what is behind a proxy."""
    stored = await contract.ask("eth_getStorageAt", [data(contract.address), hex(IMPLEMENTATION), "latest"])
    return checksummed(bytes.fromhex(stored[2:])[-20:])


async def pending_owner(contract: Contract) -> bytes | None:
    """Return who is to accept the ownership of a contract; None if nobody is."""
    try:
        found: bytes = await contract.view("pendingOwner()", "(address)")
    except ContractError:  # 0.5.11 hands over at once
        return None
    return None if found == bytes(20) else found


def signing_ask(ask: Ask, private_key: bytes) -> tuple[Ask, bytes]:
    """Return an `Ask` whose eth_sendTransaction signs here, and the key's address.

    The node sees no key. Raises `ValueError` for what is no private key of 32 bytes.
    """
    sender = address_of(private_key)

    async def signed(method: str, params: list[Any]) -> Any:
        if method != "eth_sendTransaction":
            return await ask(method, params)
        call = params[0]
        number = _asking_numbers(ask)
        tip = await number("eth_maxPriorityFeePerGas", [])
        transaction = Transaction(
            DYNAMIC_FEE,
            await number("eth_chainId", []),
            await number("eth_getTransactionCount", [data(sender), "pending"]),
            tip,
            2 * await number("eth_gasPrice", []) + tip,
            await number("eth_estimateGas", [call]),
            bytes.fromhex(call["to"][2:]) if "to" in call else None,
            0,
            bytes.fromhex(call["data"][2:]),
        ).signed(private_key)
        return await ask("eth_sendRawTransaction", [data(transaction.raw)])

    return signed, sender


def _asking_numbers(ask: Ask) -> Callable[..., Any]:
    async def number(method: str, params: list[Any]) -> int:
        return int(await ask(method, params), 16)

    return number
