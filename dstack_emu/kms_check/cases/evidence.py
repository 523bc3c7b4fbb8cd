"""Evidence and certificates of callers: each way of cheating is refused, and what is honest is not."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.certificate import spki_der
from dstack_emu.attest.eventlog import RuntimeEvent
from dstack_emu.attest.report_data import ratls_report_data
from dstack_emu.deployment.specs import GuestSpec
from dstack_emu.deployment.trust_domains import boot_domain
from dstack_emu.kms_check import evidence as forge
from dstack_emu.kms_check.case import Act, CaseList
from dstack_emu.kms_check.evidence import Issuer, Key, bound, new_key, signing_request
from dstack_emu.kms_check.trial import Trial
from dstack_emu.kms_check.world import World
from dstack_emu.simulator.trust_domain import TrustDomain
from dstack_emu.transport.tls import Identity

EVIDENCE: Final = CaseList("runtime")

Forgery = Callable[[World, Key], Attestation]
UNVERIFIED: Final = "failed to verify TDX quote: "


def _domain(t_world: World, **spec: object) -> TrustDomain:
    """Boot the app with other settings."""
    return boot_domain(
        t_world.deployment.context, GuestSpec.model_validate({"name": "app", "platform": "host of app", **spec})
    )


def _one_bit(offset: int) -> Forgery:
    return lambda world, key: forge.one_bit(bound(world.apps.app, key), offset)


def _another_key(world: World, _key: Key) -> Attestation:
    return bound(world.apps.app, new_key())


def _claimed_binding(world: World, key: Key) -> Attestation:
    """Claim the own key beside a quote over another one."""
    return replace(bound(world.apps.app, new_key()), report_data=ratls_report_data(spki_der(key.public_key())))


def _bare_key(world: World, key: Key) -> Attestation:
    """Quote the key without the tag of RA-TLS: evidence that was made for another purpose."""
    spki = spki_der(key.public_key())
    return world.apps.app.attest(spki[-64:])


def _debug(world: World, key: Key) -> Attestation:
    return bound(_domain(world, debug=True), key)


def _payload(name: str, payload: bytes) -> Forgery:
    return lambda world, key: forge.with_payload(bound(world.apps.app, key), name, payload)


def _identity_of_other(world: World, key: Key) -> Attestation:
    other = world.apps.other
    evidence = forge.with_payload(bound(world.apps.app, key), "app-id", other.app_id)
    return forge.with_payload(evidence, "compose-hash", other.compose_hash)


def _without_event(world: World, key: Key) -> Attestation:
    return forge.without_event(bound(world.apps.app, key), "instance-id")


def _reversed(world: World, key: Key) -> Attestation:
    evidence = bound(world.apps.app, key)
    return forge.with_events(evidence, evidence.runtime_events[::-1])


def _unmeasured(world: World, key: Key) -> Attestation:
    evidence = bound(world.apps.app, key)
    return forge.with_events(evidence, (*evidence.runtime_events, RuntimeEvent("app-id", world.apps.other.app_id)))


def _no_events(world: World, key: Key) -> Attestation:
    return forge.with_events(bound(world.apps.app, key), ())


FORGERIES: Final[Mapping[str, tuple[str, Forgery, str]]] = {
    **{
        f"bit-{field}": (f"a quote of which one bit is changed ({field})", _one_bit(offset), UNVERIFIED)
        for field, offset in forge.QUOTE_FIELDS.items()
    },
    "another-key": ("a quote over another key than the certificate's", _another_key, "report data mismatch"),
    "claimed-binding": (
        "a quote over another key, beside a claim that it is over this one",
        _claimed_binding,
        "report_data mismatch",
    ),
    "untagged-key": ("a quote over the key without the tag of RA-TLS", _bare_key, "report data mismatch"),
    "debug": ("a quote of a debug domain", _debug, f"{UNVERIFIED}Debug mode is enabled"),
    "event-app-id": ("a log with another app id", _payload("app-id", bytes(20)), "RTMR3 mismatch"),
    "event-compose-hash": ("a log with another compose hash", _payload("compose-hash", bytes(32)), "RTMR3 mismatch"),
    "event-instance-id": ("a log with another instance id", _payload("instance-id", bytes(20)), "RTMR3 mismatch"),
    "event-identity": ("a log with the identity of another app", _identity_of_other, "RTMR3 mismatch"),
    "event-removed": ("a log without one of its events", _without_event, "RTMR3 mismatch"),
    "event-order": ("a log in another order", _reversed, "RTMR3 mismatch"),
    "event-unmeasured": ("a log with an event that was not measured", _unmeasured, "RTMR3 mismatch"),
    "event-none": ("a log without runtime events", _no_events, "RTMR3 mismatch"),
}
"""Evidence that proves nothing: what it is, how it is made, and a part of upstream's refusal."""


def _forged(make: Forgery, text: str) -> Act:
    async def act(t: Trial) -> None:
        key = new_key()
        evidence = make(t.world, key)
        identity = t.world.issuer.with_evidence(key, evidence)
        t.refused("GetAppKey", await t.app_key(identity), f"invalid quote: {text}" if ":" in text else text)
        t.refused("SignCert", await t.sign(signing_request(key, evidence)), text)
        t.equal("requests about it to the webhook", t.world.webhook.seen("app"), [])

    return act


for _name, (_what, _make, _text) in FORGERIES.items():
    EVIDENCE.add(f"evidence/{_name}", f"{_what} gets neither keys nor a certificate", _forged(_make, _text))


@EVIDENCE.case("evidence/kms-key-forged", "root keys go to no KMS with forged or borrowed evidence")
async def _(t: Trial) -> None:
    receiver, debug = t.world.receiver, _domain(t.world, name="kms-dst", debug=True)
    forgeries: dict[str, Callable[[Key], Attestation]] = {
        "one bit changed": lambda key: forge.one_bit(bound(receiver, key), forge.QUOTE_FIELDS["mrtd"]),
        "another key": lambda key: bound(receiver, new_key()),
        "debug": lambda key: bound(debug, key),
    }
    for what, make in forgeries.items():
        key = new_key()
        answer = await t.kms_key(t.world.issuer.with_evidence(key, make(key)))
        t.refused(f"GetKmsKey, {what}", answer, "invalid quote: ")
    t.released("GetKmsKey, honest", await t.kms_key())


# ---- event logs that can be read in two ways


@EVIDENCE.case("evidence/event-twice", "a log in which a system event occurs twice does not prove the second one")
async def _(t: Trial) -> None:
    domain, other = _domain(t.world), t.world.apps.other
    domain.measure("app-id", other.app_id)
    domain.measure("compose-hash", other.compose_hash)
    answer = await t.app_key(t.world.issuer.honest(domain))
    if answer.is_success:
        own = t.released("GetAppKey, of the first identity", await t.app_key())
        t.same_secret("the keys are those of the first identity", answer.body.get("k256_key"), own.get("k256_key"))
    t.advised("GetAppKey", answer, "dstack's own KMS takes the first event of a name")


@EVIDENCE.case("evidence/event-renamed", "a log that shows measured events under other names proves no identity")
async def _(t: Trial) -> None:
    app, image = t.world.apps.app, t.world.image
    domain = TrustDomain(
        app.platform, image, t.world.compose("app"), instance_seed=b"", vm_config=app.vm_config, release=t.world.release
    )
    domain.measure("app-id", b":" + bytes(19))
    domain.measure("compose-hash", b":" + bytes(31))
    for event in app.runtime_events:
        if event.event != "system-preparing":
            domain.measure(event.event, event.payload)
    key = new_key()
    evidence = forge.renamed(bound(domain, key), "app-id", "compose-hash")
    why = "dstack's own KMS does not look for it, because its images let no app measure before the boot is over"
    t.advised("GetAppKey", await t.app_key(t.world.issuer.with_evidence(key, evidence)), why)
    t.advised("SignCert", await t.sign(signing_request(key, evidence)), why)


# ---- measurements computed otherwise


@EVIDENCE.case("evidence/mr-aggregated", "mr_aggregated is the hash of all registers, and of nothing that was claimed")
async def _(t: Trial) -> None:
    own = t.world.boot_info(t.world.receiver)["mrAggregated"]
    t.released("GetKmsKey", await t.kms_key())
    asked = {each.get("mrAggregated") for each in t.world.webhook.seen("kms")}
    t.true("mrAggregated of the caller", own in asked, ", ".join(map(str, asked)), own)
    domain = t.world.changed_kms()
    measured = t.world.boot_info(domain)["mrAggregated"]
    t.differ("mr_aggregated with one more event", measured, own)
    stranger = t.world.issuer.honest(domain)
    t.refused("GetKmsKey, one more event", await t.kms_key(stranger), "Boot denied: aggregated MR not allowed")


# ---- certificates


async def _no_keys(t: Trial, identity: Identity, text: str, *, shut_out: bool) -> None:
    answer = await t.app_key(identity)
    if shut_out:
        t.shut_out("GetAppKey", answer)
    else:
        t.refused("GetAppKey", answer, text)


@EVIDENCE.case("certificate/none", "a caller without a certificate gets no keys")
async def _(t: Trial) -> None:
    t.refused("GetAppKey", await t.call("KMS.GetAppKey", api_version=1), "App not allowed: No attestation provided")
    t.refused("GetKmsKey", await t.call("KMS.GetKmsKey"), "No attestation provided")


@EVIDENCE.case("certificate/without-evidence", "a caller whose certificate has no evidence gets no keys")
async def _(t: Trial) -> None:
    bare = t.world.issuer.with_evidence(new_key(), None)
    is_shut_out = t.release.any_client_certificate_issuer
    await _no_keys(t, bare, "App not allowed: No attestation provided", shut_out=is_shut_out)


@EVIDENCE.case("certificate/unreadable-evidence", "a caller whose evidence cannot be read gets no keys")
async def _(t: Trial) -> None:
    is_shut_out = t.release.any_client_certificate_issuer
    for data in (b"", b"\x17 no attestation", b"\0\0", b"\x80" * 40):
        identity = t.world.issuer.with_bytes(data)
        await _no_keys(t, identity, "Failed to decode attestation from cert extension: ", shut_out=is_shut_out)


@EVIDENCE.case("certificate/unreadable-log", "a caller whose event log cannot be read gets no keys")
async def _(t: Trial) -> None:
    is_shut_out = t.release.any_client_certificate_issuer
    for log in ("no JSON", "{}"):
        identity = t.world.issuer.legacy(t.world.apps.app, log)
        await _no_keys(t, identity, "Failed to create attestation from TDX quote: ", shut_out=is_shut_out)


Make = Callable[[World], Identity]


def _issued_by_strangers(name: str) -> Make:
    def make(world: World) -> Identity:
        return Issuer(forge.stranger(name, world.issuer.now), world.issuer.now).honest(world.apps.app)

    return make


def _by_strangers(make: Make) -> Act:
    async def act(t: Trial) -> None:
        answer = await t.app_key(make(t.world))
        if t.release.any_client_certificate_issuer:
            t.released("GetAppKey", answer)
        else:
            t.shut_out("GetAppKey", answer)

    return act


for _name, _what, _identity in (
    ("stranger", "a CA that nobody knows", _issued_by_strangers("nobody's CA")),
    ("namesake", "a CA with the name of the temporary one", _issued_by_strangers("Dstack Client Temp CA")),
    ("self-issued", "its own key", lambda world: world.issuer.self_issued(world.apps.app)),
):
    EVIDENCE.add(
        f"certificate/{_name}",
        f"a certificate that {_what} has signed counts only where evidence alone decides, since 0.6",
        _by_strangers(_identity),
    )


@EVIDENCE.case("certificate/dates", "a client certificate that has expired, or is not valid yet, gets no keys")
async def _(t: Trial) -> None:
    now, day = t.world.issuer.now, forge.DAY
    for what, first, last in (("expired", now - 3 * day, now - day), ("not yet valid", now + day, now + 3 * day)):
        key = new_key()
        identity = t.world.issuer.with_evidence(key, bound(t.world.apps.app, key), not_before=first, not_after=last)
        t.shut_out(f"GetAppKey, {what}", await t.app_key(identity))
