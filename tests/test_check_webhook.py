"""check-webhook: webhooks that a KMS understands pass, and each one that would break it is named, with the reason."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from dstack_emu.attest.release import DEFAULT, RELEASES, Release
from dstack_emu.testing import LiveStack
from dstack_emu.transport.listen import bind_tcp, serve
from dstack_emu.webhook_check.check import AT_ONCE, AnswerCheck, Report, check_webhook
from dstack_emu.webhook_check.sample_requests import SampleError, SampleRequests
from tests.commands import run_command, serving, usage_error

REQUESTS = SampleRequests.of_seed("dstack-emu")
KMS, APP = "bootAuth/kms", "bootAuth/app"

Answer = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]

INFO = {"status": "ok", "kmsContractAddr": "", "gatewayAppId": "any", "chainId": 1, "appImplementation": ""}
KNOWN = {REQUESTS.kms.mr_aggregated.hex(), REQUESTS.app.mr_aggregated.hex()}


async def right(request: web.Request, asked: dict[str, Any]) -> web.Response:
    """Answer as one should: allow who is known and up to date."""
    known = asked["mrAggregated"] in KNOWN and asked["tcbStatus"] == "UpToDate"
    decision = {"isAllowed": known, "reason": "" if known else "not on my list", "gatewayAppId": "any"}
    return web.json_response(decision)


@asynccontextmanager
async def webhook(answer: Answer = right, info: Callable[[], web.StreamResponse] | None = None) -> AsyncIterator[str]:
    """Run a webhook that answers so, by its URL."""

    async def get_info(request: web.Request) -> web.StreamResponse:
        return web.json_response(INFO) if info is None else info()

    async def decide(request: web.Request) -> web.StreamResponse:
        try:
            asked = await request.json()
            asked["mrAggregated"], asked["tcbStatus"]
        except (ValueError, KeyError):
            return web.json_response({"error": "no question"}, status=400)
        return await answer(request, asked)

    app = web.Application()
    app.add_routes([web.get("/", get_info), web.post("/bootAuth/{who:kms|app}", decide)])
    server = await serve(app, bind_tcp("127.0.0.1", 0))
    try:
        yield server.url
    finally:
        await server.close()


async def report_on(answer: Answer = right, info: Callable[[], web.StreamResponse] | None = None) -> Report:
    """Check a webhook that answers so, without waiting for long for one that never does."""
    async with webhook(answer, info) as url:
        return await check_webhook(url, REQUESTS, patience=0.5 if answer is hang else 10.0)


def timeless(report: Report) -> list[AnswerCheck]:
    """The findings but the one that depends on how busy this machine is."""
    return [finding for finding in report.findings if finding.name != "time"]


# ---- what passes


async def test_right_webhook_passes_without_a_warning() -> None:
    report = await report_on()
    assert [finding for finding in timeless(report) if finding.level != "ok"] == []
    assert len(report.findings) == 26


def test_auth_simple_of_a_stack_allows_the_requests_for_its_kms_and_app(dstack_stack: LiveStack) -> None:
    report = dstack_stack.check_webhook(dstack_stack.services["auth-src"])
    assert [finding for finding in timeless(report) if finding.level != "ok"] == []
    said = {finding.name: finding.said for finding in report.findings}
    assert said[KMS] == said[APP] == "allowed, gatewayAppId 'any'"
    refusal = {"readme": "TCB status is not up to date", "0.6": "TCB status is not allowed"}[DEFAULT.auth_contract]
    assert said["kms, TCB out of date, with advisories"] == f"denied: {refusal}"
    assert said["unknown KMS"] == "denied: OS image is not allowed"
    assert said["unknown app"] == "denied: app not registered"


def test_answers_of_auth_mock_pass_with_warnings_that_it_allows_everyone() -> None:
    with serving("auth", "mock", "--listen", "127.0.0.1:0") as mock:
        done = run_command("check-webhook", mock["url"], "--answers-only", "--json")
        shown = run_command("check-webhook", mock["url"], "--answers-only")
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"], report["url"]) == (0, True, mock["url"])
    assert Counter(check["level"] for check in report["checks"] if check["name"] != "time") == {"ok": 21, "warning": 4}
    assert set(report["checks"][0]) == {"name", "level", "said", "breaks", "hint", "seconds"}
    assert b"it allows a KMS, and so releases the root keys, whatever its measurements are" in shown.stdout
    assert b"\nNothing here breaks a KMS; " in shown.stdout


def test_denying_everyone_is_understood_and_shown() -> None:
    with serving("auth", "mock", "--listen", "127.0.0.1:0", environment={"MOCK_POLICY": "deny-all"}) as mock:
        done = run_command("check-webhook", mock["url"], "--answers-only", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["checks"][1]["said"] == "denied: mock policy: deny-all"


@pytest.mark.parametrize("release", RELEASES.values(), ids=lambda each: each.name)
async def test_requests_carry_the_kms_user_agent_and_content_type(release: Release) -> None:
    seen = set()

    async def note(request: web.Request, asked: dict[str, Any]) -> web.Response:
        seen.add((request.headers["User-Agent"], request.headers["Content-Type"], frozenset(asked) >= {"teeVariant"}))
        return await right(request, asked)

    async with webhook(note) as url:
        await check_webhook(url, SampleRequests.of_seed("dstack-emu", release), patience=10.0, release=release)
    agents = {(agent, kind) for agent, kind, _ in seen}
    assert agents == {(f"dstack-kms/{release.version}", "application/json")}
    assert {has_variant for _, _, has_variant in seen} == {True, False}


# ---- what breaks a KMS


def answering(**changes: Any) -> Answer:
    """Answer with other fields; None leaves one out."""

    async def answer(request: web.Request, asked: dict[str, Any]) -> web.Response:
        decision = {"isAllowed": False, "reason": "no", "gatewayAppId": "", **changes}
        return web.json_response({key: value for key, value in decision.items() if value is not ...})

    return answer


def with_response(make: Callable[[], web.StreamResponse]) -> Answer:
    """Answer the same whatever is asked."""

    async def answer(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        return make()

    return answer


def unless(fits: Callable[[web.Request, dict[str, Any]], bool], status: int) -> Answer:
    """Answer as one should what fits, else with a status."""

    async def answer(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        return await right(request, asked) if fits(request, asked) else web.Response(status=status, text="no")

    return answer


async def hang(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
    """Never answer."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("unreachable")


async def cut_off(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
    """End the connection within the body."""
    response = web.StreamResponse(headers={"Content-Length": "100", "Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(b'{"isAllowed": ')
    assert request.transport is not None
    request.transport.close()
    return response


def at_most(number: int) -> Callable[[web.Request, dict[str, Any]], bool]:
    """Fit so many questions, and no more."""
    seen = Counter[str]()

    def fits(request: web.Request, asked: dict[str, Any]) -> bool:
        seen["all"] += 1
        return seen["all"] <= number

    return fits


def text(body: str, **settings: Any) -> Answer:
    return with_response(lambda: web.Response(text=body, **settings))


DENIED = '{"isAllowed": false, "reason": "no", "gatewayAppId": ""}'
BOTH = [KMS, APP]
FIELDS = ["kms, with fields of a later release", "app, with fields of a later release"]

BROKEN: dict[str, tuple[Answer, list[str], str, str]] = {
    "a denial by status": (
        text("no", status=403),
        BOTH,
        "returned 403 Forbidden: no",
        "to deny, answer 200 with isAllowed false",
    ),
    "a redirect": (
        with_response(lambda: web.Response(status=307, headers={"Location": "/elsewhere"})),
        BOTH,
        "returned 307 Temporary Redirect: ",
        "it does not follow redirects",
    ),
    "a fault": (
        text("oops", status=500),
        BOTH,
        "returned 500 Internal Server Error: oops",
        "for a failure behind the webhook",
    ),
    "another path": (text("404 Not Found", status=404), BOTH, "returned 404 Not Found", "without a slash"),
    "isAllowed as text": (
        answering(isAllowed="true"),
        BOTH,
        "invalid type: str `'true'`, expected a boolean for `isAllowed`",
        "not a text or a number",
    ),
    "isAllowed as a number": (
        answering(isAllowed=1),
        BOTH,
        "expected a boolean for `isAllowed`",
        "not a text or a number",
    ),
    "no reason": (answering(reason=...), BOTH, "missing field `reason`", "all three fields are needed"),
    "reason null": (
        answering(reason=None),
        BOTH,
        "invalid type: null, expected a string for `reason`",
        "not null or a number",
    ),
    "gatewayAppId left out": (answering(gatewayAppId=...), BOTH, "missing field `gatewayAppId`", "all three fields"),
    "snake_case": (text('{"is_allowed": true}'), BOTH, "missing field `isAllowed`", "all three fields"),
    "a field twice": (
        text('{"isAllowed": false, "isAllowed": true, "reason": "", "gatewayAppId": ""}'),
        BOTH,
        "duplicate field `isAllowed`",
        "write each field once",
    ),
    "a page": (text("<html>", content_type="text/html"), BOTH, "failed to decode response from", "JSON in UTF-8"),
    "an empty body": (text(""), BOTH, "failed to decode response from", "JSON in UTF-8"),
    "a list": (text("[]"), BOTH, "invalid type: list `[]`, expected struct BootResponse", "one JSON object"),
    "two objects": (text(DENIED + DENIED), BOTH, "failed to decode response from", "nothing else"),
    "another encoding": (
        with_response(lambda: web.Response(body=DENIED.encode("utf-16"), content_type="application/json")),
        BOTH,
        "failed to decode response from",
        "JSON in UTF-8",
    ),
    "too much": (
        answering(reason="x" * 1024 * 1024),
        BOTH,
        "answered more than 1048576 bytes",
        "only three fields are read",
    ),
    "silence": (hang, BOTH, "no answer within 0.5 s", "answer sooner, or deny"),
    "half an answer": (cut_off, BOTH, "connection closed within the answer", "the right Content-Length"),
    "fields of its own time alone": (
        unless(lambda request, asked: "somethingNew" not in asked, 422),
        FIELDS,
        "returned 422 Unprocessable Entity: no",
        "fields that are new or empty",
    ),
    "only KMS of next": (
        unless(lambda request, asked: "teeVariant" in asked, 400),
        ["kms, as 0.5.x sends it: attestationMode", "app, as 0.5.x sends it: attestationMode"],
        "returned 400 Bad Request: no",
        "accept the request as it is",
    ),
    "only KMS of 0.5.x": (
        unless(lambda request, asked: "attestationMode" in asked, 400),
        ["kms, as next sends it: teeVariant", "app, as next sends it: teeVariant"],
        "returned 400 Bad Request: no",
        "accept the request as it is",
    ),
    "no launch ticket": (
        unless(lambda request, asked: "launchTicketHash" not in asked, 422),
        ["kms, as 0.6.5 sends it: launchTicketHash", "app, as 0.6.5 sends it: launchTicketHash"],
        "returned 422 Unprocessable Entity: no",
        "fields that are new or empty",
    ),
    "an empty instance id": (
        unless(lambda request, asked: asked["instanceId"] != "", 400),
        ["app without instance id and key provider"],
        "returned 400 Bad Request: no",
        "fields that are new or empty",
    ),
    "an unknown app is a fault": (
        unless(lambda request, asked: asked["mrAggregated"] in KNOWN, 500),
        ["unknown app", "unknown KMS"],
        "returned 500 Internal Server Error: no",
        "not for a denial",
    ),
    "an outdated TCB is a fault": (
        unless(lambda request, asked: asked["tcbStatus"] == "UpToDate", 500),
        ["kms, TCB out of date, with advisories", "app, TCB out of date, with advisories"],
        "returned 500 Internal Server Error: no",
        "not for a denial",
    ),
    "KMS are unknown to it": (
        unless(lambda request, asked: request.match_info["who"] == "app", 404),
        [KMS],
        "/bootAuth/kms returned 404 Not Found: no",
        "serve GET / and POST",
    ),
    "a user agent that it does not know": (
        unless(lambda request, asked: "dstack-kms" not in request.headers["User-Agent"], 403),
        BOTH,
        "returned 403 Forbidden",
        "a KMS sends no credentials",
    ),
    "a limited rate": (
        unless(at_most(20), 429),
        [f"{KMS}, 20 times, one after another", f"{APP}, 20 times, one after another", "16 requests at once"],
        "returned 429 Too Many Requests: no",
        "do not limit the rate of requests",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_webhook_that_breaks_a_kms_is_named(name: str) -> None:
    answer, where, words, hint = BROKEN[name]
    report = await report_on(answer)
    assert not report.ok
    assert [finding.name for finding in report.broken] == where, report.broken
    for finding in report.broken:
        assert words in finding.said
        assert hint in finding.hint
        assert finding.breaks
    skipped = [finding.name for finding in report.findings if finding.level == "skipped"]
    assert bool(skipped) == bool({KMS, APP} & set(where))


@pytest.mark.parametrize(
    ("changes", "words", "hint"),
    [
        ({"chainId": "1"}, "invalid type: str `'1'`, expected u64 for `chainId`", "chainId is a whole number"),
        ({"chainId": -1}, "invalid type: int `-1`, expected u64 for `chainId`", "chainId is a whole number"),
        ({"chainId": 2**64}, "expected u64 for `chainId`", "chainId is a whole number"),
        ({"chainId": 1.5}, "expected u64 for `chainId`", "chainId is a whole number"),
        ({"status": ...}, "missing field `status`", "GET / needs status, kmsContractAddr"),
        (
            {"kmsContractAddr": None},
            "invalid type: null, expected a string for `kmsContractAddr`",
            "not null or a number",
        ),
    ],
    ids=str,
)
async def test_info_that_breaks_get_meta_is_named_and_the_rest_is_asked(
    changes: dict[str, Any], words: str, hint: str
) -> None:
    document = {key: value for key, value in {**INFO, **changes}.items() if value is not ...}
    report = await report_on(info=lambda: web.json_response(document))
    (finding,) = report.broken
    assert (finding.name, finding.breaks.partition(" ")[0]) == ("GET /", "GetMeta")
    assert words in finding.said
    assert hint in finding.hint
    assert len(report.findings) == 26


# ---- what is understood, and hardly meant


def flipping() -> Answer:
    """Allow every other question."""
    count = Counter[str]()

    async def answer(request: web.Request, asked: dict[str, Any]) -> web.Response:
        count["all"] += 1
        return web.json_response({"isAllowed": count["all"] % 2 == 0, "reason": "odd", "gatewayAppId": ""})

    return answer


async def test_requests_at_once_that_are_refused_are_counted() -> None:
    seen = Counter[str]()

    async def count(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        seen["all"] += 1
        return await right(request, asked)

    await report_on(count)
    # The last requests of a check are those at once, and one more for the headers of its answer.
    report = await report_on(unless(at_most(seen["all"] - AT_ONCE), 503))
    (finding,) = report.broken
    assert finding.name == "16 requests at once"
    assert f"{AT_ONCE - 1} of them: auth api" in finding.said
    assert "for a failure behind the webhook" in finding.hint


@pytest.mark.parametrize(
    ("answer", "name", "said"),
    [
        (answering(reason=""), "reasons", "bootAuth/kms and 14 more: denied without a reason"),
        (answering(reason="x" * 1001), "reasons", "a reason of more than 1000 characters"),
        (answering(isAllowed=True), "unknown app", "allowed: it allows an app that nobody can"),
        (answering(isAllowed=True), "kms, TCB out of date, with advisories", "allowed: it allows a platform whose TCB"),
        (
            flipping(),
            f"{APP}, 20 times, one after another",
            "equal requests are sometimes allowed and sometimes denied",
        ),
        (text(DENIED), "headers of an answer", "Content-Type is text/plain; charset=utf-8: a KMS ignores that"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_answer_that_can_hardly_be_meant_is_a_warning(answer: Answer, name: str, said: str) -> None:
    report = await report_on(answer)
    assert report.broken == ()
    (finding,) = (finding for finding in report.warnings if finding.name == name)
    assert said in finding.said


async def test_deciding_about_nothing_is_a_warning() -> None:
    async def info(request: web.Request) -> web.Response:
        return web.json_response(INFO)

    async def allow(request: web.Request) -> web.Response:
        return web.json_response({"isAllowed": True, "reason": "", "gatewayAppId": ""})

    app = web.Application()
    app.add_routes([web.get("/", info), web.post("/bootAuth/{who}", allow)])
    server = await serve(app, bind_tcp("127.0.0.1", 0))
    try:
        report = await check_webhook(server.url, REQUESTS, patience=10.0)
    finally:
        await server.close()
    nothing = {finding.name for finding in report.warnings if "without the fields of the request" in finding.said}
    assert nothing == {"kms, an empty object", "kms, no JSON", "app, an empty object", "app, no JSON"}


# ---- the command


def test_unreachable_webhook_fails_with_a_hint() -> None:
    with bind_tcp("127.0.0.1", 0, listen=False) as sock:  # kept, so that nobody else listens there meanwhile
        port = sock.getsockname()[1]
        done = run_command("check-webhook", f"http://127.0.0.1:{port}")
    assert (done.returncode, done.stderr) == (1, b"")
    assert b"Connection refused" in done.stdout
    assert b"hint: check that the webhook runs, and that the address is right" in done.stdout
    assert done.stdout.endswith(b"\n3 findings would break a KMS.\n")


def test_own_values_are_asked_about(tmp_path: Path) -> None:
    file, log = tmp_path / "values.json", tmp_path / "log"
    file.write_text(json.dumps({"app": {"appId": "0x" + "ab" * 20}, "kms": {"tcbStatus": "Unknown"}}))
    with serving("auth", "mock", "--listen", "127.0.0.1:0", log=log) as mock:
        assert run_command("check-webhook", mock["url"], "--answers-only", "--boot-info", str(file)).returncode == 0
    assert f'mock app boot auth request: {{"appId":"{"ab" * 20}"' in log.read_text()


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ([], "an object expected, got list"),
        ({"appID": "00"}, "appID: unknown key"),
        ({"appId": "xyz"}, "appId: String should match pattern"),
        ({"kms": {"advisoryIds": "INTEL-SA-00837"}}, "kms.advisoryIds: Input should be a valid tuple"),
        ({"kms": {}, "apps": {}}, "kms: unknown key; apps: unknown key"),
    ],
)
def test_values_that_fit_no_request_are_refused(document: Any, text: str) -> None:
    with pytest.raises(SampleError) as refusal:
        REQUESTS.with_values(document)
    assert str(refusal.value).startswith(text)


def test_values_for_both_replace_those_of_both() -> None:
    changed = REQUESTS.with_values({"osImageHash": "0xAB", "attestationMode": "other", "advisoryIds": ["A"]})
    for question in (changed.kms, changed.app):
        assert (question.os_image_hash, question.tee_variant, question.advisory_ids) == (b"\xab", "other", ("A",))
    assert changed.app.app_id == REQUESTS.app.app_id


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["127.0.0.1:3000"], "http(s)://host:port expected, got '127.0.0.1:3000'"),
        (["http://127.0.0.1", "--timeout", "0"], "seconds, up to 3600, expected, got '0'"),
        ([], "the webhook's URL is missing: dstack-emu check-webhook http://host:port"),
        (
            ["http://127.0.0.1", "--control", "127.0.0.1:8070"],
            "--control: an http:// URL expected, got '127.0.0.1:8070'",
        ),
        (["http://127.0.0.1", "--junit", "/none/x.xml", "--boot-info", "/none"], "/none: JSON cannot be read"),
        (["http://127.0.0.1", "--boot-info", "/none"], "/none: JSON cannot be read from it: [Errno 2] No such file"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], text: str) -> None:
    assert text in usage_error("check-webhook", *arguments)
