"""The chain of a stack: an EVM with dstack's contracts, which allow the stack's KMS and its app by transactions.

Its blocks have the stack's clock's time, as certificates have: they are dated from `ISSUED_AT` on until that clock is
changed, so that a seed gives the same blocks on any day. Nothing here shows a private key.
"""

from collections.abc import Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from aiohttp import web

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.release import AuthEthRevision, Release
from dstack_emu.chain.acts import Act, act_document, parse_act
from dstack_emu.chain.ask import completed, immediate_ask
from dstack_emu.chain.block import Block
from dstack_emu.chain.contracts import Contract, KmsContract, Sender, creations
from dstack_emu.chain.embedded import ChainSettings, EmbeddedChain
from dstack_emu.chain.errors import ChainError, StoreError
from dstack_emu.chain.faulty import FaultyNode
from dstack_emu.chain.node import Node
from dstack_emu.chain.operations import Changed, list_entry
from dstack_emu.chain.policy import FIRST_APP_NONCE, ContractPolicy, PlannedAct, Planner, read_policy
from dstack_emu.chain.quantities import checksummed
from dstack_emu.chain.rpc import Rpc
from dstack_emu.chain.transaction import created_address
from dstack_emu.deployment import policy_files
from dstack_emu.deployment.clock import ISSUED_AT
from dstack_emu.deployment.errors import StackError
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.errors import ConfigError

T = TypeVar("T")

_APPS: Final = ("app", "gateway")
"""The trust domains whose contracts the stack deploys, in that order: their app ids are the addresses of these."""


class StackChain:
    """The chain of one stack. Close it."""

    def __init__(self, chain: EmbeddedChain) -> None:
        self._chain = chain
        self._kms = chain.kms.address
        self._ask = immediate_ask(chain.rpc)

    @classmethod
    def open(cls, seed: Seed, release: Release, clock: Callable[[], int], file: Path | None) -> "StackChain":
        """Make it, or read it from the file that keeps it; raise `StackError`, which says what to install."""
        settings = ChainSettings(seed.derive, clock, ISSUED_AT, release.auth_eth_revision, state=file)
        try:
            return cls(EmbeddedChain(settings))
        except (ConfigError, StoreError) as error:
            raise StackError(str(error)) from error

    def close(self) -> None:
        """Close the file that keeps it."""
        self._chain.close()

    @property
    def chain_id(self) -> int:
        """Its id."""
        return self._chain.settings.chain_id

    @property
    def kms_address(self) -> str:
        """The address of DstackKms, with its checksum."""
        return checksummed(self._kms)

    @property
    def kms(self) -> KmsContract:
        """DstackKms. Nothing that is asked of it waits: `completed` works with it."""
        return KmsContract(self._ask, self._kms)

    @property
    def accounts(self) -> tuple[bytes, ...]:
        """The accounts for which the node sends; the first one owns DstackKms at the start."""
        return tuple(self._chain.node.accounts)

    @property
    def revision(self) -> AuthEthRevision | None:
        """The revision of the contracts."""
        return self._chain.settings.revision

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks."""
        return tuple(self._chain.ledger.blocks)

    def fork(self) -> KmsContract:
        """Return the DstackKms of a chain that begins as this one is now: what is done there has no effect here."""
        ledger = self._chain.rpc.exclusively(self._chain.ledger.fork)
        return KmsContract(immediate_ask(Rpc(Node(ledger, self._chain.private_keys).methods())), self._kms)

    def app_id(self, name: str) -> str:
        """Return the app id of the stack's app or gateway: the address that its contract will have, in hex."""
        return created_address(self._kms, FIRST_APP_NONCE + _APPS.index(name)).hex()

    async def deploy(self) -> None:
        """Deploy the contracts, unless they are there; raise `StackError`."""
        try:
            await self._chain.deploy()
        except ChainError as error:
            raise StackError(f"the chain: {error}") from error

    def app(self) -> web.Application:
        """Return its JSON-RPC, with a page for health checks."""
        app = self._chain.server.app()
        app.router.add_get("/health", _health)
        return app

    @property
    def faulty_node(self) -> FaultyNode:
        """What answers for it while a fault applies."""
        return FaultyNode(self._chain.rpc, self._chain.ledger)

    @property
    def methods(self) -> frozenset[str]:
        """The methods of its JSON-RPC."""
        return self._chain.rpc.names

    def description(self, auth: Mapping[str, str]) -> dict[str, Any]:
        """Return what the ready line says of it; `auth` are the kinds of webhooks by KMS."""
        accounts = self._chain.node.accounts
        return {
            "chain_id": self.chain_id,
            "contracts": {
                "kms": self.kms_address,
                "app_implementation": checksummed(created_address(accounts[0], 0)),
                "owner": checksummed(accounts[0]),
            },
            "accounts": [checksummed(each) for each in accounts],
            "decides_for": [name for name, kind in auth.items() if kind == "eth"],
        }

    # ---- what it allows

    async def admit(
        self,
        measured: Iterable[Mapping[str, Any]],
        apps: Mapping[policy_files.AppRule, str],
        gateway_app_id: str,
        progress: Callable[[str], None],
    ) -> None:
        """Send the transactions that allow KMS and apps; a chain with other transactions is kept as it is.

        If an earlier run ended in the middle of them, the others are sent. Raises `StackError`.
        """
        infos = list(measured)
        images = [*(info["os_image_hash"] for info in infos), *apps.values()]
        policy = policy_files.allow(images, [info["mr_aggregated"] for info in infos], list(apps), gateway_app_id)
        devices = {bytes.fromhex(info["device_id"]) for info in infos}
        try:
            planner = Planner(self._kms, self._chain.owner.address)
            acts = planner.acts(ContractPolicy(), ContractPolicy.of_document(policy, devices))
            sent = self._sent()
            if sent != [(act.to, act.data) for act in acts[: len(sent)]]:
                progress("keeping the chain as it is: there were transactions on it")
                return
            await self._send(acts[len(sent) :])
        except ChainError as error:
            raise StackError(f"the chain: {error}") from error

    async def _send(self, acts: Iterable[PlannedAct]) -> None:
        for act in acts:
            await act.send(self._chain.owner)

    def policy(self) -> dict[str, Any]:
        """Return what the contracts allow, in auth-simple's form; raise `StackError`."""
        return self._done(read_policy(self._ask, self._kms)).document()

    def set_policy(self, policy: Mapping[str, Any], devices: Iterable[bytes]) -> list[str]:
        """Send the transactions after which the contracts allow what a policy does; return them in words.

        `devices` are those that `allowAnyDevice` of KMS stands for. Raises `StackError`; transactions before the one
        that is refused stay.
        """
        try:
            wanted = ContractPolicy.of_document(policy, devices)
        except FormatError as error:
            raise StackError(str(error)) from error
        return self._done(self._change(wanted))

    def list_entry(self, kind: str, value: bytes, *, allowed: bool, app_id: bytes | None = None) -> Changed:
        """Allow or remove a hash in a list of `operations.LISTINGS`, of DstackKms or an app; raise `StackError`."""
        address = self._kms if app_id is None else app_id
        return self._done(list_entry(Contract(self._ask, address), self._owner, kind, value, allowed=allowed))

    def deploy_app(self, *, compose_hash: bytes, allow_any_device: bool) -> str:
        """Create the contract of an app, and register it; return its id in hex. Raises `StackError`."""
        kms = KmsContract(self._ask, self._kms)
        made = kms.deploy_app(self._owner, compose_hash=compose_hash, allow_any_device=allow_any_device)
        return self._done(made).address.hex()

    @property
    def head(self) -> int:
        """The number of the latest block."""
        return self._chain.ledger.head.number

    def mine(self, count: int) -> None:
        """Mine empty blocks."""
        self._chain.rpc.exclusively(lambda: self._chain.ledger.mine(count))

    @property
    def _owner(self) -> Sender:
        return Sender(self._ask, self._chain.owner.address)

    async def _change(self, wanted: ContractPolicy) -> list[str]:
        owner = self._owner
        now = await read_policy(self._ask, self._kms)
        planner = await Planner.at(self._ask, self._kms, owner.address, wanted.apps.keys() - now.apps.keys())
        acts = planner.acts(now, wanted)
        for act in acts:
            await act.send(owner)
        return [act.text for act in acts]

    @staticmethod
    def _done(work: Coroutine[Any, Any, T]) -> T:
        try:
            return completed(work)
        except ChainError as error:
            raise StackError(f"the chain: {error}") from error

    # ---- state

    def capture(self) -> tuple[dict[str, Any], ...]:
        """Return what has made the chain what it is, as JSON."""
        acts = self._chain.rpc.exclusively(self._chain.ledger.capture)
        return tuple(map(act_document, acts))

    def restore(self, state: Iterable[dict[str, Any]]) -> None:
        """Make the chain what it was; raise `StackError` for a state of another chain."""
        acts = self.read_state(state)
        try:
            self._chain.rpc.exclusively(lambda: self._chain.ledger.restore(acts))
        except ChainError as error:
            raise StackError(f"the chain: {error}") from error

    @staticmethod
    def read_state(state: Iterable[dict[str, Any]]) -> list[Act]:
        """Read what `capture` returned; raise `StackError` for something else."""
        try:
            return [parse_act(each) for each in state]
        except (ValueError, KeyError, TypeError, ChainError) as error:
            raise StackError(f"the chain: an act expected: {error}") from error

    def _sent(self) -> list[tuple[bytes | None, bytes]]:
        """Return the receivers and calls of all transactions after the deployment."""
        receipts = [receipt for block in self._chain.ledger.blocks for receipt in block.receipts]
        revision = self._chain.settings.revision
        deployed = 0 if revision is None else len(creations(self._chain.owner.address, 0, revision))
        return [(receipt.transaction.to, receipt.transaction.data) for receipt in receipts[deployed:]]


async def _health(_request: web.Request) -> web.Response:
    return web.Response(text="ok")
