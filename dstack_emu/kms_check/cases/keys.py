"""What is released: keys equal for equal identities and different for different ones, and signed by the root key."""

from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from dstack_emu.attest.certificate import (
    USAGE_KMS_RPC,
    certificate_spki,
    load_der,
    load_pem,
    spki_der,
)
from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.kdf import derive_dh_secret, derive_key, load_p256_pem, p256_scalar
from dstack_emu.attest.signature import app_key_message, env_key_message, k256_point, recover
from dstack_emu.kms_check.case import CaseList
from dstack_emu.kms_check.evidence import bound, new_key
from dstack_emu.kms_check.trial import DepartureError, Trial
from dstack_emu.transport.ratls import peer_of

KEYS: Final = CaseList("runtime")
OF_APP: Final = ("env_crypt_key", "k256_key")
OF_INSTANCE: Final = ("disk_crypt_key",)


async def _keys(t: Trial, what: str, identity: Any = None, **arguments: Any) -> dict[str, bytes]:
    body = t.released(what, await t.app_key(identity, **arguments))
    return {name: t.octets(what, body, name) for name in (*OF_APP, *OF_INSTANCE, "k256_signature")}


@KEYS.case("keys/again", "the same instance gets the same keys, with a new certificate each time")
async def _(t: Trial) -> None:
    first = await _keys(t, "GetAppKey")
    again = await _keys(t, "GetAppKey, again", t.world.issuer.honest(t.world.apps.app))
    for name in (*OF_APP, *OF_INSTANCE):
        t.same_secret(name, again[name], first[name])
        t.equal(f"size of {name}", len(first[name]), 32)


@KEYS.case("keys/forms-of-evidence", "each form of the same evidence gets the same keys")
async def _(t: Trial) -> None:
    first, app = await _keys(t, "GetAppKey"), t.world.apps.app
    key = new_key()
    v1 = t.world.issuer.with_evidence(key, bound(app, key).as_v1())
    legacy = t.world.issuer.legacy(app)
    forms = {
        "msgpack": await _keys(t, "GetAppKey, evidence in msgpack", v1),
        "legacy": await _keys(t, "GetAppKey, legacy evidence", legacy, vm_config=app.vm_config_json),
    }
    for form, got in forms.items():
        for name in (*OF_APP, *OF_INSTANCE):
            t.same_secret(f"{name}, {form}", got[name], first[name])


@KEYS.case("keys/another-instance", "another instance of an app shares the app's keys, and has a disk key of its own")
async def _(t: Trial) -> None:
    first, twin = await _keys(t, "GetAppKey"), await _keys(t, "GetAppKey", t.world.issuer.honest(t.world.apps.twin))
    for name in OF_APP:
        t.same_secret(name, twin[name], first[name])
    for name in OF_INSTANCE:
        t.differ(name, twin[name], first[name])


@KEYS.case("keys/another-app", "another app has no key in common with an app")
async def _(t: Trial) -> None:
    first, other = await _keys(t, "GetAppKey"), await _keys(t, "GetAppKey", t.world.issuer.honest(t.world.apps.other))
    for name in (*OF_APP, *OF_INSTANCE):
        t.differ(name, other[name], first[name])
    t.differ("one app's keys of different kinds", first["env_crypt_key"], first["k256_key"])


@KEYS.case("keys/signature", "the root key has signed the app's key")
async def _(t: Trial) -> None:
    keys, root = await _keys(t, "GetAppKey"), await _root_k256(t)
    message = app_key_message(t.world.apps.app.app_id, k256_point(keys["k256_key"]))
    t.equal("key that signed k256_signature", _signer(keys["k256_signature"], message), root)


@KEYS.case("keys/environment", "the public key for an app's environment fits the released one, and is signed")
async def _(t: Trial) -> None:
    app_id, keys, root = t.world.apps.app.app_id, await _keys(t, "GetAppKey"), await _root_k256(t)
    body = t.released("GetAppEnvEncryptPubKey", await t.env_key(app_id))
    public = t.octets("GetAppEnvEncryptPubKey", body, "public_key")
    expected = X25519PrivateKey.from_private_bytes(keys["env_crypt_key"]).public_key().public_bytes_raw()
    t.equal("public_key", public, expected)
    stamp = body.get("timestamp")
    t.true("timestamp", str(stamp).isdecimal(), str(stamp), "Unix seconds")
    for name, at in (("signature", None), ("signature_v1", int(str(stamp)))):
        signature = t.octets("GetAppEnvEncryptPubKey", body, name)
        t.equal(f"key that signed {name}", _signer(signature, env_key_message(app_id, public, at)), root)
    other = t.released("GetAppEnvEncryptPubKey, another app", await t.env_key(t.world.apps.other.app_id))
    t.differ("public keys of two apps", other.get("public_key"), body.get("public_key"))


@KEYS.case("keys/root", "the root keys that another KMS gets are those behind everything else")
async def _(t: Trial) -> None:
    body, meta = t.released("GetKmsKey", await t.kms_key()), t.released("GetMeta", await t.call("KMS.GetMeta"))
    temp = t.released("GetTempCaCert", await t.temp_ca())
    keys = body.get("keys")
    t.true("keys", isinstance(keys, list) and len(keys) == 1, f"{len(keys or ())} keys", "one")
    root = keys[0] if isinstance(keys, list) else {}
    k256 = t.octets("GetKmsKey", root, "k256_key")
    t.equal("public half of k256_key", k256_point(k256), t.octets("GetMeta", meta, "k256_pubkey"))
    t.same_secret("temp_ca_key", body.get("temp_ca_key"), temp.get("temp_ca_key"))
    try:
        ca_key = load_p256_pem(t.member("GetKmsKey", root, "ca_key"), "ca_key")
        certificate = load_pem(t.member("GetMeta", meta, "ca_cert"), "ca_cert")
    except AttestError as error:
        raise DepartureError("root CA", f"what cannot be read: {error}", "a key and a certificate") from error
    t.equal("key of the root certificate", certificate_spki(certificate), spki_der(ca_key.public_key()))
    app, got, scalar = t.world.apps.app, await _keys(t, "GetAppKey"), p256_scalar(ca_key)
    derived = {
        "disk_crypt_key": derive_dh_secret(scalar, [app.app_id, app.instance_id, b"app-disk-crypt-key"]),
        "env_crypt_key": derive_dh_secret(scalar, [app.app_id, b"env-encrypt-key"]),
        "k256_key": derive_key(k256, [app.app_id, b"app-key"]),
    }
    for name, expected in derived.items():
        t.same_secret(f"{name}, derived from the root keys as dstack does", got[name], expected)


@KEYS.case("keys/server-certificate", "the KMS's own certificate has its evidence, its usage and its root")
async def _(t: Trial) -> None:
    meta = t.released("GetMeta", await t.call("KMS.GetMeta"))
    der_bytes = await t.server_certificate()
    try:
        peer = await peer_of(der_bytes, t.world.verifier)
        load_der(der_bytes).verify_directly_issued_by(load_pem(str(meta.get("ca_cert")), "ca_cert"))
    except (AttestError, ValueError, TypeError) as error:
        raise DepartureError("certificate of the KMS", f"one that proves nothing: {error}", "evidence") from error
    t.equal("usage", peer.usage, USAGE_KMS_RPC)
    t.true("evidence in the certificate", peer.attestation is not None, "none", "evidence")
    if peer.attestation is not None:
        expected = t.world.boot_info(t.world.guest.domain)["mrAggregated"]
        t.equal("mr_aggregated in the certificate", peer.attestation.app_info().mr_aggregated.hex(), expected)


@KEYS.case("keys/metrics", "the page of metrics is there, if it is switched on")
async def _(t: Trial) -> None:
    answer = await t.page("/metrics")
    t.note("/metrics", answer.is_success, answer.shown[:80], "200, by core.metrics.enabled")


async def _root_k256(t: Trial) -> bytes:
    return t.octets("GetMeta", t.released("GetMeta", await t.call("KMS.GetMeta")), "k256_pubkey")


def _signer(signature: bytes, message: bytes) -> bytes:
    try:
        return recover(signature, message)
    except AttestError as error:
        raise DepartureError("signature", f"none: {error}", "a recoverable signature of 65 bytes") from error
