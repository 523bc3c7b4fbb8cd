"""The contracts beside those that upstream released, on every selector: the same answers, errors, events and storage.

Skipped unless DSTACK_ETH_BYTECODE names a folder with upstream's `DstackKms__factory.ts` and `DstackApp__factory.ts`
(`kms/auth-eth/typechain-types/factories/contracts` of 0.5.11).
"""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.attest.keccak import keccak
from dstack_emu.chain import abi
from dstack_emu.chain.engine import Outcome
from tests.contract_world import NEW_OWNER, OWNER, STRANGER, Code, World, kind, signature

FOLDER = os.environ.get("DSTACK_ETH_BYTECODE")
STEPS = int(os.environ.get("DSTACK_ETH_STEPS", "1500"))
pytestmark = [
    pytest.mark.skipif(FOLDER is None, reason="DSTACK_ETH_BYTECODE names no folder with upstream's contracts"),
    pytest.mark.timeout(3600),
]

WORDS = (bytes(32), b"\x11" * 32, b"\x22" * 32, b"\xff" * 32)
TEXTS = ("", "UpToDate", "OutOfDate", "UpToDat", "a text that is longer than one word of a slot")
RARE = ("transferOwnership", "renounceOwnership", "upgradeToAndCall", "disableUpgrades")
"""Functions after which most others do the same for ever; the state after them is mostly dropped."""
PLACES = {
    "owner": 0x9016D09D72D40FDAE2FD8CEAC6B6234C7706214FD39C1CD1E609A0528C199300,
    "initialized": 0xF0C57E16840DF040F15088DC2F81FE391C3923BEC73E23A9662EFC9C229C6A00,
    "implementation": 0x360894A13BA1A3210667C828492DB98DCA3E2076CC3735A920A3CA505D382BBC,
}


def released() -> Code:
    return Code.released(Path(str(FOLDER)))


class Pair:
    """Ours and theirs, which are given the same acts."""

    def __init__(self) -> None:
        self.ours, self.theirs = World(Code.ours("0.5.11")), World(released())
        self.apps = [self.ours.deploy_app(compose=WORDS[1], device=WORDS[1]), self.ours.deploy_app(any_device=True)]
        assert [self.theirs.deploy_app(compose=WORDS[1], device=WORDS[1]), self.theirs.deploy_app(any_device=True)] == (
            self.apps
        )

    def send(self, to: bytes | None, data: bytes, sender: bytes, *, keeps: bool, value: int = 0) -> None:
        """Do an act in both, and compare how it ends."""
        ours, theirs = (world.send(to, data, sender, keeps=keeps, value=value) for world in (self.ours, self.theirs))
        assert seen(ours) == seen(theirs), (to and to.hex(), data.hex(), sender.hex())

    def compare_storage(self) -> None:
        """Compare the slots that the contracts use."""
        for address in (self.ours.kms, *self.apps):
            for slot in places():
                ours, theirs = (world.engine.storage(world.root, address, slot) for world in (self.ours, self.theirs))
                assert ours == theirs, (address.hex(), hex(slot))


def seen(outcome: Outcome) -> tuple[object, ...]:
    """Return what of an outcome is the contract's: all but its gas, and how the EVM ended what failed."""
    output = outcome.output if outcome.reverted or outcome.failure is None else b""
    return outcome.failure is None, output, outcome.logs


def places() -> Iterator[int]:
    """Return slots: those of variables, of byte strings, and of the members of mappings."""
    yield from PLACES.values()
    for slot in range(12):
        yield slot
        first = int.from_bytes(keccak(slot.to_bytes(32, "big")), "big")
        yield from (first + each for each in range(4))
        keys = (*WORDS, *(each.rjust(32, b"\0") for each in (OWNER, STRANGER, NEW_OWNER, bytes(20))))
        yield from (int.from_bytes(keccak(key + slot.to_bytes(32, "big")), "big") for key in keys)


def test_descriptions_agree() -> None:
    def described(items: list[dict[str, Any]]) -> set[str]:
        return {line(item) for item in items if item["type"] != "fallback"}

    def line(item: dict[str, Any]) -> str:
        values = [
            [(kind(each), each["name"], each.get("indexed", False)) for each in item.get(side, ())]
            for side in ("inputs", "outputs")
        ]
        return str((item["type"], item.get("name"), item.get("stateMutability"), item.get("anonymous"), values))

    ours, theirs = Code.ours("0.5.11"), released()
    assert described(ours.kms_abi) == described(theirs.kms_abi)
    assert described(ours.app_abi) == described(theirs.app_abi)


class Chooser:
    """Random values of the types of an ABI, from few, so that acts meet."""

    def __init__(self, pair: Pair, seed: str) -> None:
        self.random = random.Random(seed)
        ours = pair.ours
        self.contracts = (ours.kms, *pair.apps, ours.kms_implementation, ours.app_implementation)
        self.addresses = (*self.contracts, OWNER, STRANGER, NEW_OWNER, bytes(20))
        self.calls = (
            b"",
            abi.call("owner()"),
            abi.call("initialize(address,address)", OWNER, OWNER),
            abi.call("addDevice(bytes32)", WORDS[1]),
            b"\x01\x02\x03",
        )

    def value(self, wanted: str) -> Any:
        """Return a value of a type."""
        if wanted.endswith("[]"):
            return [self.value(wanted[:-2]) for _ in range(self.random.randrange(3))]
        if wanted.startswith("("):
            return [self.value(each) for each in abi.members(wanted)]
        choices: dict[str, Callable[[], Any]] = {
            "address": lambda: self.random.choice(self.addresses),
            "bool": lambda: self.random.random() < 0.5,
            "bytes32": lambda: self.random.choice(WORDS),
            "bytes4": lambda: self.random.choice(
                tuple(map(bytes.fromhex, ("01ffc9a7", "1e079198", "8fd37527", "ffffffff")))
            ),
            "string": lambda: self.random.choice(TEXTS),
            "bytes": lambda: self.random.choice((*self.calls, self.random.randbytes(self.random.randrange(100)))),
        }
        return choices[wanted]()

    def call(self, item: dict[str, Any]) -> bytes:
        """Return a call of a function, now and then a malformed one.

        Not of functions with byte strings: what is malformed there, each compiler finds at another place.
        """
        kinds = [kind(each) for each in item["inputs"]]
        data = abi.call(signature(item), *map(self.value, kinds))
        if self.random.random() < 0.85 or not set(kinds) <= {"address", "bool", "bytes32", "bytes4"}:
            return data
        cut = data[: self.random.randrange(len(data) + 1)]
        return self.random.choice(
            (cut, data + b"\0", *(cut + byte + data[len(cut) + 1 :] for byte in (b"\1", b"\xff")))
        )


@pytest.mark.parametrize("seed", ["one", "two"])
def test_every_selector_does_the_same(seed: str) -> None:
    pair = Pair()
    chooser = Chooser(pair, seed)
    functions = [item for item in (*pair.theirs.code.kms_abi, *pair.theirs.code.app_abi) if item["type"] == "function"]
    for step in range(STEPS):
        item = functions[step % len(functions)]
        belongs = pair.ours.kms if item in pair.theirs.code.kms_abi else chooser.random.choice(pair.apps)
        to = belongs if chooser.random.random() < 0.8 else chooser.random.choice(chooser.addresses)
        sender = OWNER if chooser.random.random() < 0.8 else chooser.random.choice((STRANGER, NEW_OWNER))
        keeps = item["name"] not in RARE or chooser.random.random() < 0.03
        value = 1 if chooser.random.random() < 0.03 else 0
        pair.send(to, chooser.call(item), sender, keeps=keeps, value=value)
        if step % 300 == 299:
            pair.compare_storage()
            pair = Pair()


def test_proxy_keeps_its_state_when_upstreams_implementation_is_replaced_by_ours_and_back() -> None:
    theirs = World(released())
    app = theirs.deploy_app(compose=WORDS[1])
    info = (b"k" * 65, b"c" * 31, b"q" * 5000, b"")
    theirs.act(theirs.kms, "setKmsInfo((bytes,bytes,bytes,bytes))", info)
    theirs.act(theirs.kms, "setGatewayAppId(string)", "a gateway")
    theirs.act(theirs.kms, "addOsImageHash(bytes32)", WORDS[2])
    ours = theirs.create(Code.ours("next").kms)
    for implementation in (ours, theirs.kms_implementation):
        assert theirs.act(theirs.kms, "upgradeToAndCall(address,bytes)", implementation, b"").failure is None
        assert theirs.ask(theirs.kms, "kmsInfo()", "(bytes,bytes,bytes,bytes)") == info
        assert theirs.ask(theirs.kms, "gatewayAppId()", "(string)") == "a gateway"
        assert theirs.ask(theirs.kms, "allowedOsImages(bytes32)", "(bool)", WORDS[2])
        assert theirs.ask(theirs.kms, "registeredApps(address)", "(bool)", app)
        assert theirs.ask(theirs.kms, "owner()", "(address)") == OWNER
        theirs.act(theirs.kms, "setGatewayAppId(string)", "another")
        theirs.act(theirs.kms, "setGatewayAppId(string)", "a gateway")
