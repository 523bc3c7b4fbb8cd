"""A stack with a chain of its own: its contracts decide, and transactions change what they decide."""

import asyncio
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dstack_emu import Stack
from dstack_emu.chain.accounts import private_keys
from dstack_emu.chain.artefacts import app_contract, kms_contract
from dstack_emu.cli.main import main
from dstack_emu.cli.stack_summary import summary
from dstack_emu.control.schemas import ControlError
from dstack_emu.deployment.clock import wall_clock
from dstack_emu.deployment.errors import StackError
from dstack_emu.observability.record_text import lines
from dstack_emu.runbook.cases import run_cases
from dstack_emu.runbook.kms_client import PrpcKmsClient
from dstack_emu.runbook.runner import RunbookRun
from dstack_emu.runbook.target import Target
from dstack_emu.runbook.transcript import Transcript
from dstack_emu.simulator.seed import DEFAULT_SEED, Seed
from dstack_emu.testing import LiveChain, LiveStack, refused
from dstack_emu.transport.secrets import Secrets
from tests.commands import ask
from tests.web3_client import connect

if TYPE_CHECKING:
    from web3 import Web3

BOTH = {"src": "eth", "dst": "eth"}


@pytest.fixture(scope="module")
def shared() -> Iterator[LiveStack]:
    """One stack for all tests of this file."""
    with LiveStack(auth=BOTH) as stack:
        yield stack


@pytest.fixture
def stack(shared: LiveStack) -> Iterator[LiveStack]:
    """The stack as it became ready."""
    with shared.put_back():
        yield shared


@pytest.fixture
def dstack_current(stack: LiveStack) -> LiveStack:
    """The stack that the plugin's fixtures use here."""
    return stack


def owner_of(stack: LiveStack) -> tuple["Web3", Any, Any]:
    """Return a client of the chain, DstackKms, and the contract of the stack's app, as their owner uses them."""
    described = stack.description["chain"]
    node = connect(stack.services["chain"])
    node.eth.default_account = described["contracts"]["owner"]
    app_id = node.to_checksum_address("0x" + stack.description["app"]["app_id"])
    kms = node.eth.contract(address=described["contracts"]["kms"], abi=kms_contract("next").abi)
    return node, kms, node.eth.contract(address=app_id, abi=app_contract("next").abi)


def test_app_is_allowed_by_transactions_and_its_id_is_the_address_of_its_contract(stack: LiveStack) -> None:
    _, kms, app = owner_of(stack)
    described = stack.description
    assert kms.functions.registeredApps(app.address).call()
    assert app.functions.allowedComposeHashes(bytes.fromhex(described["app"]["compose_hash"])).call()
    for info in described["kms"].values():
        assert kms.functions.kmsAllowedAggregatedMrs(bytes.fromhex(info["mr_aggregated"])).call()
        assert kms.functions.kmsAllowedDeviceIds(bytes.fromhex(info["device_id"])).call()
        assert kms.functions.allowedOsImages(bytes.fromhex(info["os_image_hash"])).call()
    assert described["policies"] == described["webhooks"] == {}
    assert described["chain"]["decides_for"] == ["src", "dst"]
    meta = stack.kms("src").rpc("GetMeta")
    assert (meta["chain_id"], meta["kms_contract_address"]) == (31337, kms.address)
    stack.boot()


def test_revocation_by_a_transaction_is_heeded_at_once(stack: LiveStack) -> None:
    _, _, app = owner_of(stack)
    compose_hash = bytes.fromhex(stack.description["app"]["compose_hash"])
    app.functions.removeComposeHash(compose_hash).transact()
    with refused("Boot denied: Compose hash not allowed"):
        stack.boot()
    app.functions.addComposeHash(compose_hash).transact()
    stack.boot()


def test_with_the_block_cache_a_revocation_is_heeded_when_its_time_is_over() -> None:
    with LiveStack(auth=BOTH, eth_block_cache=4) as stack:
        _, _, app = owner_of(stack)
        compose_hash = bytes.fromhex(stack.description["app"]["compose_hash"])
        stack.clock.freeze()
        stack.boot()
        app.functions.removeComposeHash(compose_hash).transact()
        stack.clock.advance(3.9)
        stack.boot()
        (*_, record) = stack.journal.find("/bootAuth/app", service="auth-src")
        assert record["decision"]["state"].endswith(", known for 3.9 s")
        stack.clock.advance(0.1)
        with refused("Boot denied: Compose hash not allowed"):
            stack.boot()
        stack.snapshot("revoked")
        app.functions.addComposeHash(compose_hash).transact()
        stack.boot()
        stack.revert("revoked")
        with refused("Boot denied: Compose hash not allowed"):  # the number of a block that is gone is not used again
            stack.boot()


def test_policy_acts_of_the_control_api_are_transactions(stack: LiveStack) -> None:
    node, kms, app = owner_of(stack)
    before = node.eth.block_number
    policy = stack.policy("src")
    policy.deny("app")
    assert (node.eth.block_number, kms.functions.registeredApps(app.address).call()) == (before + 1, True)
    with refused("Compose hash not allowed"):
        stack.boot()
    policy.allow("app")
    stack.boot()
    policy.deny("kms-src")
    with refused("Aggregated MR not allowed"):
        stack.boot()
    evidence = stack.in_thread(lambda each: json.dumps(each.control.guest_evidence("kms-src")))
    _, answer = ask(stack.services["control"], "/admit", {"text": evidence, "caller": "kms"})
    decided = answer["kms"]["src"]
    assert (decided["verdict"], decided["decision"]["rule"]) == ("denied", "kms_mr_aggregated")
    assert "addKmsAggregatedMr(0x" in decided["next_steps"][0]
    assert "0x" + stack.description["kms"]["src"]["mr_aggregated"] not in policy.content["kms"]["mrAggregated"]


def test_fixture_of_the_plugin_revokes_and_allows(dstack_chain: LiveChain, stack: LiveStack) -> None:
    app, before = stack.app(), dstack_chain.block
    dstack_chain.remove_compose_hash(app)
    with refused("Compose hash not allowed"):
        stack.boot()
    dstack_chain.allow_compose_hash(app).remove("os-image", stack.description["kms"]["src"]["os_image_hash"])
    with refused("OS image is not allowed"):
        stack.boot()
    assert dstack_chain.block == before + 3
    wallet = stack.app("wallet", app_id=dstack_chain.deploy_app())
    dstack_chain.allow("os-image", wallet.info["os_image_hash"]).allow_compose_hash(wallet)
    stack.boot(wallet)
    kms, other = owner_of(stack)[1], dstack_chain.description["accounts"][1]
    kms.functions.transferOwnership(other).transact()
    kms.functions.acceptOwnership().transact({"from": other})
    with pytest.raises(StackError, match="OwnableUnauthorizedAccount"):
        dstack_chain.allow("os-image", "11" * 32)


def test_command_says_what_the_contract_answered_before_and_after(
    stack: LiveStack, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(*words: str) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as ended:
            main(["chain", *words])
        printed = capsys.readouterr()
        return ended.value.code, (printed.out + printed.err).strip()

    described = stack.description
    monkeypatch.setenv("DSTACK_EMU_STATE", described["state"])
    image, compose_hash = "11" * 32, described["app"]["compose_hash"]
    status, said = act("allow", "os-image", image)
    assert (status, said.startswith(f"os-image 0x{image}: not allowed before, allowed now (block ")) == (0, True)
    status, said = act("remove", "compose-hash", compose_hash, "--json")
    assert (status, json.loads(said)["before"], json.loads(said)["after"]) == (0, "allowed", "not allowed")
    assert stack.journal.find("eth_sendTransaction")[-1]["chain"]["function"] == "removeComposeHash"
    with refused("Compose hash not allowed"):
        stack.boot()
    assert f"0x{image}" in json.loads(act("show")[1])["osImages"]
    app_id = json.loads(act("app-deploy", "--allow-any-device", "--require-tcb-up-to-date")[1])["app_id"]
    shown, owner = json.loads(act("show")[1]), described["chain"]["accounts"][0]
    settings = {name: app["requireTcbUpToDate"] for name, app in shown["apps"].items()}
    assert (settings.pop(f"0x{app_id}"), any(settings.values())) == (True, False)
    assert [shown["owner"], *(app["owner"] for app in shown["apps"].values())] == [owner] * (len(settings) + 2)
    assert act("allow", "device", image, "--app", f"0x{app_id}")[0] == 0
    other = described["chain"]["accounts"][1]
    assert act("allow", "os-image", image, "--from", other) == (1, f"Error: OwnableUnauthorizedAccount({other})")
    monkeypatch.setenv("PRIVATE_KEY", private_keys(Seed.of(DEFAULT_SEED).derive)[1].hex())
    assert act("remove", "os-image", image) == (1, f"Error: OwnableUnauthorizedAccount({other})")
    status, said = act("remove", "os-image", image, "--from", described["chain"]["accounts"][0])
    assert (status, said.startswith(f"Error: --from: {other} expected")) == (2, True)
    monkeypatch.setenv("PRIVATE_KEY", private_keys(Seed.of(DEFAULT_SEED).derive)[0].hex())
    assert act("remove", "os-image", image)[0] == 0
    assert "32 bytes in hex expected" in act("allow", "os-image", "11")[1]
    assert "before, True now" in act("app-set", "require-tcb-up-to-date", "true")[1]
    assert "stays as it is" in act("app-set", "disable-upgrades", "false")[1]
    assert act("app-set", "disable-upgrades", "true")[0] == 0
    assert "gatewayAppId: any before, 0x11 now" in act("kms-set", "gateway-app-id", "0x11")[1]
    assert "app-implementation: an address expected" in act("kms-set", "app-implementation", "0x11")[1]


def test_policy_in_the_form_of_auth_simple_says_what_the_contracts_allow(stack: LiveStack) -> None:
    described = stack.description
    content = stack.policy("dst").content
    assert content["osImages"] == ["0x" + described["kms"]["src"]["os_image_hash"]]
    assert content["apps"] == {
        "0x" + described["app"]["app_id"]: {
            "composeHashes": ["0x" + described["app"]["compose_hash"]],
            "devices": [],
            "allowAnyDevice": True,
        }
    }
    with pytest.raises(ControlError, match="on the stack's chain, not by a file"):
        stack.control.check_policy("src", "{}")


def test_app_whose_id_is_no_contract_is_refused_with_the_id_that_would_be_one(stack: LiveStack) -> None:
    stack.trust_domain("wallet", app_id="11" * 20)
    with pytest.raises(ControlError, match=r"the app id 0x1{40} is no contract on this chain.*Give the app that id"):
        stack.policy("src").allow("wallet")


def test_same_seed_gives_the_same_chain(stack: LiveStack) -> None:
    node, _, _ = owner_of(stack)
    with LiveStack(auth={"src": "eth"}) as other:
        there, kms, _ = owner_of(other)
        assert kms.address == stack.description["chain"]["contracts"]["kms"]
        assert there.eth.get_block(3)["hash"] == node.eth.get_block(3)["hash"]
        assert list(other.description["policies"]) == ["dst"]
        other.boot()


def test_state_folder_keeps_the_chain_and_what_was_revoked(tmp_path: Path) -> None:
    with LiveStack(auth=BOTH, state=tmp_path) as stack:
        stack.policy("src").deny("app")
        block = owner_of(stack)[0].eth.get_block("latest")
    with LiveStack(auth=BOTH, state=tmp_path) as stack:
        assert owner_of(stack)[0].eth.get_block("latest")["hash"] == block["hash"]
        with refused("Compose hash not allowed"):
            stack.boot()
    text = json.dumps(stack_files(tmp_path))
    assert not [key for key in private_keys(Seed.of(DEFAULT_SEED).derive) if key.hex() in text]


def stack_files(folder: Path) -> list[str]:
    return [path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()]


def test_fresh_stack_allows_nothing_and_passes_the_runbook_by_transactions() -> None:
    with LiveStack(auth=BOTH, fresh=True) as stack:
        shown = summary(stack.description, 1.0)
        assert "and the contract of kms-src and the contract of kms-dst decide (1.0 s)" in shown
        _, kms, app = owner_of(stack)
        content = stack.policy("src").content
        assert (content["osImages"], content["kms"]["mrAggregated"], content["apps"]) == ([], [], {})
        assert not kms.functions.registeredApps(app.address).call()
        info = stack.kms("src").rpc("GetAttestationInfo")
        assert (info["eth_rpc_url"], info["kms_contract_address"]) == (stack.services["chain"], kms.address)
        with refused("OS image is not allowed"):
            stack.kms("src").bootstrap()
        transcript = asyncio.run(performed(stack))
        assert transcript.ok
        (sent,) = (text for name, text in transcript.files.items() if "4.02-auth-src-allow-both-and-app" in name)
        assert [each.partition("(")[0] for each in json.loads(sent)["transactions"]] == ["deployAndRegisterApp"]
        assert kms.functions.registeredApps(app.address).call()
        written = json.dumps([transcript.files, transcript.to_json(), stack.in_thread(everything_told)])
    assert not [key for key in private_keys(Seed.of(DEFAULT_SEED).derive) if key.hex() in written]


def everything_told(stack: Stack) -> list[Any]:
    """Return the journal, the logs and the description of a stack."""
    logs = {name: stack.log_lines(name, logging.DEBUG) for name in stack.services}
    return [stack.control.journal.records(), logs, stack.description()]


async def performed(stack: LiveStack) -> Transcript:
    """Perform the runbook on a fresh stack, from its description alone."""
    transcript = Transcript(lambda *_: None, lambda *_: None, Secrets())
    description = stack.description
    target = Target.of(description, "the stack", Path(description["state"]))
    entropy = Seed.of("tests").stream("client")
    async with RunbookRun(target, PrpcKmsClient(""), transcript, entropy=entropy, clock=wall_clock, patience=60) as run:
        await run_cases(run)
    return transcript


def test_revert_and_a_saved_state_take_the_chain_along(stack: LiveStack) -> None:
    node, _, app = owner_of(stack)
    allowed = stack.policy("src").content
    head = node.eth.get_block("latest")["hash"]
    stack.snapshot("allowed")
    stack.policy("src").deny("app")
    denied = stack.control.save()
    stack.revert("allowed")
    assert node.eth.get_block("latest")["hash"] == head
    assert stack.policy("src").content == allowed
    stack.boot()
    stack.control.load(json.loads(json.dumps(denied)))
    with refused("Compose hash not allowed"):
        stack.boot()
    stack.reset()
    assert app.functions.allowedComposeHashes(bytes.fromhex(stack.description["app"]["compose_hash"])).call()
    assert not [key for key in private_keys(Seed.of(DEFAULT_SEED).derive) if key.hex() in json.dumps(denied)]


def test_state_of_a_stack_without_the_chain_is_refused(stack: LiveStack) -> None:
    state = stack.control.save()
    with pytest.raises(ControlError, match="with no chain of its own: start this one without --auth eth"):
        stack.control.load({**state, "chain": None})
    bad = [*state["chain"], {"timestamp": 5, "raw": "0x"}]
    with pytest.raises(ControlError, match="the state cannot be restored: the chain: "):
        stack.control.load({**state, "chain": bad})


def test_journal_has_what_the_webhook_asked_of_which_block_and_what_was_answered(stack: LiveStack) -> None:
    stack.chain.remove_compose_hash(stack.app())
    with refused("Compose hash not allowed"):
        stack.boot()
    (denied,) = stack.journal.find("/bootAuth/app", outcome="denied")
    asked = [(inner["call"], inner["caller"], inner["chain"]) for inner in denied["inner"]]
    block = hex(stack.chain.block)
    assert [call for call, _, _ in asked] == ["eth_chainId", "eth_blockNumber", "eth_call", "eth_call"]
    assert {caller for _, caller, _ in asked} == {"auth-src"}
    assert asked[1][2] == {"result": block}
    reason = [False, "Compose hash not allowed"]
    assert asked[2][2] == {"function": "isAppAllowed", "block": block, "result": reason}
    said = [line for line in lines(denied) if f'eth_call  200 isAppAllowed at {block}: [false, "Compose hash' in line]
    assert len(said) == 1


def test_fault_before_the_chain_denies_by_what_it_does(stack: LiveStack) -> None:
    with (
        stack.fault(service="chain", call="eth_call", caller="auth-src", kind="status", status=429),
        refused("authorization backend unavailable"),
    ):
        stack.boot()
    (denied, *_) = stack.journal.find("/bootAuth/*", outcome="denied")
    assert denied["decision"]["chain_error"] == "eth_call: the node answered HTTP status 429 Too Many Requests"
    stack.boot()


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ({"kind": "pruned"}, "missing trie node: the state of block"),
        ({"kind": "wrong-chain-id"}, "chain ID mismatch: 31337 expected, got 31338"),
        ({"kind": "stale", "blocks": 4, "call": "eth_call"}, "missing trie node: the state of block"),
    ],
)
def test_node_that_is_wrong_denies(stack: LiveStack, fault: dict[str, Any], why: str) -> None:
    with stack.fault(service="chain", **fault), refused("authorization backend unavailable"):
        stack.boot()
    (denied, *_) = stack.journal.find("/bootAuth/*", outcome="denied")
    assert why in denied["decision"]["chain_error"]
    stack.boot()


def test_node_that_lags_behind_still_allows_what_was_revoked(stack: LiveStack) -> None:
    stack.chain.remove_compose_hash(stack.app())
    with stack.fault(service="chain", kind="stale"):
        stack.boot()
    with refused("Compose hash not allowed"):
        stack.boot()


def test_reorganisation_takes_a_revocation_back(stack: LiveStack) -> None:
    stack.chain.remove_compose_hash(stack.app())
    head = stack.chain.block
    with stack.fault(service="chain", kind="reorg", times=1):
        stack.boot()
    assert stack.chain.block == head
    with pytest.raises(ControlError, match="reorg: only the chain of a stack"):
        stack.control.add_fault(service="auth-src", kind="reorg")


def test_stack_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dstack_emu.chain.pyevm", None)
    with pytest.raises(StackError, match=r"pip install 'dstack-emu\[eth\]"), LiveStack(auth=BOTH):
        pass
