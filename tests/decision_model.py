"""When a real KMS releases keys, signs a certificate or hands its root keys over: a model from the documents alone.

It was written from the reference of the wire and of release 0.6, of quotes and collateral, of OS images and of the
webhooks, and shares no code with the emulator. `denials` has one line for each rule that forbids an answer, so an empty
list is a release. Where the documents leave open what happens, the model denies: the emulator may not allow it either,
unless somebody finds out more.
"""

import base64
import binascii
import hashlib
import hmac
import json
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Event = tuple[str, bytes]
"""Name and payload of a runtime event, of version 1."""
Rpc = Literal["GetAppKey", "GetKmsKey", "SignCert"]
Contract = Literal["readme", "upstream", "next", "0.6", "file", "mock", "contract"]

RETURNED_STATUSES: Final = (
    "UpToDate",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
)
"""What a verification answers; any other status is an error."""
OUT_OF_DATE: Final = ("OutOfDate", "OutOfDateConfigurationNeeded")
MEMORY_2_GIB, MEMORY_2816_MIB = 2147483648, 2952790016


@dataclass(frozen=True)
class Platform:
    """The vendor's word on one platform."""

    device_id: str
    tcb_status: str = "UpToDate"
    advisory_ids: tuple[str, ...] = ()
    module_status: str = "UpToDate"
    module_advisory_ids: tuple[str, ...] = ()
    certificate_revoked: bool = False
    other_root: bool = False


@dataclass(frozen=True)
class Vendor:
    """The vendor's word on its enclave and certificate authority; `outdated` names documents out of their dates."""

    enclave_status: str = "UpToDate"
    enclave_advisory_ids: tuple[str, ...] = ()
    authority_revoked: bool = False
    outdated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Image:
    """What a trust domain has booted: the image's measurement document, and the VM around it."""

    measurement: bytes
    memory_size: int
    qemu_version: str | None


@dataclass(frozen=True)
class Evidence:
    """Evidence: what the quote has, and what is said beside it.

    `measured` is what went into RTMR3, `logged` what the log shows. `bound_to` is what the quote's report_data covers:
    the `own` key of whoever presents it, or `other`; `claims_own_key` is what the evidence says of it beside the quote.
    """

    platform: Platform
    image: Image
    registers: tuple[bytes, bytes, bytes, bytes]
    mr_config_id: bytes
    measured: tuple[Event, ...]
    logged: tuple[Event, ...]
    config: str
    debug: bool = False
    foreign_module: bool = False
    bound_to: Literal["own", "other"] = "own"
    claims_own_key: bool = True
    tampered: bool = False
    form: Literal["scale", "msgpack", "legacy"] = "scale"


@dataclass(frozen=True)
class ClientCertificate:
    """A client's certificate in TLS, around the evidence."""

    issuer: Literal["temporary CA", "itself"] = "temporary CA"
    validity: Literal["now", "past", "future"] = "now"
    has_evidence: bool = True


@dataclass(frozen=True)
class SigningRequest:
    """What SignCert is sent beside the evidence."""

    signed_by_own_key: bool = True
    right_word: bool = True
    not_before: int | None = None
    not_after: int | None = None


@dataclass(frozen=True)
class BootInfo:
    """What a webhook is asked about; all hex. `tcb_statuses` are those that the documents allow for it."""

    mr_aggregated: str
    os_image_hash: str
    app_id: str
    compose_hash: str
    instance_id: str
    device_id: str
    tcb_statuses: tuple[str, ...]
    advisory_ids: tuple[str, ...]


@dataclass(frozen=True)
class Webhook:
    """A webhook: its rules, its file, and what happens to its answers about `spoilt`.

    The file of `mock` is its environment, that of `contract` the state of the contracts.
    """

    contract: Contract
    file: str
    spoiling: Literal["", "status", "malformed", "text", "cut", "reset"] = ""
    spoilt: Literal["kms", "app"] = "kms"


@dataclass(frozen=True)
class Case:
    """One call of one KMS. `own` is what the KMS is itself, as its webhook is asked."""

    release: str
    rpc: Rpc
    webhook: Webhook
    evidence: Evidence
    vendor: Vendor
    own: BootInfo
    verifies_images: bool
    api_version: int
    vm_config: str
    client: ClientCertificate = field(default_factory=ClientCertificate)
    request: SigningRequest = field(default_factory=SigningRequest)


def denials(case: Case) -> list[str]:
    """Return why the call is refused; nothing if it is answered."""
    found = [f"self check: {line}" for line in decision(case.webhook, "kms", case.own)]
    if case.rpc == "SignCert":
        found += _of_signing_request(case)
    else:
        found += _of_client(case)
        if case.rpc == "GetAppKey" and case.api_version not in (0, 1):
            found.append("unsupported API version")
        if not case.client.has_evidence:
            return [*found, "no attestation"]
    found += evidence_denials(case.evidence, case.vendor)
    try:
        config = effective_config(case)
        boot_info = boot_info_of(case.evidence, case.vendor, config, is_boot_time=case.rpc == "SignCert")
    except ValueError as error:
        return [*found, str(error)]
    if len(boot_info.app_id) != 40:
        found.append("app_id must be 20 bytes")
    found += decision(case.webhook, "kms" if case.rpc == "GetKmsKey" else "app", boot_info)
    if case.verifies_images:
        found += image_denials(config, case.evidence.image)
    return found


def app_key(root_k256: bytes, app_id: bytes) -> bytes:
    """Return the k256 key of an app, 32 bytes: HKDF-SHA256 with the salt `RATLS`."""
    extracted = hmac.digest(b"RATLS", root_k256, "sha256")
    return hmac.digest(extracted, app_id + b"app-key" + b"\x01", "sha256")


# ---- the caller


def _of_client(case: Case) -> list[str]:
    found = []
    if case.client.validity != "now":
        found.append("client certificate is outside its validity")
    if case.release == "0.5" and case.client.issuer != "temporary CA":
        found.append("unknown issuer of the client certificate")
    if case.release == "0.6" and not case.client.has_evidence:
        found.append("client certificate carries no attestation")
    return found


def _of_signing_request(case: Case) -> list[str]:
    found, request = [], case.request
    if case.api_version not in (1, 2):
        found.append("unsupported API version")
    if not request.signed_by_own_key:
        found.append("signature of the request")
    if not request.right_word:
        found.append("confirm word")
    both = request.not_before is not None and request.not_after is not None
    if case.release == "0.6" and case.api_version == 2 and both and not request.not_before < request.not_after:  # type: ignore[operator]
        found.append("not_before must be earlier than not_after")
    return found


# ---- evidence


def evidence_denials(evidence: Evidence, vendor: Vendor) -> list[str]:
    """Return what is wrong with evidence, whoever presents it."""
    platform, found = evidence.platform, []
    if evidence.tampered:
        found.append("quote signature")
    if platform.other_root:
        found.append("unknown root")
    if platform.certificate_revoked or vendor.authority_revoked:
        found.append("revoked certificate")
    if vendor.outdated:
        found.append("collateral is out of date")
    if "Revoked" in (platform.tcb_status, platform.module_status, vendor.enclave_status):
        found.append("TCB status is invalid: Revoked")
    if evidence.debug:
        found.append("debug mode")
    if evidence.foreign_module:
        found.append("mr_signer_seam")
    lies = evidence.form != "legacy" and not evidence.claims_own_key  # the legacy form says nothing beside the quote
    if evidence.bound_to != "own" or lies:
        found.append("report data mismatch")
    if replayed(evidence.measured) != replayed(evidence.logged):
        found.append("RTMR3 mismatch")
    return found


def replayed(events: tuple[Event, ...], until: str | None = None) -> bytes:
    """Fold events into RTMR3: sha384(rtmr ‖ sha384(le32(0x08000001) ":" name ":" payload)), up to one of them."""
    register = bytes(48)
    for name, payload in events:
        digest = hashlib.sha384(b"\x01\x00\x00\x08:" + name.encode() + b":" + payload).digest()
        register = hashlib.sha384(register + digest).digest()
        if name == until:
            break
    return register


def boot_info_of(evidence: Evidence, vendor: Vendor, config: str, *, is_boot_time: bool) -> BootInfo:
    """Return what the webhook is asked about a caller; raise `ValueError` if it cannot be known."""
    payloads: dict[str, bytes] = {}
    for name, payload in evidence.logged:
        if name == "system-ready":
            break
        payloads.setdefault(name, payload)
    rtmr3 = replayed(evidence.logged, "boot-mr-done" if is_boot_time else None)
    aggregated = b"".join((*evidence.registers, rtmr3))
    if any(evidence.mr_config_id):
        aggregated += evidence.mr_config_id + bytes(96)
    platform = evidence.platform
    statuses: tuple[str, ...] = (platform.tcb_status,)
    if "OutOfDate" in (platform.module_status, vendor.enclave_status):
        is_configured = "Configuration" not in platform.tcb_status
        statuses = ("OutOfDate",) if is_configured else OUT_OF_DATE
    advisories = (*platform.advisory_ids, *platform.module_advisory_ids, *vendor.enclave_advisory_ids)
    return BootInfo(
        mr_aggregated=hashlib.sha256(aggregated).hexdigest(),
        os_image_hash=os_image_hash_of(config),
        app_id=payloads.get("app-id", b"").hex(),
        compose_hash=payloads.get("compose-hash", b"").hex(),
        instance_id=payloads.get("instance-id", b"").hex(),
        device_id=platform.device_id,
        tcb_statuses=statuses,
        advisory_ids=advisories,
    )


# ---- the VM's configuration


def effective_config(case: Case) -> str:
    """Return the config that counts: a request's before the evidence's; since 0.6.1 both have to be equal."""
    own = "" if case.evidence.form == "legacy" else case.evidence.config
    if case.vm_config and own and case.release == "0.6" and case.vm_config != own:
        raise ValueError("vm_config is not the one in the attestation")
    return case.vm_config or own


def os_image_hash_of(config: str) -> str:
    """Return the hash that a config names, lower-case hex; raise `ValueError` if it cannot be decoded."""
    if not config:
        return ""
    document = json.loads(config)
    if not isinstance(document, dict):
        raise ValueError("vm_config is no object")
    for name, limit in (("cpu_count", 1 << 32), ("memory_size", 1 << 64), ("num_gpus", 1 << 32)):
        number = document.get(name, 0)
        if type(number) is not int or not 0 <= number < limit:
            raise ValueError(f"vm_config: {name}")
    named = document.get("os_image_hash", "")
    if not isinstance(named, str):
        raise ValueError("vm_config: os_image_hash")
    return bytes.fromhex(named).hex()


def image_denials(config: str, booted: Image) -> list[str]:
    """Return why an OS image is refused, as with `core.image.verify`; legacy ones are nowhere to be found."""
    document: dict[str, Any] = json.loads(config) if config else {}
    material = document.get("tdx_measurement")
    if document.get("tdx_attestation_variant", "legacy") != "lite":
        return ["image cannot be downloaded"]
    if not isinstance(material, dict):
        return ["tdx lite attestation requires vm_config.tdx_measurement"]
    try:
        checksums, measurement = (base64.b64decode(material[name], validate=True) for name in _MATERIAL)
    except (KeyError, TypeError, binascii.Error) as error:
        return [f"tdx_measurement: {error!r}"]
    found = []
    if hashlib.sha256(checksums).hexdigest() != os_image_hash_of(config):
        found.append("os_image_hash mismatch")
    lines = [line.split() for line in checksums.decode().splitlines() if line.strip()]
    listed = [line[0] for line in lines if line[1:2] == ["measurement.tdx.cbor"]]
    if listed != [hashlib.sha256(measurement).hexdigest()]:
        found.append("measurement.tdx.cbor hash mismatch")
    memory = document.get("memory_size", 0)
    if memory != MEMORY_2_GIB and memory < MEMORY_2816_MIB:
        found.append("memory size")
    expected = (booted.measurement, booted.memory_size, adds_pages_in_one_pass(booted.qemu_version))
    try:
        if (measurement, memory, adds_pages_in_one_pass(document.get("qemu_version"))) != expected:
            found.append("MRs do not match")
    except ValueError as error:
        found.append(f"QEMU version: {error}")
    return found


def adds_pages_in_one_pass(qemu_version: str | None) -> bool:
    """Tell what of QEMU's version counts for MRTD; raise `ValueError` for one that is refused."""
    major, _minor, _patch = map(int, (qemu_version or "9.1.0").split("."))
    if major < 8:
        raise ValueError("8 or later expected")
    return major == 8


_MATERIAL: Final = ("checksum_file", "measurement")

# ---- webhooks


def decision(webhook: Webhook, kind: Literal["kms", "app"], boot_info: BootInfo) -> list[str]:
    """Return why a webhook's answer is no allow: by its rules, or because it does not come as it was given."""
    if webhook.spoiling and webhook.spoilt == kind:
        return ["the webhook's answer is no answer"]
    match webhook.contract:
        case "mock":
            return _mock(webhook.file, kind, boot_info)
        case "file":
            return _dstack_auth(webhook.file, kind, boot_info)
        case "contract":
            return _dstack_kms(json.loads(webhook.file)["state"], kind, boot_info)
        case contract:
            return _auth_simple(contract, webhook.file, kind, boot_info)


def _mock(environment: str, kind: str, boot_info: BootInfo) -> list[str]:
    policy, _, listed = environment.partition(":")
    allowed = {
        "allow-all": True,
        "deny-all": False,
        "deny-kms": kind == "app",
        "deny-app": kind == "kms",
        "allowlist-device": boot_info.device_id in listed.split(","),
        "allowlist-mr": boot_info.mr_aggregated in listed.split(","),
    }
    return [] if allowed[policy] else [f"mock policy: {policy}"]


def _dstack_auth(text: str, kind: str, boot_info: BootInfo) -> list[str]:
    policy = _read(text)
    if policy is None:
        return ["the file cannot be read"]
    if kind == "kms":
        rules = policy["kms"]
        found = [] if boot_info.mr_aggregated in rules["mrAggregated"] else ["kms mrAggregated not allowed"]
    else:
        images = policy["osImages"]
        found = ["os image not allowed"] if images and boot_info.os_image_hash not in images else []
        rules = policy["apps"].get(boot_info.app_id)
        if rules is None:
            return [*found, "app not registered"]
        if boot_info.compose_hash not in rules["composeHashes"]:
            found.append("compose hash not allowed")
    if not rules["allowAnyDevice"] and rules["devices"] and boot_info.device_id not in rules["devices"]:
        found.append("device not allowed")
    return found


def _dstack_kms(state: dict[str, Any], kind: str, boot_info: BootInfo) -> list[str]:
    """Return what DstackKms and DstackApp say first; what the contract's argument cannot hold never reaches them."""
    sizes = ((boot_info.app_id, 20), (boot_info.instance_id, 20), (boot_info.compose_hash, 32))
    if any(len(text) > 2 * size for text, size in (*sizes, (boot_info.os_image_hash, 32))):
        return ["longer than the contract's argument"]
    is_up_to_date = all(status == "UpToDate" for status in boot_info.tcb_statuses)
    image = boot_info.os_image_hash in state["images"], "OS image is not allowed"
    if kind == "kms":
        return _first(
            (is_up_to_date, "TCB status is not up to date"),
            image,
            (boot_info.mr_aggregated in state["kms"], "Aggregated MR not allowed"),
            (boot_info.device_id in state["kmsDevices"], "KMS is not allowed to boot on this device"),
        )
    app = state["apps"].get(boot_info.app_id)
    deployed = app is not None, "App not deployed or invalid address"
    refusal = _first((boot_info.app_id in state["registered"], "App not registered"), image, deployed)
    return refusal or _first(
        (is_up_to_date or not app["setRequireTcbUpToDate"], "TCB status is not up to date"),
        (boot_info.compose_hash in app["composeHashes"], "Compose hash not allowed"),
        (app["setAllowAnyDevice"] or boot_info.device_id in app["devices"], "Device not allowed"),
    )


def _first(*rules: tuple[bool, str]) -> list[str]:
    return [refusal for is_kept, refusal in rules if not is_kept][:1]


def _auth_simple(contract: str, text: str, kind: str, boot_info: BootInfo) -> list[str]:
    policy = _read(text)
    if policy is None:
        return ["the file cannot be read"]
    has_lists = contract in ("next", "0.6")
    statuses = policy.get("allowedTcbStatuses", ["UpToDate"]) if has_lists else ["UpToDate"]
    found = ["TCB status"] if any(status not in statuses for status in boot_info.tcb_statuses) else []
    if has_lists and set(boot_info.advisory_ids) - set(policy.get("allowedAdvisoryIds", [])):
        found.append("advisory ID is not allowed")
    if _hex(boot_info.os_image_hash) not in map(_hex, policy["osImages"]):
        found.append("OS image is not allowed")
    if kind == "kms":
        rules = policy["kms"]
        if _hex(boot_info.mr_aggregated) not in map(_hex, rules["mrAggregated"]):
            found.append("aggregated MR not allowed")
    else:
        apps = {_hex(app_id): rules for app_id, rules in policy["apps"].items()}
        rules = apps.get(_hex(boot_info.app_id))
        if rules is None:
            return [*found, "app not registered"]
        if _hex(boot_info.compose_hash) not in map(_hex, rules["composeHashes"]):
            found.append("compose hash not allowed")
    if not rules["allowAnyDevice"]:
        empty_admits = contract in ("upstream", "next") and not rules["devices"]
        if not empty_admits and _hex(boot_info.device_id) not in map(_hex, rules["devices"]):
            found.append("device is not allowed")
    return found


def _hex(text: str) -> str:
    text = text.lower()
    return text if text.startswith("0x") else f"0x{text}"


def _read(text: str) -> dict[str, Any] | None:
    """Read a policy, or None if it is no JSON, or a member has another type."""
    try:
        policy = json.loads(text)
    except ValueError:
        return None
    if not isinstance(policy, dict):
        return None
    rules: list[Any] = [policy.get("kms"), *policy["apps"].values()] if isinstance(policy.get("apps"), dict) else [None]
    if not all(isinstance(each, dict) and type(each.get("allowAnyDevice")) is bool for each in rules):
        return None
    lists = [policy.get(name) for name in ("osImages", "allowedTcbStatuses", "allowedAdvisoryIds") if name in policy]
    lists += [each[name] for each in rules for name in ("mrAggregated", "composeHashes", "devices") if name in each]
    if not all(isinstance(each, list) and all(isinstance(item, str) for item in each) for each in lists):
        return None
    return policy
