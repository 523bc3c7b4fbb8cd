"""What decides about keys in a stack, as a model that shares no code with it: policies, contracts, the vendor's word.

`State` is one moment. Rules are those of tests/decision_model.py and tests/contract_model.py, written from documents.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from dstack_emu.chain.contracts import BootInfo as ContractBootInfo
from tests.contract_model import AppModel, KmsModel
from tests.decision_model import (
    BootInfo,
    Evidence,
    Image,
    Platform,
    Vendor,
    Webhook,
    boot_info_of,
    decision,
    evidence_denials,
)

GARBAGE: Final = "{"
"""The text of a policy file that no webhook can read."""
NOBODYS: Final = "ab" * 32
"""A device, or a hash, that nobody has."""


@dataclass(frozen=True)
class Domain:
    """A trust domain: what it is, and what is wrong with its evidence."""

    name: str
    app_id: str
    compose_hash: str
    instance_id: str
    mr_aggregated: str
    os_image_hash: str
    platform: str
    is_debug: bool = False
    lies: bool = False
    """Whether its log has an event that no register has."""


@dataclass
class State:
    """One moment: all that a decision may depend on.

    `policies` are the texts of the files of auth-simple; `chain` is the contracts' state after each block, the latest
    last, where a contract decides. `own` is what a KMS may know of itself, one of these; None: nothing yet.
    """

    domains: Mapping[str, Domain]
    policies: dict[str, str]
    chain: list[KmsModel]
    contract: str
    platforms: dict[str, Platform]
    vendor: Vendor = field(default_factory=Vendor)
    own: dict[str, frozenset[BootInfo | None]] = field(default_factory=dict)

    def copy(self) -> "State":
        """Return a copy that changes by itself."""
        made = replace(self, policies=dict(self.policies), platforms=dict(self.platforms), own=dict(self.own))
        made.chain = list(self.chain)
        return made

    # ---- what changes it

    def edit(self, kms: str, edit: str, who: str) -> str:
        """Change a policy, and return its new text."""
        text = GARBAGE if edit == "garbage" else json.dumps(edited(self.policies[kms], edit, self.domains[who]))
        self.policies[kms] = text
        return text

    def transact(self, kind: str, value: str, *, allowed: bool, app_id: str | None = None) -> None:
        """Mine a block with one act on a list of the contracts."""
        latest = copy.deepcopy(self.chain[-1])
        lists = {"os-image": latest.images, "kms-mr": latest.kms, "kms-device": latest.devices}
        if app_id is not None:
            app = latest.contracts[bytes.fromhex(app_id)]
            lists |= {"compose-hash": app.compose_hashes, "device": app.devices}
        (lists[kind].add if allowed else lists[kind].discard)(bytes.fromhex(value))
        self.chain.append(latest)

    def reorganize(self, blocks: int) -> None:
        """Replace the last blocks by empty ones."""
        self.chain[-blocks:] = [self.chain[-blocks - 1]] * blocks

    # ---- what it decides

    def evidence(self, who: str) -> Evidence:
        """Return what a trust domain proves of itself."""
        domain = self.domains[who]
        measured = (
            ("app-id", bytes.fromhex(domain.app_id)),
            ("compose-hash", bytes.fromhex(domain.compose_hash)),
            ("instance-id", bytes.fromhex(domain.instance_id)),
        )
        return Evidence(
            platform=self.platforms[domain.platform],
            image=Image(b"", 0, None),
            registers=(b"", b"", b"", b""),
            mr_config_id=bytes(48),
            measured=measured,
            logged=(*measured, ("a-lie", b"")) if domain.lies else measured,
            config=json.dumps({"os_image_hash": domain.os_image_hash}),
            debug=domain.is_debug,
        )

    def invalid(self, who: str) -> list[str]:
        """Return why the evidence of a trust domain does not hold."""
        return [f"the evidence of {who}: {line}" for line in evidence_denials(self.evidence(who), self.vendor)]

    def asked(self, who: str) -> BootInfo:
        """Return what a webhook is asked about a trust domain."""
        evidence = self.evidence(who)
        info = boot_info_of(evidence, self.vendor, evidence.config, is_boot_time=False)
        return replace(info, mr_aggregated=self.domains[who].mr_aggregated)

    def denied(self, kms: str, kind: str, asked: BootInfo, behind: int = 0) -> list[str]:
        """Return why a KMS's webhook denies; `behind`: a contract answers as it did so many blocks ago."""
        if kms in self.policies:
            rules = decision(Webhook(self.contract, self.policies[kms]), kind, asked)  # type: ignore[arg-type]
        else:
            rules = self._contract_denies(kind, asked, behind)
        return [f"{kind} at {kms}: {rule}" for rule in rules]

    def _contract_denies(self, kind: str, asked: BootInfo, behind: int) -> list[str]:
        contract = self.chain[-1 - behind]
        boot = ContractBootInfo(
            app_id=bytes.fromhex(asked.app_id),
            compose_hash=bytes.fromhex(asked.compose_hash),
            instance_id=bytes.fromhex(asked.instance_id),
            device_id=bytes.fromhex(asked.device_id),
            mr_aggregated=bytes.fromhex(asked.mr_aggregated),
            os_image_hash=bytes.fromhex(asked.os_image_hash),
        )
        decide = contract.decide_kms if kind == "kms" else contract.decide_app
        answers = [decide(replace(boot, tcb_status=status)) for status in asked.tcb_statuses]
        return [reason for allowed, reason in answers if not allowed]

    def judged(self, kms: str) -> BootInfo | None:
        """Return what a KMS finds out about itself now, None if it cannot."""
        who = f"kms-{kms}"
        return None if self.invalid(who) else self.asked(who)

    def itself(self, kms: str) -> list[BootInfo | None]:
        """Return what a KMS may know of itself at its next check."""
        return [self.judged(kms) if known is None else known for known in self.own[kms]]


def edited(text: str, edit: str, who: Domain) -> dict[str, Any]:
    """Return a policy after an edit; one that could not be read is empty first."""
    empty = {"osImages": [], "kms": {"mrAggregated": [], "devices": [], "allowAnyDevice": True}, "apps": {}}
    policy: dict[str, Any] = empty if text == GARBAGE else json.loads(text)
    is_kms, app_id = who.name.startswith("kms-"), f"0x{who.app_id}"
    kms, apps = policy["kms"], policy["apps"]
    rules: dict[str, Any] | None = kms if is_kms else apps.get(app_id)
    match edit:
        case "allow" if is_kms:
            kms["mrAggregated"] = sorted({*kms["mrAggregated"], f"0x{who.mr_aggregated}"})
            policy["osImages"] = sorted({*policy["osImages"], f"0x{who.os_image_hash}"})
        case "allow":
            apps[app_id] = {"composeHashes": [f"0x{who.compose_hash}"], "devices": [], "allowAnyDevice": True}
            policy["osImages"] = sorted({*policy["osImages"], f"0x{who.os_image_hash}"})
        case "deny" if is_kms:
            kms["mrAggregated"] = [each for each in kms["mrAggregated"] if each != f"0x{who.mr_aggregated}"]
        case "deny":
            apps.pop(app_id, None)
        case "other-compose" if rules is not None:
            rules["composeHashes" if not is_kms else "mrAggregated"] = [f"0x{NOBODYS}"]
        case "other-device" if rules is not None:
            rules |= {"allowAnyDevice": False, "devices": [f"0x{NOBODYS}"]}
        case "no-image":
            policy["osImages"] = []
        case "lenient":  # about the platform alone
            policy["allowedTcbStatuses"] = ["UpToDate", "SWHardeningNeeded", "OutOfDate"]
            policy["allowedAdvisoryIds"] = ["INTEL-SA-00001"]
        case "strict":
            policy.pop("allowedTcbStatuses", None)
            policy.pop("allowedAdvisoryIds", None)
        case "empty":
            policy = empty
    return policy


def contracts_of(policy: Mapping[str, Any], devices: set[bytes]) -> KmsModel:
    """Return the model of contracts that allow what a policy says."""
    apps = {
        bytes.fromhex(app_id.removeprefix("0x")): AppModel(
            compose_hashes=_bytes(rules["composeHashes"]),
            devices=_bytes(rules["devices"]),
            any_device=rules["allowAnyDevice"],
        )
        for app_id, rules in policy["apps"].items()
    }
    return KmsModel(
        images=_bytes(policy["osImages"]),
        kms=_bytes(policy["kms"]["mrAggregated"]),
        devices=set(devices),
        registered=set(apps),
        contracts=apps,
    )


def _bytes(listed: list[str]) -> set[bytes]:
    return {bytes.fromhex(each.removeprefix("0x")) for each in listed}
