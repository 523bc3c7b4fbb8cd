"""auth-eth-bun as an HTTP application, with the original's answers and log lines.

Binds no socket, reads no environment and knows no command line. The routes and refusals are those of `auth.hono`.

Source: dstack, `kms/auth-eth-bun/index.ts` at 40eaf35e (0.5.11) and next 312dc605.
"""

import logging
from collections.abc import AsyncIterator, Mapping
from typing import Final

from aiohttp import web

from dstack_emu.auth import openapi
from dstack_emu.auth.boot_info import PolicyDecision, ReceivedBootInfo, parse_boot_info
from dstack_emu.auth.errors import BootInfoBoundsError, BootInfoError, ChainError
from dstack_emu.auth.eth import EthAuth, KeptHead
from dstack_emu.auth.eth_request import parse_bounded_boot_info
from dstack_emu.auth.eth_settings import BACKEND_UNAVAILABLE, EthSettings
from dstack_emu.auth.hono import JsonText, Webhook, boot_response, webhook_app, zod_refusal
from dstack_emu.auth.json_rpc import Headers
from dstack_emu.auth.server import DecisionObserver

_TITLE: Final = "auth-eth-bun: boot authorization by a contract on a chain"
_INVALID_REQUEST: Final = "invalid authorization request"
_UNLOGGED: Final = "Test backend error"
"""Upstream does not log this failure of a request about a KMS, which its tests use."""

_log = logging.getLogger("dstack_emu.auth.eth")


def eth_app(
    settings: EthSettings,
    *,
    observer: DecisionObserver | None = None,
    headers: Headers | None = None,
    head: KeptHead | None = None,
) -> web.Application:
    """Build auth-eth-bun over one contract.

    `observer` is called after each decision, `headers` are added to each call of the chain. `head` is the block
    cache, if it is not one of its own. Logs upstream's lines to `auth.eth`, and for each answer the block whose state
    decided. Why a chain gives no answer is logged at level debug, because upstream's next hides it in its log, too;
    0.5.11 answers with it.
    """
    service = EthAuth(settings, headers=headers, head=head)
    rules = settings.rules

    async def info() -> tuple[int, Mapping[str, object]]:
        try:
            answer = await service.info()
        except ChainError as error:
            _log.error(
                "%s", "authorization backend health check failed" if rules.hides_cause else "error in health check"
            )
            _log.debug("%s", error)
            message = BACKEND_UNAVAILABLE if rules.hides_cause else str(error)
            return 500, {"status": "error", "message": message}
        _log.info("batch %s", JsonText([answer["gatewayAppId"], answer["chainId"], answer["appImplementation"]]))
        return 200, answer

    async def decide(boot_info: ReceivedBootInfo, is_kms: bool) -> PolicyDecision:
        decision = await service.decide(boot_info, is_kms)
        _log_decision(decision, is_kms, hides_cause=rules.hides_cause)
        if observer is not None:
            observer(boot_info, is_kms, decision)
        return decision

    async def close(_app: web.Application) -> AsyncIterator[None]:
        yield
        await service.close()

    parse = parse_bounded_boot_info if rules.bounds_request else parse_boot_info
    document = openapi.eth_document(_TITLE, bounds_request=rules.bounds_request)
    refuse = _refuse_briefly if rules.bounds_request else zod_refusal
    app = webhook_app(Webhook(document, info, parse, decide, refuse))
    app.cleanup_ctx.append(close)
    return app


def _refuse_briefly(error: BootInfoError | BootInfoBoundsError) -> object:
    _log.info("%s: %s", _INVALID_REQUEST, error)
    return {"isAllowed": False, "reason": _INVALID_REQUEST, "gatewayAppId": ""}


def _log_decision(decision: PolicyDecision, is_kms: bool, *, hides_cause: bool) -> None:
    caller = "KMS" if is_kms else "app"
    if decision.chain_error:
        if not (is_kms and decision.chain_error == _UNLOGGED):
            failed = f"{'KMS' if is_kms else 'application'} authorization backend failed"
            _log.error("%s", failed if hides_cause else f"error in {caller} boot auth: {decision.chain_error}")
        _log.debug("%s", decision.chain_error)
        return
    if not decision.is_allowed:
        _log.info("%s boot denied by rule %s of the contract", caller, decision.rule)
    _log.info("%s boot auth result: %s (%s)", caller, JsonText(boot_response(decision)), decision.state)
