"""auth-simple: its rules, its contracts, its settings, over real sockets."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given
from hypothesis import strategies as st

from dstack_emu.attest.release import DEFAULT
from dstack_emu.auth.boot_info import ReceivedBootInfo, parse_boot_info
from dstack_emu.auth.errors import AuthConfigError
from dstack_emu.auth.policy import CONTRACTS, Contract, Policy, evaluate
from dstack_emu.auth.server import simple_app
from dstack_emu.auth.simple import SimpleSettings
from dstack_emu.observability.decisions import decision_recorder
from dstack_emu.observability.spans import CallSpan, entered
from tests.auth_simple import (
    ALLOWED,
    BOOT_INFO,
    CONFIG,
    OS_IMAGE,
    ZERO,
    app_with,
    config_with,
    decide,
    denied,
    kms_with,
    write,
    write_text,
)
from tests.recorded import golden


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write(tmp_path / "auth-config.json", CONFIG)


# --- every rule


@pytest.mark.parametrize("contract", CONTRACTS)
@pytest.mark.parametrize("caller", ["app", "kms"])
async def test_listed_boot_is_allowed(config: Path, caller: str, contract: Contract) -> None:
    assert await decide(config, caller, contract) == ALLOWED


async def test_answers_are_the_documented_bytes(config: Path) -> None:
    async with TestClient(TestServer(simple_app(config))) as client:
        async with client.post("/bootAuth/kms", json=BOOT_INFO) as response:
            assert response.headers["Content-Type"] == "application/json"
            assert await response.text() == '{"isAllowed":true,"reason":"","gatewayAppId":"0x9a"}'
        async with client.get("/") as response:
            assert await response.text() == (
                f'{{"status":"ok","kmsContractAddr":"{ZERO}","gatewayAppId":"0x9a","chainId":0,'
                f'"appAuthImplementation":"{ZERO}","appImplementation":"{ZERO}","configPath":"{config}"}}'
            )


@pytest.mark.parametrize(
    ("caller", "changed", "reason"),
    [
        ("app", {"tcbStatus": "OutOfDate"}, "TCB status is not up to date"),
        ("app", {"tcbStatus": ""}, "TCB status is not up to date"),
        ("app", {"tcbStatus": "uptodate"}, "TCB status is not up to date"),
        ("kms", {"tcbStatus": "SWHardeningNeeded"}, "TCB status is not up to date"),
        ("app", {"osImageHash": "0x00"}, "OS image is not allowed"),
        ("kms", {"osImageHash": ""}, "OS image is not allowed"),
        ("kms", {"mrAggregated": "0xabc124"}, "aggregated MR not allowed"),
        ("kms", {"deviceId": "0xd1"}, "KMS is not allowed to boot on this device"),
        ("app", {"appId": "0xa1"}, "app not registered"),
        ("app", {"composeHash": "0xc1"}, "compose hash not allowed"),
        ("app", {"deviceId": "0xd1"}, "app is not allowed to boot on this device"),
    ],
)
async def test_one_value_changed_is_denied_with_its_reason(
    config: Path, caller: str, changed: dict[str, Any], reason: str
) -> None:
    assert await decide(config, caller, **changed) == denied(reason)
    assert await decide(config, caller) == ALLOWED


@pytest.mark.parametrize(
    ("contract", "reason"), [("readme", "TCB status is not up to date"), ("0.6", "TCB status is not allowed")]
)
async def test_absent_tcb_status_is_not_up_to_date(config: Path, contract: Contract, reason: str) -> None:
    required = {key: BOOT_INFO[key] for key in list(BOOT_INFO)[:6]}
    async with (
        TestClient(TestServer(simple_app(config, contract=contract))) as client,
        client.post("/bootAuth/app", json=required) as response,
    ):
        assert await response.json() == denied(reason)


async def test_an_app_is_not_asked_for_kms_values_nor_a_kms_for_app_values(config: Path) -> None:
    assert await decide(config, "app", mrAggregated="0x00") == ALLOWED
    assert await decide(config, "kms", appId="0x00", composeHash="0x00") == ALLOWED


async def test_rules_are_checked_in_order(config: Path) -> None:
    """All is wrong at first; each denial names the next rule, whose value is then put right."""
    hex_keys = ["osImageHash", "mrAggregated", "appId", "composeHash", "deviceId"]
    wrong: dict[str, Any] = dict.fromkeys(hex_keys, "0x00")
    common = [("tcbStatus", "TCB status is not up to date"), ("osImageHash", "OS image is not allowed")]
    kms = [
        ("mrAggregated", "aggregated MR not allowed"),
        ("deviceId", "KMS is not allowed to boot on this device"),
    ]
    app = [
        ("appId", "app not registered"),
        ("composeHash", "compose hash not allowed"),
        ("deviceId", "app is not allowed to boot on this device"),
    ]
    for caller, rules in [("kms", common + kms), ("app", common + app)]:
        changed = {**wrong, "tcbStatus": "Revoked"}
        for key, reason in rules:
            assert await decide(config, caller, **changed) == denied(reason)
            del changed[key]
        assert await decide(config, caller, **changed) == ALLOWED


@pytest.mark.parametrize(
    ("document", "caller", "reason"),
    [
        ({}, "app", "OS image is not allowed"),
        ({}, "kms", "OS image is not allowed"),
        (config_with(osImages=[]), "app", "OS image is not allowed"),
        (config_with(kms={}), "kms", "aggregated MR not allowed"),
        (kms_with(mrAggregated=[], allowAnyDevice=True), "kms", "aggregated MR not allowed"),
        (config_with(apps={}), "app", "app not registered"),
        (config_with(apps={"0xa0": {}}), "app", "compose hash not allowed"),
        (app_with(composeHashes=[], allowAnyDevice=True), "app", "compose hash not allowed"),
    ],
)
async def test_what_the_config_leaves_out_is_denied_under_every_contract(
    config: Path, document: dict[str, Any], caller: str, reason: str
) -> None:
    write(config, document)
    for contract in CONTRACTS:
        assert await decide(config, caller, contract) == denied(reason, document.get("gatewayAppId", ""))


async def test_any_device_is_admitted_where_the_config_says_so(config: Path) -> None:
    for devices in [[], ["0xd0"]]:
        write(config, kms_with(devices=devices, allowAnyDevice=True))
        assert await decide(config, "kms", deviceId="0xd1") == ALLOWED
        write(config, app_with(devices=devices, allowAnyDevice=True))
        assert await decide(config, "app", deviceId="0xd1") == ALLOWED


# --- hex


@pytest.mark.parametrize("respell", [str.upper, str.lower, lambda text: text[2:], lambda text: "0X" + text[2:].upper()])
async def test_hex_is_compared_without_regard_to_case_and_prefix(config: Path, respell: Callable[[str], str]) -> None:
    hex_keys = ["mrAggregated", "osImageHash", "appId", "composeHash", "deviceId"]
    respelt: dict[str, Any] = {key: respell(BOOT_INFO[key]) for key in hex_keys}
    for caller in ["app", "kms"]:
        assert await decide(config, caller, **respelt) == ALLOWED
    spelt_config = {
        "osImages": [respell(OS_IMAGE)],
        "gatewayAppId": "0x9a",
        "kms": {"mrAggregated": [respell("0xabc123")], "devices": [respell("0xd0")]},
        "apps": {respell("0xa0"): {"composeHashes": [respell("0xc0")], "devices": [respell("0xd0")]}},
    }
    write(config, spelt_config)
    for caller in ["app", "kms"]:
        assert await decide(config, caller) == ALLOWED
        assert await decide(config, caller, **respelt) == ALLOWED


async def test_hex_is_compared_as_text_otherwise(config: Path) -> None:
    assert await decide(config, "app", appId="0x00a0") == denied("app not registered")
    assert await decide(config, "app", appId=" 0xa0") == denied("app not registered")


async def test_of_two_spellings_of_an_app_the_first_counts(config: Path) -> None:
    section = {"composeHashes": ["0xc0"], "allowAnyDevice": True}
    write(config, config_with(apps={"A0": section, "0xa0": {}}))
    assert await decide(config, "app") == ALLOWED
    write(config, config_with(apps={"0xa0": {}, "A0": section}))
    assert await decide(config, "app") == denied("compose hash not allowed")


# --- contracts


# Contract: what an empty `devices` admits without `allowAnyDevice`, and whether the file names statuses and advisories.
DIFFERENCES: dict[Contract, tuple[bool, bool]] = {
    "readme": (False, False),
    "upstream": (True, False),
    "next": (True, True),
    "0.6": (False, True),
}
NO_DEVICE = {
    "kms": denied("KMS is not allowed to boot on this device"),
    "app": denied("app is not allowed to boot on this device"),
}


def test_every_contract_is_in_the_table() -> None:
    assert tuple(DIFFERENCES) == CONTRACTS


@pytest.mark.parametrize("changed", [{"devices": []}, {"devices": [], "allowAnyDevice": False}])
@pytest.mark.parametrize("caller", ["app", "kms"])
@pytest.mark.parametrize(("contract", "empty_admits"), [(name, row[0]) for name, row in DIFFERENCES.items()])
async def test_empty_devices_admit_what_the_contract_says(
    config: Path, contract: Contract, empty_admits: bool, caller: str, changed: dict[str, Any]
) -> None:
    section = kms_with if caller == "kms" else app_with
    write(config, section(**changed))
    assert await decide(config, caller, contract) == (ALLOWED if empty_admits else NO_DEVICE[caller])
    write(config, section(**{**changed, "allowAnyDevice": True}))
    assert await decide(config, caller, contract) == ALLOWED
    write(config, section(devices=["0xd1"]))
    assert await decide(config, caller, contract) == NO_DEVICE[caller]
    assert await decide(config, caller, contract, deviceId="0xd1") == ALLOWED


@pytest.mark.parametrize("caller", ["app", "kms"])
@pytest.mark.parametrize(("contract", "empty_admits"), [(name, row[0]) for name, row in DIFFERENCES.items()])
async def test_absent_devices_are_empty_devices(
    config: Path, contract: Contract, empty_admits: bool, caller: str
) -> None:
    kms = {"mrAggregated": ["0xabc123"]}
    write(config, config_with(kms=kms, apps={"0xa0": {"composeHashes": ["0xc0"]}}))
    assert await decide(config, caller, contract) == (ALLOWED if empty_admits else NO_DEVICE[caller])


FROM_THE_FILE: list[Contract] = [name for name, row in DIFFERENCES.items() if row[1]]
FIXED: list[Contract] = [name for name, row in DIFFERENCES.items() if not row[1]]


@pytest.mark.parametrize("contract", FROM_THE_FILE)
async def test_tcb_statuses_come_from_the_config(config: Path, contract: Contract) -> None:
    assert await decide(config, "kms", contract, tcbStatus="OutOfDate") == denied("TCB status is not allowed")
    write(config, config_with(allowedTcbStatuses=["OutOfDate"]))
    assert await decide(config, "kms", contract, tcbStatus="OutOfDate") == ALLOWED
    assert await decide(config, "kms", contract) == denied("TCB status is not allowed")
    write(config, config_with(allowedTcbStatuses=[]))
    assert await decide(config, "kms", contract) == denied("TCB status is not allowed")


@pytest.mark.parametrize("contract", FIXED)
async def test_tcb_status_is_fixed_whatever_the_config_says(config: Path, contract: Contract) -> None:
    write(config, config_with(allowedTcbStatuses=["OutOfDate"]))
    expected = denied("TCB status is not up to date")
    assert await decide(config, "kms", contract, tcbStatus="OutOfDate") == expected
    assert await decide(config, "kms", contract) == ALLOWED


@pytest.mark.parametrize("contract", FROM_THE_FILE)
async def test_advisories_must_be_in_the_config(config: Path, contract: Contract) -> None:
    advisories = ["INTEL-SA-00001", "INTEL-SA-00002"]
    assert await decide(config, "app", contract, advisoryIds=advisories) == denied("advisory ID is not allowed")
    write(config, config_with(allowedAdvisoryIds=advisories[:1]))
    assert await decide(config, "app", contract, advisoryIds=advisories[:1]) == ALLOWED
    assert await decide(config, "app", contract, advisoryIds=advisories) == denied("advisory ID is not allowed")
    lower = [advisories[0].lower()]
    assert await decide(config, "app", contract, advisoryIds=lower) == denied("advisory ID is not allowed")


@pytest.mark.parametrize("contract", FIXED)
async def test_advisories_are_not_checked(config: Path, contract: Contract) -> None:
    assert await decide(config, "app", contract, advisoryIds=["INTEL-SA-00001", "INTEL-SA-00002"]) == ALLOWED


@pytest.mark.parametrize("contract", FROM_THE_FILE)
async def test_advisories_are_checked_between_tcb_and_os_image(config: Path, contract: Contract) -> None:
    wrong: dict[str, Any] = {"tcbStatus": "Revoked", "advisoryIds": ["x"], "osImageHash": "0x00"}
    assert await decide(config, "app", contract, **wrong) == denied("TCB status is not allowed")
    del wrong["tcbStatus"]
    assert await decide(config, "app", contract, **wrong) == denied("advisory ID is not allowed")
    del wrong["advisoryIds"]
    assert await decide(config, "app", contract, **wrong) == denied("OS image is not allowed")


async def test_decision_that_another_contract_makes_otherwise_is_warned_of(
    config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(config, kms_with(devices=[]))
    await decide(config, "kms")
    await decide(config, "kms", "upstream")
    await decide(config, "kms", "0.6")
    await decide(config, "app", advisoryIds=["x"])
    await decide(config, "app", "next", advisoryIds=["x"])
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "KMS boot denied by rule kms_device of the readme contract; otherwise under: upstream, next",
        "KMS boot allowed by rule allowed of the upstream contract; otherwise under: readme, 0.6",
        "KMS boot denied by rule kms_device of the 0.6 contract; otherwise under: upstream, next",
        "app boot allowed by rule allowed of the readme contract; otherwise under: next, 0.6",
        "app boot denied by rule advisory_ids of the next contract; otherwise under: readme, upstream",
    ]


async def test_decision_on_which_all_contracts_agree_is_not_warned_of(
    config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes: list[dict[str, Any]] = [{}, {"tcbStatus": "OutOfDate"}, {"deviceId": "0xd1"}]
    for changed in changes:
        await decide(config, "kms", **changed)
    assert [record for record in caplog.records if record.name == "dstack_emu.auth.simple"] == []


def test_decision_names_the_rule_that_decided() -> None:
    policy = Policy.model_validate_json(json.dumps(CONFIG))

    def rule(is_kms: bool, **changed: Any) -> str:
        return evaluate(policy, parse_boot_info({**BOOT_INFO, **changed}), is_kms, contract="next").rule

    assert rule(True) == rule(False) == "allowed"
    assert rule(True, tcbStatus="x") == "tcb_status"
    assert rule(True, advisoryIds=["x"]) == "advisory_ids"
    assert rule(True, osImageHash="x") == "os_image"
    assert rule(True, mrAggregated="x") == "kms_mr_aggregated"
    assert rule(True, deviceId="x") == "kms_device"
    assert rule(False, appId="x") == "app_registered"
    assert rule(False, composeHash="x") == "app_compose_hash"
    assert rule(False, deviceId="x") == "app_device"


_words = st.sampled_from(["", "0x", "aa", "0xAA", "0XAA", "bb", "0xbb"])
_lists = st.lists(_words, max_size=2)
_sections = st.fixed_dictionaries({"devices": _lists, "allowAnyDevice": st.booleans()})
_kms = st.tuples(_sections, _lists).map(lambda pair: {**pair[0], "mrAggregated": pair[1]})
_app = st.tuples(_sections, _lists).map(lambda pair: {**pair[0], "composeHashes": pair[1]})
_configs = st.fixed_dictionaries(
    {"osImages": _lists, "kms": _kms, "apps": st.dictionaries(_words, _app, max_size=2)},
    optional={
        "allowedTcbStatuses": st.just(["OutOfDate"]),
        "allowedAdvisoryIds": st.just(["INTEL-SA-00001"]),
    },
)
_boot_infos = st.builds(
    ReceivedBootInfo,
    mr_aggregated=_words,
    os_image_hash=_words,
    app_id=_words,
    compose_hash=_words,
    instance_id=_words,
    device_id=_words,
    tcb_status=st.sampled_from(["UpToDate", "OutOfDate"]),
    advisory_ids=st.lists(st.sampled_from(["INTEL-SA-00001", "x"]), max_size=2).map(tuple),
)


@given(config=_configs, boot_info=_boot_infos, is_kms=st.booleans())
def test_contracts_relate_as_documented(config: dict[str, Any], boot_info: ReceivedBootInfo, is_kms: bool) -> None:
    policy = Policy.model_validate_json(json.dumps(config))
    decisions = {contract: evaluate(policy, boot_info, is_kms, contract=contract) for contract in CONTRACTS}
    allowing = {contract for contract, decision in decisions.items() if decision.is_allowed}
    for contract, decision in decisions.items():
        assert set(decision.differs_from) == {
            other for other in CONTRACTS if (other in allowing) != (contract in allowing)
        }
        assert decision.is_allowed == (decision.reason == "") == (decision.rule == "allowed")
    if "readme" in allowing:
        assert "upstream" in allowing
    if "0.6" in allowing:
        assert "next" in allowing
    if not boot_info.advisory_ids and "allowedTcbStatuses" not in config:
        assert ("next" in allowing) == ("upstream" in allowing)
        assert ("0.6" in allowing) == ("readme" in allowing)


# --- logs


async def test_requests_and_results_are_logged_as_upstream_does_and_what_differed(
    config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dstack_emu.auth.simple")
    await decide(config, "app")
    await decide(config, "kms", mrAggregated="0x00")
    assert [record.getMessage() for record in caplog.records if record.name == "dstack_emu.auth.simple"] == [
        'app boot auth request: {"appId":"0xa0","composeHash":"0xc0","instanceId":"0x10"}',
        'app boot auth result: {"isAllowed":true,"reason":"","gatewayAppId":"0x9a"}',
        f'KMS boot auth request: {{"osImageHash":"{OS_IMAGE}","mrAggregated":"0x00","instanceId":"0x10"}}',
        "KMS boot denied by rule kms_mr_aggregated: mrAggregated is 0x00; the file admits 0xabc123",
        'KMS boot auth result: {"isAllowed":false,"reason":"aggregated MR not allowed","gatewayAppId":"0x9a"}',
    ]


# --- settings


def test_settings_come_from_the_environment() -> None:
    assert SimpleSettings.from_env({}) == SimpleSettings("./auth-config.json", DEFAULT.auth_contract)
    assert SimpleSettings.from_env({"AUTH_CONFIG_PATH": "", "AUTH_SIMPLE_COMPAT": ""}) == SimpleSettings()
    env = {"AUTH_CONFIG_PATH": "/x/y.json", "AUTH_SIMPLE_COMPAT": "next"}
    assert SimpleSettings.from_env(env) == SimpleSettings("/x/y.json", "next")
    assert SimpleSettings.from_env({"AUTH_SIMPLE_COMPAT": "0.6"}).contract == "0.6"


def test_contract_of_the_release_is_the_default_of_the_variable() -> None:
    assert SimpleSettings.from_env({}, default_contract="0.6").contract == "0.6"
    assert SimpleSettings.from_env({"AUTH_SIMPLE_COMPAT": ""}, default_contract="0.6").contract == "0.6"
    assert SimpleSettings.from_env({"AUTH_SIMPLE_COMPAT": "upstream"}, default_contract="0.6").contract == "upstream"


@pytest.mark.parametrize("text", ["README", "v0.5.11", "readme ", "0.5", "0.6.0"])
def test_unknown_contract_refuses_to_start(text: str) -> None:
    expected = f'AUTH_SIMPLE_COMPAT is "{text}", expected one of readme, upstream, next, 0.6'
    with pytest.raises(AuthConfigError) as caught:
        SimpleSettings.from_env({"AUTH_SIMPLE_COMPAT": text})
    assert str(caught.value) == expected
    with pytest.raises(AuthConfigError) as caught:
        simple_app("x.json", contract=text)  # type: ignore[arg-type]
    assert str(caught.value) == expected


# --- examples of others


async def test_readme_example_for_a_kms(config: Path) -> None:
    os_image = "0x0b327bcd642788b0517de3ff46d31ebd3847b6c64ea40bacde268bb9f1c8ec83"
    write_text(
        config,
        """{
  "osImages": ["0x0b327bcd642788b0517de3ff46d31ebd3847b6c64ea40bacde268bb9f1c8ec83"],
  "kms": {
    "mrAggregated": ["0x<kms-mr-aggregated>"],
    "allowAnyDevice": true
  },
  "apps": {}
}""",
    )
    boot: dict[str, Any] = {"osImageHash": os_image, "mrAggregated": "0x<kms-mr-aggregated>"}
    assert await decide(config, "kms", **boot) == {"isAllowed": True, "reason": "", "gatewayAppId": ""}
    assert await decide(config, "kms", osImageHash=os_image) == denied("aggregated MR not allowed", "")
    assert await decide(config, "app", **boot) == denied("app not registered", "")


async def test_readme_example_with_gateway_and_app(config: Path) -> None:
    write_text(
        config,
        """{
  "osImages": ["0x..."],
  "gatewayAppId": "0x...",
  "kms": {
    "mrAggregated": ["0x..."],
    "devices": [],
    "allowAnyDevice": true
  },
  "apps": {
    "0xYourAppId": {
      "composeHashes": ["0xabc...", "0xdef..."],
      "devices": [],
      "allowAnyDevice": true
    }
  }
}""",
    )
    boot: dict[str, Any] = {"osImageHash": "...", "mrAggregated": "0x...", "appId": "YOURAPPID"}
    for compose_hash in ["0xabc...", "DEF..."]:
        answer = await decide(config, "app", **boot, composeHash=compose_hash)
        assert answer == {"isAllowed": True, "reason": "", "gatewayAppId": "0x..."}
    assert await decide(config, "app", **boot) == denied("compose hash not allowed", "0x...")
    assert (await decide(config, "kms", **boot))["isAllowed"]


async def test_unknown_keys_are_ignored_at_every_level(config: Path) -> None:
    write(
        config,
        {
            **CONFIG,
            "_comment": "x",
            "os_images": ["ignored"],
            "kms": {**CONFIG["kms"], "allow_any_device": True, "allowAnyDevices": True},
            "apps": {"0xa0": {**CONFIG["apps"]["0xa0"], "allowAnyDevices": True}},
        },
    )
    assert await decide(config, "app") == ALLOWED
    assert await decide(config, "kms", deviceId="0xd1") == denied("KMS is not allowed to boot on this device")
    assert await decide(config, "app", deviceId="0xd1") == denied("app is not allowed to boot on this device")


async def test_keys_of_the_config_are_camel_case_only(config: Path) -> None:
    write(config, {"os_images": [OS_IMAGE], **{key: CONFIG[key] for key in ("gatewayAppId", "kms", "apps")}})
    assert await decide(config, "kms") == denied("OS image is not allowed")


async def test_requests_of_the_real_kms_are_decided_by_their_values(config: Path) -> None:
    requests = [row for row in golden("webhook-requests.json")["requests"] if "/bootAuth/" in row["path"]]
    assert {row["path"] for row in requests} == {"/bootAuth/app", "/bootAuth/kms"}
    async with TestClient(TestServer(simple_app(config))) as client:
        for row in requests:
            sent = json.loads(row["body"])
            headers = {"content-type": dict(row["headers"])["content-type"]}
            app = {"composeHashes": ["0x" + sent["composeHash"]], "devices": [sent["deviceId"].upper()]}
            kms = {"mrAggregated": [sent["mrAggregated"]], "devices": ["0x" + sent["deviceId"]]}
            listed = {"osImages": [sent["osImageHash"]], "kms": kms, "apps": {"0x" + sent["appId"]: app}}
            for document, is_allowed in [(listed, True), ({**listed, "kms": {}, "apps": {}}, False)]:
                write(config, document)
                async with client.post(row["path"], data=row["body"], headers=headers) as response:
                    assert (await response.json())["isAllowed"] is (is_allowed and sent["tcbStatus"] == "UpToDate")


def test_a_refusal_says_what_it_compared_with_which_place_of_the_file() -> None:
    policy = Policy.model_validate({"allowedAdvisoryIds": ["INTEL-SA-1"]})
    document = {**BOOT_INFO, "tcbStatus": "UpToDate", "advisoryIds": ["INTEL-SA-1", "INTEL-SA-2"]}
    refusal = evaluate(policy, parse_boot_info(document), False, contract="0.6").refusal
    assert refusal is not None
    assert (refusal.rule, refusal.member, refusal.path) == ("advisory_ids", "advisoryIds", ("allowedAdvisoryIds",))
    assert (refusal.got, refusal.expected) == (("INTEL-SA-2",), frozenset({"INTEL-SA-1"}))
    outdated = parse_boot_info({**document, "tcbStatus": "OutOfDate"})
    refusal = evaluate(policy, outdated, False, contract="readme").refusal
    assert refusal is not None
    assert (refusal.rule, refusal.got, refusal.path) == ("tcb_status", ("OutOfDate",), ())


def test_denials_by_one_policy_share_what_it_admits_however_many_apps_it_has() -> None:
    apps = {f"0x{number:040x}": {"composeHashes": ["0xc0"]} for number in range(1000)}
    policy, boot_info = Policy.model_validate(config_with(apps=apps)), parse_boot_info(BOOT_INFO)
    record, spans = (
        decision_recorder(),
        [CallSpan(False, n, "auth-src", "/bootAuth/app", "kms-src", 0.0) for n in (1, 2)],
    )
    decisions = [evaluate(policy, boot_info, is_kms=False) for _ in spans]
    for span, decision in zip(spans, decisions, strict=True):
        with entered(span):
            record(boot_info, False, decision)
    first, second = (decision.refusal for decision in decisions)
    assert first is not None
    assert second is not None
    assert first.expected == apps.keys()
    assert first.expected is second.expected
    assert str(first).endswith("admits " + ", ".join([*sorted(apps)[:5], "995 more"]))
    one, two = (span.annotations["decision"]["mismatch"]["allowed"] for span in spans)
    assert one == sorted(apps)
    assert one is two
