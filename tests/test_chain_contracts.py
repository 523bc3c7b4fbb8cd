"""The rules of the contracts: each allowed and refused, in both revisions, and random states against a model."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from dstack_emu.attest.release import AuthEthRevision
from dstack_emu.chain import abi
from dstack_emu.chain.contracts import BOOT_INFO, BootInfo
from dstack_emu.chain.engine import Message, Outcome
from tests.contract_model import AppModel, KmsModel
from tests.contract_world import AROUND, GAS, NEW_OWNER, OWNER, STRANGER, Code, World
from tests.repository import ROOT

DECISIONS = int(os.environ.get("DSTACK_EMU_DECISIONS", "30"))
SEED = os.environ.get("DSTACK_EMU_DECISIONS_SEED", "contracts")

IMAGE, MR, DEVICE, COMPOSE, OTHER = (bytes([number]) * 32 for number in (1, 2, 3, 4, 9))
TCB = "TCB status is not up to date"
TOPICS = {
    name: abi.topic(name)
    for name in (
        "Upgraded(address)",
        "ComposeHashAdded(bytes32)",
        "DeviceAdded(bytes32)",
        "OwnershipTransferred(address,address)",
        "OwnershipTransferStarted(address,address)",
        "Initialized(uint64)",
        "AppRegistered(address)",
        "AppDeployedViaFactory(address,address)",
        "PolicyChanged(address,bytes32,bytes32,bool)",
        "UpgradesDisabled()",
    )
}


@pytest.fixture(scope="module", params=["0.5.11", "next"])
def shared_world(request: pytest.FixtureRequest) -> tuple[World, bytes]:
    """Contracts of one revision that allow one KMS and one app, whose id comes with them."""
    revision: AuthEthRevision = request.param
    world = World(Code.ours(revision))
    app = world.deploy_app(compose=COMPOSE, device=DEVICE)
    world.act(world.kms, "addOsImageHash(bytes32)", IMAGE)
    world.act(world.kms, "addKmsAggregatedMr(bytes32)", MR)
    world.act(world.kms, "addKmsDevice(bytes32)", DEVICE)
    return world, app


@pytest.fixture
def allowing(shared_world: tuple[World, bytes]) -> Iterator[tuple[World, BootInfo]]:
    """The same, as it began, and a boot that is allowed."""
    world, app = shared_world
    root = world.root
    yield world, BootInfo(app, COMPOSE, b"\5" * 20, DEVICE, MR, OTHER, IMAGE, "UpToDate", ("INTEL-SA-1",))
    world.root = root


def refusal(outcome: Outcome) -> bytes:
    """Return what an act was refused with."""
    assert outcome.failure is not None
    return outcome.output


def error(signature: str, *values: Any) -> bytes:
    return abi.call(signature, *values)


def text(message: str) -> bytes:
    return abi.call("Error(string)", message)


def names(outcome: Outcome) -> list[str]:
    """Return the events of an act, by their names."""
    assert outcome.failure is None, outcome
    by_topic = {topic: name for name, topic in TOPICS.items()}
    return [by_topic.get(log.topics[0], "?").partition("(")[0] for log in outcome.logs]


def test_outcome_of_a_call_is_kept_for_the_same_state_block_and_message_alone(allowing: tuple[World, BootInfo]) -> None:
    world, boot = allowing
    call, number = world.engine.call, bytes.fromhex("435f5260205ff3")  # creates a contract of the block's number
    asked = Message(OWNER, world.kms, abi.call(f"isAppAllowed({BOOT_INFO})", boot.values()), GAS)
    first, block = call(world.root, AROUND, asked), Message(OWNER, None, number, GAS)
    assert call(world.root, AROUND, asked) is first
    assert call(world.root, AROUND, replace(asked, gas=30_000)).failure is not None
    assert [int.from_bytes(call(world.root, replace(AROUND, number=at), block).output) for at in (7, 8, 7)] == [7, 8, 7]
    world.act(world.kms, "removeOsImageHash(bytes32)", IMAGE)
    assert abi.decode("(bool,string)", call(world.root, AROUND, asked).output) == [False, "OS image is not allowed"]


# ---- decisions


def test_kms_and_app_that_the_contracts_list_are_allowed(allowing: tuple[World, BootInfo]) -> None:
    world, boot = allowing
    assert world.kms_decision(boot) == (True, "")
    assert world.app_decision(boot) == (True, "")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"tcb_status": "OutOfDate"}, TCB),
        ({"tcb_status": "UpToDate "}, TCB),
        ({"tcb_status": ""}, TCB),
        ({"os_image_hash": OTHER}, "OS image is not allowed"),
        ({"mr_aggregated": OTHER}, "Aggregated MR not allowed"),
        ({"device_id": OTHER}, "KMS is not allowed to boot on this device"),
        ({"tcb_status": "x" * 1000, "os_image_hash": OTHER}, TCB),
        ({"os_image_hash": OTHER, "mr_aggregated": OTHER}, "OS image is not allowed"),
        ({"mr_aggregated": OTHER, "device_id": OTHER}, "Aggregated MR not allowed"),
    ],
)
def test_kms_is_refused_by_the_first_rule_that_it_breaks(
    changed: dict[str, Any], reason: str, allowing: tuple[World, BootInfo]
) -> None:
    world, boot = allowing
    assert world.kms_decision(replace(boot, **changed)) == (False, reason)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"app_id": STRANGER}, "App not registered"),
        ({"os_image_hash": OTHER}, "OS image is not allowed"),
        ({"compose_hash": OTHER}, "Compose hash not allowed"),
        ({"device_id": OTHER}, "Device not allowed"),
        ({"app_id": STRANGER, "os_image_hash": OTHER}, "App not registered"),
        ({"os_image_hash": OTHER, "compose_hash": OTHER}, "OS image is not allowed"),
        ({"compose_hash": OTHER, "device_id": OTHER}, "Compose hash not allowed"),
    ],
)
def test_app_is_refused_by_the_first_rule_that_it_breaks(
    changed: dict[str, Any], reason: str, allowing: tuple[World, BootInfo]
) -> None:
    world, boot = allowing
    assert world.app_decision(replace(boot, **changed)) == (False, reason)


@pytest.mark.parametrize(
    "changed",
    [
        {"instance_id": OWNER},
        {"mr_system": IMAGE},
        {"mr_aggregated": OTHER},
        {"tcb_status": "OutOfDate"},
        {"advisory_ids": ("a" * 1000,) * 200},
    ],
)
def test_app_is_allowed_whatever_no_rule_looks_at(changed: dict[str, Any], allowing: tuple[World, BootInfo]) -> None:
    world, boot = allowing
    assert world.app_decision(replace(boot, **changed)) == (True, "")


def test_app_that_requires_it_is_refused_without_the_tcb_status(allowing: tuple[World, BootInfo]) -> None:
    world, boot = allowing
    late = replace(boot, tcb_status="SWHardeningNeeded", compose_hash=OTHER)
    world.act(boot.app_id, "setRequireTcbUpToDate(bool)", True)
    assert world.app_decision(late) == (False, TCB)
    world.act(boot.app_id, "setRequireTcbUpToDate(bool)", False)
    assert world.app_decision(late) == (False, "Compose hash not allowed")


def test_registered_address_without_a_contract_is_refused(allowing: tuple[World, BootInfo]) -> None:
    world, boot = allowing
    world.act(world.kms, "registerApp(address)", STRANGER, sender=STRANGER)
    assert world.app_decision(replace(boot, app_id=STRANGER)) == (False, "App not deployed or invalid address")


def test_app_that_answers_no_question_makes_the_call_revert(allowing: tuple[World, BootInfo]) -> None:
    world, boot = allowing
    world.act(world.kms, "registerApp(address)", world.kms)  # asks itself, until its gas is used up
    call = abi.call(f"isAppAllowed({BOOT_INFO})", replace(boot, app_id=world.kms).values())
    assert world.send(world.kms, call, keeps=False).failure is not None


@pytest.mark.parametrize(
    ("act", "undo", "on_app", "member"),
    [
        ("addOsImageHash", "removeOsImageHash", False, IMAGE),
        ("addComposeHash", "removeComposeHash", True, COMPOSE),
        ("addDevice", "removeDevice", True, DEVICE),
    ],
)
def test_app_is_refused_after_what_allowed_it_is_withdrawn(
    act: str, undo: str, on_app: bool, member: bytes, allowing: tuple[World, BootInfo]
) -> None:
    world, boot = allowing
    contract = boot.app_id if on_app else world.kms
    world.act(contract, f"{undo}(bytes32)", member)
    assert world.app_decision(boot)[0] is False
    world.act(contract, f"{act}(bytes32)", member)
    assert world.app_decision(boot) == (True, "")


@pytest.mark.parametrize("name", ["KmsAggregatedMr", "KmsDevice", "OsImageHash"])
def test_kms_is_refused_after_what_allowed_it_is_withdrawn(name: str, allowing: tuple[World, BootInfo]) -> None:
    world, boot = allowing
    member = {"KmsAggregatedMr": MR, "KmsDevice": DEVICE, "OsImageHash": IMAGE}[name]
    world.act(world.kms, f"remove{name}(bytes32)", member)
    assert world.kms_decision(boot)[0] is False
    world.act(world.kms, f"add{name}(bytes32)", member)
    assert world.kms_decision(boot) == (True, "")


# ---- who may do what

OF_KMS = (
    ("setKmsInfo((bytes,bytes,bytes,bytes))", (b"", b"", b"", b"")),
    ("setKmsQuote(bytes)", b""),
    ("setKmsEventlog(bytes)", b""),
    ("setGatewayAppId(string)", ""),
    ("setAppImplementation(address)", OWNER),
    ("addKmsAggregatedMr(bytes32)", OTHER),
    ("removeKmsAggregatedMr(bytes32)", OTHER),
    ("addKmsDevice(bytes32)", OTHER),
    ("removeKmsDevice(bytes32)", OTHER),
    ("addOsImageHash(bytes32)", OTHER),
    ("removeOsImageHash(bytes32)", OTHER),
    ("transferOwnership(address)", OWNER),
)
OF_APP = (
    ("addComposeHash(bytes32)", OTHER),
    ("removeComposeHash(bytes32)", OTHER),
    ("addDevice(bytes32)", OTHER),
    ("removeDevice(bytes32)", OTHER),
    ("setAllowAnyDevice(bool)", True),
    ("setRequireTcbUpToDate(bool)", True),
    ("transferOwnership(address)", OWNER),
)


@pytest.mark.parametrize(("on_app", "acts"), [(False, OF_KMS), (True, OF_APP)], ids=["kms", "app"])
def test_acts_of_the_owner_are_refused_to_others(
    on_app: bool, acts: tuple[tuple[str, Any], ...], allowing: tuple[World, BootInfo]
) -> None:
    world, boot = allowing
    contract = boot.app_id if on_app else world.kms
    expected = error("OwnableUnauthorizedAccount(address)", STRANGER)
    for signature, value in acts:
        assert refusal(world.act(contract, signature, value, sender=STRANGER)) == expected, signature
        assert world.act(contract, signature, value).failure is None, signature
    for signature in ("renounceOwnership()", *(("disableUpgrades()",) if on_app else ())):
        assert refusal(world.act(contract, signature, sender=STRANGER)) == expected, signature


def test_everybody_may_register_and_deploy_an_app(allowing: tuple[World, BootInfo]) -> None:
    world, _ = allowing
    assert world.act(world.kms, "registerApp(address)", OTHER[:20], sender=STRANGER).failure is None
    values = (STRANGER, True, True, bytes(32), COMPOSE)
    older = world.act(world.kms, "deployAndRegisterApp(address,bool,bool,bytes32,bytes32)", *values, sender=STRANGER)
    app = abi.decode("(address)", older.output)[0]
    assert world.ask(app, "owner()", "(address)") == STRANGER
    assert world.ask(app, "requireTcbUpToDate()", "(bool)") is False
    assert world.ask(app, "allowAnyDevice()", "(bool)") is True
    assert world.ask(world.kms, "registeredApps(address)", "(bool)", app) is True


@pytest.mark.parametrize(
    ("signature", "values", "message"),
    [
        ("registerApp(address)", (bytes(20),), "Invalid app ID"),
        ("setAppImplementation(address)", (bytes(20),), "Invalid implementation address"),
        (
            "deployAndRegisterApp(address,bool,bool,bool,bytes32,bytes32)",
            (bytes(20), False, False, False, OTHER, OTHER),
            "Invalid owner address",
        ),
        (
            "deployAndRegisterApp(address,bool,bool,bytes32,bytes32)",
            (bytes(20), False, False, OTHER, OTHER),
            "Invalid owner address",
        ),
    ],
)
def test_acts_are_refused_with_the_text_of_the_rule(
    signature: str, values: tuple[Any, ...], message: str, allowing: tuple[World, BootInfo]
) -> None:
    world, _ = allowing
    assert refusal(world.act(world.kms, signature, *values)) == text(message)


def test_factory_without_an_implementation_is_refused(allowing: tuple[World, BootInfo]) -> None:
    world, _ = allowing
    bare = world.proxy(world.kms_implementation, abi.call("initialize(address,address)", OWNER, bytes(20)))
    signature = "deployAndRegisterApp(address,bool,bool,bool,bytes32,bytes32)"
    refused = world.act(bare, signature, OWNER, False, False, False, OTHER, OTHER)
    assert refusal(refused) == text("DstackApp implementation not set")


def test_contract_is_initialized_once(allowing: tuple[World, BootInfo]) -> None:
    world, boot = allowing
    app_values = (OWNER, False, False, False, OTHER, OTHER)
    acts = (
        (world.kms, "initialize(address,address)", (OWNER, OWNER)),
        (world.kms_implementation, "initialize(address,address)", (OWNER, OWNER)),
        (boot.app_id, "initialize(address,bool,bool,bool,bytes32,bytes32)", app_values),
        (world.app_implementation, "initialize(address,bool,bool,bool,bytes32,bytes32)", app_values),
        (boot.app_id, "initialize(address,bool,bool,bytes32,bytes32)", app_values[1:]),
    )
    for contract, signature, values in acts[:4]:
        assert refusal(world.act(contract, signature, *values)) == error("InvalidInitialization()")
    older = (OWNER, False, False, OTHER, OTHER)
    assert refusal(world.act(acts[4][0], acts[4][1], *older)) == error("InvalidInitialization()")


# ---- ownership, upgrades, events


def test_new_owner_takes_over_as_the_revision_says(allowing: tuple[World, BootInfo]) -> None:
    world, _ = allowing
    handed = world.act(world.kms, "transferOwnership(address)", NEW_OWNER)
    if names(handed) == ["OwnershipTransferStarted"]:
        assert world.ask(world.kms, "owner()", "(address)") == OWNER
        assert world.ask(world.kms, "pendingOwner()", "(address)") == NEW_OWNER
        expected = error("OwnableUnauthorizedAccount(address)", STRANGER)
        assert refusal(world.act(world.kms, "acceptOwnership()", sender=STRANGER)) == expected
        handed = world.act(world.kms, "acceptOwnership()", sender=NEW_OWNER)
        assert world.ask(world.kms, "pendingOwner()", "(address)") == bytes(20)
    else:
        assert refusal(world.act(world.kms, "acceptOwnership()", sender=NEW_OWNER)) == b""
        expected = error("OwnableInvalidOwner(address)", bytes(20))
        assert refusal(world.act(world.kms, "transferOwnership(address)", bytes(20), sender=NEW_OWNER)) == expected
    assert names(handed) == ["OwnershipTransferred"]
    assert world.ask(world.kms, "owner()", "(address)") == NEW_OWNER


def test_events_of_a_deployment_have_the_order_of_the_revision(allowing: tuple[World, BootInfo]) -> None:
    world, _ = allowing
    signature = "deployAndRegisterApp(address,bool,bool,bool,bytes32,bytes32)"
    seen = names(world.act(world.kms, signature, OWNER, False, False, False, DEVICE, COMPOSE))
    bare = [name for name in seen if name != "PolicyChanged"]
    assert bare == [
        "Upgraded",
        "DeviceAdded",
        "ComposeHashAdded",
        "OwnershipTransferred",
        "Initialized",
        "AppRegistered",
        "AppDeployedViaFactory",
    ]
    if "PolicyChanged" in seen:
        followed = [seen[place - 1] for place, name in enumerate(seen) if name == "PolicyChanged"]
        assert followed == ["DeviceAdded", "ComposeHashAdded", "AppRegistered"]


def test_each_change_of_a_policy_is_told_in_revision_next() -> None:
    world = World(Code.ours("next"))
    for name, signature, value, subject, enabled in (
        ("os-image", "addOsImageHash(bytes32)", IMAGE, IMAGE, True),
        ("os-image", "removeOsImageHash(bytes32)", IMAGE, IMAGE, False),
        ("kms-aggregated-mr", "addKmsAggregatedMr(bytes32)", MR, MR, True),
        ("kms-device", "removeKmsDevice(bytes32)", DEVICE, DEVICE, False),
        ("registered-app", "registerApp(address)", STRANGER, STRANGER.rjust(32, b"\0"), True),
        ("app-implementation", "setAppImplementation(address)", STRANGER, STRANGER.rjust(32, b"\0"), True),
        ("gateway-app-id", "setGatewayAppId(string)", "gateway", abi.topic("gateway"), True),
        ("kms-info", "setKmsInfo((bytes,bytes,bytes,bytes))", (b"key", b"", b"", b""), abi.topic("key"), True),
    ):
        log = world.act(world.kms, signature, value).logs[-1]
        assert log.topics == (
            TOPICS["PolicyChanged(address,bytes32,bytes32,bool)"],
            OWNER.rjust(32, b"\0"),
            abi.topic(name),
            subject,
        ), signature
        assert int.from_bytes(log.data, "big") == enabled, signature


def test_proxy_is_upgraded_by_its_owner_to_an_implementation(allowing: tuple[World, BootInfo]) -> None:
    world, boot = allowing
    other = world.create(world.code.app)
    signature = "upgradeToAndCall(address,bytes)"
    for implementation, expected in (
        (STRANGER, b""),
        (boot.app_id, error("ERC1967InvalidImplementation(address)", boot.app_id)),
    ):
        assert refusal(world.act(boot.app_id, signature, implementation, b"")) == expected
    context = error("UUPSUnauthorizedCallContext()")
    assert refusal(world.act(world.app_implementation, signature, other, b"")) == context
    assert refusal(world.act(boot.app_id, signature, other, b"", sender=STRANGER)) == error(
        "OwnableUnauthorizedAccount(address)", STRANGER
    )
    assert "Upgraded" in names(world.act(boot.app_id, signature, other, abi.call("removeDevice(bytes32)", DEVICE)))
    assert world.app_decision(boot) == (False, "Device not allowed")
    world.act(boot.app_id, "disableUpgrades()")
    assert refusal(world.act(boot.app_id, signature, other, b"")) == text("Upgrades are permanently disabled")


def test_information_of_the_kms_is_kept_whole_and_replaced_whole(allowing: tuple[World, BootInfo]) -> None:
    world, _ = allowing
    for info in (
        (b"k" * 65, b"c" * 31, b"q" * 5000, b"e" * 32),
        (b"", b"c" * 33, b"q" * 31, b"e" * 4097),
        (b"", b"", b"", b""),
    ):
        assert world.act(world.kms, "setKmsInfo((bytes,bytes,bytes,bytes))", info).failure is None
        assert world.ask(world.kms, "kmsInfo()", "(bytes,bytes,bytes,bytes)") == info
    world.act(world.kms, "setKmsQuote(bytes)", b"quote")
    world.act(world.kms, "setKmsEventlog(bytes)", b"log")
    assert world.ask(world.kms, "kmsInfo()", "(bytes,bytes,bytes,bytes)") == (b"", b"", b"quote", b"log")


@pytest.mark.parametrize(
    ("interface", "kms", "app"),
    [("01ffc9a7", True, True), ("1e079198", True, True), ("8fd37527", False, True), ("ffffffff", False, False)],
)
def test_interfaces_are_told(interface: str, kms: bool, app: bool, allowing: tuple[World, BootInfo]) -> None:
    world, boot = allowing
    for contract, expected in ((world.kms, kms), (boot.app_id, app)):
        answer = world.ask(contract, "supportsInterface(bytes4)", "(bool)", bytes.fromhex(interface))
        assert answer is expected


# ---- random states


def test_contract_and_model_decide_the_same_in_random_states() -> None:
    chosen = random.Random(SEED)
    members = [bytes([number]) * 32 for number in range(1, 4)]
    world, model = World(Code.ours("next")), KmsModel()
    apps = [world.deploy_app(), world.deploy_app(any_device=True), world.deploy_app(tcb=True)]
    model.contracts = dict(zip(apps, (AppModel(), AppModel(any_device=True), AppModel(requires_tcb=True)), strict=True))
    model.registered = set(apps)
    subjects = (*apps, STRANGER, NEW_OWNER)

    def change() -> None:
        member, adds = chosen.choice(members), chosen.random() < 0.6
        kind = chosen.choice(("image", "kms", "device", "register", "compose", "app device", "any device", "tcb"))
        app = chosen.choice(apps)
        verb = "add" if adds else "remove"
        known = model.contracts[app]
        sets = {
            "image": (world.kms, "OsImageHash", model.images),
            "kms": (world.kms, "KmsAggregatedMr", model.kms),
            "device": (world.kms, "KmsDevice", model.devices),
            "compose": (app, "ComposeHash", known.compose_hashes),
            "app device": (app, "Device", known.devices),
        }
        if kind in sets:
            contract, name, kept = sets[kind]
            world.act(contract, f"{verb}{name}(bytes32)", member)
            (kept.add if adds else kept.discard)(member)
        elif kind == "register":
            world.act(world.kms, "registerApp(address)", STRANGER, sender=STRANGER)
            model.registered.add(STRANGER)
        elif kind == "any device":
            world.act(app, "setAllowAnyDevice(bool)", adds)
            known.any_device = adds
        else:
            world.act(app, "setRequireTcbUpToDate(bool)", adds)
            known.requires_tcb = adds

    for _ in range(DECISIONS):
        change()
        compose, device, mr, image = (chosen.choice(members) for _ in range(4))
        status = chosen.choice(("UpToDate", "UpToDate", "OutOfDate", ""))
        boot = BootInfo(chosen.choice(subjects), compose, OWNER, device, mr, OTHER, image, status)
        assert world.app_decision(boot) == model.decide_app(boot)
        assert world.kms_decision(boot) == model.decide_kms(boot)


# ---- the compiler


def test_committed_bytecode_is_what_the_compiler_makes() -> None:
    tool = [sys.executable, str(ROOT / "tools/compile_contracts.py"), "--check"]
    done = subprocess.run(tool, capture_output=True, text=True, check=False)
    if "no vyper" in done.stderr:
        pytest.skip("no vyper: `make contracts` installs it")
    assert (done.returncode, done.stdout) == (0, "dstack_emu/chain/contracts is fresh\n"), done.stderr
