"""`fail-open`: random decisions while anything that a party asks another for may fail. Nothing else may open.

The script has acts that change what is decided, faults at every place where one part talks to another, and calls. Each
RPC of a KMS that an act caused is judged by the model, as it was before, during and after the act.
"""

from random import Random
from typing import Any, Final

from campaigns.case import Act, Campaign, Script
from campaigns.decision_stack import APPS, STATUSES
from campaigns.fail_open_world import FailOpenWorld

CALLERS: Final = ("app", "app", "twin", "wallet", "wallet", "stranger", "debug", "liar")
EDITS: Final = (
    "allow",
    "allow",
    "allow",
    "deny",
    "other-compose",
    "other-device",
    "no-image",
    "lenient",
    "strict",
    "empty",
    "garbage",
)
ADVISORIES: Final = ("INTEL-SA-00001", "INTEL-SA-00002")

NO_DECISIONS: Final = (
    "",
    "null",
    "true",
    "[]",
    "{}",
    '{"isAllowed": true}',
    '{"isAllowed": "true", "reason": "", "gatewayAppId": "any"}',
    '{"isAllowed": 1, "reason": "", "gatewayAppId": "any"}',
    '{"isAllowed": null, "reason": "", "gatewayAppId": "any"}',
    '{"isAllowed": false, "isAllowed": true, "reason": "", "gatewayAppId": "any"}',
    '{"isallowed": true, "reason": "", "gatewayAppId": "any"}',
    '{"isAllowed": true, "reason": "", "gatewayAppId": "any"',
    '{"allowed": true, "isAllowed": false, "reason": "no", "gatewayAppId": ""}',
)
"""Answers of status 200 that allow nothing."""
ALLOWANCE: Final = '{"isAllowed": true, "reason": "", "gatewayAppId": "any"}'
"""An answer that would allow, were its status one of success."""
NO_RESULTS: Final = (
    '{"jsonrpc": "2.0", "id": 1, "result": "0x"}',
    '{"jsonrpc": "2.0", "id": 1, "result": "0x1"}',
    '{"jsonrpc": "2.0", "id": 1, "result": true}',
    '{"jsonrpc": "2.0", "id": 1, "error": {"code": -32000, "message": "no"}}',
    '{"jsonrpc": "2.0", "id": 99, "result": null}',
    "[]",
)
"""Answers of a chain that decide nothing."""

CALLS: Final = {
    "auth-src": ("/bootAuth/kms", "/bootAuth/app", "*"),
    "auth-dst": ("/bootAuth/kms", "/bootAuth/app", "*"),
    "auth-third": ("/bootAuth/kms", "*"),
    "pccs": ("/tdx/certification/v4/tcb", "/sgx/certification/v4/pckcrl", "/tdx/certification/v4/qe/identity", "*"),
    "agent-src": ("Attest", "*"),
    "agent-dst": ("Attest",),
    "agent-third": ("Attest", "Info", "*"),
    "chain": ("eth_call", "eth_blockNumber", "*"),
    "kms-src": ("GetTempCaCert", "GetAppKey", "SignCert", "GetKmsKey", "*"),
    "kms-dst": ("GetTempCaCert", "GetAppKey", "SignCert", "*"),
    "gateway": ("RegisterCvm", "*"),
}
"""The places where one part asks another, and what it asks for."""
KINDS: Final = ("reset", "drop", "truncate", "malformed", "wrong-type", "status", "status", "hang", "delay", "slow")


class Draw:
    """One script."""

    def __init__(self, chance: Random) -> None:
        self._chance = chance

    def script(self) -> Script:
        """Draw it: a few changes and faults, calls between them."""
        chance = self._chance
        acts: list[Act] = []
        for _ in range(chance.randint(2, 5)):
            for _ in range(chance.choice((0, 0, 1, 1, 2))):
                acts.append(self.change())
            for _ in range(chance.choice((0, 1, 1, 2))):
                acts.append(self.fault())
            for _ in range(chance.choice((1, 1, 2, 3))):
                acts.append(self.call())
            if chance.random() < 0.4:
                acts.append(Act("lift"))
        return tuple(acts)

    def change(self) -> Act:
        """Draw an act that changes what is decided."""
        chance = self._chance
        made = chance.choices((self._policy, self._chain, self._platform, self._vendor, self._clock), (8, 5, 4, 2, 1))
        return made[0]()

    def _policy(self) -> Act:
        chance = self._chance
        kms, edit = chance.choice(("src", "src", "src", "third")), chance.choice(EDITS)
        who = chance.choice(("app", "wallet", "stranger", "kms-src", "kms-third", "kms-dst"))
        return Act("policy", {"kms": kms, "edit": edit, "who": who}, f"policy: {edit}")

    def _chain(self) -> Act:
        chance = self._chance
        kind = chance.choice(("os-image", "kms-mr", "kms-device", "compose-hash", "compose-hash", "device"))
        who = chance.choice(("app", "wallet")) if kind in ("compose-hash", "device") else "kms-dst"
        if kind == "kms-mr":
            who = chance.choice(("kms-dst", "kms-dst", "kms-third"))
        fields = {"list": kind, "who": who, "allowed": chance.random() < 0.5}
        return Act("chain", fields, f"chain: {kind}")

    def _platform(self) -> Act:
        chance = self._chance
        who = chance.choice((*APPS[:4], "kms-src", "kms-dst", "kms-third"))
        advisories = [each for each in ADVISORIES if chance.random() < 0.5]
        changes: list[dict[str, Any]] = [
            {"tcb_status": chance.choice(STATUSES), "advisory_ids": advisories},
            {"tcb_status": "UpToDate", "advisory_ids": advisories},
            {"module_status": chance.choice(("OutOfDate", "Revoked", "UpToDate"))},
            {"pck_revoked": chance.random() < 0.7},
        ]
        if who in APPS:
            changes.append({"other_root": chance.random() < 0.7})
        change = chance.choice(changes)
        return Act("platform", {"of": who, "set": change}, f"platform: {next(iter(change))}")

    def _vendor(self) -> Act:
        chance = self._chance
        dating = chance.choice(("tcb_info_dating", "qe_identity_dating", "pck_crl_dating", "root_ca_crl_dating"))
        change: dict[str, Any] = chance.choice(
            (
                {"qe_status": chance.choice(("OutOfDate", "Revoked", "UpToDate"))},
                {"pck_ca_revoked": chance.random() < 0.5},
                {dating: chance.choice(("expired", "not-yet-valid", "current"))},
            )
        )
        return Act("vendor", {"set": change}, f"vendor: {next(iter(change))}")

    def _clock(self) -> Act:
        return Act("clock", {"advance": self._chance.choice(("1s", "10m", "30d"))})

    def fault(self) -> Act:
        """Draw a fault at one of the places."""
        chance = self._chance
        service = chance.choice(tuple(CALLS))
        if service.startswith("agent") and chance.random() < 0.3:
            return Act("swap", {"service": service, "with": chance.choice(("app", "wallet", "stranger"))})
        fields: dict[str, Any] = {"service": service, "call": chance.choice(CALLS[service])}
        own = {"pccs": ("stale", "stale"), "chain": ("stale", "pruned", "reorg", "wrong-chain-id")}.get(service, ())
        if service.startswith("auth"):
            own = ("status", "decision")
        kind = chance.choice((*KINDS, *own, *own))
        fields["kind"] = kind
        match kind:
            case "delay":
                fields["seconds"] = 0.01
            case "slow":
                fields["seconds"] = 0.001
            case "decision":
                fields["allow"] = False
            case "status":
                fields |= self._status(service)
            case "stale" | "reorg" if service == "chain":
                fields["blocks"] = chance.randint(1, 4)
        if chance.random() < 0.5:
            fields["times"] = chance.randint(1, 3)
        if chance.random() < 0.4:
            fields["after"] = chance.randint(1, 4)
        if chance.random() < 0.2:
            fields["probability"] = 0.5
        return Act("fault", fields, f"fault: {service} {kind}")

    def _status(self, service: str) -> dict[str, Any]:
        chance = self._chance
        if service.startswith("auth"):
            if chance.random() < 0.6:
                return {"status": 200, "body": chance.choice(NO_DECISIONS)}
            return {"status": chance.choice((302, 400, 401, 403, 404, 500, 502, 503)), "body": ALLOWANCE}
        if service == "chain" and chance.random() < 0.6:
            return {"status": 200, "body": chance.choice(NO_RESULTS)}
        if chance.random() < 0.3:
            return {"status": 200, "body": chance.choice(("", "{}", "null", "[]"))}
        return {"status": chance.choice((400, 403, 404, 429, 500, 503))}

    def call(self) -> Act:
        """Draw a call that a KMS decides about."""
        chance = self._chance
        kms = chance.choice(("src", "src", "dst"))
        name = chance.choices(
            ("boot", "certificate", "temporary CA", "onboard", "no evidence", "restart"),
            (12, 3, 2, 3, 1, 1.5),
        )[0]
        match name:
            case "boot" | "certificate":
                fields: dict[str, Any] = {"who": chance.choice(CALLERS), "kms": kms}
                if name == "certificate":
                    del fields["kms"]
                if chance.random() < 0.25:
                    change = self.change()
                    fields |= {"meanwhile": change.to_json(), "steps": chance.randrange(0, 120)}
                return Act(name, fields, f"{name}{', meanwhile a change' if 'meanwhile' in fields else ''}")
            case "onboard":
                return Act(name, {"source": kms})
            case "no evidence":
                return Act(name, {"kms": kms, "rpc": chance.choice(("GetAppKey", "GetKmsKey"))})
        return Act(name, {"kms": kms})


class FailOpen:
    """The campaign."""

    name = "fail-open"
    about = "random decisions under random faults: no key without an allowance, no denial without a reason"

    def draw(self, chance: Random) -> Script:
        """Draw a case: the first act says of which release the stack is."""
        release = chance.choice(("0.6", "0.6", "0.5"))
        return (Act("release", {"name": release}, f"release: {release}"), *Draw(chance).script())

    def world(self) -> FailOpenWorld:
        """Make the world, which starts a stack of each release when it first needs it."""
        return FailOpenWorld()


CAMPAIGN: Campaign = FailOpen()
