"""A stack whose KMS ask a contract: its webhooks are auth-eth-bun, and the chain decides."""

from pathlib import Path
from typing import Any

import pytest

from dstack_emu import Stack, StackConfig
from dstack_emu.control.schemas import ControlError
from dstack_emu.deployment.errors import StackError
from dstack_emu.runbook.target import Target, TargetError
from dstack_emu.testing import LiveStack, refused
from tests.commands import usage_error
from tests.json_rpc_server import CONTRACT, Chain, RpcError, abi_decision, running_chain
from tests.running import running_stack


def test_chain_decides_for_the_whole_stack_and_the_journal_says_by_which_block() -> None:
    with running_chain() as chain:
        asking: dict[str, Any] = {"eth_rpc_url": chain.url, "kms_contract": CONTRACT}
        with LiveStack(auth={"src": "eth", "dst": "eth"}, **asking) as stack:
            assert {"isKmsAllowed", "isAppAllowed"} <= {name for name, _ in chain.calls}
            assert stack.description["policies"] == {}
            assert stack.description["webhooks"] == {
                name: stack.services[f"auth-{name}"].rstrip("/") for name in ("src", "dst")
            }
            stack.boot()
            chain.head = 101
            chain.fault = _denying_apps("Compose hash not allowed")
            with refused("Boot denied: Compose hash not allowed"):
                stack.boot()
            (record,) = stack.journal.find("/bootAuth/app", service="auth-src", outcome="denied")
            decision = record["decision"]
            assert (decision["rule"], decision["reason"]) == ("app_compose_hash", "Compose hash not allowed")
            assert decision["state"] == "block 101 of chain 1337, latest 101, just asked"
            chain.fault = _failing
            with refused("authorization backend unavailable"):
                stack.boot()
            (record,) = stack.journal.find("/bootAuth/kms", service="auth-src", outcome="denied")
            assert record["decision"]["chain_error"] == "header not found"
            with pytest.raises(ControlError, match="asks the webhook"):
                stack.policy("src").allow("app")


def _denying_apps(reason: str) -> Any:
    return lambda name, _request: abi_decision(False, reason) if name == "isAppAllowed" else None


def _failing(_name: str, _request: dict[str, Any]) -> Any:
    raise RpcError("header not found")


def options(chain: Chain, auth: str) -> tuple[str, ...]:
    return "--auth", auth, "--eth-rpc-url", chain.url, "--kms-contract", CONTRACT


def test_command_lets_the_chain_decide_for_one_kms_which_states_url_and_contract() -> None:
    with running_chain() as chain, running_stack("--fresh", *options(chain, "src=eth")) as stack:
        assert (list(stack.policies), list(stack.description["webhooks"])) == (["dst"], ["src"])
        with pytest.raises(TargetError, match="without --eth-rpc-url: then it has a chain of its own"):
            Target.load(Path(stack.description["state"], "stack.json"))
        status, info = stack.rpc("kms-src", "Onboard.GetAttestationInfo")
        assert (status, info["eth_rpc_url"], info["kms_contract_address"]) == (200, chain.url, CONTRACT)
        assert stack.rpc("kms-dst", "Onboard.GetAttestationInfo")[1]["eth_rpc_url"] == ""
        domain = {"domain": stack.description["kms_names"][0]}
        chain.decision = False, "Aggregated MR not allowed"
        status, answer = stack.rpc("kms-src", "Onboard.Bootstrap", domain)
        assert (status, "Aggregated MR not allowed" in answer["error"]) == (400, True)
        chain.decision = True, ""
        assert stack.rpc("kms-src", "Onboard.Bootstrap", domain)[0] == 200
        assert stack.curl(f"{stack.services['kms-src']}/finish")[0] == 200
        status, meta = stack.rpc("kms-src", "KMS.GetMeta")
        assert status == 200
        assert (meta["chain_id"], meta["kms_contract_address"], meta["gateway_app_id"]) == (
            chain.chain_id,
            CONTRACT,
            chain.gateway,
        )
        assert meta["app_auth_implementation"] == "0x9876543210987654321098765432109876543210"
        chain.fault = _failing
        assert stack.rpc("kms-src", "KMS.GetMeta")[0] == 400


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"auth": {"third": "eth"}}, "auth: src or dst expected, got 'third'"),
        ({"auth": {"src": "ether"}}, "auth of src: simple or eth expected, got 'ether'; did you mean 'eth'?"),
        ({"auth": {"src": "eth"}, "kms_contract": CONTRACT}, "eth_rpc_url is missing: .*--eth-rpc-url URL"),
        ({"auth": {"src": "eth"}, "eth_rpc_url": "http://h"}, "kms_contract is missing"),
        ({"eth_rpc_url": "http://h"}, "eth_rpc_url and kms_contract are settings of webhooks that ask a chain"),
        ({"eth_block_cache": 4}, "eth_block_cache is a setting of webhooks that ask a chain: add `--auth eth`"),
        ({"auth": {"src": "eth"}, "eth_block_cache": 3601}, "eth_block_cache: seconds from 0 to 3600 .*, got 3601"),
        ({"auth": {"src": "eth"}, "eth_block_cache": -1}, "eth_block_cache: seconds from 0 to 3600 .*, got -1"),
        (
            {"auth": {"src": "eth"}, "eth_block_cache": 4, "release": "0.5"},
            "eth_block_cache: auth-eth of dstack 0.5 asks about the latest state",
        ),
        (
            {"auth": {"src": "eth"}, "webhooks": {"src": "http://h"}, "eth_rpc_url": "http://h"},
            "auth of src: this KMS asks the webhook that `webhooks` names",
        ),
        (
            {"auth": {"src": "eth"}, "eth_rpc_url": "ws://u:word@h", "kms_contract": CONTRACT},
            "a webhook that asks a chain: ETH_RPC_URL: http.*got 'ws://h'",
        ),
        (
            {"auth": {"src": "eth"}, "eth_rpc_url": "http://h", "kms_contract": "0x1"},
            "a webhook that asks a chain: KMS_CONTRACT_ADDR: an address expected",
        ),
    ],
)
async def test_setting_that_cannot_be_used_is_named(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(StackError, match=complaint):
        async with Stack(StackConfig.on_free_ports(**settings)):
            pass


@pytest.mark.parametrize("text", ["ether", "third=eth", "=eth", "src=", "src"])
def test_option_that_names_no_webhook_is_refused(text: str) -> None:
    said = usage_error("up", "--auth", text)
    assert f"simple or eth, or src=… or dst=… with one of them, expected, got {text!r}" in said
