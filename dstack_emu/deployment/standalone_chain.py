"""A chain without a stack, for `dstack-emu chain`: an EVM with dstack's contracts, and its JSON-RPC on one port."""

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstack_emu.attest.release import Release
from dstack_emu.chain.embedded import ChainSettings, EmbeddedChain
from dstack_emu.chain.errors import StoreError
from dstack_emu.chain.quantities import checksummed
from dstack_emu.deployment.clock import ISSUED_AT, wall_clock
from dstack_emu.deployment.standalone import Standalone
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.errors import ConfigError
from dstack_emu.transport.listen import serve

FILE = "chain.jsonl"
"""The file in the state folder."""


@dataclass(frozen=True, slots=True)
class StandaloneChainSettings:
    """Seed, release of the contracts, chain id, and the folder that keeps the chain (None: none does).

    With `deploys` false there are no contracts in it.
    """

    seed: str
    release: Release
    chain_id: int
    state: Path | None = None
    deploys: bool = True


class StandaloneChain(Standalone):
    """A chain on a bound socket. Enter it to start it."""

    def __init__(self, settings: StandaloneChainSettings, sock: socket.socket) -> None:
        super().__init__()
        self._settings, self._socket = settings, sock
        self.url = ""

    async def _start(self) -> None:
        settings = self._settings
        self._exit.callback(self._socket.close)
        try:
            self.chain = EmbeddedChain(
                ChainSettings(
                    derive=Seed.of(settings.seed).derive,
                    clock=wall_clock,
                    began=ISSUED_AT,
                    revision=settings.release.auth_eth_revision if settings.deploys else None,
                    chain_id=settings.chain_id,
                    state=None if settings.state is None else settings.state / FILE,
                )
            )
            self._exit.callback(self.chain.close)
            await self.chain.deploy()
            server = await serve(self.chain.server.app(), self._socket)
        except StoreError as error:
            raise ConfigError(f"--state: {error}") from error
        self._exit.push_async_callback(server.close)
        self.url = server.url

    async def description(self) -> dict[str, Any]:
        """Return what the ready line says: URLs, accounts with their keys, contracts."""
        chain = self.chain
        accounts = [
            {"address": checksummed(address), "private_key": f"0x{key.hex()}"}
            for address, key in zip(chain.node.accounts, chain.private_keys, strict=True)
        ]
        return {
            "url": self.url,
            "ws_url": self.url.replace("http", "ws", 1),
            "chain_id": self._settings.chain_id,
            "block": chain.ledger.head.number,
            "accounts": accounts,
            "contracts": await self._contracts() if self._settings.deploys else {},
        }

    async def _contracts(self) -> dict[str, str]:
        kms = self.chain.kms
        return {
            "kms": checksummed(kms.address),
            "app_implementation": checksummed(await kms.app_implementation()),
            "owner": checksummed(await kms.owner()),
        }
