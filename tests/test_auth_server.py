"""The webhooks' HTTP front, asked over real sockets by aiohttp's client, by curl and by hand."""

import asyncio
import gzip
import json
import logging
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from yarl import URL

from dstack_emu.auth.mock import MockSettings
from dstack_emu.auth.policy import CONTRACTS, Contract
from dstack_emu.auth.server import MAX_BODY_SIZE, mock_app, simple_app

Client = TestClient[web.Request, web.Application]

BOOT_INFO: dict[str, Any] = {
    "mrAggregated": "0xaa",
    "osImageHash": "0xbb",
    "appId": "0xcc",
    "composeHash": "0xdd",
    "instanceId": "0xee",
    "deviceId": "0xff",
}
# Schema order, which is the order of the issues.
FIELDS = ["mrAggregated", "osImageHash", "appId", "composeHash", "instanceId", "deviceId"]
FIELDS += ["tcbStatus", "advisoryIds", "mrSystem"]
REQUIRED = FIELDS[:6]
GATEWAY = "0xmockgateway1234567890123456789012345678"
ALLOWED = f'{{"isAllowed":true,"reason":"mock app always allowed","gatewayAppId":"{GATEWAY}"}}'


def issue(expected: str, received: str, path: list[str | int]) -> dict[str, Any]:
    message = "Required" if received == "undefined" else f"Expected {expected}, received {received}"
    return {
        "code": "invalid_type",
        "expected": expected,
        "received": received,
        "path": path,
        "message": message,
    }


def refusal(*issues: dict[str, Any]) -> str:
    error = {"issues": list(issues), "name": "ZodError"}
    return json.dumps({"success": False, "error": error}, separators=(",", ":"))


ALL_REQUIRED = refusal(*(issue("string", "undefined", [key]) for key in REQUIRED))


@pytest.fixture
async def mock() -> AsyncIterator[Client]:
    async with TestClient(TestServer(mock_app(MockSettings()))) as client:
        yield client


@pytest.fixture(params=["mock", "simple"])
async def webhook(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Client]:
    app = mock_app(MockSettings()) if request.param == "mock" else simple_app(tmp_path / "none.json")
    async with TestClient(TestServer(app)) as client:
        yield client


async def ask(client: Client, body: bytes | str, content_type: str | None = "application/json") -> tuple[int, str]:
    headers = {} if content_type is None else {"Content-Type": content_type}
    skip = ["Content-Type"] if content_type is None else []
    data = body.encode() if isinstance(body, str) else body
    async with client.post("/bootAuth/app", data=data, headers=headers, skip_auto_headers=skip) as response:
        return response.status, await response.text()


async def ask_json(client: Client, document: object) -> tuple[int, str]:
    return await ask(client, json.dumps(document))


# --- answers


async def test_boot_auth_answer_is_compact_json_in_documented_key_order(mock: Client) -> None:
    async with mock.post("/bootAuth/app", json=BOOT_INFO) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/json"
        assert int(response.headers["Content-Length"]) == len(ALLOWED)
        assert await response.text() == ALLOWED


async def test_answer_to_curl_is_the_same_bytes(mock: Client) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    arguments = ["-sS", "-i", "--json", json.dumps(BOOT_INFO), str(mock.make_url("/bootAuth/app"))]
    process = await asyncio.create_subprocess_exec(curl, *arguments, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    head, _, body = output.decode().partition("\r\n\r\n")
    assert process.returncode == 0
    assert head.startswith("HTTP/1.1 200 OK\r\n")
    assert "\r\nContent-Type: application/json\r\n" in head
    assert body == ALLOWED


async def test_health_answers_ok(webhook: Client) -> None:
    async with webhook.get("/health") as response:
        assert (response.status, await response.text()) == (200, '{"status":"ok"}')


async def test_head_of_root_answers_without_body(webhook: Client) -> None:
    async with webhook.head("/") as response:
        assert (response.status, await response.read()) == (200, b"")


async def test_reason_echoes_what_json_can_carry_as_javascript_writes_it() -> None:
    settings = MockSettings(policy="allowlist-device", allowed_device_ids=frozenset({"other"}))
    async with TestClient(TestServer(mock_app(settings))) as client:
        device_id = r'"é\u2028\ud800\u0001\u007f\n\"\\/"'
        body = json.dumps(BOOT_INFO).replace('"0xff"', device_id)
        async with client.post("/bootAuth/kms", data=body, headers={"Content-Type": "application/json"}) as response:
            raw = await response.read()
    reason = 'mock policy: device é\u2028\\ud800\\u0001\x7f\\n\\"\\\\/ not in allowlist'
    assert raw == f'{{"isAllowed":false,"reason":"{reason}","gatewayAppId":""}}'.encode()


# --- 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nope"),
        ("POST", "/"),
        ("PUT", "/"),
        ("OPTIONS", "/"),
        ("GET", "/bootAuth/app"),
        ("HEAD", "/bootAuth/app"),
        ("GET", "/bootAuth/kms"),
        ("PUT", "/bootAuth/kms"),
        ("POST", "/bootAuth/app/"),
        ("POST", "/bootAuth/kms/"),
        ("POST", "/bootAuth"),
        ("POST", "/bootauth/app"),
        ("POST", "/bootAuth/eth"),
        ("GET", "/health/"),
        ("POST", "/health"),
        ("GET", "/nope%0Anope"),
        ("PROPFIND", "/"),
    ],
)
async def test_unknown_path_or_method_is_404_text(webhook: Client, method: str, path: str) -> None:
    async with webhook.request(method, URL(path, encoded=True), json=BOOT_INFO) as response:
        assert response.status == 404
        assert response.headers["Content-Type"] == "text/plain; charset=UTF-8"
        assert await response.text() == ("" if method == "HEAD" else "404 Not Found")


@pytest.mark.parametrize("target", ["//bootAuth/kms", "//", "/.", "/bootAuth/../bootAuth/kms"])
async def test_odd_request_target_is_404_text(webhook: Client, target: str) -> None:
    reader, writer = await asyncio.open_connection(webhook.host, webhook.port)
    writer.write(f"OPTIONS {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert answer.endswith(b"\r\n\r\n404 Not Found")


async def test_query_string_is_ignored(mock: Client) -> None:
    async with mock.post("/bootAuth/app?json=1", json=BOOT_INFO) as response:
        assert await response.text() == ALLOWED


# --- 400, zod's shape


async def test_missing_field_is_answered_with_the_documented_bytes(webhook: Client) -> None:
    document = {key: value for key, value in BOOT_INFO.items() if key != "appId"}
    async with webhook.post("/bootAuth/kms", json=document) as response:
        assert response.status == 400
        assert response.headers["Content-Type"] == "application/json"
        assert await response.text() == (
            '{"success":false,"error":{"issues":[{"code":"invalid_type","expected":"string",'
            '"received":"undefined","path":["appId"],"message":"Required"}],"name":"ZodError"}}'
        )


@pytest.mark.parametrize("key", REQUIRED)
async def test_each_required_field_missing_is_named(webhook: Client, key: str) -> None:
    document = {name: value for name, value in BOOT_INFO.items() if name != key}
    assert await ask_json(webhook, document) == (400, refusal(issue("string", "undefined", [key])))


@pytest.mark.parametrize(
    ("value", "received"),
    [
        (1, "number"),
        (-1.5, "number"),
        (True, "boolean"),
        (False, "boolean"),
        (None, "null"),
        ([], "array"),
        (["x"], "array"),
        ({}, "object"),
    ],
)
@pytest.mark.parametrize("key", [key for key in FIELDS if key != "advisoryIds"])
async def test_mistyped_text_field_is_named_with_its_type(
    webhook: Client, key: str, value: object, received: str
) -> None:
    assert await ask_json(webhook, {**BOOT_INFO, key: value}) == (
        400,
        refusal(issue("string", received, [key])),
    )


@pytest.mark.parametrize(
    ("value", "received"),
    [("INTEL-SA-1", "string"), (1, "number"), (True, "boolean"), (None, "null"), ({"0": "x"}, "object")],
)
async def test_advisory_ids_that_are_no_array_are_refused(webhook: Client, value: object, received: str) -> None:
    expected = (400, refusal(issue("array", received, ["advisoryIds"])))
    assert await ask_json(webhook, {**BOOT_INFO, "advisoryIds": value}) == expected


async def test_each_advisory_id_that_is_no_string_is_named_by_its_index(webhook: Client) -> None:
    document = {**BOOT_INFO, "advisoryIds": ["INTEL-SA-1", 7, "INTEL-SA-2", None, ["x"]]}
    expected = refusal(
        issue("string", "number", ["advisoryIds", 1]),
        issue("string", "null", ["advisoryIds", 3]),
        issue("string", "array", ["advisoryIds", 4]),
    )
    assert await ask_json(webhook, document) == (400, expected)


async def test_issues_come_in_schema_order_whatever_the_order_of_the_body(webhook: Client) -> None:
    document = {key: [1] if key == "advisoryIds" else 1 for key in reversed(FIELDS)}
    expected = [issue("string", "number", ["advisoryIds", 0] if key == "advisoryIds" else [key]) for key in FIELDS]
    assert await ask_json(webhook, document) == (400, refusal(*expected))


async def test_empty_object_lacks_all_six_required_fields(webhook: Client) -> None:
    assert await ask_json(webhook, {}) == (400, ALL_REQUIRED)


@pytest.mark.parametrize(
    ("body", "received"),
    [
        ("[]", "array"),
        ("[{}]", "array"),
        ("null", "null"),
        ("1", "number"),
        ("1e999", "number"),
        ("-0", "number"),
        ("1" * 5000, "number"),
        ("true", "boolean"),
        ('"x"', "string"),
    ],
)
async def test_body_that_is_no_object_is_refused_at_the_empty_path(webhook: Client, body: str, received: str) -> None:
    assert await ask(webhook, body) == (400, refusal(issue("object", received, [])))


async def test_optional_extra_and_empty_fields_pass(mock: Client) -> None:
    optional = {"tcbStatus": "", "advisoryIds": [], "mrSystem": ""}
    extra: dict[str, Any] = {
        "attestationMode": 1,
        "teeVariant": None,
        "keyProviderInfo": [],
        "": {"nested": [1]},
    }
    assert await ask_json(mock, {**BOOT_INFO, **optional, **extra}) == (200, ALLOWED)
    assert await ask_json(mock, dict.fromkeys(REQUIRED, "")) == (200, ALLOWED)


async def test_of_a_repeated_key_the_last_counts(mock: Client) -> None:
    text = json.dumps(BOOT_INFO)
    assert await ask(mock, text[:-1] + ',"appId":1}') == (400, refusal(issue("string", "number", ["appId"])))
    assert await ask(mock, '{"appId":1,' + text[1:]) == (200, ALLOWED)


@pytest.mark.parametrize("ticket", ["ab" * 32, "", None, 7, {"nested": []}])
async def test_launch_ticket_hash_of_a_later_kms_is_accepted(mock: Client, tmp_path: Path, ticket: object) -> None:
    asked = {**BOOT_INFO, "teeVariant": "dstack-tdx", "tcbStatus": "UpToDate", "launchTicketHash": ticket}
    assert await ask_json(mock, asked) == (200, ALLOWED)
    section = {"composeHashes": ["0xdd"], "devices": ["0xff"]}
    config = tmp_path / "c.json"
    config.write_text(json.dumps({"osImages": ["0xbb"], "apps": {"0xcc": section}}))
    for contract in CONTRACTS:
        async with TestClient(TestServer(simple_app(config, contract=contract))) as client:
            assert await ask_json(client, asked) == (200, '{"isAllowed":true,"reason":"","gatewayAppId":""}')


@pytest.mark.parametrize(("contract", "is_field"), [("readme", 0), ("upstream", 0), ("next", 1), ("0.6", 1)])
async def test_tee_variant_is_an_optional_field_since_next(tmp_path: Path, contract: Contract, is_field: int) -> None:
    document = {**BOOT_INFO, "teeVariant": 1, "appId": 1}
    app_id, tee_variant = issue("string", "number", ["appId"]), issue("string", "number", ["teeVariant"])
    async with TestClient(TestServer(simple_app(tmp_path / "c.json", contract=contract))) as client:
        issues = [tee_variant, app_id] if is_field else [app_id]
        assert await ask_json(client, document) == (400, refusal(*issues))
        assert (await ask_json(client, {**BOOT_INFO, "teeVariant": "dstack-tdx"}))[0] == 200
        assert (await ask_json(client, BOOT_INFO))[0] == 200


# --- 400, malformed JSON


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"{bad}",
        b"{'appId': 1}",
        b'{"appId": NaN}',
        b'{"appId": Infinity}',
        b'{"appId": -Infinity}',
        b'{"appId": 01}',
        b'{"appId": "\n"}',
        b'{"appId": "x",}',
        b"{} {}",
        b"\xef\xbb\xbf",
        b"\x00",
        b"\xff\xfe{\x00}\x00",
        b"[" * 1_000,
        json.dumps(BOOT_INFO).encode()[:-1],
    ],
)
async def test_malformed_json_is_400_text(webhook: Client, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    async with webhook.post("/bootAuth/kms", data=body, headers=headers) as response:
        assert response.status == 400
        assert response.headers["Content-Type"] == "text/plain; charset=UTF-8"
        assert await response.text() == "Malformed JSON in request body"


async def test_byte_order_mark_and_undecodable_bytes_pass_as_in_javascript(mock: Client) -> None:
    text = json.dumps(BOOT_INFO).encode()
    assert await ask(mock, b"\xef\xbb\xbf" + text) == (200, ALLOWED)
    assert await ask(mock, text.replace(b"0xee", b"\xff\xee")) == (200, ALLOWED)


# --- content type


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        "application/json;charset=UTF-8;profile=x",
        "application/JSON",
        "application/problem+json",
        "application/vnd.api+json; charset=utf-8",
    ],
)
async def test_json_content_type_counts(mock: Client, content_type: str) -> None:
    assert await ask(mock, json.dumps(BOOT_INFO), content_type) == (200, ALLOWED)


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "text/json",
        "application/jsonp",
        "application/x-www-form-urlencoded",
        "application/octet-stream",
        "application/v2+json",
        "application/json;",
        "application/json ; charset=utf-8",
        "application/json, application/json",
        "xapplication/json",
    ],
)
async def test_body_of_another_content_type_is_ignored(webhook: Client, content_type: str | None) -> None:
    assert await ask(webhook, json.dumps(BOOT_INFO), content_type) == (400, ALL_REQUIRED)
    assert await ask(webhook, "{bad", content_type) == (400, ALL_REQUIRED)


# --- transfer


async def test_body_at_the_limit_passes_and_one_byte_more_is_413(mock: Client) -> None:
    text = json.dumps(BOOT_INFO)
    assert await ask(mock, text.ljust(MAX_BODY_SIZE)) == (200, ALLOWED)
    expected = (413, f"Request body is larger than {MAX_BODY_SIZE} bytes")
    assert await ask(mock, text.ljust(MAX_BODY_SIZE + 1)) == expected
    assert await ask(mock, text) == (200, ALLOWED)


async def test_chunked_body_passes(mock: Client) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for byte in json.dumps(BOOT_INFO).encode():
            yield bytes([byte])

    async with mock.post("/bootAuth/app", data=chunks(), headers={"Content-Type": "application/json"}) as response:
        assert await response.text() == ALLOWED


async def test_body_that_is_not_in_its_content_encoding_is_malformed(mock: Client) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    async with mock.post("/bootAuth/app", data=b"not gzip", headers=headers) as response:
        assert (response.status, await response.text()) == (400, "Malformed JSON in request body")


async def test_compressed_body_counts_against_the_limit_at_its_full_size(mock: Client) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    data = gzip.compress(json.dumps(BOOT_INFO).ljust(MAX_BODY_SIZE + 1).encode())
    assert len(data) < 10_000
    async with mock.post("/bootAuth/app", data=data, headers=headers) as response:
        assert response.status == 413


async def test_many_requests_share_a_connection_and_an_application(mock: Client) -> None:
    answers = await asyncio.gather(*(ask_json(mock, BOOT_INFO) for _ in range(100)))
    assert set(answers) == {(200, ALLOWED)}


# --- openapi


async def test_openapi_describes_what_is_served(webhook: Client) -> None:
    async with webhook.get("/openapi.json") as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/json"
        document = await response.json()
    assert document["openapi"].startswith("3.0.")
    served = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert served == {
        ("/", "get"),
        ("/bootAuth/app", "post"),
        ("/bootAuth/kms", "post"),
        ("/health", "get"),
    }
    schemas = document["components"]["schemas"]
    assert schemas["BootInfo"]["required"] == REQUIRED
    assert list(schemas["BootInfo"]["properties"]) == FIELDS
    for path, method in served:
        async with webhook.request(method, path, json=BOOT_INFO if method == "post" else None) as response:
            answer = await response.json()
        content = document["paths"][path][method]["responses"]["200"]["content"]
        schema = schemas[content["application/json"]["schema"]["$ref"].rpartition("/")[2]]
        assert response.status == 200
        assert set(schema["required"]) <= set(answer)


async def test_references_in_openapi_resolve(mock: Client) -> None:
    async with mock.get("/openapi.json") as response:
        text = await response.text()
    referenced = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert referenced == set(json.loads(text)["components"]["schemas"])


# --- logs


async def test_refused_request_is_not_logged_as_a_request(mock: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dstack_emu.auth.mock")
    await ask(mock, "{bad")
    await ask_json(mock, {})
    assert [record for record in caplog.records if record.name.startswith("dstack_emu.auth.")] == []
