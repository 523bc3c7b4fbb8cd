"""Acts on a stack's chain by its control API: what they change, what contracts refuse, and what a denial needs."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic.alias_generators import to_camel

from dstack_emu.chain.artefacts import app_contract
from dstack_emu.control.schemas import ControlError
from dstack_emu.testing import LiveStack, refused
from tests.web3_client import connect

IMAGE = "11" * 32
NOT_HASHED = "value: 32 bytes in hex expected"


@pytest.fixture(scope="module")
def shared() -> Iterator[LiveStack]:
    """One stack for all tests of this file."""
    with LiveStack(auth={"src": "eth", "dst": "eth"}) as stack:
        yield stack


@pytest.fixture
def stack(shared: LiveStack) -> Iterator[LiveStack]:
    """The stack as it became ready."""
    with shared.put_back():
        yield shared


def test_act_changes_the_contract_and_says_what_it_decides_before_and_after(stack: LiveStack) -> None:
    from web3.logs import DISCARD

    app, node = stack.description["app"], connect(stack.services["chain"])
    contract = node.eth.contract(node.to_checksum_address("0x" + app["app_id"]), abi=app_contract("next").abi)
    allowed = contract.functions.allowedComposeHashes(bytes.fromhex(app["compose_hash"]))
    act: dict[str, Any] = {"kind": "compose-hash", "value": app["compose_hash"]}
    planned = stack.control.chain_act("remove", **act, preview=True)
    assert (planned["after"], planned["transaction"], allowed.call()) == ("not allowed", None, True)
    done = stack.control.chain_act("remove", **act)
    assert (done["before"], done["after"], allowed.call()) == ("allowed", "not allowed", False)
    assert done["decisions"] == planned["decisions"]
    assert done["decisions"]["app"] == {
        "before": {"allowed": True, "reason": ""},
        "after": {"allowed": False, "reason": "Compose hash not allowed"},
    }
    receipt = node.eth.get_transaction_receipt(done["transaction"])
    assert (receipt["blockNumber"], receipt["from"]) == (done["block"], done["sender"])
    (record,) = stack.journal.find("eth_sendTransaction", caller="control")
    assert record["chain"] == {"function": "remove", "block": hex(done["block"]), "result": done["transaction"]}
    (sent,) = stack.control.chain_transactions(since=done["block"] - 1)
    assert (sent["hash"], sent["function"]) == (done["transaction"], "removeComposeHash")
    (event,) = contract.events.ComposeHashRemoved().process_receipt(receipt, DISCARD)
    decoded = event["args"]["composeHash"]
    removed = {"composeHash": "0x" + decoded.hex()}
    assert sent["args"] == removed
    assert (sent["events"][0]["name"], sent["events"][0]["args"]) == ("ComposeHashRemoved", removed)


def test_every_act_is_one_of_the_contracts(stack: LiveStack) -> None:
    control = stack.control
    described = control.chain()
    other = stack.description["chain"]["accounts"][1]
    made = control.chain_act("app-deploy", compose_hash=IMAGE, device=IMAGE)
    app = described["next_app_id"]
    assert (made["what"], made["before"], made["after"]) == (f"app {app}", "not registered", "registered")
    control.chain_act("app-set", setting="require-tcb-up-to-date", app=app)
    control.chain_act("app-set", setting="disable-upgrades", app=app)
    control.chain_act("kms-set", setting="gateway-app-id", value=app)
    info = {"k256_pubkey": "02", "ca_pubkey": "0x03", "quote": "04", "eventlog": "05"}
    control.chain_act("kms-info", **info)
    control.chain_act("transfer-ownership", address=other, app=app)
    assert control.chain()["apps"][app]["pending_owner"] == other
    control.chain_act("accept-ownership", app=app, sender=other)
    upgraded = control.chain_act("upgrade")
    held = control.chain()
    assert held["apps"][app] == {
        "address": app,
        "owner": other,
        "pending_owner": None,
        "implementation": described["kms"]["app_implementation"],
        "compose_hashes": [f"0x{IMAGE}"],
        "devices": [f"0x{IMAGE}"],
        "allow_any_device": False,
        "require_tcb_up_to_date": True,
        "upgrades_disabled": True,
    }
    assert held["kms"]["info"] == {name: value.removeprefix("0x") for name, value in info.items()}
    assert held["kms"]["implementation"] == upgraded["after"] != described["kms"]["implementation"]
    assert held["kms"]["gateway_app_id"] == app
    with pytest.raises(ControlError, match="FailedCall|disabled|Upgrades"):
        control.chain_act("upgrade", app=app, sender=other)


@pytest.mark.parametrize(
    ("act", "fields", "why"),
    [
        ("allow", {"kind": "os-image", "value": "11"}, NOT_HASHED),
        ("allow", {"kind": "os-image", "value": 11}, NOT_HASHED),
        ("allow", {"kind": "image", "value": IMAGE}, "kind: Input should be 'os-image', 'kms-mr'"),
        ("allow", {"kind": "os-image", "value": IMAGE, "app": "22" * 20}, "os-image is listed by DstackKms"),
        (
            "allow",
            {"kind": "os-image", "value": IMAGE, "sender": "22" * 20},
            "sender: an account of the chain expected",
        ),
        ("app-set", {"setting": "disable-upgrades", "value": False}, "disable-upgrades: true expected"),
        ("kms-set", {"setting": "app-implementation", "value": "0x11"}, "value: "),
        (
            "kms-info",
            {"k256_pubkey": "0", "ca_pubkey": "", "quote": "", "eventlog": ""},
            "an even number of hex digits",
        ),
        ("app-register", {"address": "22" * 19}, "address: 20 bytes in hex expected"),
        ("mint", {}, "there is no act 'mint': allow, remove"),
    ],
)
def test_act_that_is_none_is_refused_and_sends_nothing(
    shared: LiveStack, act: str, fields: dict[str, Any], why: str
) -> None:
    block = shared.chain.block
    with pytest.raises(ControlError, match=why):
        shared.control.chain_act(act, **fields)
    assert shared.chain.block == block


def test_refusal_of_a_contract_is_its_error_before_and_without_a_preview(stack: LiveStack) -> None:
    block, other = stack.chain.block, stack.description["chain"]["accounts"][1]
    for preview in (True, False):
        for act in ("allow", "upgrade"):
            fields = {"kind": "os-image", "value": IMAGE} if act == "allow" else {}
            with pytest.raises(ControlError, match=rf"OwnableUnauthorizedAccount\({other}\)") as error:
                stack.control.chain_act(act, **fields, sender=other, preview=preview)
            assert error.value.status == 409
    assert stack.chain.block == block
    assert [each["outcome"] for each in stack.journal.find("eth_sendTransaction", caller="control")] == ["refused"] * 2


def denied(stack: LiveStack, name: str) -> dict[str, Any]:
    """Return the explanation of the last denial about an app or KMS."""
    record = stack.journal.find(f"/bootAuth/{name}", outcome="denied")[-1]
    (found,) = stack.control.why(record["id"])["denials"]
    return dict(found)


def allow(stack: LiveStack, found: dict[str, Any]) -> None:
    """Send what an explanation says."""
    for each in found["change"]["acts"]:
        stack.control.chain_act(each["act"], **each["body"])


def test_denial_of_an_app_has_the_entries_that_admit_it_and_they_do(stack: LiveStack) -> None:
    described, control = stack.description, stack.control
    app = control.chain_act("app-set", setting="allow-any-device", value=False)["what"].rpartition(" ")[2]
    control.chain_act("remove", kind="compose-hash", value=described["app"]["compose_hash"])
    control.chain_act("allow", kind="compose-hash", value=IMAGE)
    control.chain_act("transfer-ownership", app=app, address=described["chain"]["accounts"][1])
    control.chain_act("accept-ownership", app=app, sender=described["chain"]["accounts"][1])
    with refused("Compose hash not allowed"):
        stack.boot()
    found = denied(stack, "app")
    compose_hash, device = "0x" + described["app"]["compose_hash"], "0x" + stack.app().info["device_id"]
    assert [each["rule"] for each in found["refusals"]] == ["app_compose_hash", "app_device"]
    assert found["change"]["diff"].splitlines() == [
        f"@@ allowedComposeHashes of {app} @@",
        f" 0x{IMAGE}",
        f"+{compose_hash}",
        f"@@ allowedDeviceIds of {app} @@",
        f"+{device}",
    ]
    assert found["change"]["differences"][1] == {
        "contract": app,
        "list": "allowedDeviceIds",
        "op": "add",
        "value": device,
    }
    assert found["change"]["after"] == {"allowed": True, "reason": ""}
    asked = {to_camel(name): value for name, value in found["decision"]["asked"].items()}
    admission = stack.control.admit(text=json.dumps({**asked, "mrSystem": "", "keyProviderInfo": ""}), caller="app")
    assert admission["kms"]["src"]["change"] == found["change"]
    allow(stack, found)
    stack.boot()
    assert denied(stack, "app")["refusals"] == []


def test_denial_of_a_kms_and_of_an_image_have_them_too(stack: LiveStack) -> None:
    described, control = stack.description, stack.control
    source = described["kms"]["src"]
    control.chain_act("remove", kind="kms-mr", value=source["mr_aggregated"])
    control.chain_act("remove", kind="os-image", value=source["os_image_hash"])
    with refused("OS image is not allowed"):
        stack.boot()
    found = denied(stack, "kms")
    assert [each["list"] for each in found["change"]["differences"]] == ["allowedOsImages", "kmsAllowedAggregatedMrs"]
    allow(stack, found)
    assert control.chain()["decisions"]["kms-src"] == found["change"]["after"] == {"allowed": True, "reason": ""}


def test_denial_of_a_status_names_the_setting_or_that_nothing_admits_it(stack: LiveStack) -> None:
    stack.control.chain_act("app-set", setting="require-tcb-up-to-date")
    stack.control.set_platform("host of app", tcb_status="OutOfDate")
    with refused("TCB status is not up to date"):
        stack.boot()
    found = denied(stack, "app")
    assert found["change"]["diff"].splitlines()[1:] == ["-true", "+false"]
    allow(stack, found)
    stack.boot()
    stack.control.set_platform("host of kms-src", tcb_status="OutOfDate")
    stack.kms("src").restart()
    with refused("TCB status is not up to date"):
        stack.boot()
    found = denied(stack, "kms")
    assert (found["change"], found["no_change_because"]) == (
        None,
        "DstackKms lets no KMS boot whose TCB status is not UpToDate",
    )


def test_denial_of_an_app_without_a_contract_says_which_id_it_needs_or_creates_it(stack: LiveStack) -> None:
    following = stack.control.chain()["next_app_id"]
    with refused("App not registered"):
        stack.boot(stack.app("lost", app_id="22" * 20))
    assert f"the next one that the factory creates is {following}" in denied(stack, "app")["no_change_because"]
    wallet = stack.app("wallet", app_id=following[2:].lower())
    with refused("App not registered"):
        stack.boot(wallet)
    found = denied(stack, "app")
    assert [each["act"] for each in found["change"]["acts"]] == ["app-deploy"]
    allow(stack, found)
    stack.boot(wallet)
