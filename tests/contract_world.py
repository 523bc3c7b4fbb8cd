"""dstack's contracts on an engine without a ledger: each act takes a state and gives another one."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstack_emu.attest.release import AuthEthRevision
from dstack_emu.chain import abi
from dstack_emu.chain.artefacts import app_contract, kms_contract, proxy_contract
from dstack_emu.chain.contracts import BOOT_INFO, BootInfo
from dstack_emu.chain.engine import Message, Outcome, Surroundings
from dstack_emu.chain.transaction import created_address

GAS = 29_000_000
OWNER, STRANGER, NEW_OWNER = (bytes([number]) * 20 for number in (0xA1, 0xB2, 0xC3))
AROUND = Surroundings(31337, 1, 1_767_225_600, bytes(20), 30_000_000, 0, bytes(32), tuple)


@dataclass(frozen=True, slots=True)
class Code:
    """What creates the implementations of DstackKms and DstackApp, and their ABIs."""

    kms: bytes
    app: bytes
    kms_abi: list[dict[str, Any]]
    app_abi: list[dict[str, Any]]

    @classmethod
    def ours(cls, revision: AuthEthRevision) -> "Code":
        """Return this project's."""
        kms, app = kms_contract(revision), app_contract(revision)
        return cls(kms.bytecode, app.bytecode, kms.abi, app.abi)

    @classmethod
    def released(cls, folder: Path) -> "Code":
        """Return upstream's, from the folder with typechain's factories."""
        kms, app = (_factory(folder / f"{name}__factory.ts") for name in ("DstackKms", "DstackApp"))
        return cls(kms[1], app[1], kms[0], app[0])


def _factory(path: Path) -> tuple[list[dict[str, Any]], bytes]:
    """Return ABI and bytecode of a factory in TypeScript."""
    text = path.read_text()
    described = re.search(r"const _abi = (\[.*?\n\]) as const", text, re.DOTALL)
    code = re.search(r'_bytecode =\s*"0x([0-9a-f]+)"', text)
    assert described, f"a factory of typechain expected: {path}"
    assert code, f"a factory with bytecode expected: {path}"
    plain = re.sub(r"^(\s*)(\w+):", r'\1"\2":', described[1], flags=re.MULTILINE)
    return json.loads(re.sub(r",(\s*[}\]])", r"\1", plain)), bytes.fromhex(code[1])


class World:
    """Both contracts behind their proxies, owned by OWNER, and a state that acts replace."""

    def __init__(self, code: Code) -> None:
        from dstack_emu.chain.pyevm import PyEvm  # takes a second, and only some workers run these tests

        self.engine, self.code = PyEvm(), code
        self.root = self.engine.genesis(dict.fromkeys((OWNER, STRANGER, NEW_OWNER), 10**24))
        self.app_implementation, self.kms_implementation = self.create(code.app), self.create(code.kms)
        self.kms = self.proxy(
            self.kms_implementation, abi.call("initialize(address,address)", OWNER, self.app_implementation)
        )

    def create(self, code: bytes, sender: bytes = OWNER) -> bytes:
        """Create a contract, which must succeed; return its address."""
        nonce = self.engine.account(self.root, sender).nonce
        outcome = self.send(None, code, sender)
        assert outcome.failure is None, outcome
        return created_address(sender, nonce)

    def proxy(self, implementation: bytes, call: bytes) -> bytes:
        """Create a proxy of an implementation."""
        return self.create(proxy_contract().bytecode + abi.encode("(address,bytes)", (implementation, call)))

    def send(
        self, to: bytes | None, data: bytes, sender: bytes = OWNER, *, keeps: bool = True, value: int = 0
    ) -> Outcome:
        """Execute a transaction, and keep the state after it."""
        outcome = self.engine.execute(self.root, AROUND, Message(sender, to, data, GAS, value))
        if keeps:
            self.root = outcome.root
        return outcome

    def act(self, to: bytes, signature: str, *values: Any, sender: bytes = OWNER) -> Outcome:
        """Call a function in a transaction."""
        return self.send(to, abi.call(signature, *values), sender)

    def ask(self, to: bytes, signature: str, results: str, *values: Any) -> Any:
        """Call a view, which must succeed."""
        outcome = self.engine.call(self.root, AROUND, Message(OWNER, to, abi.call(signature, *values), GAS))
        assert outcome.failure is None, (signature, outcome)
        decoded = abi.decode(results, outcome.output)
        return decoded[0] if len(decoded) == 1 else tuple(decoded)

    def deploy_app(self, *, any_device: bool = False, tcb: bool = False, **hashes: bytes) -> bytes:
        """Create an app through the factory; return its address."""
        values = (OWNER, False, tcb, any_device, hashes.get("device", bytes(32)), hashes.get("compose", bytes(32)))
        outcome = self.act(self.kms, "deployAndRegisterApp(address,bool,bool,bool,bytes32,bytes32)", *values)
        assert outcome.failure is None, outcome
        return outcome.logs[0].address

    def app_decision(self, boot: BootInfo) -> tuple[bool, str]:
        """Ask DstackKms about an app."""
        found: tuple[bool, str] = self.ask(self.kms, f"isAppAllowed({BOOT_INFO})", "(bool,string)", boot.values())
        return found

    def kms_decision(self, boot: BootInfo) -> tuple[bool, str]:
        """Ask DstackKms about a KMS."""
        found: tuple[bool, str] = self.ask(self.kms, f"isKmsAllowed({BOOT_INFO})", "(bool,string)", boot.values())
        return found


def signature(item: Mapping[str, Any]) -> str:
    """Return the signature of an item of an ABI, with tuples spelled out."""
    return f"{item['name']}({','.join(map(kind, item.get('inputs', ())))})"


def kind(value: Mapping[str, Any]) -> str:
    """Return the type of a value of an ABI, with tuples spelled out."""
    text: str = value["type"]
    return text if not text.startswith("tuple") else f"({','.join(map(kind, value['components']))}){text[5:]}"
