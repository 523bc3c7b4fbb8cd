"""The HTTP server of auth-simple and auth-mock: one application for each, with the originals' answers and refusals.

Binds no socket, reads no environment and knows no command line. Two routes are ours, `GET /health` and
`GET /openapi.json`; anything else that is not one of the three of the protocol is a 404, also a known path with
another method. There is no catch-all for exceptions: a defect of ours is aiohttp's 500, which a KMS treats as an
error and never as an allow.

Source: `kms/auth-simple/index.ts` and `kms/auth-mock/index.ts` of dstack, next 312dc605; hono 4.12.34
`validator.ts` (content type, malformed JSON) and `hono-base.ts` (404).
"""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from aiohttp import web

from dstack_emu.auth import openapi
from dstack_emu.auth.boot_info import PolicyDecision, ReceivedBootInfo, parse_body, parse_boot_info
from dstack_emu.auth.errors import BootInfoError, MalformedJsonError, OversizedJsonError
from dstack_emu.auth.mock import MockAuth, MockSettings
from dstack_emu.auth.policy import DEFAULT_CONTRACT, Contract, knows_tee_variant
from dstack_emu.auth.simple import SimpleAuth

MAX_BODY_SIZE: Final = 1024 * 1024  # a KMS sends well under 2 KiB

# Any case, as hono 4.12.34 (next's auth-simple); 4.12.18 and 4.12.27, which the others pin, want lowercase.
# What comes before `+` is letters, `-` and `.`.
_JSON_CONTENT_TYPE: Final = re.compile(
    r"application/(?:[a-z.-]+\+)?json(?:;\s*[a-z0-9-]+=[^;]+)*", re.IGNORECASE | re.ASCII
)
_LONE_SURROGATE: Final = re.compile("[\ud800-\udfff]")


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
        log.info("%s boot auth request: %s", caller, _Json({**request, "instanceId": boot_info.instance_id}))
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
        log.info("%s boot auth result: %s", caller, _Json(_boot_response(decision)))
        if observer is not None:
            observer(boot_info, is_kms, decision)
        return decision

    title = "auth-simple: boot authorization by a config file"
    return _webhook(title, info, decide, checks_tee_variant=knows_tee_variant(contract))


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
        log.info("mock %s boot auth request: %s", "KMS" if is_kms else "app", _Json({**request, **note}))
        return service.decide(boot_info, is_kms)

    return _webhook("auth-mock: boot authorization by a fixed policy, for tests", service.info, decide)


def _webhook(
    title: str,
    info: Callable[[], dict[str, object]],
    decide: Callable[[ReceivedBootInfo, bool], PolicyDecision],
    *,
    checks_tee_variant: bool = False,
) -> web.Application:
    async def get_info(_request: web.Request) -> web.Response:
        return _json_answer(info())

    async def get_health(_request: web.Request) -> web.Response:
        return _json_answer({"status": "ok"})

    async def get_openapi(_request: web.Request) -> web.Response:
        return _json_answer(openapi.document(title))

    async def boot_auth(request: web.Request, is_kms: bool) -> web.Response:
        try:
            boot_info = parse_boot_info(await _read_json(request), checks_tee_variant=checks_tee_variant)
        except BootInfoError as error:
            refusal = {"success": False, "error": {"issues": error.issues, "name": "ZodError"}}
            return _json_answer(refusal, status=400)
        except MalformedJsonError:
            return _text_answer("Malformed JSON in request body", status=400)
        except OversizedJsonError as error:
            return _text_answer(f"Request body: {error}", status=413)
        except web.HTTPRequestEntityTooLarge:
            return _text_answer(f"Request body is larger than {MAX_BODY_SIZE} bytes", status=413)
        return _json_answer(_boot_response(decide(boot_info, is_kms)))

    async def boot_auth_app(request: web.Request) -> web.Response:
        return await boot_auth(request, is_kms=False)

    async def boot_auth_kms(request: web.Request) -> web.Response:
        return await boot_auth(request, is_kms=True)

    async def not_found(_request: web.Request) -> web.Response:
        return _text_answer("404 Not Found", status=404)

    app = web.Application(client_max_size=MAX_BODY_SIZE)
    app.add_routes(
        [
            web.post("/bootAuth/app", boot_auth_app),
            web.post("/bootAuth/kms", boot_auth_kms),
            web.get("/", get_info),
            web.get("/health", get_health),
            web.get("/openapi.json", get_openapi),
            web.route("*", r"/{path:[\s\S]*}", not_found),
        ]
    )
    return app


async def _read_json(request: web.Request) -> object:
    """Parse the body; if the content type is not a JSON one, return an empty object, and leave the body unread."""
    if not _JSON_CONTENT_TYPE.fullmatch(request.headers.get("Content-Type", "")):
        return {}
    try:
        body = await request.read()
    except web.RequestPayloadError as error:
        raise MalformedJsonError(f"body cannot be read: {error}") from error
    return parse_body(body)


def _boot_response(decision: PolicyDecision) -> dict[str, object]:
    return {
        "isAllowed": decision.is_allowed,
        "reason": decision.reason,
        "gatewayAppId": decision.gateway_app_id,
    }


class _Json:
    """A value in a log line, which is encoded as JSON only if the line is written."""

    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        return _dump(self._value)


def _dump(value: object) -> str:
    """Encode as `JSON.stringify` does: compact, escaping only what must be, including lone surrogates."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return _LONE_SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _json_answer(value: object, *, status: int = 200) -> web.Response:
    return web.Response(status=status, body=_dump(value).encode(), content_type="application/json")


def _text_answer(text: str, *, status: int) -> web.Response:
    return web.Response(status=status, body=text.encode(), headers={"Content-Type": "text/plain; charset=UTF-8"})
