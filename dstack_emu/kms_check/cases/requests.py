"""Requests that are not as they should be: versions, VM configs, signing requests, bodies and methods."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from cryptography.exceptions import InvalidSignature

from dstack_emu.attest.certificate import USAGE_APP_LEAF, app_id_of, certificate_spki, load_pem, spki_der, usage_of
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.release import Release
from dstack_emu.kms_check import evidence as forge
from dstack_emu.kms_check.calls import request
from dstack_emu.kms_check.case import Act, CaseList
from dstack_emu.kms_check.evidence import Key, bound, new_key, signing_request, signing_request_v1
from dstack_emu.kms_check.trial import DepartureError, Trial
from dstack_emu.kms_check.world import World

REQUESTS: Final = CaseList("runtime")
MISMATCH: Final = "vm_config of the request does not match the one in the attestation"
UNREADABLE: Final = ("{", "[]", '{"cpu_count": -1}', '{"os_image_hash": "0x00"}', '{"os_image_hash": 7}')


@REQUESTS.case("request/api-version", "GetAppKey of a version that does not exist is refused")
async def _(t: Trial) -> None:
    for version in (2, 7):
        answer = await t.app_key(api_version=version)
        t.refused(f"GetAppKey, version {version}", answer, f"Unsupported API version: {version}")
    t.released("GetAppKey, version 0", await t.app_key(api_version=0))


@REQUESTS.case("request/vm-config-unreadable", "a VM config that cannot be read is refused before the webhook is asked")
async def _(t: Trial) -> None:
    identity = t.world.issuer.legacy(t.world.apps.app)
    for config in UNREADABLE:
        answer = await t.app_key(identity, vm_config=config)
        t.refused(f"GetAppKey, {config}", answer, "App not allowed: decode app info: Failed to decode os image hash: ")
    t.equal("requests about the app to the webhook", t.world.webhook.seen("app"), [])


@REQUESTS.case("request/vm-config-missing", "evidence without a VM config, in a request without one, names no image")
async def _(t: Trial) -> None:
    identity = t.world.issuer.legacy(t.world.apps.app)
    t.refused("GetAppKey", await t.app_key(identity), "App not allowed: Boot denied: OS image is not allowed")
    right = t.world.apps.app.vm_config_json
    t.released("GetAppKey, with the VM config", await t.app_key(identity, vm_config=right))


@REQUESTS.case("request/vm-config-empty-object", "an empty VM config names no image, whatever the evidence has")
async def _(t: Trial) -> None:
    must_match = t.release.vm_config_must_match
    text = MISMATCH if must_match else "Boot denied: OS image is not allowed"
    t.refused("GetAppKey", await t.app_key(vm_config="{}"), f"App not allowed: {text}")
    t.refused("GetKmsKey", await t.kms_key(vm_config="{}"), text)
    key = new_key()
    arguments = {**signing_request(key, bound(t.world.apps.app, key)), "vm_config": "{}"}
    t.refused("SignCert", await t.sign(arguments), text)
    right = t.world.apps.app.vm_config_json
    t.released("GetAppKey, with the VM config of the evidence", await t.app_key(vm_config=right))


def _must_match(release: Release) -> bool:
    return release.vm_config_must_match


@REQUESTS.case(
    "request/vm-config-other",
    "a VM config that is not the evidence's is refused, before the webhook is asked",
    applies=_must_match,
)
async def _(t: Trial) -> None:
    for config in (t.world.claim(cpu_count=3), t.world.claim(os_image_hash="55" * 32)):
        t.refused("GetAppKey", await t.app_key(vm_config=config), f"App not allowed: {MISMATCH}")
    t.equal("requests about the app to the webhook", t.world.webhook.seen("app"), [])


@REQUESTS.case("request/app-id", "an app id that is not 20 bytes is refused")
async def _(t: Trial) -> None:
    for app_id in (b"", b"\0", bytes(21)):
        t.refused(f"GetAppEnvEncryptPubKey, {len(app_id)} bytes", await t.env_key(app_id), "app_id must be 20 bytes")


@REQUESTS.case("request/body", "a body that is no JSON is refused")
async def _(t: Trial) -> None:
    url = f"{t.world.kms.url}/prpc/KMS.GetAppKey?json"
    for body in (b"{", b"1", b'{"api_version": "one"}', b"\xff"):
        answer = await request("POST", url, body, t.world.app_identity, patience=t.world.patience)
        t.refused(f"GetAppKey, {body!r}", answer)


@REQUESTS.case("request/method", "a method that does not exist is refused")
async def _(t: Trial) -> None:
    answer = await t.call("KMS.NoSuchMethod", t.world.app_identity)
    t.equal("status of an unknown method", answer.status, t.release.unknown_method_status)
    onboard = await t.call("Onboard.Bootstrap", domain="127.0.0.1")
    t.equal("status of a method of the onboard phase", onboard.status, t.release.unknown_method_status)


# ---- SignCert


Forged = Callable[[World, Key], dict[str, Any]]


def _of(world: World, key: Key, **config: Any) -> dict[str, Any]:
    return signing_request(key, bound(world.apps.app, key), **config)


def _v1(world: World, key: Key, **changes: Any) -> dict[str, Any]:
    made = signing_request_v1(key, bound(world.apps.app, key), **changes)
    return {**made, "vm_config": world.apps.app.vm_config_json}


def _cut(world: World, key: Key) -> dict[str, Any]:
    made = _of(world, key)
    return {**made, "csr": made["csr"][:100]}


_V1_LOG: Final = "Failed to upgrade csr v1 to v2: Failed to parse tdx_event_log: "
SIGNING: Final[Mapping[str, tuple[str, Forged, str]]] = {
    "version-0": ("version 0", lambda w, k: {**_of(w, k), "api_version": 0}, "Unsupported API version: 0"),
    "version-3": ("version 3", lambda w, k: {**_of(w, k), "api_version": 3}, "Unsupported API version: 3"),
    "version-1-as-2": ("version 1 that says 2", lambda w, k: {**_v1(w, k), "api_version": 2}, "Failed to parse csr: "),
    "cut": ("a request that is cut off", _cut, "Failed to parse csr: "),
    "no-signature": (
        "a request without a signature",
        lambda w, k: {**_of(w, k), "signature": ""},
        "Failed to verify csr signature: ",
    ),
    "other-signature": (
        "a request that another key has signed",
        lambda w, k: signing_request(k, bound(w.apps.app, k), signer=new_key()),
        "Failed to verify csr signature: ",
    ),
    "borrowed": (
        "a request with evidence for another key",
        lambda w, k: signing_request(k, bound(w.apps.app, new_key())),
        "Quote verification failed: report data mismatch",
    ),
    "v1-word": (
        "a request of version 1 with another confirm word",
        lambda w, k: _v1(w, k, word="please sign this:"),
        "Failed to verify csr signature: Invalid confirm word",
    ),
    "v1-log-empty": (
        "a request of version 1 with an empty log",
        lambda w, k: _v1(w, k, log=b"[]"),
        "Quote verification failed: RTMR3 mismatch",
    ),
    "v1-log-no-json": ("a request of version 1 whose log is no JSON", lambda w, k: _v1(w, k, log=b"no JSON"), _V1_LOG),
    "v1-borrowed": (
        "a request of version 1 with a quote over another key",
        lambda w, k: {
            **signing_request_v1(k, bound(w.apps.app, new_key())),
            "vm_config": w.apps.app.vm_config_json,
        },
        "Quote verification failed: report data mismatch",
    ),
    "v1-bit": (
        "a request of version 1 with one bit of the quote changed",
        lambda w, k: {
            **signing_request_v1(k, forge.one_bit(bound(w.apps.app, k), forge.QUOTE_FIELDS["mrtd"])),
            "vm_config": w.apps.app.vm_config_json,
        },
        "Quote verification failed: ",
    ),
}


def _signing(make: Forged, text: str) -> Act:
    async def act(t: Trial) -> None:
        t.refused("SignCert", await t.sign(make(t.world, new_key())), text)
        t.equal("requests about the app to the webhook", t.world.webhook.seen("app"), [])
        key = new_key()
        t.released("SignCert, as it should be", await t.sign(_of(t.world, key)))

    return act


for _name, (_what, _make, _text) in SIGNING.items():
    REQUESTS.add(f"sign-cert/{_name}", f"{_what} gets no certificate", _signing(_make, _text))


def _refuses_reversed(release: Release) -> bool:
    return release.refuses_reversed_validity


@REQUESTS.case(
    "sign-cert/dates",
    "a certificate that would end before it begins is not issued",
    applies=_refuses_reversed,
)
async def _(t: Trial) -> None:
    key = new_key()
    answer = await t.sign(_of(t.world, key, not_before=2_000_000_000, not_after=1_000_000_000))
    t.refused("SignCert", answer, "not_before must be earlier than not_after")
    t.released("SignCert", await t.sign(_of(t.world, key, not_before=1_000_000_000, not_after=2_000_000_000)))


@REQUESTS.case("sign-cert/issued", "a certificate has the key and the app id that were proven, and leads to the root")
async def _(t: Trial) -> None:
    for version in (2, 1):
        key = new_key()
        body = t.released("SignCert", await t.sign((_of if version == 2 else _v1)(t.world, key)))
        chain = body.get("certificate_chain")
        t.true("certificate_chain", isinstance(chain, list) and len(chain) == 3, str(type(chain)), "three certificates")
        try:
            leaf, app_ca, root = (load_pem(str(text), "certificate_chain") for text in chain or ())
            leaf.verify_directly_issued_by(app_ca)
            app_ca.verify_directly_issued_by(root)
            got = app_id_of(leaf)
        except (FormatError, ValueError, TypeError, InvalidSignature) as error:
            raise DepartureError("certificate_chain", f"no chain: {error!r:.200}", "a chain to the root") from error
        t.equal(f"key in the certificate, version {version}", certificate_spki(leaf), spki_der(key.public_key()))
        t.equal("app id in the certificate", got, t.world.apps.app.app_id)
        t.equal("usage in the certificate", usage_of(leaf), USAGE_APP_LEAF)
