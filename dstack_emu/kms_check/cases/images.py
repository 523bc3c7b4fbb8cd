"""OS images of callers: whoever booted another one than the image whose hash it claims gets nothing."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from dstack_emu.kms_check.case import Act, CaseList
from dstack_emu.kms_check.evidence import bound, new_key, signing_request
from dstack_emu.kms_check.trial import Trial
from dstack_emu.kms_check.world import World
from dstack_emu.simulator.trust_domain import TrustDomain

IMAGES: Final = CaseList("runtime")
NO_IMAGE: Final = "55" * 32
"""The hash of no image."""


def _changed(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[1000] ^= 1
    return bytes(changed)


def _other_kernel(world: World, name: str = "app") -> TrustDomain:
    return world.impostor(name, kernel=_changed(world.image.files["bzImage"]))


IMPOSTORS: Final[Mapping[str, tuple[str, Callable[[World], TrustDomain], str]]] = {
    "kernel": ("another kernel", _other_kernel, "RTMR1 mismatch"),
    "command-line": ("another command line", lambda world: world.impostor(cmdline="init=/bin/sh"), "RTMR2 mismatch"),
    "initrd": (
        "another initrd",
        lambda world: world.impostor(initrd=_changed(world.image.files["initramfs.cpio.gz"])),
        "RTMR2 mismatch",
    ),
    "firmware": (
        "another firmware",
        lambda world: world.impostor(firmware=_changed(world.image.files["ovmf.fd"])),
        "MRTD mismatch",
    ),
    "memory": ("another memory size", lambda world: world.impostor(memory_size=4 << 30), "RTMR0 mismatch"),
}
"""Domains that booted something else than the image whose hash they claim."""

IMAGE: Final = "Failed to verify os image hash: "


def _impostor(boot: Callable[[World], TrustDomain], text: str) -> Act:
    async def act(t: Trial) -> None:
        domain, key = boot(t.world), new_key()
        t.refused("GetAppKey", await t.app_key(t.world.issuer.honest(domain)), f"App not allowed: {IMAGE}{IMAGE}")
        answer = await t.sign(signing_request(key, bound(domain, key)))
        t.refused("SignCert", answer, IMAGE)
        t.note("SignCert names the register", text in answer.refusal, answer.shown, text)

    return act


for _name, (_what, _boot, _text) in IMPOSTORS.items():
    IMAGES.add(
        f"image/{_name}",
        f"a guest that booted {_what} under the hash of an allowed image gets nothing",
        _impostor(_boot, _text),
    )


@IMAGES.case("image/kms", "root keys go to no KMS that booted another image than it claims")
async def _(t: Trial) -> None:
    domain = _other_kernel(t.world, "kms-dst")
    t.world.complete(domain, "kms-dst")
    measured = t.world.boot_info(domain)["mrAggregated"]
    with t.world.webhook.changed(lambda policy: policy["kms"]["mrAggregated"].append(measured)):
        t.refused("GetKmsKey", await t.kms_key(t.world.issuer.honest(domain)), IMAGE)
    t.released("GetKmsKey, honest", await t.kms_key())


_Claim = Callable[[World], str]


def _claimed(claim: _Claim, text: str) -> Act:
    async def act(t: Trial) -> None:
        identity = t.world.issuer.legacy(t.world.apps.app)
        t.refused("GetAppKey", await t.app_key(identity, vm_config=claim(t.world)), text)
        right = t.world.apps.app.vm_config_json
        t.released("GetAppKey, with the right config", await t.app_key(identity, vm_config=right))

    return act


for _name, _what, _claim, _text in (
    (
        "claimed-hash",
        "another image's hash",
        lambda world: world.claim(os_image_hash=NO_IMAGE),
        "OS image is not allowed",
    ),
    ("checksums", "other checksums", lambda world: world.claim_document("checksum_file", b"\n"), IMAGE),
    ("measurement", "another measurement document", lambda world: world.claim_document("measurement", b"\0"), IMAGE),
    ("no-measurement", "no measurement document", lambda world: world.claim(tdx_measurement=None), IMAGE),
    ("cpu-count", "an unreadable number of CPUs", lambda world: world.claim(cpu_count=-1), "Failed to parse vm config"),
):
    IMAGES.add(f"image/vm-config-{_name}", f"a request that claims {_what} gets no keys", _claimed(_claim, _text))


@IMAGES.case("image/vm-config-of-another", "evidence that claims the hash of another image is refused")
async def _(t: Trial) -> None:
    """The evidence has another image's config; the webhook allows both images."""
    key = new_key()
    claim = t.world.claim(os_image_hash=NO_IMAGE)
    evidence = replace(bound(t.world.apps.app, key), config=claim)
    with t.world.webhook.changed(lambda policy: policy["osImages"].append(NO_IMAGE)):
        t.refused("GetAppKey", await t.app_key(t.world.issuer.with_evidence(key, evidence)), IMAGE)
        t.refused("SignCert", await t.sign(signing_request(key, evidence)), IMAGE)
