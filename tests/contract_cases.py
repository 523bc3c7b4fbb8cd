"""Webhooks of the kind `contract`: random states of the contracts on a stack's chain, which decide on random evidence.

A state is one in which everything right is allowed, and none to two transactions after it. `ContractDraw` draws the
transactions, and gives the model what the contracts then allow; `DecisionChain` sends them.
"""

import copy
import hashlib
import json
import urllib.request
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

from dstack_emu.attest.release import AuthEthRevision
from dstack_emu.chain import abi
from tests.decision_cases import Draw, Forger
from tests.decision_model import BootInfo, Case, Event, Evidence, Webhook

Act = tuple[str, str, Any]
"""The receiver, `kms` or an app id in hex; the function; and its only argument, a hash in hex or a boolean."""

APPS: Final = 3
COMPOSE_HASHES: Final = tuple(hashlib.sha256(bytes([number])).hexdigest() for number in range(APPS))
NO_CODE: Final = "cc" * 20
"""An address that is registered, and at which there is no contract."""
_DEPLOY: Final = "deployAndRegisterApp(address,bool,bool,bool,bytes32,bytes32)"
_DEPLOYED: Final = abi.topic("AppDeployedViaFactory(address,address)").hex()
_LISTS: Final = {
    "OsImageHash": "images",
    "KmsAggregatedMr": "kms",
    "KmsDevice": "kmsDevices",
    "ComposeHash": "composeHashes",
    "Device": "devices",
}


class DecisionChain:
    """The contracts of a stack's chain, one app for each compose hash, and the state to which each case returns."""

    def __init__(self, chain: dict[str, Any], url: str, revision: AuthEthRevision) -> None:
        self.url, self.kms, self.revision = url, chain["contracts"]["kms"], revision
        self._owner = chain["contracts"]["owner"]
        self.base: dict[str, Any] = {}
        self._snapshot = ""

    def prepare(self, forger: Forger, own: Iterable[BootInfo]) -> None:
        """Allow what is right: these KMS, the images and hosts of a forger, and the apps."""
        kms, hosts = list(own), list(forger.devices.values())
        state: dict[str, Any] = {
            "images": [
                *{booted.config["os_image_hash"] for booted in forger.booted},
                *(each.os_image_hash for each in kms),
            ],
            "kms": [each.mr_aggregated for each in kms],
            "kmsDevices": [*hosts, *(each.device_id for each in kms)],
        }
        for ending, name in list(_LISTS.items())[:3]:
            for value in sorted(set(state[name])):
                self._send("kms", f"add{ending}", value)
        rules = {"devices": hosts[:1], "setAllowAnyDevice": True, "setRequireTcbUpToDate": False}
        apps = {self._deploy(each, hosts[0]): {**rules, "composeHashes": [each]} for each in COMPOSE_HASHES}
        self._transact(self.kms, abi.call("registerApp(address)", bytes.fromhex(NO_CODE)))
        self.base = {**state, "apps": apps, "registered": [*apps, NO_CODE]}
        self._snapshot = self._rpc("evm_snapshot")

    def set(self, acts: Iterable[Act]) -> None:
        """Return to that state, and send transactions."""
        assert self._rpc("evm_revert", self._snapshot) is True
        self._snapshot = self._rpc("evm_snapshot")
        for act in acts:
            self._send(*act)

    def after(self, acts: Iterable[Act]) -> dict[str, Any]:
        """Return what the contracts allow after the transactions."""
        state = copy.deepcopy(self.base)
        for to, name, value in acts:
            place = state if to == "kms" else state["apps"][to]
            if name.startswith("set"):
                place[name] = value
                continue
            verb = "add" if name.startswith("add") else "remove"
            entries = _LISTS[name.removeprefix(verb)]
            place[entries] = [each for each in place[entries] if each != value] + [value] * (verb == "add")
        return state

    def _deploy(self, compose_hash: str, device: str) -> str:
        values = (
            bytes.fromhex(self._owner[2:]),
            False,
            False,
            True,
            bytes.fromhex(device),
            bytes.fromhex(compose_hash),
        )
        logs = self._transact(self.kms, abi.call(_DEPLOY, *values))["logs"]
        (log,) = (each for each in logs if each["topics"][0] == f"0x{_DEPLOYED}")
        return str(log["topics"][1][-40:])

    def _send(self, to: str, name: str, value: Any) -> None:
        kind, given = ("bool", value) if isinstance(value, bool) else ("bytes32", bytes.fromhex(value))
        self._transact(self.kms if to == "kms" else f"0x{to}", abi.call(f"{name}({kind})", given))

    def _transact(self, to: str, call: bytes) -> Any:
        sent = self._rpc("eth_sendTransaction", {"from": self._owner, "to": to, "data": f"0x{call.hex()}"})
        receipt = self._rpc("eth_getTransactionReceipt", sent)
        assert receipt["status"] == "0x1", receipt
        return receipt

    def _rpc(self, method: str, *params: Any) -> Any:
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url, body), timeout=30) as response:
            answer = json.load(response)
        assert "error" not in answer, answer
        return answer["result"]


class ContractDraw(Draw):
    """One random case whose webhook asks the contracts. Its app id is mostly the address of one of them."""

    def __init__(self, chain: DecisionChain, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._chain = chain

    def _evidence(self, *, is_kms: bool) -> Evidence:
        evidence, pick = super()._evidence(is_kms=is_kms), self._random
        own = dict(evidence.measured)["compose-hash"].hex()
        ids = {each: app for app, rules in self._chain.base["apps"].items() for each in rules["composeHashes"]}
        app = pick.choices((ids[own], pick.choice(list(ids.values())), NO_CODE), (18, 1, 1))[0]
        events: tuple[Event, ...] = tuple(
            (name, bytes.fromhex(app) if name == "app-id" else payload) for name, payload in evidence.measured
        )
        return evidence if pick.random() < 0.05 else replace(evidence, measured=events, logged=events)

    def _webhook(self, case: Case, right: BootInfo) -> Webhook:
        pick, acts = self._random, list[Act]()
        if case.rpc == "GetKmsKey" and pick.random() < 0.9:
            acts.append(("kms", "addKmsAggregatedMr", right.mr_aggregated))
        app = right.app_id if right.app_id in self._chain.base["apps"] else next(iter(self._chain.base["apps"]))
        changes: tuple[Act, ...] = (
            ("kms", "removeOsImageHash", pick.choice((self._own, right)).os_image_hash),
            ("kms", "removeKmsAggregatedMr", pick.choice((self._own, right)).mr_aggregated),
            ("kms", "removeKmsDevice", pick.choice((self._own, right)).device_id),
            (app, "removeComposeHash", right.compose_hash),
            (app, "setAllowAnyDevice", False),
            (app, "removeDevice", right.device_id),
            (app, "setRequireTcbUpToDate", True),
            (app, "addComposeHash", right.compose_hash),
        )
        acts += pick.sample(changes, pick.choice((0, 0, 0, 1, 1, 2)))
        file = json.dumps({"acts": acts, "state": self._chain.after(acts)})
        spoiling: Any = pick.choice(("status", "malformed", "text", "cut", "reset")) if pick.random() < 0.06 else ""
        return Webhook("contract", file, spoiling, pick.choice(("kms", "app")))
