"""Requests that a webhook allows: those that a policy admits, or boot infos, or those of a stack.

A policy has the form of auth-simple's file; dstack-auth's allowlist has the same members.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, get_args

from pydantic import ValidationError

from dstack_emu.attest.app_info import BootInfo
from dstack_emu.attest.hexadecimal import decode_hex
from dstack_emu.auth.policy import CONTRACTS as SIMPLE_CONTRACTS
from dstack_emu.auth.policy import AppPolicy, KmsPolicy, Policy, accepted_tcb_statuses
from dstack_emu.transport.validation import describe
from dstack_emu.webhook_check.sample_requests import SampleError, SampleRequests, Variation

Contract = Literal["readme", "upstream", "next", "0.6", "file", "eth"]
"""A contract of auth-simple, or `file`: dstack-auth's rules, or `eth`: those of DstackKms behind auth-eth-bun."""
CONTRACTS: Final[tuple[Contract, ...]] = get_args(Contract)
Side = Literal["kms", "app"]
SIDES: Final[tuple[Side, ...]] = get_args(Side)
_UP_TO_DATE: Final = "UpToDate"
_KMS: Final = "kms"
"""The section of a policy about KMS."""
_SHOWN: Final = {
    "mrAggregated": "mr_aggregated",
    "osImageHash": "os_image_hash",
    "appId": "app_id",
    "composeHash": "compose_hash",
    "instanceId": "instance_id",
    "deviceId": "device_id",
}
"""Members of a request, and what the control API calls them."""
_ADMITS_EMPTY_DEVICES: Final = frozenset[Contract](("upstream", "next", "file"))


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the policy that allows a request; by default that of a policy that only this one is known of."""

    tcb_statuses: frozenset[str] = frozenset({_UP_TO_DATE})
    """The TCB statuses that the policy allows, if its contract lets it choose."""
    advisory_ids: frozenset[str] = frozenset()
    """The advisories that it allows."""
    checks_os_image: bool = True
    checks_device: bool | None = None
    """Whether it lists devices; None if that is not known."""


@dataclass(frozen=True, slots=True)
class AllowedRequest:
    """A request that should be allowed; `missing` says why there is none: then `boot_info` is to be ignored."""

    boot_info: BootInfo
    facts: Facts = field(default_factory=Facts)
    missing: str = ""


@dataclass(frozen=True, slots=True)
class AllowedRequests:
    """One request for each path, and where they come from."""

    kms: AllowedRequest
    app: AllowedRequest
    source: str

    def of(self, side: Side) -> AllowedRequest:
        """Return the request of one path."""
        return self.kms if side == "kms" else self.app

    @property
    def samples(self) -> SampleRequests:
        """Return the two requests."""
        return SampleRequests(Variation.of(self.kms.boot_info), Variation.of(self.app.boot_info))


def from_samples(samples: SampleRequests, source: str) -> AllowedRequests:
    """Take requests as allowed whose policy is not known."""
    return AllowedRequests(_as_sent(samples.kms), _as_sent(samples.app), source)


def _as_sent(boot_info: BootInfo) -> AllowedRequest:
    facts = Facts(frozenset({_UP_TO_DATE, boot_info.tcb_status}), frozenset(boot_info.advisory_ids))
    return AllowedRequest(boot_info, facts)


def from_guests(guests: Mapping[str, Mapping[str, Any]], samples: SampleRequests, source: str) -> AllowedRequests:
    """Take the source KMS and the app of a running stack, whose policy is not known, as its control API shows them.

    The `mr_aggregated` of an app that has its keys is not that of its request: then that of `samples` is taken.
    """
    app = {wire: guests["app"][name] for wire, name in _SHOWN.items()}
    kms = {wire: guests["kms-src"][name] for wire, name in _SHOWN.items()}
    if guests["app"]["has_keys"]:
        del app["mrAggregated"]
    return from_samples(samples.with_values({"kms": kms, "app": app}), source)


def from_document(document: Any, samples: SampleRequests, contract: Contract, source: str) -> AllowedRequests:
    """Read a policy or boot infos, parsed from JSON; what they leave open comes from `samples`.

    A document with `osImages` or `apps` is a policy. Raises `SampleError`.
    """
    if not isinstance(document, Mapping) or not document.keys() & {"osImages", "apps"}:
        return from_samples(samples.with_values(document), source)
    try:
        policy = Policy.model_validate(document)
    except ValidationError as error:
        raise SampleError(f"a policy of auth-simple expected: {describe(error)}") from error
    return from_policy(policy, samples, contract, source)


def from_policy(policy: Policy, samples: SampleRequests, contract: Contract, source: str) -> AllowedRequests:
    """Find requests that a policy admits under a contract: those of `samples`, if it does, else the first it lists."""
    return AllowedRequests(
        _of_kms(policy, samples.kms, contract), _of_app(policy, samples.app, contract), f"{source}, contract {contract}"
    )


class _NoneAdmittedError(Exception):
    """A policy admits no request; the text says why."""


def _of_kms(policy: Policy, sample: BootInfo, contract: Contract) -> AllowedRequest:
    try:
        common, facts = _platform(policy, sample, contract)
        if not policy.kms.mr_aggregated:
            raise _NoneAdmittedError("kms.mrAggregated is empty: it admits no KMS")
        chosen = replace(common, mr_aggregated=_choose(policy.kms.mr_aggregated, sample.mr_aggregated))
        return _on_device(chosen, facts, policy.kms, contract, _KMS)
    except _NoneAdmittedError as error:
        return AllowedRequest(sample, missing=str(error))


def _of_app(policy: Policy, sample: BootInfo, contract: Contract) -> AllowedRequest:
    try:
        common, facts = _platform(policy, sample, contract)
        usable = {app_id: app for app_id, app in policy.apps.items() if app.compose_hashes}
        if not usable:
            raise _NoneAdmittedError("no entry of apps has composeHashes: it admits no app")
        app_id = _choose(frozenset(usable), sample.app_id)
        app = next(app for name, app in usable.items() if _bytes(name) == app_id)
        chosen = replace(common, app_id=app_id, compose_hash=_choose(app.compose_hashes, sample.compose_hash))
        return _on_device(chosen, facts, app, contract, f"apps.{app_id.hex()}")
    except _NoneAdmittedError as error:
        return AllowedRequest(sample, missing=str(error))


def _platform(policy: Policy, sample: BootInfo, contract: Contract) -> tuple[BootInfo, Facts]:
    statuses = next((accepted_tcb_statuses(policy, each) for each in SIMPLE_CONTRACTS if each == contract), None)
    if statuses is not None and not statuses:
        raise _NoneAdmittedError("allowedTcbStatuses is empty: it admits no platform")
    status = _UP_TO_DATE if statuses is None or _UP_TO_DATE in statuses else min(statuses)
    facts = Facts(statuses or frozenset({_UP_TO_DATE}), policy.allowed_advisory_ids, bool(policy.os_images))
    common = replace(sample, tcb_status=status, advisory_ids=())
    if policy.os_images:
        common = replace(common, os_image_hash=_choose(policy.os_images, sample.os_image_hash))
    elif contract != "file":
        raise _NoneAdmittedError("osImages is empty: it admits no OS image")
    return common, facts


def _on_device(
    boot_info: BootInfo, facts: Facts, section: KmsPolicy | AppPolicy, contract: Contract, where: str
) -> AllowedRequest:
    if section.allow_any_device and (contract, where) != ("eth", _KMS):
        return AllowedRequest(boot_info, replace(facts, checks_device=False))
    if section.devices:
        chosen = replace(boot_info, device_id=_choose(section.devices, boot_info.device_id))
        return AllowedRequest(chosen, replace(facts, checks_device=True))
    if contract in _ADMITS_EMPTY_DEVICES:
        return AllowedRequest(boot_info, replace(facts, checks_device=False))
    if (contract, where) == ("eth", _KMS):
        raise _NoneAdmittedError(
            "kms.devices is empty, and a contract cannot admit a KMS on any device: it admits none"
        )
    raise _NoneAdmittedError(f"{where}.devices is empty, and allowAnyDevice is not true: it admits no device")


def _choose(listed: Iterable[str], sample: bytes) -> bytes:
    """Return the sample if it is listed, else the first; raise `SampleError` if one is not hex of whole bytes."""
    values = [_bytes(text) for text in sorted(listed)]
    return sample if sample in values else values[0]


def _bytes(text: str) -> bytes:
    try:
        return decode_hex(text)
    except ValueError as error:
        raise SampleError(f"hex of whole bytes expected, got {text!r:.80}") from error
