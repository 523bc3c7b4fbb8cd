"""A chain in this process, on a port, and web3.py as its client."""

import asyncio
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dstack_emu.attest.release import AuthEthRevision
from dstack_emu.chain.artefacts import app_contract, kms_contract
from dstack_emu.chain.embedded import ChainSettings, EmbeddedChain
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.listen import bind_tcp, serve
from tests.web3_client import connect, send

if TYPE_CHECKING:
    from web3.contract import Contract

BEGAN = 1_767_225_600
READY_TIMEOUT = 120


class LiveChain:
    """A chain whose clock stands at `now`, and a client of it."""

    def __init__(self, chain: EmbeddedChain, url: str, revision: AuthEthRevision) -> None:
        self.chain, self.url, self.revision = chain, url, revision
        self.web3 = connect(url)
        self.accounts = [self.web3.to_checksum_address(account) for account in chain.node.accounts]
        self.owner = self.accounts[0]
        self.kms = self.contract(chain.kms.address)
        self.snapshot = self.rpc("evm_snapshot")

    def contract(self, address: Any, *, app: bool = False) -> "Contract":
        """Return the contract at an address."""
        artefact = app_contract(self.revision) if app else kms_contract(self.revision)
        return self.web3.eth.contract(address=self.web3.to_checksum_address(address), abi=artefact.abi)

    def rpc(self, method: str, *params: Any) -> Any:
        """Send a request; return its result."""
        answer = send(self.web3, method, *params)
        assert "error" not in answer, answer
        return answer["result"]

    def refused(self, method: str, *params: Any) -> Any:
        """Send a request that must be refused; return the error."""
        return send(self.web3, method, *params)["error"]

    def reset(self) -> None:
        """Return to how it began."""
        assert self.rpc("evm_revert", self.snapshot) is True
        self.snapshot = self.rpc("evm_snapshot")

    def deploy_app(self, **changed: Any) -> "Contract":
        """Deploy an app through the factory: any device, no compose hash, unless that is changed."""
        values = {"owner": self.owner, "upgrades_disabled": False, "tcb": False, "any_device": True}
        values |= {"device": bytes(32), "compose_hash": bytes(32), **changed}
        deploy = self.kms.get_function_by_signature("deployAndRegisterApp(address,bool,bool,bool,bytes32,bytes32)")
        sent = deploy(*values.values()).transact({"from": self.owner})
        (log,) = self.kms.events.AppDeployedViaFactory().get_logs(
            from_block=self.web3.eth.get_transaction_receipt(sent)["blockNumber"]
        )
        return self.contract(log["args"]["appId"], app=True)


@contextmanager
def running_chain(revision: AuthEthRevision = "next") -> Iterator[LiveChain]:
    """Run a chain in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    wait = functools.partial(asyncio.run_coroutine_threadsafe, loop=loop)
    chain = EmbeddedChain(ChainSettings(Seed.of("tests").derive, lambda: BEGAN, BEGAN, revision))
    try:
        wait(chain.deploy()).result(READY_TIMEOUT)
        server = wait(_served(chain)).result(READY_TIMEOUT)
        try:
            yield LiveChain(chain, server.url, revision)
        finally:
            wait(server.close()).result(READY_TIMEOUT)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _served(chain: EmbeddedChain) -> Any:
    return await serve(chain.server.app(), bind_tcp("127.0.0.1", 0))
