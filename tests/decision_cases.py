"""Random policies, manifests of images, platform states and evidence, and the bytes that a KMS is sent for them.

A `Draw` makes a case from a seed and its number: everything right at first, then none to three things changed. `Forger`
signs the evidence of a case, with the platforms of a stack.
"""

import datetime
import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.eventlog import RuntimeEvent, TdxEvent, log_to_json
from dstack_emu.attest.quote import TdReport
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.platform import TCB_STATUSES, TEE_TCB_SVN, PlatformState
from dstack_emu.simulator.trust_domain import TD_ATTRIBUTES, TD_ATTRIBUTES_DEBUG, XFAM
from dstack_emu.simulator.vendor_state import VendorState
from tests import foreign
from tests.decision_model import (
    BootInfo,
    Case,
    ClientCertificate,
    Contract,
    Event,
    Evidence,
    Image,
    Platform,
    Rpc,
    Vendor,
    Webhook,
    boot_info_of,
)
from tests.foreign import Identity
from tests.test_sign_cert import compact, vec

GIB: Final = 1 << 30
HOSTS: Final = ("host of model-1", "host of model-2")
CONTRACTS: Final[tuple[Contract, ...]] = ("readme", "upstream", "next", "0.6", "file", "mock")
ADVISORIES: Final = ("INTEL-SA-00001", "INTEL-SA-00002")
DATINGS: Final = ("tcb_info_dating", "qe_identity_dating", "pck_crl_dating", "root_ca_crl_dating")
NAME: Final = "model.example.test"
MR_DONE: Final = "boot-mr-done"


@dataclass(frozen=True)
class Booted:
    """An OS image on a VM: what the model knows of it, its configuration, and its registers and log."""

    image: Image
    config: dict[str, Any]
    registers: tuple[bytes, bytes, bytes, bytes]
    log: tuple[TdxEvent, ...]

    @classmethod
    def of(cls, image: OsImage, memory_size: int) -> "Booted":
        """Boot an image."""
        config = image.vm_config(memory_size=memory_size)
        registers, log = image.boot(config)
        document = json.loads(config.to_json())
        known = Image(image.files["measurement.tdx.cbor"], memory_size, document["qemu_version"])
        return cls(known, document, (registers.mrtd, registers.rtmr0, registers.rtmr1, registers.rtmr2), log)


class Forger:
    """Makes evidence of any kind: it has the platforms' keys, and no trust domain that would object."""

    def __init__(self, intel: Intel, derive: Callable[[str, int], bytes]) -> None:
        self._intel = intel
        images = (OsImage.from_seed(derive, "model", "1"), OsImage.from_seed(derive, "model", "2"))
        self.booted = [Booted.of(image, memory) for image in images for memory in (2 * GIB, 4 * GIB)]
        self.devices = {name: intel.platform(name).device_id.hex() for name in HOSTS}

    def publish(self, vendor: Vendor, *platforms: Platform) -> None:
        """Let the vendor say this of itself and of platforms; call it in the thread that serves them."""
        outdated: dict[str, Any] = dict.fromkeys(vendor.outdated, "expired")
        self._intel.state = VendorState(
            qe_status=vendor.enclave_status,  # type: ignore[arg-type]  # drawn from the statuses there are
            qe_advisory_ids=vendor.enclave_advisory_ids,
            pck_ca_revoked=vendor.authority_revoked,
            **outdated,
        )
        for of_it in platforms:
            self._platform(of_it).state = PlatformState(
                tcb_status=of_it.tcb_status,  # type: ignore[arg-type]
                advisory_ids=of_it.advisory_ids,
                module_status=of_it.module_status,  # type: ignore[arg-type]
                module_advisory_ids=of_it.module_advisory_ids,
                pck_revoked=of_it.certificate_revoked,
                other_root=of_it.other_root,
            )

    def _platform(self, of_it: Platform) -> Any:
        return next(self._intel.platform(name) for name, device in self.devices.items() if device == of_it.device_id)

    def attestation(self, evidence: Evidence, own: bytes) -> Attestation:
        """Sign evidence over report_data, or over another one if the evidence says so; each has 64 bytes."""
        other = foreign.binding_of(b"another key")
        platform = self._platform(evidence.platform)
        rtmr3 = bytes(48)
        for name, payload in evidence.measured:
            rtmr3 = hashlib.sha384(rtmr3 + TdxEvent.of(RuntimeEvent(name, payload)).digest).digest()
        mrtd, rtmr0, rtmr1, rtmr2 = evidence.registers
        report = TdReport(
            TEE_TCB_SVN,
            platform.mr_seam,
            bytes([evidence.foreign_module]).rjust(48, b"\0"),
            bytes(8),
            TD_ATTRIBUTES_DEBUG if evidence.debug else TD_ATTRIBUTES,
            XFAM,
            mrtd,
            evidence.mr_config_id,
            bytes(48),
            bytes(48),
            rtmr0,
            rtmr1,
            rtmr2,
            rtmr3,
            own if evidence.bound_to == "own" else other,
        )
        quote = bytearray(platform.quote(report))
        if evidence.tampered:
            quote[190] ^= 1  # in MRTD
        runtime = tuple(RuntimeEvent(name, payload) for name, payload in evidence.logged)
        firmware = next(b.log for b in self.booted if b.registers == evidence.registers)
        log = (*firmware, *map(TdxEvent.of, runtime))
        claimed = own if evidence.claims_own_key else other
        wire: Any = 1 if evidence.form == "msgpack" else 0
        return Attestation(bytes(quote), log, runtime, claimed, evidence.config, wire=wire)

    def identity(self, case: Case, authority: foreign.Authority) -> Identity:
        """Make the client certificate of a case."""
        key, client, values = foreign.new_key(), case.client, {}
        if client.has_evidence:
            attestation = self.attestation(case.evidence, foreign.binding_of(foreign.spki_of(key)))
            if case.evidence.form == "legacy":
                values = {foreign.OID_QUOTE: attestation.quote}
                values[foreign.OID_EVENT_LOG] = log_to_json(attestation.event_log).encode()
            else:
                values = {foreign.OID_ATTESTATION: attestation.stripped(keep_digests=True).encode()}
        return Identity(_certificate(key, client, authority, values), key)

    def signing_request(self, case: Case) -> dict[str, Any]:
        """Make the arguments of SignCert."""
        key, request = foreign.new_key(), case.request
        attestation = self.attestation(case.evidence, foreign.binding_of(foreign.spki_of(key)))
        word = b"please sign cert:" if request.right_word else b"please sign this:"
        csr = vec(word) + vec(foreign.spki_of(key)) + b"\0" + vec(NAME.encode()) + compact(1) + vec(NAME.encode())
        csr += b"\1\0\1"
        if case.evidence.form == "legacy":
            csr += vec(attestation.quote) + vec(log_to_json(attestation.event_log).encode())
        else:
            csr += b"\0" + _optional(request.not_before) + _optional(request.not_after) + attestation.encode()
        signer = key if request.signed_by_own_key else foreign.new_key()
        signature = signer.sign(csr, ec.ECDSA(hashes.SHA256()))
        arguments: dict[str, Any] = {"api_version": case.api_version, "csr": csr.hex(), "signature": signature.hex()}
        return arguments | ({"vm_config": case.vm_config} if case.vm_config else {})


def _optional(number: int | None) -> bytes:
    return b"\0" if number is None else b"\1" + number.to_bytes(8, "little")


def _certificate(
    key: ec.EllipticCurvePrivateKey,
    client: ClientCertificate,
    authority: foreign.Authority,
    values: dict[x509.ObjectIdentifier, bytes],
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "model client")])
    is_own = client.issuer == "itself"
    first, last = {"now": (-1, 1), "past": (-2, -1), "future": (1, 2)}[client.validity]
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if is_own else authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + first * day)
        .not_valid_after(now + last * day)
    )
    for oid, value in values.items():
        extension = x509.UnrecognizedExtension(oid, foreign.der_octet_string(value))
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key if is_own else authority.key, hashes.SHA256())


# ---- drawing


class Draw:
    """One random case of one release."""

    def __init__(self, forger: Forger, own: Mapping[bool, BootInfo], release: str, seed: str) -> None:
        self._random = random.Random(f"{seed}/{release}")
        self._verifies_images = self._random.random() < 0.6
        self._forger, self._own, self._release = forger, own[self._verifies_images], release

    def case(self) -> Case:
        """Draw a case."""
        pick = self._random
        rpc: Rpc = pick.choice(("GetAppKey", "GetAppKey", "GetKmsKey", "SignCert", "SignCert"))
        evidence = self._evidence(is_kms=rpc == "GetKmsKey")
        case = Case(
            release=self._release,
            rpc=rpc,
            webhook=Webhook("readme", ""),
            evidence=evidence,
            vendor=Vendor(),
            own=self._own,
            verifies_images=self._verifies_images,
            api_version=2 if rpc == "SignCert" else pick.choice((0, 1)),
            vm_config=pick.choice(("", evidence.config)),
        )
        if evidence.form == "legacy":
            case = replace(case, vm_config=pick.choice(("", evidence.config, evidence.config)))
            case = replace(case, api_version=1) if rpc == "SignCert" else case
        boot_info = boot_info_of(evidence, case.vendor, evidence.config, is_boot_time=rpc == "SignCert")
        for _ in range(pick.choice((0, 0, 1, 1, 1, 2, 3))):
            case = pick.choices(*zip(*self._changes(case), strict=True))[0](case)
        return replace(case, webhook=self._webhook(case, boot_info))

    # what is presented

    def _evidence(self, *, is_kms: bool) -> Evidence:
        pick = self._random
        booted = pick.choice(self._forger.booted)
        compose_hash = hashlib.sha256(bytes([pick.randrange(3)])).digest()
        events: tuple[Event, ...] = (
            ("system-preparing", b""),
            ("app-id", compose_hash[: 20 if pick.random() < 0.7 else 10].ljust(20, b"\xaa")),
            ("compose-hash", compose_hash),
            ("instance-id", pick.choice((b"", hashlib.sha256(b"instance").digest()[:20]))),
            (MR_DONE, b""),
        )
        if is_kms or pick.random() < 0.3:
            provider = json.dumps({"name": "local-sgx", "id": "aa"} if is_kms else {"name": "kms", "id": "bb"}).encode()
            events += (("key-provider", provider), ("storage-fs", b"zfs"), ("system-ready", b""))
        name = pick.choice(HOSTS)
        return Evidence(
            platform=Platform(self._forger.devices[name]),
            image=booted.image,
            registers=booted.registers,
            mr_config_id=pick.choice((bytes(48), (b"\1" + compose_hash).ljust(48, b"\0"))),
            measured=events,
            logged=events,
            config=json.dumps(booted.config, separators=(",", ":")),
            form=pick.choice(("scale", "scale", "msgpack", "legacy")),
        )

    # what is changed: functions of a case with their weights

    def _changes(self, case: Case) -> list[tuple[Callable[[Case], Case], int]]:
        changes = [
            (self._change_platform, 5),
            (self._change_vendor, 2),
            (self._change_quote, 4),
            (self._change_log, 5),
            (self._change_config, 5),
            (self._change_version, 1),
        ]
        special = (self._change_request, 2) if case.rpc == "SignCert" else (self._change_client, 2)
        return [*changes, special]

    def _change_platform(self, case: Case) -> Case:
        pick, some = self._random, self._some
        change: dict[str, Any] = pick.choice(
            (
                {"tcb_status": pick.choice(TCB_STATUSES), "advisory_ids": some(ADVISORIES)},
                {"tcb_status": pick.choice(TCB_STATUSES[:-1]), "advisory_ids": some(ADVISORIES)},
                {"advisory_ids": some(ADVISORIES)},
                {"module_status": pick.choice(("OutOfDate", "Revoked")), "module_advisory_ids": some(ADVISORIES)},
                {"module_advisory_ids": some(ADVISORIES)},
                {"certificate_revoked": True},
                {"other_root": True},
            )
        )
        platform = replace(case.evidence.platform, **change)
        return replace(case, evidence=replace(case.evidence, platform=platform))

    def _change_vendor(self, case: Case) -> Case:
        pick = self._random
        change: dict[str, Any] = pick.choice(
            (
                {"enclave_status": "OutOfDate", "enclave_advisory_ids": self._some(ADVISORIES)},
                {"enclave_status": "Revoked"},
                {"authority_revoked": True},
                {"outdated": (pick.choice(DATINGS),)},
            )
        )
        return replace(case, vendor=replace(case.vendor, **change))

    def _change_quote(self, case: Case) -> Case:
        change: dict[str, Any] = self._random.choice(
            (
                {"debug": True},
                {"foreign_module": True},
                {"bound_to": "other"},
                {"claims_own_key": False},
                {"bound_to": "other", "claims_own_key": False},
                {"tampered": True},
                {"mr_config_id": (b"\1" + hashlib.sha256(b"another app").digest()).ljust(48, b"\0")},
            )
        )
        return replace(case, evidence=replace(case.evidence, **change))

    def _change_log(self, case: Case) -> Case:
        pick, evidence = self._random, case.evidence
        events = evidence.measured
        at = pick.randrange(len(events))
        more = (pick.choice(("app-id", "compose-hash", "an-app:s-event", "instance-id")), pick.randbytes(20))
        ready = (*events, ("system-ready", b""), ("app-id", pick.randbytes(20)))
        payload = {"app-id": pick.randbytes(pick.choice((0, 19, 21, 32))), "instance-id": pick.randbytes(21)}
        payload["compose-hash"] = pick.randbytes(pick.choice((0, 31, 33)))
        resized = tuple((name, payload.get(name, was) if name == more[0] else was) for name, was in events)
        measured, logged = pick.choice(
            (
                (events, events[:at] + events[at + 1 :]),
                (events, (*events, more)),
                (events, (*events[:at], (events[at][0], events[at][1] + b"\0"), *events[at + 1 :])),
                (events[:at] + events[at + 1 :],) * 2,
                ((*events, more),) * 2,
                ((more, *events),) * 2,
                (ready,) * 2,
                (resized,) * 2,
                (events, _renamed(events, ("app-id", pick.randbytes(20)))),
                self._aliased(events),
            )
        )
        return replace(case, evidence=replace(evidence, measured=measured, logged=logged))

    def _aliased(self, events: tuple[Event, ...]) -> tuple[tuple[Event, ...], tuple[Event, ...]]:
        """An app id that begins with a colon, shown as part of an event's name, and another app's id behind it."""
        own, victim = b":" + self._random.randbytes(19), dict(events).get("app-id", b"")
        true = tuple((name, own if name == "app-id" else payload) for name, payload in events)
        behind = (*true, ("app-id", victim), ("compose-hash", dict(events).get("compose-hash", b"")))
        shown = tuple(("app-id:", payload[1:]) if payload == own else (name, payload) for name, payload in behind)
        return behind, shown

    def _change_config(self, case: Case) -> Case:
        pick, evidence = self._random, case.evidence
        document = next(b.config for b in self._forger.booted if b.registers == evidence.registers)
        other = pick.choice(self._forger.booted).config
        changed: str = pick.choice(
            (
                "",
                "{}",
                "[]",
                "{",
                json.dumps(other),
                json.dumps(document | {"os_image_hash": other["os_image_hash"]}),
                json.dumps(document | {"os_image_hash": pick.choice(("", "xyz", "0xab", None, 1))}),
                json.dumps(document | {"os_image_hash": str(document.get("os_image_hash")).upper()}),
                json.dumps(document | {"memory_size": pick.choice((GIB, 2 * GIB, 3 * GIB, 4 * GIB, -1, "2"))}),
                json.dumps(document | {"cpu_count": pick.choice((1, 7, -1, "2"))}),
                json.dumps(document | {"qemu_version": pick.choice(("8.2.3", "9.1.0", "7.0.0"))}),
                json.dumps({name: value for name, value in document.items() if name != "tdx_measurement"}),
                json.dumps(document | {"tdx_attestation_variant": "legacy"}),
                json.dumps(document | {"tdx_measurement": other["tdx_measurement"]}),
                json.dumps(document, indent=1),
                json.dumps({"vm_config": evidence.config}),
            )
        )
        if pick.random() < 0.5:
            return replace(case, vm_config=changed)
        same = case.vm_config == evidence.config and pick.random() < 0.7
        case = replace(case, evidence=replace(evidence, config=changed))
        return replace(case, vm_config=changed) if same else case

    def _change_version(self, case: Case) -> Case:
        wrong = (0, 3) if case.rpc == "SignCert" else (2, 7)
        return replace(case, api_version=self._random.choice(wrong))

    def _change_client(self, case: Case) -> Case:
        pick = self._random
        change: dict[str, Any] = pick.choice(
            ({"issuer": "itself"}, {"issuer": "itself"}, {"validity": pick.choice(("past", "future"))}, {})
        )
        return replace(case, client=replace(case.client, **(change or {"has_evidence": False})))

    def _change_request(self, case: Case) -> Case:
        pick = self._random
        dates = {"not_before": pick.choice((1, 2, 3)) * 10**9, "not_after": pick.choice((1, 2, 3)) * 10**9}
        change: dict[str, Any] = pick.choice(({"signed_by_own_key": False}, {"right_word": False}, dates, dates))
        return replace(case, request=replace(case.request, **change))

    # what the webhook says

    def _webhook(self, case: Case, right: BootInfo) -> Webhook:
        pick = self._random
        contract = pick.choice(CONTRACTS)
        file = self._environment(right) if contract == "mock" else self._policy(case, contract, right)
        spoiling: Any = pick.choice(("status", "malformed", "text", "cut", "reset")) if pick.random() < 0.06 else ""
        return Webhook(contract, file, spoiling, pick.choice(("kms", "app")))

    def _environment(self, right: BootInfo) -> str:
        pick = self._random
        listed = [[self._own.device_id, right.device_id], [self._own.mr_aggregated, right.mr_aggregated]]
        name = pick.choice(("allow-all", "allow-all", "deny-all", "deny-kms", "deny-app", "device", "mr"))
        if name not in ("device", "mr"):
            return name
        some = [value for value in listed[name == "mr"] if pick.random() < 0.85]
        return f"allowlist-{name}:{','.join(some)}"

    def _policy(self, case: Case, contract: Contract, right: BootInfo) -> str:
        pick = self._random
        is_kms = case.rpc == "GetKmsKey"
        spell = (lambda text: text) if contract == "file" else self._spelled
        status = case.evidence.platform.tcb_status
        policy: dict[str, Any] = {
            "osImages": self._most([self._own.os_image_hash, *self._images()], spell),
            "gatewayAppId": "0x" + "11" * 20,
            "kms": {"mrAggregated": self._most([self._own.mr_aggregated, *([right.mr_aggregated] * is_kms)], spell)}
            | self._devices([self._own.device_id, right.device_id], spell),
            "apps": {
                spell(app_id): {"composeHashes": self._most([compose_hash], spell)}
                | self._devices([right.device_id], spell)
                for app_id, compose_hash in ((right.app_id, right.compose_hash), ("22" * 20, "33" * 32))
                if pick.random() < 0.95
            },
        }
        if pick.random() < 0.6:
            policy["allowedTcbStatuses"] = ["UpToDate", *self._some((status, "OutOfDate", "SWHardeningNeeded"))]
        if pick.random() < 0.6:
            policy["allowedAdvisoryIds"] = list(self._some(ADVISORIES))
        if pick.random() < 0.02 and contract == "file":
            policy["osImages"] = []
        if pick.random() < 0.05:
            return self._broken(policy)
        return json.dumps(policy)

    def _images(self) -> list[str]:
        return sorted({booted.config["os_image_hash"] for booted in self._forger.booted})

    def _devices(self, right: list[str], spell: Callable[[str], str]) -> dict[str, Any]:
        pick = self._random
        devices = pick.choice(
            ([], [spell(device) for device in right], [spell(device) for device in right], ["44" * 32])
        )
        return {"devices": devices, "allowAnyDevice": pick.random() < 0.6}

    def _most(self, values: list[str], spell: Callable[[str], str]) -> list[str]:
        return [spell(value) for value in values if self._random.random() < 0.96]

    def _some(self, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(value for value in values if self._random.random() < 0.5)

    def _spelled(self, text: str) -> str:
        return self._random.choice((text, text, text.upper(), f"0x{text}", f"0x{text.upper()}"))

    def _broken(self, policy: dict[str, Any]) -> str:
        pick = self._random
        policy = json.loads(json.dumps(policy))
        kinds = ("text", "empty", "array", "images", "apps", "any-device", "measurements")
        match pick.choice(kinds):
            case "text":
                return json.dumps(policy)[:-2]
            case "empty":
                return ""
            case "array":
                return json.dumps([policy])
            case "images":
                policy["osImages"] = "".join(policy["osImages"])
            case "apps":
                policy["apps"] = list(policy["apps"])
            case "any-device":
                policy["kms"]["allowAnyDevice"] = "true"
            case _:
                policy["kms"]["mrAggregated"] = [1]
        return json.dumps(policy)


def _renamed(events: tuple[Event, ...], event: Event) -> tuple[Event, ...]:
    """Give the event of that name another payload."""
    return tuple(event if name == event[0] else (name, payload) for name, payload in events)
