"""Acts on the chain of a stack, and what they are asked about: what came of them, for contracts and trust domains."""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eth_address import decode_address
from dstack_emu.chain import operations
from dstack_emu.chain.admission import UP_TO_DATE
from dstack_emu.chain.ask import completed
from dstack_emu.chain.contracts import AppContract, BootInfo, Contract, Decision, KmsContract, KmsInfo, Sender
from dstack_emu.chain.errors import ChainError
from dstack_emu.chain.history import transactions
from dstack_emu.chain.holdings import read_holdings
from dstack_emu.chain.operations import Changed
from dstack_emu.chain.quantities import checksummed
from dstack_emu.control import chain_schemas as schemas
from dstack_emu.control.schemas import ControlError
from dstack_emu.deployment.guests import RunningGuest
from dstack_emu.deployment.stack_chain import StackChain

Domains = Mapping[str, RunningGuest]


class Acts:
    """The acts that an account sends to one chain, or to a fork of it, by the names of `dstack-emu chain`."""

    def __init__(self, kms: KmsContract, sender: bytes, chain: StackChain) -> None:
        self._kms, self._sender, self._chain = kms, Sender(kms.ask, sender), chain

    def of(self, act: str, body: Any) -> Coroutine[Any, Any, Changed]:
        """Return the work of an act."""
        run: Callable[[Any], Coroutine[Any, Any, Changed]] = getattr(self, f"_{act.replace('-', '_')}")
        return run(body)

    def _app(self, app: str | None) -> AppContract:
        return AppContract(self._kms.ask, bytes.fromhex(app or self._chain.app_id("app")))

    def _contract(self, app: str | None) -> Contract:
        return self._kms if app is None else self._app(app)

    def _allow(self, body: schemas.ListEntry, *, allowed: bool = True) -> Coroutine[Any, Any, Changed]:
        contract = self._app(body.app) if body.kind in schemas.OF_APP else self._kms
        return operations.list_entry(contract, self._sender, body.kind, bytes.fromhex(body.value), allowed=allowed)

    def _remove(self, body: schemas.ListEntry) -> Coroutine[Any, Any, Changed]:
        return self._allow(body, allowed=False)

    def _app_deploy(self, body: schemas.NewApp) -> Coroutine[Any, Any, Changed]:
        return operations.deploy_app(
            self._kms,
            self._sender,
            owner=None if body.owner is None else bytes.fromhex(body.owner),
            compose_hash=bytes.fromhex(body.compose_hash or "00" * 32),
            device_id=bytes.fromhex(body.device or "00" * 32),
            allow_any_device=body.allow_any_device,
            require_tcb_up_to_date=body.require_tcb_up_to_date,
            disable_upgrades=body.disable_upgrades,
        )

    def _app_register(self, body: schemas.RegisteredApp) -> Coroutine[Any, Any, Changed]:
        return operations.register_app(self._kms, self._sender, bytes.fromhex(body.address))

    def _app_set(self, body: schemas.AppSetting) -> Coroutine[Any, Any, Changed]:
        app = self._app(body.app)
        if body.setting == "disable-upgrades":
            return operations.disable_upgrades(app, self._sender)
        return operations.set_app(app, self._sender, body.setting, body.value)

    def _kms_set(self, body: schemas.KmsSetting) -> Coroutine[Any, Any, Changed]:
        if body.setting == "gateway-app-id":
            return operations.set_gateway_app_id(self._kms, self._sender, body.value)
        try:
            implementation = decode_address(body.value)
        except FormatError as error:
            raise ControlError(f"value: {error}") from error
        return operations.set_app_implementation(self._kms, self._sender, implementation)

    def _kms_info(self, body: schemas.PublishedInfo) -> Coroutine[Any, Any, Changed]:
        try:
            values = [bytes.fromhex(each) for each in (body.k256_pubkey, body.ca_pubkey, body.quote, body.eventlog)]
        except ValueError as error:
            raise ControlError(f"an even number of hex digits expected: {error}") from error
        return operations.set_info(self._kms, self._sender, KmsInfo(*values))

    def _transfer_ownership(self, body: schemas.NewOwner) -> Coroutine[Any, Any, Changed]:
        return operations.transfer_ownership(self._contract(body.app), self._sender, bytes.fromhex(body.address))

    def _accept_ownership(self, body: schemas.AcceptedOwner) -> Coroutine[Any, Any, Changed]:
        return operations.accept_ownership(self._contract(body.app), self._sender)

    def _upgrade(self, body: schemas.Upgrade) -> Coroutine[Any, Any, Changed]:
        implementation = None if body.implementation is None else bytes.fromhex(body.implementation)
        revision = self._chain.revision or "next"
        return operations.upgrade(self._contract(body.app), self._sender, implementation, revision)


def perform(chain: StackChain, act: str, body: schemas.ChainAct, domains: Domains) -> dict[str, Any]:
    """Send an act, or with `preview` send it to a fork of the chain; raise `ControlError` if a contract refuses."""
    sender = chain.accounts[0] if body.sender is None else bytes.fromhex(body.sender)
    if sender not in chain.accounts:
        known = ", ".join(map(checksummed, chain.accounts))
        raise ControlError(f"sender: an account of the chain expected, got {checksummed(sender)}; there are {known}")
    kms = chain.fork() if body.preview else chain.kms
    try:
        before = decisions(chain.kms, domains)
        if act == "upgrade" and not body.preview:  # two transactions: it is refused before the first one
            completed(Acts(chain.fork(), sender, chain).of(act, body))
        changed = completed(Acts(kms, sender, chain).of(act, body))
        after = decisions(kms, domains)
    except ChainError as error:
        raise ControlError(f"the chain: {error}", 409) from error
    return {
        "what": changed.what,
        "before": changed.before,
        "after": changed.after,
        "transaction": None if body.preview else changed.transaction,
        "block": None if body.preview else changed.block,
        "sender": checksummed(sender),
        "preview": body.preview,
        "decisions": {name: {"before": before[name], "after": after[name]} for name in before},
    }


def holdings(chain: StackChain, domains: Domains) -> dict[str, Any]:
    """Return what the contracts hold, and what they decide on each trust domain; raise `ControlError`."""
    try:
        held = completed(read_holdings(chain.kms))
        accounts = [checksummed(each) for each in chain.accounts]
        about = {"chain_id": chain.chain_id, "block": chain.head, "accounts": accounts}
        return {**about, **held, "decisions": decisions(chain.kms, domains)}
    except ChainError as error:
        raise ControlError(f"the chain: {error}", 409) from error


def history(chain: StackChain, since: int, limit: int) -> list[dict[str, Any]]:
    """Return the last transactions after a block, oldest first."""
    found = transactions(chain.blocks[since + 1 :], chain.revision)
    return found[max(0, len(found) - limit) :]


def decisions(kms: KmsContract, domains: Domains) -> dict[str, dict[str, Any]]:
    """Return what the contracts answer about each trust domain, if its TCB status is UpToDate."""
    return {name: _decision(kms, name, each) for name, each in domains.items()}


def _decision(kms: KmsContract, name: str, domain: RunningGuest) -> dict[str, Any]:
    info = domain.agent.app_info()
    boot = BootInfo(
        info.app_id.rjust(20, b"\0"),
        info.compose_hash.rjust(32, b"\0"),
        info.instance_id.rjust(20, b"\0"),
        info.device_id,
        info.mr_aggregated,
        os_image_hash=info.os_image_hash,
        tcb_status=UP_TO_DATE,
    )
    decided = completed(decide(kms, boot, is_kms=name.startswith("kms-")))
    return {"allowed": decided.allowed, "reason": decided.reason}


async def decide(kms: KmsContract, boot: BootInfo, *, is_kms: bool) -> Decision:
    """Return what DstackKms answers about a boot."""
    return await (kms.decide_kms(boot) if is_kms else kms.decide_app(boot))
