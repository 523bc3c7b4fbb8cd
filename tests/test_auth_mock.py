"""auth-mock: every policy over real sockets, and what its environment may say."""

import json
import logging
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from dstack_emu.auth.errors import AuthConfigError, AuthError
from dstack_emu.auth.mock import MockSettings
from dstack_emu.auth.server import mock_app
from tests.recorded import golden

GATEWAY = "0xmockgateway1234567890123456789012345678"
BOOT_INFO: dict[str, Any] = {
    "mrAggregated": "0xAA01",
    "osImageHash": "bb",
    "appId": "0xcc",
    "composeHash": "dd",
    "instanceId": "0xee",
    "deviceId": "FF01",
}


async def decide(env: dict[str, str], path: str, **changed: str) -> dict[str, Any]:
    async with (
        TestClient(TestServer(mock_app(MockSettings.from_env(env)))) as client,
        client.post(f"/bootAuth/{path}", json={**BOOT_INFO, **changed}) as response,
    ):
        assert response.status == 200
        answer: dict[str, Any] = await response.json()
        return answer


def allowed(reason: str) -> dict[str, Any]:
    return {"isAllowed": True, "reason": reason, "gatewayAppId": GATEWAY}


def denied(reason: str) -> dict[str, Any]:
    return {"isAllowed": False, "reason": reason, "gatewayAppId": ""}


async def test_info_by_default_is_the_documented_bytes() -> None:
    async with (
        TestClient(TestServer(mock_app(MockSettings.from_env({})))) as client,
        client.get("/") as response,
    ):
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/json"
        assert await response.text() == (
            '{"status":"ok","kmsContractAddr":"0xmockcontract1234567890123456789012345678","ethRpcUrl":"",'
            '"gatewayAppId":"0xmockgateway1234567890123456789012345678","chainId":1337,'
            '"appAuthImplementation":"0xmockapp9876543210987654321098765432109",'
            '"appImplementation":"0xmockapp9876543210987654321098765432109",'
            '"note":"this is a mock backend - all authentications will succeed"}'
        )


async def test_info_and_decision_follow_the_environment() -> None:
    env = {
        "KMS_CONTRACT_ADDR": "0x01",
        "ETH_RPC_URL": "http://chain",
        "MOCK_GATEWAY_APP_ID": "0x02",
        "MOCK_CHAIN_ID": "31337",
        "MOCK_APP_IMPLEMENTATION": "0x03",
    }
    async with TestClient(TestServer(mock_app(MockSettings.from_env(env)))) as client:
        async with client.get("/") as response:
            assert await response.json() == {
                "status": "ok",
                "kmsContractAddr": "0x01",
                "ethRpcUrl": "http://chain",
                "gatewayAppId": "0x02",
                "chainId": 31337,
                "appAuthImplementation": "0x03",
                "appImplementation": "0x03",
                "note": "this is a mock backend - all authentications will succeed",
            }
        async with client.post("/bootAuth/app", json=BOOT_INFO) as response:
            assert (await response.json())["gatewayAppId"] == "0x02"


@pytest.mark.parametrize(
    ("policy", "app", "kms"),
    [
        (None, allowed("mock app always allowed"), allowed("mock KMS always allowed")),
        ("", allowed("mock app always allowed"), allowed("mock KMS always allowed")),
        ("allow-all", allowed("mock app always allowed"), allowed("mock KMS always allowed")),
        ("deny-all", denied("mock policy: deny-all"), denied("mock policy: deny-all")),
        ("deny-kms", allowed("mock app allowed (deny-kms policy)"), denied("mock policy: deny-kms")),
        ("deny-app", denied("mock policy: deny-app"), allowed("mock KMS allowed (deny-app policy)")),
    ],
)
async def test_policy_decides_for_app_and_kms(policy: str | None, app: dict[str, Any], kms: dict[str, Any]) -> None:
    env = {} if policy is None else {"MOCK_POLICY": policy}
    assert await decide(env, "app") == app
    assert await decide(env, "kms") == kms


LISTS = [
    ("allowlist-device", "MOCK_ALLOWED_DEVICE_IDS", "deviceId", "device"),
    ("allowlist-mr", "MOCK_ALLOWED_MR_AGGREGATED", "mrAggregated", "mrAggregated"),
]


@pytest.mark.parametrize("path", ["app", "kms"])
@pytest.mark.parametrize(("policy", "variable", "field", "name"), LISTS)
async def test_allowlist_policy_decides_by_its_list(
    policy: str, variable: str, field: str, name: str, path: str
) -> None:
    env = {"MOCK_POLICY": policy, variable: " ab01, ,CD02 ,"}
    for value in ["ab01", "0xab01", "AB01", "0XAb01", "cd02"]:
        assert await decide(env, path, **{field: value}) == allowed(f"mock policy: {name} {value} allowed")
    for value in ["ab", "0xab0100", "", "0x", "0x0xab01"]:
        reason = f"mock policy: {name} {value} not in allowlist"
        assert await decide(env, path, **{field: value}) == denied(reason)


@pytest.mark.parametrize("path", ["app", "kms"])
@pytest.mark.parametrize("text", [None, "", " , ,"])
@pytest.mark.parametrize(("policy", "variable", "field", "name"), LISTS)
async def test_allowlist_policy_with_empty_list_denies(
    policy: str, variable: str, field: str, name: str, text: str | None, path: str
) -> None:
    env = {"MOCK_POLICY": policy} | ({} if text is None else {variable: text})
    assert await decide(env, path, **{field: ""}) == denied(f"mock policy: {policy} with empty list")


async def test_allowlist_policy_looks_at_no_other_list() -> None:
    env = {"MOCK_POLICY": "allowlist-device", "MOCK_ALLOWED_MR_AGGREGATED": "aa01"}
    assert await decide(env, "kms") == denied("mock policy: allowlist-device with empty list")


async def test_allowlist_entry_with_0x_matches_nothing_and_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    env = {"MOCK_POLICY": "allowlist-device", "MOCK_ALLOWED_DEVICE_IDS": "0xFF01"}
    assert await decide(env, "app", deviceId="0xff01") == denied("mock policy: device 0xff01 not in allowlist")
    warning = "allowlist entry 0xff01 matches nothing: entries are compared without 0x"
    assert ("dstack_emu.auth.mock", logging.WARNING, warning) in caplog.record_tuples


async def test_requests_are_logged_as_upstream_does(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dstack_emu.auth.mock")
    await decide({}, "app")
    await decide({}, "kms", instanceId="a\nb")
    await decide({"MOCK_POLICY": "deny-kms"}, "app")  # upstream notes success here, too
    assert [record.message for record in caplog.records if record.name == "dstack_emu.auth.mock"] == [
        'mock app boot auth request: {"appId":"0xcc","instanceId":"0xee","note":"always returning success"}',
        'mock KMS boot auth request: {"appId":"0xcc","instanceId":"a\\nb","note":"always returning success"}',
        'mock app boot auth request: {"appId":"0xcc","instanceId":"0xee"}',
    ]


async def test_every_request_of_the_real_kms_is_understood() -> None:
    requests = [row for row in golden("webhook-requests.json")["requests"] if "/bootAuth/" in row["path"]]
    assert requests
    async with TestClient(TestServer(mock_app(MockSettings()))) as client:
        for row in requests:
            headers = {"content-type": dict(row["headers"])["content-type"]}
            async with client.post(row["path"], data=row["body"], headers=headers) as response:
                caller = "KMS" if row["path"].endswith("kms") else "app"
                assert await response.json() == allowed(f"mock {caller} always allowed")


@pytest.mark.parametrize("policy", ["allow", "Allow-All", "deny-all ", "allowlist", "none"])
def test_unknown_policy_refuses_to_start(policy: str) -> None:
    expected = f'unknown MOCK_POLICY "{policy}"'
    with pytest.raises(AuthConfigError) as caught:
        MockSettings.from_env({"MOCK_POLICY": policy})
    assert str(caught.value) == expected
    with pytest.raises(AuthConfigError) as caught:
        MockSettings(policy=policy)  # type: ignore[arg-type]
    assert str(caught.value) == expected


def test_production_is_refused_whatever_the_policy() -> None:
    assert issubclass(AuthConfigError, AuthError)
    for env in [{}, {"MOCK_POLICY": "deny-all"}, {"MOCK_POLICY": "bogus"}]:
        with pytest.raises(AuthConfigError, match=r"^auth-mock must not run with NODE_ENV=production$"):
            MockSettings.from_env({**env, "NODE_ENV": "production"})
    assert MockSettings.from_env({"NODE_ENV": "development"}) == MockSettings()


@pytest.mark.parametrize("text", ["x", "0x539", "-1", "1.5", " 1", "\u0661", str(2**64), "9" * 5000])
def test_chain_id_that_is_no_number_refuses_to_start(text: str) -> None:
    with pytest.raises(AuthConfigError) as caught:
        MockSettings.from_env({"MOCK_CHAIN_ID": text})
    assert str(caught.value) == f'MOCK_CHAIN_ID is "{text}", expected a decimal number below 2^64'


def test_empty_variables_mean_the_defaults() -> None:
    names = ["NODE_ENV", "MOCK_POLICY", "MOCK_ALLOWED_DEVICE_IDS", "MOCK_ALLOWED_MR_AGGREGATED"]
    names += [
        "KMS_CONTRACT_ADDR",
        "ETH_RPC_URL",
        "MOCK_GATEWAY_APP_ID",
        "MOCK_CHAIN_ID",
        "MOCK_APP_IMPLEMENTATION",
    ]
    assert MockSettings.from_env(dict.fromkeys(names, "")) == MockSettings()


async def test_largest_chain_id_is_answered_exactly() -> None:
    settings = MockSettings.from_env({"MOCK_CHAIN_ID": str(2**64 - 1)})
    async with TestClient(TestServer(mock_app(settings))) as client, client.get("/") as response:
        assert json.loads(await response.text())["chainId"] == 2**64 - 1
