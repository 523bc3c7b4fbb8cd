"""dstack-auth: its rules, its allowlist file's life and its refusals, over real sockets."""

import asyncio
import gzip
import json
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from dstack_emu.auth.allowlist import Allowlist, evaluate_allowlist, parse_allowlist_boot_info
from dstack_emu.auth.boot_info import ReceivedBootInfo, Refusal
from dstack_emu.auth.file import FileAuth
from dstack_emu.auth.file_server import MAX_ALLOWLIST_BODY_SIZE, file_app
from dstack_emu.transport.http import Application
from tests.recorded import golden
from tests.toy import served

Client = aiohttp.ClientSession

BOOT_INFO: dict[str, Any] = {
    "mrAggregated": "0xabc123",
    "osImageHash": "0x0f",
    "appId": "0xa0",
    "composeHash": "0xc0",
    "deviceId": "0xd0",
}
ALLOWLIST: dict[str, Any] = {
    "osImages": ["0x0f"],
    "gatewayAppId": "0x9a",
    "kms": {"mrAggregated": ["0xabc123"], "devices": ["0xd0"], "allowAnyDevice": False},
    "apps": {"0xa0": {"composeHashes": ["0xc0"], "devices": ["0xd0"], "allowAnyDevice": False}},
}
ALLOWED = {"isAllowed": True, "reason": "ok", "gatewayAppId": "0x9a"}
LOGGER = "dstack_emu.auth.file"


def denied(reason: str, gateway_app_id: str = "0x9a") -> dict[str, Any]:
    return {"isAllowed": False, "reason": reason, "gatewayAppId": gateway_app_id}


DENIED_BY_NOTHING = {"app": denied("app not registered", ""), "kms": denied("kms mrAggregated not allowed", "")}
"""What an empty allowlist answers, and so what every file answers that cannot be used."""


def allowlist_with(**changed: Any) -> dict[str, Any]:
    return {**ALLOWLIST, **changed}


def kms_with(**changed: Any) -> dict[str, Any]:
    return allowlist_with(kms={**ALLOWLIST["kms"], **changed})


def app_with(**changed: Any) -> dict[str, Any]:
    return allowlist_with(apps={"0xa0": {**ALLOWLIST["apps"]["0xa0"], **changed}})


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write(tmp_path / "auth-allowlist.json", ALLOWLIST)


@asynccontextmanager
async def asking(app: Application) -> AsyncIterator[Client]:
    """Serve an application, and give a client of it."""
    async with served(app) as server, aiohttp.ClientSession(server.url) as client:
        yield client


@pytest.fixture
async def webhook(config: Path) -> AsyncIterator[Client]:
    async with asking(file_app(config)) as client:
        yield client


def write(path: Path, document: object) -> Path:
    return write_text(path, json.dumps(document))


def write_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


async def ask(client: Client, caller: str, **changed: Any) -> Any:
    async with client.post(f"/bootAuth/{caller}", json={**BOOT_INFO, **changed}) as response:
        assert response.status == 200
        return await response.json()


async def decide(path: Path, caller: str, **changed: Any) -> Any:
    async with asking(file_app(path)) as client:
        return await ask(client, caller, **changed)


# --- every rule


@pytest.mark.parametrize("caller", ["app", "kms"])
async def test_listed_boot_is_allowed(webhook: Client, caller: str) -> None:
    assert await ask(webhook, caller) == ALLOWED


@pytest.mark.parametrize(
    ("caller", "changed", "reason"),
    [
        ("app", {"osImageHash": "0x0e"}, "os image not allowed"),
        ("app", {"osImageHash": ""}, "os image not allowed"),
        ("app", {"appId": "0xa1"}, "app not registered"),
        ("app", {"composeHash": "0xc1"}, "compose hash not allowed"),
        ("app", {"deviceId": "0xd1"}, "device not allowed"),
        ("kms", {"mrAggregated": "0xabc124"}, "kms mrAggregated not allowed"),
        ("kms", {"deviceId": "0xd1"}, "device not allowed"),
    ],
)
async def test_one_value_changed_is_denied_with_its_reason(
    webhook: Client, caller: str, changed: dict[str, Any], reason: str
) -> None:
    assert await ask(webhook, caller, **changed) == denied(reason)
    assert await ask(webhook, caller) == ALLOWED


async def test_an_app_is_not_checked_for_kms_values_nor_a_kms_for_app_values(webhook: Client) -> None:
    assert await ask(webhook, "app", mrAggregated="0x00") == ALLOWED
    assert await ask(webhook, "kms", osImageHash="0x00", appId="0x00", composeHash="0x00") == ALLOWED


@pytest.mark.parametrize("caller", ["app", "kms"])
@pytest.mark.parametrize("tcb", [{"tcbStatus": "Revoked"}, {"advisoryIds": ["INTEL-SA-00001"]}, {"tcbStatus": ""}])
async def test_tcb_status_and_advisories_are_not_checked(webhook: Client, caller: str, tcb: dict[str, Any]) -> None:
    assert await ask(webhook, caller, **tcb) == ALLOWED
    assert (await ask(webhook, caller, **tcb, deviceId="0xd1"))["isAllowed"] is False


@pytest.mark.parametrize("os_images", [None, []])
async def test_empty_os_images_admit_every_image(config: Path, os_images: list[str] | None) -> None:
    document = {key: value for key, value in ALLOWLIST.items() if key != "osImages"}
    write(config, document if os_images is None else document | {"osImages": os_images})
    assert await decide(config, "app", osImageHash="0x0e") == ALLOWED
    assert await decide(config, "app", osImageHash="") == ALLOWED
    assert await decide(config, "app", osImageHash="0x0e", composeHash="0xc1") == denied("compose hash not allowed")


@pytest.mark.parametrize(("caller", "section"), [("app", app_with), ("kms", kms_with)])
async def test_devices_are_checked_if_there_are_any(
    config: Path, caller: str, section: Callable[..., dict[str, Any]]
) -> None:
    """Devices of the file, `allowAnyDevice`, and whether a device that is not in the file is admitted."""
    for devices, allow_any, admits_others in [
        (["0xd0"], False, False),
        (["0xd0"], True, True),
        ([], False, True),
        ([], True, True),
    ]:
        write(config, section(devices=devices, allowAnyDevice=allow_any))
        assert await decide(config, caller) == ALLOWED
        expected = ALLOWED if admits_others else denied("device not allowed")
        assert await decide(config, caller, deviceId="0xd1") == expected


@pytest.mark.parametrize(
    ("document", "caller", "reason"),
    [
        ({}, "app", "app not registered"),
        ({}, "kms", "kms mrAggregated not allowed"),
        (allowlist_with(kms={}), "kms", "kms mrAggregated not allowed"),
        (kms_with(mrAggregated=[], allowAnyDevice=True), "kms", "kms mrAggregated not allowed"),
        (allowlist_with(apps={}), "app", "app not registered"),
        (allowlist_with(apps={"0xa0": {}}), "app", "compose hash not allowed"),
        (app_with(composeHashes=[], allowAnyDevice=True), "app", "compose hash not allowed"),
    ],
)
async def test_what_the_allowlist_leaves_out_is_denied(
    config: Path, document: dict[str, Any], caller: str, reason: str
) -> None:
    write(config, document)
    assert await decide(config, caller) == denied(reason, document.get("gatewayAppId", ""))


async def test_rules_are_checked_in_order(webhook: Client) -> None:
    """All is wrong at first; each denial names the next rule, whose value is then put right."""
    app = [
        ("osImageHash", "os image not allowed"),
        ("appId", "app not registered"),
        ("composeHash", "compose hash not allowed"),
        ("deviceId", "device not allowed"),
    ]
    kms = [("mrAggregated", "kms mrAggregated not allowed"), ("deviceId", "device not allowed")]
    for caller, rules in (("app", app), ("kms", kms)):
        changed: dict[str, Any] = dict.fromkeys(BOOT_INFO, "0x00")
        for key, reason in rules:
            assert await ask(webhook, caller, **changed) == denied(reason)
            del changed[key]
        assert await ask(webhook, caller, **changed) == ALLOWED


def test_decision_names_the_rule_that_decided() -> None:
    allowlist = Allowlist.model_validate_json(json.dumps(ALLOWLIST))

    def rule(is_kms: bool, **changed: Any) -> str:
        boot_info = parse_allowlist_boot_info(json.dumps({**BOOT_INFO, **changed}).encode())
        return evaluate_allowlist(allowlist, boot_info, is_kms).rule

    assert rule(True) == rule(False) == "allowed"
    assert rule(True, mrAggregated="x") == "kms_mr_aggregated"
    assert rule(True, deviceId="x") == "kms_device"
    assert rule(False, osImageHash="x") == "os_image"
    assert rule(False, appId="x") == "app_registered"
    assert rule(False, composeHash="x") == "app_compose_hash"
    assert rule(False, deviceId="x") == "app_device"


_words = st.sampled_from(["", "0x", "aa", " 0xAA", "0XAA", "bb"])
_boot_infos = st.builds(
    ReceivedBootInfo,
    mr_aggregated=_words,
    os_image_hash=_words,
    app_id=_words,
    compose_hash=_words,
    instance_id=_words,
    device_id=_words,
)


@given(boot_info=_boot_infos, is_kms=st.booleans())
def test_an_empty_allowlist_denies_whatever_is_asked(boot_info: ReceivedBootInfo, is_kms: bool) -> None:
    assert not evaluate_allowlist(Allowlist(), boot_info, is_kms).is_allowed


# --- ids


RESPELL = [
    str.upper,
    str.lower,
    lambda text: text[2:],
    lambda text: "0X" + text[2:].upper(),
    lambda text: f" \t{text}\n",
]


@pytest.mark.parametrize("respell", RESPELL)
async def test_ids_are_compared_without_regard_to_case_prefix_and_outer_spaces(
    config: Path, respell: Callable[[str], str]
) -> None:
    respelt: dict[str, Any] = {key: respell(value) for key, value in BOOT_INFO.items()}
    for caller in ("app", "kms"):
        assert await decide(config, caller, **respelt) == ALLOWED
    write(
        config,
        {
            "osImages": [respell("0x0f")],
            "gatewayAppId": "0x9a",
            "kms": {"mrAggregated": [respell("0xabc123")], "devices": [respell("0xd0")]},
            "apps": {respell("0xa0"): {"composeHashes": [respell("0xc0")], "devices": [respell("0xd0")]}},
        },
    )
    for caller in ("app", "kms"):
        assert await decide(config, caller) == ALLOWED
        assert await decide(config, caller, **respelt) == ALLOWED


@pytest.mark.parametrize("app_id", ["0x00a0", "0x0xa0", "0x a0", "a0a0", ""])
async def test_ids_are_compared_as_text_otherwise(webhook: Client, app_id: str) -> None:
    assert await ask(webhook, "app", appId=app_id) == denied("app not registered")


async def test_gateway_app_id_is_answered_as_it_is_written(config: Path) -> None:
    write(config, allowlist_with(gatewayAppId=" 0xÄb\n"))
    assert (await decide(config, "app"))["gatewayAppId"] == " 0xÄb\n"


# --- the file's life


async def test_file_replaced_or_rewritten_between_two_requests_takes_effect(webhook: Client, config: Path) -> None:
    assert await ask(webhook, "app") == ALLOWED
    os.replace(write(config.with_name("new.json"), allowlist_with(apps={}, gatewayAppId="0x9b")), config)
    assert await ask(webhook, "app") == denied("app not registered", "0x9b")
    write(config, ALLOWLIST)
    assert await ask(webhook, "app") == ALLOWED


@pytest.mark.parametrize("caller", ["app", "kms"])
async def test_file_that_appears_vanishes_and_returns_takes_effect(tmp_path: Path, caller: str) -> None:
    path = tmp_path / "later.json"
    async with asking(file_app(path)) as client:
        assert await ask(client, caller) == DENIED_BY_NOTHING[caller]
        write(path, ALLOWLIST)
        assert await ask(client, caller) == ALLOWED
        path.unlink()
        assert await ask(client, caller) == DENIED_BY_NOTHING[caller]
        write(path, ALLOWLIST)
        assert await ask(client, caller) == ALLOWED


async def test_broken_file_denies_and_the_last_valid_one_is_not_remembered(webhook: Client, config: Path) -> None:
    assert await ask(webhook, "kms") == ALLOWED
    write_text(config, "{")
    for _ in range(2):
        assert await ask(webhook, "kms") == DENIED_BY_NOTHING["kms"]
    write(config, ALLOWLIST)
    assert await ask(webhook, "kms") == ALLOWED


def test_half_written_file_denies_at_every_length(config: Path) -> None:
    content = config.read_bytes()
    service = FileAuth(config)
    boot_info = parse_allowlist_boot_info(json.dumps(BOOT_INFO).encode())
    assert service.decide(boot_info, is_kms=False).is_allowed
    for length in range(len(content)):
        config.write_bytes(content[:length])
        decision = service.decide(boot_info, is_kms=False)
        assert (decision.is_allowed, decision.gateway_app_id) == (False, "")
        assert decision.config_error.startswith(f"failed to load config: {config}: Invalid JSON: ")


def test_unchanged_file_is_read_but_not_parsed_again(config: Path) -> None:
    service = FileAuth(config)
    first = service.allowlist()
    write(config, ALLOWLIST)
    assert service.allowlist() is first


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        ("", "Invalid JSON: "),
        ("auth", "Invalid JSON: "),
        ('{"osImages": [],}', "Invalid JSON: "),
        ("{} {}", "Invalid JSON: "),
        ("\ufeff{}", "Invalid JSON: "),
        ('{"unknown": NaN}', "Invalid JSON: NaN is not JSON"),
        ('{"gatewayAppId": "\\ud800"}', "Invalid JSON: "),
        ('{"apps": {}, "apps": {}}', "Invalid JSON: duplicate field `apps`"),
        ("[]", "Input should be an object"),
        ("null", "Input should be an object"),
        ('{"osImages": "0x00"}', "osImages: Input should be a valid array"),
        ('{"osImages": null}', "osImages: Input should be a valid array"),
        ('{"osImages": ["0x00", 1]}', "osImages.1: Input should be a valid string"),
        ('{"gatewayAppId": 1}', "gatewayAppId: Input should be a valid string"),
        ('{"gatewayAppId": null}', "gatewayAppId: Input should be a valid string"),
        ('{"kms": []}', "kms: Input should be an object"),
        ('{"kms": null}', "kms: Input should be an object"),
        ('{"kms": {"mrAggregated": {}}}', "kms.mrAggregated: Input should be a valid array"),
        ('{"kms": {"allowAnyDevice": "true"}}', "kms.allowAnyDevice: Input should be a valid boolean"),
        ('{"kms": {"allowAnyDevice": 1}}', "kms.allowAnyDevice: Input should be a valid boolean"),
        ('{"apps": []}', "apps: Input should be an object"),
        ('{"apps": {"0xa0": []}}', "apps.0xa0: Input should be an object"),
        ('{"apps": {"0xa0": {"devices": "0xd0"}}}', "apps.0xa0.devices: Input should be a valid array"),
        ('{"apps": {"0xA0": {}, "a0": {}}}', "apps: a0 is listed twice"),
    ],
)
async def test_broken_file_denies_everything_and_the_log_says_what_is_wrong(
    config: Path, content: str, detail: str, caplog: pytest.LogCaptureFixture
) -> None:
    for caller in ("app", "kms"):
        assert await decide(config, caller) == ALLOWED
    write_text(config, content)
    for caller in ("app", "kms"):
        assert await decide(config, caller) == DENIED_BY_NOTHING[caller]
    start = f"failed to load config: {config}: {detail}"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    for warning in warnings:
        assert warning.endswith("; denying all")
        assert warning.startswith(start) if detail.endswith(": ") else warning == f"{start}; denying all"


def test_bytes_that_are_not_utf_8_deny_everything(config: Path) -> None:
    service = FileAuth(config)
    boot_info = parse_allowlist_boot_info(json.dumps(BOOT_INFO).encode())
    assert service.decide(boot_info, is_kms=False).is_allowed
    config.write_bytes(config.read_bytes().replace(b"0x9a", b"\xff\xfe"))
    decision = service.decide(boot_info, is_kms=False)
    assert (decision.is_allowed, decision.reason) == (False, "app not registered")


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "loop"])
async def test_file_that_cannot_be_read_denies_everything(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "allowlist.json"
    make: dict[str, Callable[[], None]] = {
        "missing": lambda: None,
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(path),
    }
    make[kind]()
    detail = {
        "missing": f"config file not found: {path}",
        "directory": f"failed to load config: {path}: Is a directory",
        "fifo": f"failed to load config: {path}: Not a regular file",
        "loop": f"failed to load config: {path}: Too many levels of symbolic links",
    }[kind]
    for caller in ("app", "kms"):
        assert await decide(path, caller) == DENIED_BY_NOTHING[caller]
    assert caplog.record_tuples.count((LOGGER, logging.WARNING, f"{detail}; denying all")) == 2


async def test_unknown_members_are_ignored_at_every_level(config: Path) -> None:
    later = {"rootEpochs": [{"ca": 1}], "tcb": {"allowedStatuses": None}}
    app = {**ALLOWLIST["apps"]["0xa0"], **later}
    write(config, {**ALLOWLIST, **later, "kms": {**ALLOWLIST["kms"], **later}, "apps": {"0xa0": app}})
    for caller in ("app", "kms"):
        assert await decide(config, caller) == ALLOWED
        assert await decide(config, caller, deviceId="0xd1") == denied("device not allowed")


# --- answers


async def test_answers_are_upstream_s_bytes(webhook: Client) -> None:
    async with webhook.post("/bootAuth/kms", json=BOOT_INFO) as response:
        assert response.headers["Content-Type"] == "application/json"
        assert await response.text() == '{"isAllowed":true,"gatewayAppId":"0x9a","reason":"ok"}'
    async with webhook.get("/") as response:
        assert (response.status, response.headers["Content-Type"]) == (200, "application/json")
        assert await response.text() == (
            '{"status":"ok","kmsContractAddr":"","ethRpcUrl":"","gatewayAppId":"","chainId":0,"appImplementation":""}'
        )


async def test_info_is_the_same_without_a_usable_file(tmp_path: Path, webhook: Client) -> None:
    async with (
        asking(file_app(tmp_path / "none.json")) as client,
        client.get("/") as response,
        webhook.get("/") as other,
    ):
        assert await response.json() == await other.json()


async def test_health_answers_ok(webhook: Client) -> None:
    async with webhook.get("/health") as response:
        assert (response.status, await response.json()) == (200, {"status": "ok"})


async def test_openapi_describes_what_is_served(webhook: Client) -> None:
    async with webhook.get("/openapi.json") as response:
        text = await response.text()
    document = json.loads(text)
    schemas = document["components"]["schemas"]
    assert list(schemas["BootInfo"]["properties"]) == list(BOOT_INFO)
    referenced = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert referenced == set(schemas)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            async with webhook.request(method, path, json=BOOT_INFO if method == "post" else None) as response:
                answer = await response.json()
            content = operation["responses"]["200"]["content"]["application/json"]
            assert set(schemas[content["schema"]["$ref"].rpartition("/")[2]]["required"]) <= set(answer)


# --- requests


async def post(client: Client, body: bytes | str, **headers: str) -> tuple[int, str]:
    data = body.encode() if isinstance(body, str) else body
    async with client.post("/bootAuth/app", data=data, headers=headers, skip_auto_headers=["Content-Type"]) as response:
        return response.status, await response.text()


@pytest.mark.parametrize("key", BOOT_INFO)
async def test_absent_member_is_empty_and_matches_no_listed_id(webhook: Client, key: str) -> None:
    document = {name: value for name, value in BOOT_INFO.items() if name != key}
    rule = {"mrAggregated": "kms", "deviceId": "kms"}.get(key, "app")
    async with webhook.post(f"/bootAuth/{rule}", json=document) as response:
        assert (response.status, (await response.json())["isAllowed"]) == (200, False)
    assert await ask(webhook, rule) == ALLOWED


@pytest.mark.parametrize("value", [1, 1.5, True, None, [], ["0xa0"], {}])
@pytest.mark.parametrize("key", BOOT_INFO)
async def test_mistyped_member_is_422(webhook: Client, key: str, value: object) -> None:
    status, page = await post(webhook, json.dumps({**BOOT_INFO, key: value}))
    assert (status, "422 Unprocessable Entity" in page) == (422, True)


@pytest.mark.parametrize("body", ["null", "1", "true", '"x"', "[]", json.dumps([BOOT_INFO])])
async def test_body_that_is_not_an_object_is_422(webhook: Client, body: str) -> None:
    assert (await post(webhook, body))[0] == 422


async def test_repeated_member_is_422(webhook: Client) -> None:
    text = json.dumps(BOOT_INFO)
    assert (await post(webhook, text[:-1] + ',"appId":"0xa0"}'))[0] == 422
    assert (await post(webhook, text))[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"{'appId': 1}",
        b'{"appId": NaN}',
        b'{"appId": 01}',
        b'{"appId": "\n"}',
        b'{"appId": "\\ud800"}',
        b'{"appId": "x",}',
        b"{} {}",
        b"\xef\xbb\xbf{}",
        b'{"appId": "\xff"}',
        b"[" * 1_000,
        json.dumps(BOOT_INFO).encode()[:-1],
    ],
)
async def test_body_that_is_not_json_is_400(webhook: Client, body: bytes) -> None:
    status, page = await post(webhook, body)
    assert (status, "400 Bad Request" in page) == (400, True)


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_content_type_is_not_heeded(webhook: Client, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    status, answer = await post(webhook, json.dumps(BOOT_INFO), **headers)
    assert (status, json.loads(answer)) == (200, ALLOWED)


async def test_body_at_the_limit_passes_and_one_byte_more_is_413(webhook: Client) -> None:
    text = json.dumps(BOOT_INFO)
    assert (await post(webhook, text.ljust(MAX_ALLOWLIST_BODY_SIZE)))[0] == 200
    status, page = await post(webhook, text.ljust(MAX_ALLOWLIST_BODY_SIZE + 1))
    assert (status, "413 Payload Too Large" in page) == (413, True)
    assert (await post(webhook, text))[0] == 200


async def test_compressed_body_is_not_uncompressed(webhook: Client) -> None:
    data = gzip.compress(json.dumps(BOOT_INFO).encode())
    assert (await post(webhook, data, **{"Content-Encoding": "gzip"}))[0] == 400
    assert (await post(webhook, json.dumps(BOOT_INFO), **{"Content-Encoding": "gzip"}))[0] == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nope"),
        ("POST", "/"),
        ("GET", "/bootAuth/app"),
        ("PUT", "/bootAuth/kms"),
        ("POST", "/bootAuth/app/"),
        ("POST", "/bootauth/app"),
        ("POST", "/bootAuth/eth"),
        ("POST", "/health"),
        ("GET", "/nope%0Anope"),
    ],
)
async def test_unknown_path_or_method_is_404(webhook: Client, method: str, path: str) -> None:
    async with webhook.request(method, URL(path, encoded=True), json=BOOT_INFO) as response:
        assert (response.status, response.content_type) == (404, "text/html")


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [("/nope", "{}", 404), ("/bootAuth/app", "{", 400), ("/bootAuth/kms", "[]", 422)],
)
async def test_refusal_is_json_if_accept_asks_for_it(webhook: Client, path: str, body: str, code: int) -> None:
    async with webhook.post(path, data=body, headers={"Accept": "application/json"}) as response:
        answer = await response.json()
        assert (response.status, answer["error"]["code"]) == (code, code)


async def test_many_requests_share_a_connection_and_an_application(webhook: Client) -> None:
    answers = await asyncio.gather(*(ask(webhook, "app") for _ in range(50)))
    assert all(answer == ALLOWED for answer in answers)


@pytest.mark.parametrize("caller", ["app", "kms"])
async def test_members_of_other_releases_are_accepted(webhook: Client, caller: str) -> None:
    for members in (
        {"attestationMode": "dstack-tdx"},
        {"teeVariant": "dstack-tdx"},
        {"teeVariant": 1, "launchTicketHash": "ab" * 32},
        {"launchTicketHash": None, "somethingNew": {"nested": [1]}},
    ):
        assert await ask(webhook, caller, **members) == ALLOWED
        assert await ask(webhook, caller, **members, deviceId="0xd1") == denied("device not allowed")


async def test_requests_of_the_real_kms_are_decided_by_their_values(webhook: Client, config: Path) -> None:
    requests = [row for row in golden("webhook-requests.json")["requests"] if "/bootAuth/" in row["path"]]
    assert {row["path"] for row in requests} == {"/bootAuth/app", "/bootAuth/kms"}
    for row in requests:
        sent = json.loads(row["body"])
        app = {"composeHashes": ["0x" + sent["composeHash"]], "devices": [sent["deviceId"].upper()]}
        kms = {"mrAggregated": [sent["mrAggregated"]], "devices": ["0x" + sent["deviceId"]]}
        listed = {"osImages": [sent["osImageHash"]], "kms": kms, "apps": {"0x" + sent["appId"]: app}}
        for document, is_allowed in [(listed, True), ({**listed, "kms": {}, "apps": {}}, False)]:
            write(config, document)
            async with webhook.post(row["path"], data=row["body"]) as response:
                assert (await response.json())["isAllowed"] is is_allowed


# --- logs


async def test_decisions_are_logged_as_upstream_does(webhook: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    await ask(webhook, "app", appId=" 0xA0")
    await ask(webhook, "kms", mrAggregated="0x00")
    await post(webhook, "{bad")
    assert [record.getMessage() for record in caplog.records if record.name == LOGGER] == [
        "bootAuth/app app=a0 compose=c0 -> allowed=true (ok)",
        "bootAuth/kms mr=00 -> allowed=false (kms mrAggregated not allowed)",
        "denied by rule kms_mr_aggregated: mrAggregated is 0x00; the file admits abc123",
    ]


def test_a_refusal_says_what_it_compared_with_which_place_of_the_file() -> None:
    allowlist = Allowlist.model_validate({"apps": {"0xAA": {"composeHashes": ["0xBB"]}}})
    boot_info = parse_allowlist_boot_info(b'{"appId": "aa", "composeHash": "0xCC"}')
    refusal = evaluate_allowlist(allowlist, boot_info, is_kms=False).refusal
    assert refusal == Refusal(
        "app_compose_hash",
        "compose hash not allowed",
        "composeHash",
        ("0xCC",),
        frozenset({"bb"}),
        ("apps", "aa", "composeHashes"),
    )
