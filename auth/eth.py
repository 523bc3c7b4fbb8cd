"""auth-eth-bun: a webhook that asks a DstackKms contract. The service; no HTTP server.

It decides nothing itself: each request asks the chain, over JSON-RPC, and the contract's answer is the decision. If the
chain does not answer exactly as a contract does, it denies. The chain is believed: nothing here verifies a block.

Source: dstack, `kms/auth-eth-bun/index.ts` at 40eaf35e (0.5.11) and next 312dc605.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from dstack_emu.attest.errors import FormatError
from dstack_emu.auth.boot_info import PolicyDecision, ReceivedBootInfo
from dstack_emu.auth.contract_abi import (
    APP_IMPLEMENTATION,
    GATEWAY_APP_ID,
    IS_APP_ALLOWED,
    IS_KMS_ALLOWED,
    decode_contract_address,
    decode_decision,
    decode_text,
    encode_question,
)
from dstack_emu.auth.contract_rules import rule_of
from dstack_emu.auth.errors import ChainError
from dstack_emu.auth.eth_request import contract_question
from dstack_emu.auth.eth_settings import BACKEND_UNAVAILABLE, EthSettings
from dstack_emu.auth.json_rpc import Headers, JsonRpcClient

T = TypeVar("T")

LATEST: Final = "latest"


@dataclass(frozen=True, slots=True)
class _State:
    """The state that is asked about: `block` as eth_call takes it, and what the log says of it."""

    block: str
    name: str


class EthAuth:
    """Asks the contract of its settings. Close it.

    `head` is the block cache (None: one of its own, which follows the monotonic clock). `headers` are added to each
    call of the chain.
    """

    def __init__(
        self,
        settings: EthSettings,
        *,
        head: "KeptHead | None" = None,
        headers: Headers | None = None,
    ) -> None:
        self.settings: Final = settings
        self._chain = JsonRpcClient(settings.rpc_url, timeout=settings.timeout, headers=headers)
        self._head = head or KeptHead(settings.block_cache, time.monotonic)

    async def close(self) -> None:
        """Close the connections."""
        await self._chain.close()

    async def decide(self, boot_info: ReceivedBootInfo, is_kms: bool) -> PolicyDecision:
        """Ask the contract; a chain that gives no decision denies, and `chain_error` says why."""
        try:
            return await self._decide(boot_info, is_kms)
        except ChainError as error:
            reason = BACKEND_UNAVAILABLE if self.settings.rules.hides_cause else str(error)
            return PolicyDecision(False, reason, "", "chain", chain_error=str(error))

    async def info(self) -> dict[str, object]:
        """Build the answer of `GET /`, from the latest state; raise `ChainError`. The chain id is not compared."""
        gateway = decoded(decode_text, await self._call(GATEWAY_APP_ID, LATEST))
        chain_id = await self._chain.quantity("eth_chainId")
        implementation = decoded(decode_contract_address, await self._call(APP_IMPLEMENTATION, LATEST))
        return {
            "status": "ok",
            "kmsContractAddr": self.settings.kms_contract,
            "ethRpcUrl": self.settings.answered_rpc_url,
            "gatewayAppId": gateway,
            "chainId": chain_id,
            "appAuthImplementation": implementation,
            "appImplementation": implementation,
        }

    async def _decide(self, boot_info: ReceivedBootInfo, is_kms: bool) -> PolicyDecision:
        question = encode_question(IS_KMS_ALLOWED if is_kms else IS_APP_ALLOWED, contract_question(boot_info))
        state = await self._state()
        is_allowed, reason = decoded(decode_decision, await self._call(question, state.block))
        gateway = decoded(decode_text, await self._call(GATEWAY_APP_ID, state.block))
        rule = "allowed" if is_allowed else rule_of(reason, is_kms=is_kms) or "contract"
        return PolicyDecision(is_allowed, reason, gateway, rule, state=state.name)

    async def _state(self) -> _State:
        """Return the state to ask about; raise `ChainError` for another chain, or one with too few blocks."""
        settings = self.settings
        if not settings.rules.reads_confirmed_block:
            return _State(LATEST, "the latest block")
        chain_id = await self._chain.quantity("eth_chainId")
        if settings.chain_id not in (None, chain_id):
            raise ChainError(f"authorization backend chain ID mismatch: {settings.chain_id} expected, got {chain_id}")
        head, age = await self._head.get(lambda: self._chain.quantity("eth_blockNumber"))
        block = head - settings.confirmations
        if block < 0:
            raise ChainError(
                f"authorization backend has not reached configured finality: {settings.confirmations} blocks after "
                f"the first expected, got {head}"
            )
        known = "just asked" if age is None else f"known for {age:.1f} s"
        return _State(hex(block), f"block {block} of chain {chain_id}, latest {head}, {known}")

    async def _call(self, data: bytes, block: str) -> bytes:
        return await self._chain.eth_call(self.settings.kms_contract, data, block)


class KeptHead:
    """The number of the latest block, which is used for `seconds` after it came, as upstream's client does.

    `now` is a clock in seconds. With 0 seconds it is asked for each time. A state that is that much older is then
    judged: what was revoked meanwhile is still allowed.
    """

    def __init__(self, seconds: float, now: Callable[[], float]) -> None:
        self._seconds, self._now = seconds, now
        self._kept: tuple[int, float] | None = None

    async def get(self, ask: Callable[[], Awaitable[int]]) -> tuple[int, float | None]:
        """Return the number and its age in seconds, None if it was asked for; raise what `ask` raises."""
        if self._kept is not None:
            head, came = self._kept
            age = self._now() - came
            if 0 <= age < self._seconds:
                return head, age
        head = await ask()
        self._kept = head, self._now()
        return head, None

    def forget(self) -> None:
        """Ask for the number the next time."""
        self._kept = None


def decoded(decode: Callable[[bytes], T], data: bytes) -> T:
    """Decode what the contract returned; raise `ChainError` if it is not what the contract returns."""
    try:
        return decode(data)
    except FormatError as error:
        no_contract = "" if data else " (nothing: is there a contract at KMS_CONTRACT_ADDR?)"
        raise ChainError(f"{error}{no_contract}") from error
