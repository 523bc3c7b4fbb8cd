"""The webhooks as commands: how they are set, what they print and log; what they answer is tested by the library."""

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.attest.release import DEFAULT
from tests.commands import ask, serving, usage_error
from tests.json_rpc_server import CONTRACT, running_chain
from tests.ports import refusing_port

BOOT_INFO: dict[str, Any] = {
    "mrAggregated": "ab" * 32,
    "osImageHash": "0f" * 32,
    "appId": "a0" * 20,
    "composeHash": "c0" * 32,
    "instanceId": "10" * 20,
    "deviceId": "d0" * 32,
    "tcbStatus": "UpToDate",
    "advisoryIds": [],
}
POLICY: dict[str, Any] = {
    "osImages": ["0x" + "0f" * 32],
    "gatewayAppId": "0x9a",
    "kms": {"mrAggregated": ["0x" + "ab" * 32], "devices": [], "allowAnyDevice": True},
    "apps": {"0x" + "a0" * 20: {"composeHashes": ["0x" + "c0" * 32], "devices": [], "allowAnyDevice": True}},
}
ALLOWED = {"isAllowed": True, "reason": "", "gatewayAppId": "0x9a"}
FREE = ("--listen", "127.0.0.1:0")


def denied(reason: str, gateway: str = "0x9a") -> dict[str, Any]:
    return {"isAllowed": False, "reason": reason, "gatewayAppId": gateway}


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A policy file that allows BOOT_INFO."""
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(POLICY))
    return path


def decision(url: str, caller: str = "app", **changed: Any) -> Any:
    status, answer = ask(url, f"/bootAuth/{caller}", {**BOOT_INFO, **changed})
    assert status == 200
    return answer


def log_lines(path: Path) -> list[str]:
    """What a command logged, without the time before it."""
    return [re.sub(r"^.*? (?=auth\.)", "", line) for line in path.read_text().splitlines()]


# ---- auth simple


def test_simple_decides_by_its_file_and_says_so(policy: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving("auth", "simple", *FREE, "--config", str(policy), log=log) as said:
        assert said == {"url": said["url"], "config_path": str(policy), "compat": DEFAULT.auth_contract}
        assert said["url"].startswith("http://127.0.0.1:")
        assert decision(said["url"]) == decision(said["url"], "kms") == ALLOWED
        policy.write_text(json.dumps({**POLICY, "apps": {}}))
        assert decision(said["url"]) == denied("app not registered")
        assert ask(said["url"], "/health") == (200, {"status": "ok"})
        assert ask(said["url"], "/")[1]["configPath"] == str(policy)
        assert "/bootAuth/kms" in ask(said["url"], "/openapi.json")[1]["paths"]
    asked = {name: BOOT_INFO[name] for name in ("appId", "composeHash", "instanceId")}
    of_kms = {name: BOOT_INFO[name] for name in ("osImageHash", "mrAggregated", "instanceId")}
    assert log_lines(log) == [
        f"auth.simple: {line}"
        for line in (
            f"app boot auth request: {_compact(asked)}",
            f"app boot auth result: {_compact(ALLOWED)}",
            f"KMS boot auth request: {_compact(of_kms)}",
            f"KMS boot auth result: {_compact(ALLOWED)}",
            f"app boot auth request: {_compact(asked)}",
            f"app boot denied by rule app_registered: appId is {BOOT_INFO['appId']}; the file admits none",
            f"app boot auth result: {_compact(denied('app not registered'))}",
        )
    ]


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def test_simple_without_its_file_runs_and_denies_until_it_is_there(policy: Path, tmp_path: Path) -> None:
    path, log = tmp_path / "missing.json", tmp_path / "log"
    missing = f"config file not found: {path}"
    with serving("auth", "simple", *FREE, "--config", str(path), log=log) as said:
        assert log.read_text() == f"{missing}; everything is denied until this file can be used\n"
        assert decision(said["url"], "kms") == denied(missing, "")
        policy.rename(path)
        assert decision(said["url"], "kms") == ALLOWED


@pytest.mark.parametrize(("contract", "allowed"), [("", False), ("upstream", True)])
def test_simple_takes_the_variables_of_the_original(policy: Path, contract: str, allowed: bool) -> None:
    policy.write_text(json.dumps({**POLICY, "kms": {"mrAggregated": POLICY["kms"]["mrAggregated"], "devices": []}}))
    environment = {"PORT": "0", "AUTH_CONFIG_PATH": str(policy), "AUTH_SIMPLE_COMPAT": contract}
    with serving("auth", "simple", environment=environment) as said:
        assert (said["config_path"], said["compat"]) == (str(policy), contract or DEFAULT.auth_contract)
        assert said["url"].startswith("http://127.0.0.1:")
        answer = decision(said["url"], "kms")
        assert answer == (ALLOWED if allowed else denied("KMS is not allowed to boot on this device"))


@pytest.mark.parametrize(
    ("release", "variable", "contract"),
    [("0.5", "", "readme"), ("0.6", "", "0.6"), ("0.6", "upstream", "upstream"), ("0.5", "0.6", "0.6")],
)
def test_simple_has_the_contract_of_the_release_unless_the_variable_names_one(
    policy: Path, release: str, variable: str, contract: str
) -> None:
    options = (*FREE, "-c", str(policy), "--release", release)
    with serving("auth", "simple", *options, environment={"AUTH_SIMPLE_COMPAT": variable}) as said:
        assert said["compat"] == contract
        answer = decision(said["url"], advisoryIds=["INTEL-SA-1"])
        assert answer == (denied("advisory ID is not allowed") if contract == "0.6" else ALLOWED)
        assert decision(said["url"]) == ALLOWED


def test_simple_options_go_before_variables(policy: Path, tmp_path: Path) -> None:
    environment = {"PORT": "1", "AUTH_CONFIG_PATH": str(tmp_path / "other.json")}
    with serving("auth", "simple", *FREE, "-c", str(policy), "--seed", "any", environment=environment) as said:
        assert decision(said["url"]) == ALLOWED


def test_simple_never_decides_by_half_a_file(policy: Path, tmp_path: Path) -> None:
    """Replaced at once, a file is the old or the new one; rewritten in place, it may also be none."""
    other = tmp_path / "other.json"
    padding = {"note": "x" * 20_000}  # more than one page, and more than one read of a careless reader
    texts = [json.dumps({**POLICY, **padding}), json.dumps({**padding, **POLICY, "apps": {}, "gatewayAppId": "0x9b"})]
    whole = [ALLOWED, denied("app not registered", "0x9b")]
    policy.write_text(texts[0])
    done = threading.Event()

    def replace() -> None:
        while not done.is_set():
            for text in reversed(texts):
                other.write_text(text)
                os.replace(other, policy)

    def rewrite() -> None:
        while not done.is_set():
            for text in reversed(texts):
                policy.write_text(text)

    with serving("auth", "simple", *FREE, "--config", str(policy), log=tmp_path / "log") as said:
        for change, in_place in ((replace, False), (rewrite, True)):
            done.clear()
            writer = threading.Thread(target=change)
            writer.start()
            try:
                answers = [decision(said["url"]) for _ in range(80)]
            finally:
                done.set()
                writer.join()
            none = [answer for answer in answers if answer not in whole]
            broken = (f"failed to load config: {policy}: ", f"config is being rewritten: {policy}")
            assert all(in_place and not answer["isAllowed"] for answer in none)
            assert all(answer["reason"].startswith(broken) for answer in none)
            if not in_place:  # where a file is never at rest, it may be that nobody ever reads it whole
                assert {answer["gatewayAppId"] for answer in answers} == {"0x9a", "0x9b"}
            assert decision(said["url"]) in whole  # it is at rest now


# ---- auth file


def test_file_decides_by_its_allowlist_and_says_so(policy: Path, tmp_path: Path) -> None:
    log, allowed = tmp_path / "log", {**ALLOWED, "reason": "ok"}
    with serving("auth", "file", *FREE, "--config", str(policy), log=log) as said:
        assert said == {"url": said["url"], "config_path": str(policy)}
        assert decision(said["url"]) == decision(said["url"], "kms", osImageHash="00" * 32) == allowed
        policy.write_text(json.dumps({**POLICY, "apps": {}}))
        assert decision(said["url"]) == denied("app not registered")
        assert ask(said["url"], "/")[1]["gatewayAppId"] == ""
        assert ask(said["url"], "/health") == (200, {"status": "ok"})
    app = f"bootAuth/app app={'a0' * 20} compose={'c0' * 32}"
    assert log_lines(log) == [
        f"auth.file: {app} -> allowed=true (ok)",
        f"auth.file: bootAuth/kms mr={'ab' * 32} -> allowed=true (ok)",
        f"auth.file: {app} -> allowed=false (app not registered)",
        f"auth.file: denied by rule app_registered: appId is {BOOT_INFO['appId']}; the file admits none",
    ]


def test_file_without_its_allowlist_runs_and_denies_until_it_is_there(policy: Path, tmp_path: Path) -> None:
    path, log = tmp_path / "missing.json", tmp_path / "log"
    missing = f"config file not found: {path}"
    with serving("auth", "file", *FREE, "--config", str(path), log=log) as said:
        assert log.read_text() == f"{missing}; everything is denied until this file can be used\n"
        assert decision(said["url"], "kms") == denied("kms mrAggregated not allowed", "")
        policy.rename(path)
        assert decision(said["url"], "kms")["isAllowed"]
    assert f"auth.file: {missing}; denying all" in log_lines(log)


def test_file_takes_no_variables(policy: Path) -> None:
    environment = {"PORT": "no number", "AUTH_CONFIG_PATH": "/nowhere", "AUTH_SIMPLE_COMPAT": "x"}
    with serving("auth", "file", *FREE, "-c", str(policy), environment=environment) as said:
        assert decision(said["url"])["isAllowed"]


# ---- auth eth


CONTRACT_OPTIONS = ("--kms-contract", CONTRACT)


def test_eth_asks_its_contract_and_says_so(tmp_path: Path) -> None:
    command, log = ("auth", "eth", *FREE, "--eth-rpc-url"), tmp_path / "log"
    with (
        running_chain() as chain,
        serving(*command, f"{chain.url}/v3/key", *CONTRACT_OPTIONS, "--eth-chain-id", "1337", log=log) as said,
    ):
        assert said == {"url": said["url"], "rpc_url": chain.url, "kms_contract": CONTRACT, "compat": "next"}
        allowed = {"isAllowed": True, "reason": "", "gatewayAppId": "0xgateway"}
        assert decision(said["url"]) == decision(said["url"], "kms") == allowed
        chain.decision = False, "Compose hash not allowed"
        refused = denied("Compose hash not allowed", "0xgateway")
        assert decision(said["url"]) == refused
        chain.chain_id = 1
        assert decision(said["url"]) == denied("authorization backend unavailable", "")
        assert ask(said["url"], "/")[1]["chainId"] == 1
        assert "500" in ask(said["url"], "/openapi.json")[1]["paths"]["/"]["get"]["responses"]
    state = "(block 100 of chain 1337, latest 100, just asked)"
    assert log_lines(log) == [
        f"auth.eth: {line}"
        for line in (
            f"app boot auth result: {_compact(allowed)} {state}",
            f"KMS boot auth result: {_compact(allowed)} {state}",
            "app boot denied by rule app_compose_hash of the contract",
            f"app boot auth result: {_compact(refused)} {state}",
            "application authorization backend failed",
            'batch ["0xgateway",1,"0x9876543210987654321098765432109876543210"]',
        )
    ]


def test_eth_takes_the_variables_of_the_original_and_options_go_before_them(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running_chain() as chain:
        environment = {
            "PORT": "0",
            "HOST": "127.0.0.2",
            "ETH_RPC_URL": chain.url,
            "KMS_CONTRACT_ADDR": CONTRACT,
            "ETH_FINALITY_CONFIRMATIONS": "2",
            "ETH_CHAIN_ID": "1",
        }
        with serving("auth", "eth", "--eth-chain-id", "1337", environment=environment) as said:
            assert said["url"].startswith("http://127.0.0.2:")
            assert decision(said["url"])["isAllowed"]
            assert chain.calls[-1] == ("gatewayAppId", "0x62")
        with serving("auth", "eth", "--release", "0.5", environment=environment, log=log) as said:
            assert said["compat"] == "0.5.11"
            assert decision(said["url"])["isAllowed"]
            assert chain.calls[-1] == ("gatewayAppId", "latest")
    unread = "has no effect: auth-eth-bun of 0.5.11 does not read it"
    assert log.read_text().startswith(f"ETH_CHAIN_ID {unread}\nETH_FINALITY_CONFIRMATIONS {unread}\n")


def test_eth_without_chain_runs_and_denies_and_logs_why_with_v(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        refusing_port() as port,
        serving("auth", "eth", "-v", *FREE, log=log, environment={"ETH_RPC_URL": f"http://127.0.0.1:{port}"}) as said,
    ):
        assert decision(said["url"], "kms") == denied("authorization backend unavailable", "")
        assert ask(said["url"], "/health") == (200, {"status": "ok"})
    lines = log_lines(log)
    assert lines[0].startswith("KMS_CONTRACT_ADDR (--kms-contract) is not set: everything is denied")
    assert "auth.eth: KMS authorization backend failed" in lines
    assert "auth.eth: eth_chainId: Connection refused" in lines


# ---- auth mock


@pytest.mark.parametrize(
    ("environment", "app", "kms"),
    [
        ({}, (True, "mock app always allowed"), (True, "mock KMS always allowed")),
        (
            {"MOCK_POLICY": "deny-kms"},
            (True, "mock app allowed (deny-kms policy)"),
            (False, "mock policy: deny-kms"),
        ),
        (
            {"MOCK_POLICY": "allowlist-device", "MOCK_ALLOWED_DEVICE_IDS": f"{'d0' * 32}, other"},
            (True, f"mock policy: device {'d0' * 32} allowed"),
            (True, f"mock policy: device {'d0' * 32} allowed"),
        ),
    ],
)
def test_mock_takes_the_variables_of_the_original(
    environment: dict[str, str], app: tuple[bool, str], kms: tuple[bool, str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with serving("auth", "mock", environment={"PORT": "0", **environment}, log=log) as said:
        assert said == {"url": said["url"], "policy": environment.get("MOCK_POLICY", "allow-all")}
        assert said["url"].startswith("http://127.0.0.1:")
        for caller, expected in (("app", app), ("kms", kms)):
            answer = decision(said["url"], caller)
            assert (answer["isAllowed"], answer["reason"]) == expected
    note = {} if "MOCK_POLICY" in environment else {"note": "always returning success"}
    asked = _compact({name: BOOT_INFO[name] for name in ("appId", "instanceId")} | note)
    assert log_lines(log) == [f"auth.mock: mock {caller} boot auth request: {asked}" for caller in ("app", "KMS")]


# ---- wrong use


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (("mock",), {"NODE_ENV": "production"}, "auth-mock must not run with NODE_ENV=production"),
        (("mock",), {"MOCK_POLICY": "allow"}, 'unknown MOCK_POLICY "allow"'),
        (
            ("mock", "--config", "x"),
            {},
            "--config is for `auth simple` and `auth file`; set MOCK_POLICY to choose what `auth mock` decides",
        ),
        (
            ("simple", "--release", "0.7"),
            {},
            "argument --release: dstack release: 0.5 or 0.6 expected, got '0.7' (see dstack-emu auth --help)",
        ),
        (("eth",), {"ETH_CHAIN_ID": "01"}, 'ETH_CHAIN_ID must be a non-negative integer, got "01"'),
        (
            ("eth", "--kms-contract", "0x12"),
            {},
            "KMS_CONTRACT_ADDR: an address expected, 0x and 40 hex digits, got '0x12'",
        ),
        (("mock", "--eth-rpc-url", "x"), {}, "--eth-rpc-url is for `auth eth`; `auth mock` asks no chain"),
        (
            ("eth", "-c", "x"),
            {},
            "--config is for `auth simple` and `auth file`; `auth eth` decides by the contract alone",
        ),
        (("simple",), {"PORT": "65536"}, 'PORT is "65536", expected a number of 0 (a free one) to 65535'),
    ],
)
def test_wrong_use_is_one_line(
    arguments: tuple[str, ...], environment: dict[str, str], said: str, policy: Path
) -> None:
    assert usage_error("auth", *arguments, environment={"AUTH_CONFIG_PATH": str(policy), **environment}) == said


def test_port_of_file_that_is_taken_is_named_with_its_option(policy: Path) -> None:
    with serving("auth", "file", *FREE, "-c", str(policy)) as said:
        address = said["url"].removeprefix("http://")
        taken = f"cannot listen on {address}: the address is in use (set by --listen HOST:PORT)"
        assert usage_error("auth", "file", "-c", str(policy), "--listen", address) == taken


def test_port_that_is_taken_is_named_with_its_settings(policy: Path) -> None:
    with serving("auth", "simple", *FREE, "-c", str(policy)) as said:
        port = said["url"].rpartition(":")[2]
        taken = f"cannot listen on 127.0.0.1:{port}: the address is in use (set by --listen HOST:PORT or PORT)"
        assert usage_error("auth", "simple", "-c", str(policy), environment={"PORT": port}) == taken
