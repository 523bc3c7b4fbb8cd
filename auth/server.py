"""auth-simple and auth-mock as HTTP applications, with the originals' answers and log lines.

Binds no socket, reads no environment and knows no command line. The routes and refusals are those of `auth.hono`.

Source: `kms/auth-simple/index.ts` and `kms/auth-mock/index.ts` of dstack, next 312dc605.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from dstack_emu.auth import openapi
from dstack_emu.auth.boot_info import PolicyDecision, ReceivedBootInfo, parse_boot_info
from dstack_emu.auth.hono import MAX_BODY_SIZE as MAX_BODY_SIZE
from dstack_emu.auth.hono import JsonText, Webhook, boot_response, webhook_app
from dstack_emu.auth.mock import MockAuth, MockSettings
from dstack_emu.auth.policy import DEFAULT_CONTRACT, Contract, knows_tee_variant
from dstack_emu.auth.simple import SimpleAuth

DecisionObserver = Callable[[ReceivedBootInfo, bool, PolicyDecision], None]
"""Called after each decision with the boot info, whether it was about a KMS, and the decision."""


def simple_app(
    config_path: Path | str, *, contract: Contract = DEFAULT_CONTRACT, observer: DecisionObserver | None = None
) -> web.Application:
    """Build auth-simple over one config file; raises `AuthConfigError` for an unknown `contract`.

    `observer` is called after each decision. Logs upstream's lines to `auth.simple`, an error for a file that cannot
    be used, and a warning for each key that nothing reads and for each decision that another contract would have made
    otherwise.
    """
    service = SimpleAuth(config_path, contract=contract)
    service.info()  # warns about keys that nothing reads before the first request comes
    log = logging.getLogger("dstack_emu.auth.simple")

    def info() -> dict[str, object]:
        answer = service.info()
        if "configError" in answer:
            log.error("%s", answer["configError"])
        return answer

    def decide(boot_info: ReceivedBootInfo, is_kms: bool) -> PolicyDecision:
        caller = "KMS" if is_kms else "app"
        request = (
            {"osImageHash": boot_info.os_image_hash, "mrAggregated": boot_info.mr_aggregated}
            if is_kms
            else {"appId": boot_info.app_id, "composeHash": boot_info.compose_hash}
        )
        log.info("%s boot auth request: %s", caller, JsonText({**request, "instanceId": boot_info.instance_id}))
        decision = service.decide(boot_info, is_kms)
        if decision.rule == "config":
            log.error("%s", decision.reason)
        if decision.differs_from:
            log.warning(
                "%s boot %s by rule %s of the %s contract; otherwise under: %s",
                caller,
                "allowed" if decision.is_allowed else "denied",
                decision.rule,
                service.contract,
                ", ".join(decision.differs_from),
            )
        if decision.refusal is not None:
            log.info("%s boot denied by rule %s: %s", caller, decision.rule, decision.refusal)
        log.info("%s boot auth result: %s", caller, JsonText(boot_response(decision)))
        if observer is not None:
            observer(boot_info, is_kms, decision)
        return decision

    document = openapi.document("auth-simple: boot authorization by a config file")
    return _app(document, info, decide, checks_tee_variant=knows_tee_variant(contract))


def mock_app(settings: MockSettings) -> web.Application:
    """Build auth-mock; logs upstream's request lines to `auth.mock`, with their note only if all do succeed."""
    service = MockAuth(settings)
    note = {"note": "always returning success"} if settings.policy == "allow-all" else {}
    log = logging.getLogger("dstack_emu.auth.mock")
    for entry in sorted(settings.allowed_device_ids | settings.allowed_mr_aggregated):
        if entry.startswith("0x"):
            log.warning("allowlist entry %s matches nothing: entries are compared without 0x", entry)

    def decide(boot_info: ReceivedBootInfo, is_kms: bool) -> PolicyDecision:
        request = {"appId": boot_info.app_id, "instanceId": boot_info.instance_id}
        log.info("mock %s boot auth request: %s", "KMS" if is_kms else "app", JsonText({**request, **note}))
        return service.decide(boot_info, is_kms)

    document = openapi.document("auth-mock: boot authorization by a fixed policy, for tests")
    return _app(document, service.info, decide)


def _app(
    document: dict[str, object],
    info: Callable[[], dict[str, object]],
    decide: Callable[[ReceivedBootInfo, bool], PolicyDecision],
    *,
    checks_tee_variant: bool = False,
) -> web.Application:
    async def get_info() -> tuple[int, dict[str, object]]:
        return 200, info()

    async def decide_now(boot_info: ReceivedBootInfo, is_kms: bool) -> PolicyDecision:
        return decide(boot_info, is_kms)

    def parse(body: object) -> ReceivedBootInfo:
        return parse_boot_info(body, checks_tee_variant=checks_tee_variant)

    return webhook_app(Webhook(document, get_info, parse, decide_now))
