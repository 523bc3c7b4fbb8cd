"""Decisions of auth-eth-bun by the contracts on `dstack-emu chain`: what webhook and chain need together.

Both share a core, and the rates count the processor time of both, so that other load on the machine changes them less.
How much a chain has to do depends on what it was asked before:

- again: the same boot in the same state, over eight connections
- other boot: each boot is a new one, in the same state, over eight connections
- other state: a transaction before each decision, so that all is read anew. Its own time does not count
"""

import asyncio
import itertools
import json
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from typing import Final, TypeVar

from bench.auth_eth import BOOT_INFO, CONNECTIONS
from bench.figure import Bar, Effort, Figure, median
from bench.load import Connection, LoadError, post
from bench.processes import OTHER_CORE, SERVER_CORE, cpu_seconds, on_core, running
from dstack_emu.chain.ask import remote_ask
from dstack_emu.chain.contracts import KmsContract, Sender
from dstack_emu.transport.http_client import HttpClient

T = TypeVar("T")

BAR: Final = 150
TURNS: Final = 16
"""How often each figure's work is done in a round."""
TIMEOUT: Final = 30.0
MAX_ANSWER: Final = 1024 * 1024
EMULATOR: Final = (sys.executable, "-m", "dstack_emu")
UNIT: Final = "decisions/CPU s of both"


def measure(effort: Effort) -> Iterator[Figure]:
    """Measure decisions for each second of processor time of webhook and chain."""
    with ExitStack() as stack:
        chain = (*EMULATOR, "chain", "--listen", "127.0.0.1:0", "--json")
        node, line = stack.enter_context(running(chain, SERVER_CORE))
        url, kms, owner = _addresses(line)
        options = ("--listen", "127.0.0.1:0", "--eth-rpc-url", url, "--kms-contract", kms)
        command = (*EMULATOR, "auth", "eth", "--eth-compat", "next", "--json", *options)
        webhook, ready = stack.enter_context(running(command, SERVER_CORE))
        stack.enter_context(on_core(OTHER_CORE))
        act = _Operator(url, kms, owner)
        boot = {**BOOT_INFO, "appId": act.allow()}
        address = ("127.0.0.1", int(json.loads(ready)["url"].rpartition(":")[2]))
        sockets = [stack.enter_context(socket.create_connection(address)) for _ in range(CONNECTIONS)]
        numbers = itertools.count(1)

        def decide(chosen: list[socket.socket], number: Callable[[], int]) -> float:
            """Let each connection ask once; return the processor time."""
            bodies = [json.dumps({**boot, "instanceId": f"{number():040x}"}).encode() for _ in chosen]
            connections = [Connection(*each) for each in zip(chosen, map(_request, bodies), strict=True)]
            began = cpu_seconds(node.pid) + cpu_seconds(webhook.pid)
            for connection in connections:
                connection.send()
            answers = [json.loads(connection.receive()) for connection in connections]
            if not all(answer["isAllowed"] for answer in answers):
                raise LoadError(f"the webhook does not allow what the contracts allow: {answers[0]}")
            return cpu_seconds(node.pid) + cpu_seconds(webhook.pid) - began

        def other_state() -> float:
            act.change_state()
            return decide(sockets[:1], lambda: 0)

        yield _figure("again", effort, lambda: decide(sockets, lambda: 0), CONNECTIONS)
        yield _figure("other_boot", effort, lambda: decide(sockets, lambda: next(numbers)), CONNECTIONS)
        yield _figure("other_state", effort, other_state, 1)


def _figure(name: str, effort: Effort, work: Callable[[], float], decisions: int) -> Figure:
    work()
    rates = [decisions * TURNS / sum(work() for _ in range(TURNS)) for _ in range(effort.rounds)]
    return Figure(f"auth_eth_chain_{name}", median(rates), UNIT, Bar(BAR))


def _addresses(line: str) -> tuple[str, str, str]:
    """Return the URL of the chain, DstackKms and its owner."""
    ready = json.loads(line)
    return ready["url"], ready["contracts"]["kms"], ready["contracts"]["owner"]


def _request(body: bytes) -> bytes:
    return post("/bootAuth/app", body)


class _Operator:
    """Sends the transactions of the owner of the contracts."""

    def __init__(self, url: str, kms: str, owner: str) -> None:
        self._url, self._kms, self._owner = url, bytes.fromhex(kms[2:]), bytes.fromhex(owner[2:])
        self._images = itertools.count(1)

    def allow(self) -> str:
        """Let the contracts allow the boot; return the app's id."""
        image, compose_hash = (bytes.fromhex(str(BOOT_INFO[name])) for name in ("osImageHash", "composeHash"))

        async def acts(kms: KmsContract, owner: Sender) -> bytes:
            await kms.add_os_image(owner, image)
            return (await kms.deploy_app(owner, compose_hash=compose_hash, allow_any_device=True)).address

        return asyncio.run(self._done(acts)).hex()

    def change_state(self) -> None:
        """Allow one more OS image."""
        image = next(self._images).to_bytes(32, "big")
        asyncio.run(self._done(lambda kms, owner: kms.add_os_image(owner, image)))

    async def _done(self, acts: Callable[[KmsContract, Sender], Awaitable[T]]) -> T:
        client = HttpClient(timeout=TIMEOUT, max_answer=MAX_ANSWER)
        ask = remote_ask(client, self._url)
        try:
            return await acts(KmsContract(ask, self._kms), Sender(ask, self._owner))
        finally:
            await client.close()
