"""A guest that did not boot the image it names gets no key and no certificate, and the verifier says why.

Both are asked over sockets, with evidence whose quote and app are in order and whose hash the policy allows: only the
image is another than the one that is claimed.
"""

import asyncio
import base64
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.attest.app_info import decode_app_info
from dstack_emu.attest.image import Registers, measure
from dstack_emu.attest.os_image import cache_key, encode_cache_entry
from dstack_emu.attest.proto import kms_pb2 as pb
from dstack_emu.deployment.guest_config import GuestConfig, VirtualMachine, power_on
from dstack_emu.kms_emu.image_cache import ImageCache
from dstack_emu.simulator.image import ImageParts, OsImage
from dstack_emu.simulator.image_files import fill_cache, save_image
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import DEFAULT_SEED, Seed
from dstack_emu.simulator.trust_domain import TrustDomain
from tests import foreign
from tests.commands import ask, serving
from tests.foreign import Guest
from tests.recorded import tdx_lite_steps
from tests.running import RunningStack

Json = dict[str, Any]

TWICE = "Failed to verify os image hash: Failed to verify os image hash: "
OF_APP = f"App not allowed: {TWICE}"
OF_VERIFIER = "OS image hash verification failed: "
GIB = 1 << 30

SEED = Seed.of(DEFAULT_SEED)
GOOD = OsImage.from_seed(SEED.derive)
CLAIM = GOOD.vm_config().to_json()


@functools.cache
def intel() -> Intel:
    return Intel(SEED)


def booted(folder: Path, image: OsImage, memory_size: int = 2 * GIB, claim: str | None = CLAIM) -> TrustDomain:
    """The stack's app, on its machine, booted from an image directory; it claims to be the stack's image."""
    save_image(image, folder)
    machine = VirtualMachine(memory_size=memory_size, config=claim, directory=folder)
    return power_on(intel(), GuestConfig(machine=machine))


@pytest.fixture
def guest(ready_stack: RunningStack) -> Guest:
    return Guest.of(ready_stack.services["kms-src"], ready_stack.services["app"])


def app_key(guest: Guest, domain: TrustDomain, **arguments: Any) -> foreign.Answer:
    """Ask for keys with evidence of that domain."""
    key = foreign.new_key()
    evidence = domain.attest(foreign.binding_of(foreign.spki_of(key))).encode()
    return guest.get_app_key(guest.temp_ca.issue(key, evidence), **arguments)


def verify(stack: RunningStack, **request: Any) -> Json:
    """POST /verify."""
    status, answer = ask(stack.services["verifier"], "/verify", request)
    assert status == 200
    assert isinstance(answer, dict)
    return answer


def verified(stack: RunningStack, domain: TrustDomain) -> Json:
    return verify(stack, attestation=domain.attest(bytes(64)).encode().hex())


def mismatch(register: str, expected: Registers, domain: TrustDomain) -> str:
    """The text for one register that is not what the good image gives."""
    report = domain.report(bytes(64))
    quoted = {"mrtd": report.mr_td, "rtmr0": report.rt_mr0, "rtmr1": report.rt_mr1, "rtmr2": report.rt_mr2}[register]
    want = getattr(expected, register).hex()
    return f"MRs do not match: {register.upper()} mismatch: expected={want}, actual={quoted.hex()}"


# ---- what holds


def test_guest_of_the_image_it_names_gets_keys_and_is_valid(
    ready_stack: RunningStack, guest: Guest, tmp_path: Path
) -> None:
    domain = booted(tmp_path / "image", GOOD)
    assert app_key(guest, domain).value["os_image_hash"] == GOOD.os_image_hash.hex()
    answer = verified(ready_stack, domain)
    assert (answer["is_valid"], answer["reason"]) == (True, None)
    details = answer["details"]
    assert [name for name, value in details.items() if value is True] == [
        "quote_verified",
        "event_log_verified",
        "os_image_hash_verified",
        "acpi_tables_verified",
    ]
    assert details["boot_info"]["osImageHash"] == GOOD.os_image_hash.hex()
    registers, _ = GOOD.boot(GOOD.vm_config())
    assert details["app_info"]["rtmr1"] == registers.rtmr1.hex()


def test_recorded_image_boots_to_its_recorded_registers(
    ready_stack: RunningStack, guest: Guest, tmp_path: Path
) -> None:
    recorded = tdx_lite_steps()["emulated"]
    document = recorded["vm_config"]["tdx_measurement"]
    folder = tmp_path / "dstack-emu-image-0.6.0"
    folder.mkdir()
    for name, content in recorded["files"].items():
        (folder / name).write_bytes(bytes.fromhex(content))
    (folder / "sha256sum.txt").write_bytes(base64.b64decode(document["checksum_file"]))
    domain = power_on(intel(), GuestConfig(machine=VirtualMachine(directory=folder)))
    # MRTD is the document's other one: this machine's QEMU adds pages in two passes.
    report = domain.report(bytes(64))
    assert [report.rt_mr1.hex(), report.rt_mr2.hex()] == [recorded["registers"][name] for name in ("rtmr1", "rtmr2")]
    os_image_hash = recorded["vm_config"]["os_image_hash"]
    answer = verified(ready_stack, domain)
    assert (answer["is_valid"], answer["details"]["app_info"]["os_image_hash"]) == (True, os_image_hash)
    assert app_key(guest, domain).error == "App not allowed: Boot denied: OS image is not allowed"
    with ready_stack.policy_changed("src", lambda policy: policy["osImages"].append(f"0x{os_image_hash}")):
        assert app_key(guest, domain).value["os_image_hash"] == os_image_hash


# ---- another image than the claimed one


def _part(**parts: Any) -> OsImage:
    return OsImage.from_seed(SEED.derive, given=ImageParts(**parts))


def _one_byte(name: str) -> bytes:
    content = bytearray(GOOD.files[name])
    content[1000] ^= 1
    return bytes(content)


CMDLINE: str = json.loads(GOOD.files["metadata.json"])["cmdline"]


@dataclass(frozen=True)
class Another:
    """A boot that is not the claimed one: how it is made, and the register in which it shows."""

    image: Callable[[], OsImage]
    register: str
    memory_size: int = 2 * GIB


OTHERS = {
    "one byte of the kernel": Another(lambda: _part(kernel=_one_byte("bzImage")), "rtmr1"),
    "another command line": Another(lambda: _part(cmdline=f"{CMDLINE} init=/bin/sh"), "rtmr2"),
    "another initrd": Another(lambda: _part(initrd=_one_byte("initramfs.cpio.gz")), "rtmr2"),
    "another firmware": Another(lambda: _part(firmware=_one_byte("ovmf.fd")), "mrtd"),
    "another memory size": Another(lambda: GOOD, "rtmr0", memory_size=4 * GIB),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_guest_of_another_image_is_refused_by_both(
    other: Another, ready_stack: RunningStack, guest: Guest, tmp_path: Path
) -> None:
    domain = booted(tmp_path / "image", other.image(), other.memory_size)
    # The ACPI digests are the log's: another memory size shows in the TD HOB, which is the image's to measure.
    acpi = GOOD.acpi_digests(domain.vm_config)
    said = mismatch(other.register, measure(GOOD.measurement, GOOD.vm_config(), acpi), domain)
    assert app_key(guest, domain).error == OF_APP + said
    answer = verified(ready_stack, domain)
    assert (answer["is_valid"], answer["reason"]) == (False, OF_VERIFIER + said)
    assert answer["details"]["quote_verified"] is True
    assert answer["details"]["os_image_hash_verified"] is False
    assert answer["details"]["app_info"] is None
    assert "boot_info" not in answer["details"]
    true = booted(tmp_path / "true", GOOD)
    assert (app_key(guest, true).status, verified(ready_stack, true)["is_valid"]) == (200, True)


def test_refused_guest_gets_no_certificate_and_no_root_keys(
    ready_stack: RunningStack, guest: Guest, tmp_path: Path
) -> None:
    domain = booted(tmp_path / "image", _part(kernel=_one_byte("bzImage")))
    said = TWICE + mismatch("rtmr1", GOOD.boot(GOOD.vm_config())[0], domain)
    key = foreign.new_key()
    evidence = domain.attest(foreign.binding_of(foreign.spki_of(key)))
    with foreign.kms(guest.kms_url) as connection:
        request = foreign.signing_request(key, evidence.encode(), "app.example.com")
        assert connection.call("SignCert", **request).error == said
    measured = decode_app_info(evidence).mr_aggregated.hex()
    identity = guest.temp_ca.issue(key, evidence.encode())
    with (
        ready_stack.policy_changed("src", lambda policy: policy["kms"]["mrAggregated"].append(f"0x{measured}")),
        foreign.kms(guest.kms_url, identity=identity) as connection,
    ):
        assert connection.call("GetKmsKey").error == said


def test_webhook_is_asked_before_the_image_is_measured(ready_stack: RunningStack, guest: Guest, tmp_path: Path) -> None:
    domain = booted(tmp_path / "image", _part(kernel=_one_byte("bzImage")))
    with ready_stack.policy_changed("src", lambda policy: policy["apps"].clear()):
        assert app_key(guest, domain).error == "App not allowed: Boot denied: app not registered"


# ---- a config that is not the image's


def _claims(change: Callable[[Json], object]) -> str:
    document: Json = json.loads(CLAIM)
    change(document)
    return json.dumps(document)


def _document(document: Json, name: str, change: Callable[[bytes], bytes]) -> None:
    measurement = document["tdx_measurement"]
    measurement[name] = base64.b64encode(change(base64.b64decode(measurement[name]))).decode()


def _other_document(content: bytes) -> bytes:
    return _part(kernel=_one_byte("bzImage")).files["measurement.tdx.cbor"]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


CHECKSUM_FILE, DOCUMENT = GOOD.files["sha256sum.txt"], GOOD.files["measurement.tdx.cbor"]
LONGER = CHECKSUM_FILE + b"\n"
MATERIAL = "tdx lite measurement material does not match os_image_hash: "

CLAIMS = {
    "wrong checksum file": (
        _claims(lambda d: _document(d, "checksum_file", lambda text: LONGER)),
        f"{MATERIAL}os_image_hash mismatch: expected sha256(sha256sum.txt)={GOOD.os_image_hash.hex()}, "
        f"actual={_sha256(LONGER)}",
    ),
    "swapped measurement document": (
        _claims(lambda d: _document(d, "measurement", _other_document)),
        f"{MATERIAL}measurement.tdx.cbor hash mismatch: sha256sum.txt={_sha256(DOCUMENT)}, "
        f"actual={_sha256(_other_document(b''))}",
    ),
    "no document": (
        _claims(lambda d: d.pop("tdx_measurement")),
        "tdx lite attestation requires vm_config.tdx_measurement",
    ),
    "a memory size that the document does not cover": (
        _claims(lambda d: d.update(memory_size=2500 << 20)),
        "Failed to compute TDX expected measurements without image download: TDX lite attestation without image "
        "download requires memory_size == 2147483648 bytes (2048 MiB) or >= 2952790016 bytes (2816 MiB); got "
        "2621440000 bytes",
    ),
}


@pytest.mark.parametrize(("claim", "said"), CLAIMS.values(), ids=CLAIMS.keys())
def test_false_config_is_refused_by_both(claim: str, said: str, ready_stack: RunningStack, guest: Guest) -> None:
    assert guest.get_app_key(guest.identity_without_vm_config(), vm_config=claim).error == OF_APP + said
    evidence = foreign.ask_agent(ready_stack.services["app"], "GetQuote", {"report_data": ""})
    request = {"quote": evidence["quote"], "event_log": evidence["event_log"], "vm_config": claim}
    answer = verify(ready_stack, **request)
    assert (answer["is_valid"], answer["reason"]) == (False, OF_VERIFIER + said)
    # Beside an attestation it must be the attestation's own.
    attestation = foreign.ask_agent(ready_stack.services["app"], "v1/Attest", {"report_data": ""})["attestation"]
    answer = verify(ready_stack, **request, attestation=attestation)
    mismatch = "vm_config of the request does not match the one in the attestation"
    assert (answer["is_valid"], answer["reason"]) == (False, OF_VERIFIER + mismatch)
    request["vm_config"] = evidence["vm_config"]
    assert verify(ready_stack, **request, attestation=attestation)["is_valid"]


def test_log_without_its_acpi_events_is_refused(ready_stack: RunningStack, guest: Guest) -> None:
    evidence = foreign.ask_agent(ready_stack.services["app"], "GetQuote", {"report_data": ""})
    log = [event for event in json.loads(evidence["event_log"]) if not event["event"].startswith("acpi-")]
    request = {"quote": evidence["quote"], "event_log": json.dumps(log), "vm_config": evidence["vm_config"]}
    assert verify(ready_stack, **request)["reason"] == (
        f"{OF_VERIFIER}TDX lite attestation is missing named RTMR0 ACPI DATA digests: TDX lite attestation requires "
        "exactly 3 RTMR0 ACPI DATA events; found 0 candidates and 10 RTMR0 events"
    )


# ---- the commands


def test_agent_boots_an_image_directory_and_claims_what_it_is_told(
    ready_stack: RunningStack, guest: Guest, tmp_path: Path
) -> None:
    save_image(_part(kernel=_one_byte("bzImage")), tmp_path / "changed")
    (tmp_path / "sys-config.json").write_text(json.dumps({"vm_config": CLAIM}))
    claims = ("--sys-config", str(tmp_path / "sys-config.json"))
    common = ("--pccs", ready_stack.services["pccs"])
    with serving("agent", "--image-dir", str(tmp_path / "changed"), *claims, *common) as agent:
        assert agent["os_image_hash"] == GOOD.os_image_hash.hex()
        liar = Guest.of(guest.kms_url, agent["dstack_sock"])
        assert liar.get_app_key().error.startswith(f"{OF_APP}MRs do not match: RTMR1 mismatch: expected=")


# ---- the cache of a KMS


def test_legacy_guest_gets_keys_once_image_and_measurements_are_cached(
    ready_stack: RunningStack, guest: Guest, tmp_path: Path
) -> None:
    legacy = replace(GOOD.vm_config(), tdx_attestation_variant="legacy")
    domain = booted(tmp_path / "image", GOOD, claim=legacy.to_json())
    offline = f"Failed to download image {GOOD.os_image_hash.hex()}: Failed to download image: error sending request"
    assert app_key(guest, domain).error.startswith(OF_APP + offline)
    assert verified(ready_stack, domain)["reason"].startswith(OF_VERIFIER + offline)
    registers, _ = GOOD.boot(GOOD.vm_config())
    cache = Path(ready_stack.description["state"]) / "images"
    fill_cache(GOOD, cache, cache_key(legacy), encode_cache_entry(registers))
    assert app_key(guest, domain).value["os_image_hash"] == GOOD.os_image_hash.hex()
    assert verified(ready_stack, domain)["details"]["acpi_tables_verified"] is True
    # Another kernel shows here, too.
    other = booted(tmp_path / "other", _part(kernel=_one_byte("bzImage")), claim=legacy.to_json())
    assert app_key(guest, other).error == OF_APP + mismatch("rtmr1", registers, other)


def test_cleared_cache_is_empty(tmp_path: Path) -> None:
    legacy = replace(GOOD.vm_config(), tdx_attestation_variant="legacy")
    entry = cache_key(legacy)
    path = fill_cache(GOOD, tmp_path, entry, encode_cache_entry(GOOD.boot(legacy)[0]))
    cache = ImageCache(tmp_path)
    asyncio.run(cache.clear(pb.ClearImageCacheRequest(config_hash=entry)))
    assert not path.exists()
    assert (tmp_path / "images" / GOOD.os_image_hash.hex()).exists()
    asyncio.run(cache.clear(pb.ClearImageCacheRequest(image_hash=GOOD.os_image_hash.hex())))
    assert list((tmp_path / "images").iterdir()) == []
