"""A chain in this process: an EVM, a ledger, a node and its server, with dstack's contracts in it.

The same seed gives the same accounts, contracts and first blocks. Binds no socket.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dstack_emu.attest.release import AuthEthRevision
from dstack_emu.chain.accounts import BALANCE, Derive, private_keys
from dstack_emu.chain.acts import Forgetful, Kept, Record
from dstack_emu.chain.ask import local_ask
from dstack_emu.chain.contracts import KmsContract, Sender, creations
from dstack_emu.chain.dev_methods import DevMethods
from dstack_emu.chain.engine import Engine
from dstack_emu.chain.ledger import Genesis, Ledger
from dstack_emu.chain.node import Node
from dstack_emu.chain.rpc import Rpc
from dstack_emu.chain.server import ChainServer
from dstack_emu.chain.transaction import address_of, created_address
from dstack_emu.transport.errors import ConfigError

DEFAULT_CHAIN_ID: Final = 31337
"""That of anvil and hardhat."""
MISSING: Final = (
    "a chain needs py-evm, which the extra `eth` installs: "
    "pip install 'dstack-emu[eth] @ git+https://github.com/OWNER/dstack-emu'"
)
KMS_NONCE: Final = 2
"""The proxy of DstackKms is the third contract that the first account creates."""


@dataclass(frozen=True, slots=True)
class ChainSettings:
    """What a chain is made of. `clock` returns Unix seconds, `began` is the time of its first block.

    `revision` is that of the contracts, None for a chain without them. `state` is a file that keeps it, None for none.
    """

    derive: Derive
    clock: Callable[[], int]
    began: int
    revision: AuthEthRevision | None
    chain_id: int = DEFAULT_CHAIN_ID
    state: Path | None = None


def embedded_engine() -> Engine:
    """Return an engine of py-evm; raise `ConfigError`, which says what to install, if it is not there."""
    try:
        from dstack_emu.chain.pyevm import PyEvm
    except ModuleNotFoundError as error:
        raise ConfigError(f"{MISSING} ({error.name} is missing)") from error
    return PyEvm()


class EmbeddedChain:
    """A running chain. Close it, so that the file that keeps it is closed."""

    def __init__(self, settings: ChainSettings, engine: Engine | None = None) -> None:
        self.settings = settings
        self._clock = settings.clock
        self.private_keys = private_keys(settings.derive)
        self._kept = _kept(settings)
        record: Record = self._kept or Forgetful()
        try:
            self.ledger = self._ledger(engine or embedded_engine(), record)
        except BaseException:
            self.close()
            raise
        self.node = Node(self.ledger, self.private_keys)
        self.rpc = Rpc({**self.node.methods(), **DevMethods(self.node).methods()})
        self.server = ChainServer(self.rpc)
        self.ledger.on_block.append(self.server.tell)
        self.ask = local_ask(self.rpc)

    @property
    def owner(self) -> Sender:
        """The account that owns the contracts."""
        return self.sender(0)

    def sender(self, number: int) -> Sender:
        """Return a development account."""
        return Sender(self.ask, self.node.accounts[number])

    @property
    def kms(self) -> KmsContract:
        """The DstackKms that was deployed at the start."""
        return KmsContract(self.ask, created_address(self.owner.address, KMS_NONCE))

    async def deploy(self) -> None:
        """Deploy the contracts, or what is left of that if a process ended in the middle of it."""
        if self.settings.revision is None:
            return
        owner = self.owner
        done = self.ledger.account(self.ledger.head, owner.address).nonce
        self._clock = lambda: self.settings.began  # the first blocks are the same on every day
        for code in creations(owner.address, 0, self.settings.revision)[done:]:
            await owner.create(code)
        self._clock = self.settings.clock

    def close(self) -> None:
        """Close the file."""
        if self._kept is not None:
            self._kept.close()

    def _ledger(self, engine: Engine, record: Record) -> Ledger:
        balances = {address_of(key): BALANCE for key in self.private_keys}
        genesis = Genesis(self.settings.chain_id, self.settings.began, balances)
        return Ledger(genesis, engine, lambda: self._clock(), record)


def _kept(settings: ChainSettings) -> Kept | None:
    """Open the file that keeps a chain: it is of one seed, chain id and revision."""
    if settings.state is None:
        return None
    seed = settings.derive("chain state", 16).hex()
    beginning = {"chain_id": settings.chain_id, "began": settings.began, "revision": settings.revision, "seed": seed}
    return Kept(settings.state, beginning)
