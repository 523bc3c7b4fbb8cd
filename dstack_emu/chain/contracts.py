"""dstack's contracts, as their operators use them: one method for each act, over any node's JSON-RPC.

`Node` runs in this process or elsewhere; it must have the sender's key, or impersonate it. An act returns when it is
mined, and raises `ContractError` if the contract refuses. Nothing is decided here: the contracts do.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.release import AuthEthRevision
from dstack_emu.chain import abi
from dstack_emu.chain.artefacts import app_contract, kms_contract, proxy_contract
from dstack_emu.chain.errors import ChainError
from dstack_emu.chain.quantities import checksummed, data, quantity
from dstack_emu.chain.revert import custom_error, reason
from dstack_emu.chain.transaction import created_address

BOOT_INFO: Final = "(address,bytes32,address,bytes32,bytes32,bytes32,bytes32,string,string[])"
INITIALIZE_APP: Final = "(address,bool,bool,bool,bytes32,bytes32)"

Ask = Callable[[str, list[Any]], Awaitable[Any]]
"""Sends a JSON-RPC request, method and parameters, and returns its result; raises `RpcError`."""

RECEIPT_TIMEOUT: Final = 120.0
"""Seconds that an act waits until it is mined."""
PAUSE: Final = 0.5
"""Seconds between two questions for a receipt."""


class RpcError(ChainError):
    """The error of a JSON-RPC answer; `data` is what a contract reverted with."""

    def __init__(self, code: int, message: str, data_: bytes = b"") -> None:
        super().__init__(message)
        self.code, self.data = code, data_


class ContractError(ChainError):
    """A contract refused an act."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer of isKmsAllowed or isAppAllowed."""

    allowed: bool
    reason: str


@dataclass(frozen=True, slots=True)
class BootInfo:
    """What a KMS asks about: addresses of 20 bytes, hashes of 32."""

    app_id: bytes = bytes(20)
    compose_hash: bytes = bytes(32)
    instance_id: bytes = bytes(20)
    device_id: bytes = bytes(32)
    mr_aggregated: bytes = bytes(32)
    mr_system: bytes = bytes(32)
    os_image_hash: bytes = bytes(32)
    tcb_status: str = "UpToDate"
    advisory_ids: tuple[str, ...] = ()

    def values(self) -> tuple[Any, ...]:
        """Return the members in their order."""
        hashes = (self.device_id, self.mr_aggregated, self.mr_system, self.os_image_hash)
        return (self.app_id, self.compose_hash, self.instance_id, *hashes, self.tcb_status, self.advisory_ids)


@dataclass(frozen=True, slots=True)
class KmsInfo:
    """What a KMS publishes on chain."""

    k256_pubkey: bytes
    ca_pubkey: bytes
    quote: bytes
    eventlog: bytes


@dataclass(frozen=True, slots=True)
class Sent:
    """A mined transaction: its receipt, in JSON."""

    receipt: Mapping[str, Any]

    @property
    def logs(self) -> list[Mapping[str, Any]]:
        """The events of it."""
        return list(self.receipt["logs"])

    @property
    def created(self) -> bytes:
        """The address of the contract that it created."""
        return bytes.fromhex(self.receipt["contractAddress"][2:])


@dataclass(frozen=True, slots=True)
class Sender:
    """An account that sends transactions through a node."""

    ask: Ask
    address: bytes

    async def create(self, code: bytes) -> bytes:
        """Create a contract; return its address."""
        return (await self._send({"data": data(code)})).created

    async def send(self, to: bytes, call: bytes) -> Sent:
        """Send a call, and wait until it is mined; raise `ContractError` if it is refused."""
        return await self._send({"to": data(to), "data": data(call)})

    async def _send(self, transaction: dict[str, Any]) -> Sent:
        try:
            hash_ = await self.ask("eth_sendTransaction", [{"from": data(self.address), **transaction}])
        except RpcError as error:
            raise ContractError(described(error)) from error
        receipt = await self._receipt(hash_)
        if int(receipt["status"], 16) != 1:
            raise ContractError(f"transaction {hash_} was mined, and failed")
        return Sent(receipt)

    async def _receipt(self, hash_: str) -> Mapping[str, Any]:
        """Wait until a transaction is mined: many nodes mine a block every few seconds, and not for each."""
        for _ in range(int(RECEIPT_TIMEOUT / PAUSE)):
            receipt: Mapping[str, Any] | None = await self.ask("eth_getTransactionReceipt", [hash_])
            if receipt is not None:
                return receipt
            await asyncio.sleep(PAUSE)
        raise ContractError(
            f"transaction {hash_} was sent, but not mined within {RECEIPT_TIMEOUT:g} s: it still may be"
        )


@dataclass(frozen=True, slots=True)
class Contract:
    """A contract at an address, asked through a node."""

    ask: Ask
    address: bytes

    async def view(self, signature: str, results: str, *values: Any, block: int | None = None) -> Any:
        """Call a view at a block (None: the latest); return its result, or a list if it has several."""
        call = {"to": data(self.address), "data": data(abi.call(signature, *values))}
        try:
            answer = await self.ask("eth_call", [call, "latest" if block is None else quantity(block)])
        except RpcError as error:
            raise ContractError(f"{signature.partition('(')[0]}: {described(error)}") from error
        decoded = self._decoded(signature, results, bytes.fromhex(answer[2:]))
        return decoded[0] if len(decoded) == 1 else decoded

    def _decoded(self, signature: str, results: str, answer: bytes) -> Any:
        try:
            return abi.decode(results, answer)
        except FormatError as error:
            raise ContractError(f"no answer to {signature} at {checksummed(self.address)}: {error}") from error

    async def act(self, sender: Sender, signature: str, *values: Any) -> Sent:
        """Send a call of a function."""
        return await sender.send(self.address, abi.call(signature, *values))

    async def owner(self) -> bytes:
        """Return the owner's address."""
        found: bytes = await self.view("owner()", "(address)")
        return found

    async def transfer_ownership(self, sender: Sender, owner: bytes) -> Sent:
        """Hand the contract over; in revision next the new owner has to accept."""
        return await self.act(sender, "transferOwnership(address)", owner)

    async def accept_ownership(self, sender: Sender) -> Sent:
        """Become the owner; only revision next has this."""
        return await self.act(sender, "acceptOwnership()")

    async def upgrade(self, sender: Sender, implementation: bytes, call: bytes = b"") -> Sent:
        """Replace the implementation behind the proxy, and call it with `call`, unless that is empty."""
        return await self.act(sender, "upgradeToAndCall(address,bytes)", implementation, call)


class AppContract(Contract):
    """The DstackApp of an app, whose address is the app id."""

    __slots__ = ()

    async def add_compose_hash(self, sender: Sender, compose_hash: bytes) -> Sent:
        """Allow a compose hash."""
        return await self.act(sender, "addComposeHash(bytes32)", compose_hash)

    async def remove_compose_hash(self, sender: Sender, compose_hash: bytes) -> Sent:
        """Withdraw a compose hash."""
        return await self.act(sender, "removeComposeHash(bytes32)", compose_hash)

    async def add_device(self, sender: Sender, device_id: bytes) -> Sent:
        """Allow a device."""
        return await self.act(sender, "addDevice(bytes32)", device_id)

    async def remove_device(self, sender: Sender, device_id: bytes) -> Sent:
        """Withdraw a device."""
        return await self.act(sender, "removeDevice(bytes32)", device_id)

    async def set_allow_any_device(self, sender: Sender, allow: bool) -> Sent:
        """Allow any device, or those that were added alone."""
        return await self.act(sender, "setAllowAnyDevice(bool)", allow)

    async def set_require_tcb_up_to_date(self, sender: Sender, require: bool) -> Sent:
        """Require the TCB status UpToDate, or none."""
        return await self.act(sender, "setRequireTcbUpToDate(bool)", require)

    async def disable_upgrades(self, sender: Sender) -> Sent:
        """Forbid upgrades for ever."""
        return await self.act(sender, "disableUpgrades()")

    async def decide(self, boot: BootInfo, block: int | None = None) -> Decision:
        """Return what this contract alone says of a boot."""
        allowed, why = await self.view(f"isAppAllowed({BOOT_INFO})", "(bool,string)", boot.values(), block=block)
        return Decision(allowed, why)


class KmsContract(Contract):
    """The DstackKms."""

    __slots__ = ()

    async def add_os_image(self, sender: Sender, os_image_hash: bytes) -> Sent:
        """Allow an OS image."""
        return await self.act(sender, "addOsImageHash(bytes32)", os_image_hash)

    async def remove_os_image(self, sender: Sender, os_image_hash: bytes) -> Sent:
        """Withdraw an OS image."""
        return await self.act(sender, "removeOsImageHash(bytes32)", os_image_hash)

    async def add_kms(self, sender: Sender, mr_aggregated: bytes) -> Sent:
        """Allow the aggregated measurement of a KMS."""
        return await self.act(sender, "addKmsAggregatedMr(bytes32)", mr_aggregated)

    async def remove_kms(self, sender: Sender, mr_aggregated: bytes) -> Sent:
        """Withdraw the aggregated measurement of a KMS."""
        return await self.act(sender, "removeKmsAggregatedMr(bytes32)", mr_aggregated)

    async def add_device(self, sender: Sender, device_id: bytes) -> Sent:
        """Allow KMS to run on a device."""
        return await self.act(sender, "addKmsDevice(bytes32)", device_id)

    async def remove_device(self, sender: Sender, device_id: bytes) -> Sent:
        """Withdraw a device of KMS."""
        return await self.act(sender, "removeKmsDevice(bytes32)", device_id)

    async def set_gateway_app_id(self, sender: Sender, app_id: str) -> Sent:
        """Name the gateway's app."""
        return await self.act(sender, "setGatewayAppId(string)", app_id)

    async def gateway_app_id(self) -> str:
        """Return the gateway's app."""
        found: str = await self.view("gatewayAppId()", "(string)")
        return found

    async def set_info(self, sender: Sender, info: KmsInfo) -> Sent:
        """Publish the KMS's keys and evidence."""
        values = (info.k256_pubkey, info.ca_pubkey, info.quote, info.eventlog)
        return await self.act(sender, "setKmsInfo((bytes,bytes,bytes,bytes))", values)

    async def info(self) -> KmsInfo:
        """Return what is published of the KMS."""
        return KmsInfo(*await self.view("kmsInfo()", "(bytes,bytes,bytes,bytes)"))

    async def app_implementation(self) -> bytes:
        """Return the implementation of the apps that the factory makes."""
        found: bytes = await self.view("appImplementation()", "(address)")
        return found

    async def set_app_implementation(self, sender: Sender, implementation: bytes) -> Sent:
        """Replace it; apps that exist keep theirs."""
        return await self.act(sender, "setAppImplementation(address)", implementation)

    async def register_app(self, sender: Sender, app_id: bytes) -> Sent:
        """Register a contract that exists as an app."""
        return await self.act(sender, "registerApp(address)", app_id)

    async def deploy_app(self, sender: Sender, **settings: Any) -> AppContract:
        """Create a DstackApp through the factory, and register it; `settings` are those of `send_deploy_app`."""
        return self.deployed_app(await self.send_deploy_app(sender, **settings))

    async def send_deploy_app(
        self,
        sender: Sender,
        *,
        owner: bytes | None = None,
        compose_hash: bytes = bytes(32),
        device_id: bytes = bytes(32),
        allow_any_device: bool = False,
        require_tcb_up_to_date: bool = False,
        disable_upgrades: bool = False,
    ) -> Sent:
        """Send deployAndRegisterApp; zero hashes stand for none, and the sender is the owner unless one is given."""
        values = (owner or sender.address, disable_upgrades, require_tcb_up_to_date, allow_any_device)
        return await self.act(sender, f"deployAndRegisterApp{INITIALIZE_APP}", *values, device_id, compose_hash)

    def deployed_app(self, sent: Sent) -> AppContract:
        """Return the app that a transaction created through the factory."""
        wanted = data(abi.topic("AppDeployedViaFactory(address,address)"))
        (found,) = (log for log in sent.logs if log["topics"][0] == wanted)
        return AppContract(self.ask, bytes.fromhex(found["topics"][1][-40:]))

    async def decide_app(self, boot: BootInfo, block: int | None = None) -> Decision:
        """Return isAppAllowed at a block."""
        allowed, why = await self.view(f"isAppAllowed({BOOT_INFO})", "(bool,string)", boot.values(), block=block)
        return Decision(allowed, why)

    async def decide_kms(self, boot: BootInfo, block: int | None = None) -> Decision:
        """Return isKmsAllowed at a block."""
        allowed, why = await self.view(f"isKmsAllowed({BOOT_INFO})", "(bool,string)", boot.values(), block=block)
        return Decision(allowed, why)


def creations(owner: bytes, nonce: int, revision: AuthEthRevision) -> tuple[bytes, bytes, bytes]:
    """Return the codes of three contracts that an owner creates, from a nonce on.

    The implementations of DstackApp and DstackKms, and the proxy of DstackKms, whose owner it is.
    """
    app, kms = (created_address(owner, nonce + place) for place in (0, 1))
    initialize = abi.call("initialize(address,address)", owner, app)
    proxy = proxy_contract().bytecode + abi.encode("(address,bytes)", (kms, initialize))
    return app_contract(revision).bytecode, kms_contract(revision).bytecode, proxy


async def deploy_kms(sender: Sender, revision: AuthEthRevision) -> KmsContract:
    """Create a DstackKms behind a proxy, which the sender owns, with a factory of apps."""
    nonce = int(await sender.ask("eth_getTransactionCount", [data(sender.address), "pending"]), 16)
    created = [await sender.create(code) for code in creations(sender.address, nonce, revision)]
    return KmsContract(sender.ask, created[-1])


def described(error: RpcError) -> str:
    """Return a refusal in words: the text of `require`, or the custom error's name and the address it names."""
    text = reason(error.data)
    if text is not None:
        return text
    return custom_error(error.data) or str(error)
