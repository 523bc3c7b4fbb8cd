"""The HTTP front of the webhooks that are Hono servers upstream: routes, refusals, and JSON as JavaScript writes it.

Two routes are ours, `GET /health` and `GET /openapi.json`; anything else that is not one of the three of the protocol
is a 404, also a known path with another method. There is no catch-all for exceptions: a defect of ours is aiohttp's
500, which a KMS treats as an error and never as an allow.

Source: hono 4.12.34 `validator.ts` (content type, malformed JSON) and `hono-base.ts` (404); zod's refusals as
`@hono/zod-validator` 0.2.2 answers them.
"""

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from dstack_emu.auth.boot_info import PolicyDecision, ReceivedBootInfo, parse_body
from dstack_emu.auth.errors import BootInfoBoundsError, BootInfoError, MalformedJsonError, OversizedJsonError

MAX_BODY_SIZE: Final = 1024 * 1024  # a KMS sends well under 2 KiB

# Any case, as hono 4.12.34 (next's auth-simple); 4.12.12 to 4.12.27, which the others pin, want lowercase.
# What comes before `+` is letters, `-` and `.`.
_JSON_CONTENT_TYPE: Final = re.compile(
    r"application/(?:[a-z.-]+\+)?json(?:;\s*[a-z0-9-]+=[^;]+)*", re.IGNORECASE | re.ASCII
)
_LONE_SURROGATE: Final = re.compile("[\ud800-\udfff]")

Refuse = Callable[[BootInfoError | BootInfoBoundsError], object]
"""Returns the JSON of the 400 for a body that is no boot info."""


def zod_refusal(error: BootInfoError | BootInfoBoundsError) -> object:
    """Return the refusal of zod's validator, with every issue."""
    issues = error.issues if isinstance(error, BootInfoError) else ()
    return {"success": False, "error": {"issues": issues, "name": "ZodError"}}


@dataclass(frozen=True, slots=True)
class Webhook:
    """What one webhook answers.

    `document` is its OpenAPI document; `info` returns status and JSON of `GET /`; `parse` reads a parsed body, and
    raises `BootInfoError` or `BootInfoBoundsError`, of which `refuse` makes the answer; `decide` is told whether it is
    about a KMS.
    """

    document: Mapping[str, object]
    info: Callable[[], Awaitable[tuple[int, Mapping[str, object]]]]
    parse: Callable[[object], ReceivedBootInfo]
    decide: Callable[[ReceivedBootInfo, bool], Awaitable[PolicyDecision]]
    refuse: Refuse = zod_refusal


def webhook_app(webhook: Webhook) -> web.Application:
    """Build the application of a webhook."""

    async def get_info(_request: web.Request) -> web.Response:
        status, answer = await webhook.info()
        return _json_answer(answer, status=status)

    async def get_health(_request: web.Request) -> web.Response:
        return _json_answer({"status": "ok"})

    async def get_openapi(_request: web.Request) -> web.Response:
        return _json_answer(webhook.document)

    async def boot_auth(request: web.Request, is_kms: bool) -> web.Response:
        try:
            boot_info = webhook.parse(await _read_json(request))
        except (BootInfoError, BootInfoBoundsError) as error:
            return _json_answer(webhook.refuse(error), status=400)
        except MalformedJsonError:
            return _text_answer("Malformed JSON in request body", status=400)
        except OversizedJsonError as error:
            return _text_answer(f"Request body: {error}", status=413)
        except web.HTTPRequestEntityTooLarge:
            return _text_answer(f"Request body is larger than {MAX_BODY_SIZE} bytes", status=413)
        return _json_answer(boot_response(await webhook.decide(boot_info, is_kms)))

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


def boot_response(decision: PolicyDecision) -> dict[str, object]:
    """Return the JSON of a decision."""
    return {
        "isAllowed": decision.is_allowed,
        "reason": decision.reason,
        "gatewayAppId": decision.gateway_app_id,
    }


class JsonText:
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
