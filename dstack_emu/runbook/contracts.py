"""The contracts of a target that decide in place of policy files: a policy is put into force by transactions.

They are sent as the owner of the contracts, for which the node must have the key: that of a stack has it.
"""

from collections.abc import Iterable
from typing import Any, Final

from dstack_emu.attest.errors import FormatError
from dstack_emu.chain.ask import remote_ask
from dstack_emu.chain.contracts import Sender
from dstack_emu.chain.errors import ChainError
from dstack_emu.chain.policy import ContractPolicy, Planner, read_policy
from dstack_emu.runbook.errors import RunbookError
from dstack_emu.runbook.target import TargetChain
from dstack_emu.transport.http_client import HttpClient
from dstack_emu.transport.urls import shown_origin

TIMEOUT: Final = 30.0
MAX_ANSWER: Final = 4 * 1024 * 1024
"""Bytes of an answer: all events of the contracts are in one."""


class ContractsOfTarget:
    """The contracts on the chain of a target. Close it."""

    def __init__(self, chain: TargetChain) -> None:
        self._chain = chain
        self._client = HttpClient(timeout=TIMEOUT, max_answer=MAX_ANSWER, shown=shown_origin)
        self._owner = Sender(remote_ask(self._client, chain.rpc_url), chain.owner)
        self._before: ContractPolicy | None = None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def apply(self, policy: dict[str, Any], devices: Iterable[str]) -> list[str]:
        """Send what lets the contracts allow what a policy does; return the calls in words. Raises `RunbookError`.

        `devices` (hex) are those on which a policy allows KMS that it allows on any device.
        """
        try:
            return await self._change(ContractPolicy.of_document(policy, map(bytes.fromhex, devices)))
        except (ChainError, FormatError) as error:
            raise RunbookError(f"the contracts at {shown_origin(self._chain.rpc_url)}: {error}") from error

    async def restore(self) -> None:
        """Let the contracts allow what they allowed before; raise `ChainError`."""
        if self._before is not None:
            await self._change(self._before)

    async def _change(self, wanted: ContractPolicy) -> list[str]:
        owner, kms = self._owner, self._chain.kms
        now = await read_policy(owner.ask, kms)
        self._before = self._before or now
        planner = await Planner.at(owner.ask, kms, owner.address, wanted.apps.keys() - now.apps.keys())
        acts = planner.acts(now, wanted)
        for act in acts:
            await act.send(owner)
        return [act.text for act in acts]
