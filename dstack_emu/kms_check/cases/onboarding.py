"""A KMS that is onboarded from our source: if either side denies it, it gets and stores no root keys."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

from dstack_emu.attest.attestation import Attestation
from dstack_emu.deployment.clock import wall_clock
from dstack_emu.deployment.specs import GuestSpec
from dstack_emu.deployment.trust_domains import boot_domain
from dstack_emu.kms_check import evidence as forge
from dstack_emu.kms_check.calls import call
from dstack_emu.kms_check.case import Act, CaseList
from dstack_emu.kms_check.cases.webhook_answers import add_webhook_answers
from dstack_emu.kms_check.evidence import Key, bound, new_key
from dstack_emu.kms_check.impostor_source import impostor_source
from dstack_emu.kms_check.trial import Trial
from dstack_emu.kms_check.world import AGENT, World

ONBOARDING: Final = CaseList("onboard")
DOMAIN: Final = "127.0.0.1"
NOBODY: Final = "https://127.0.0.1:1"
"""A URL at which no server listens."""
SOURCE_NOT_ALLOWED: Final = "Failed to onboard: Source KMS is not allowed for onboarding: "
UNPROVEN: Final = "failed to verify the attestation report presented by the server: "


def source_url(world: World) -> str:
    """Return the URL of our source."""
    return f"{world.deployment.context.urls['kms-src']}/prpc"


async def onboard(t: Trial, url: str = "") -> Any:
    """Call Onboard."""
    return await t.onboard("Onboard", source_url=url or source_url(t.world), domain=DOMAIN)


async def refuses(t: Trial, text: str = "", url: str = "") -> None:
    """Require Onboard to be refused, and no key to be stored."""
    t.refused("Onboard", await onboard(t, url), text)
    t.equal("root keys in core.cert_dir", t.world.kms.stored_keys(), [])


# ---- the receiver denies the source


add_webhook_answers(
    ONBOARDING,
    "onboard",
    refuses,
    SOURCE_NOT_ALLOWED,
    denied="a receiver whose webhook denies the source takes no keys",
    undecided="a receiver without a decision about the source takes no keys",
)


@ONBOARDING.case("onboard/webhook-down", "a receiver whose webhook cannot be reached takes no keys")
async def _(t: Trial) -> None:
    async with t.world.webhook.down():
        await refuses(t, "Connection refused")


@ONBOARDING.case("onboard/source-not-registered", "a receiver takes no keys of a source that its policy does not list")
async def _(t: Trial) -> None:
    own = t.world.boot_info(t.world.guest.domain)["mrAggregated"]
    with t.world.webhook.changed(lambda policy: policy["kms"].update(mrAggregated=[own])):
        await refuses(t, f"{SOURCE_NOT_ALLOWED}boot denied: aggregated MR not allowed")


# ---- the source denies


def _source_denies(text: str, *domains: str) -> Act:
    async def act(t: Trial) -> None:
        mrs = [t.world.boot_info(getattr(t.world, name))["mrAggregated"] for name in domains]
        kms = {"mrAggregated": mrs, "devices": [], "allowAnyDevice": True}
        with t.world.policy_of("src", kms=kms):
            await refuses(t, text)

    return act


ONBOARDING.add(
    "onboard/source-denies-receiver",
    "a source gives no keys to a KMS that its webhook denies",
    _source_denies("Boot denied: aggregated MR not allowed", "source"),
)
ONBOARDING.add(
    "onboard/source-denies-itself",
    "a source that its webhook denies gives no keys",
    _source_denies("KMS self authorization failed: KMS is not allowed: ", "receiver"),
)


def _failing(service: str, kind: str, **options: Any) -> Act:
    async def act(t: Trial) -> None:
        with t.world.reissued(), t.world.fault(service, kind, **options):
            await refuses(t)

    return act


for _call in ("GetTempCaCert", "GetKmsKey"):
    for _kind in ("status", "reset", "drop", "truncate", "malformed", "wrong-type"):
        ONBOARDING.add(
            f"onboard/source-{_call}-{'500' if _kind == 'status' else _kind}",
            f"a receiver takes no keys of a source whose {_call} fails ({_kind})",
            _failing("kms-src", _kind, call=_call),
        )
for _kind in ("status", "reset", "malformed"):
    _label = "500" if _kind == "status" else _kind
    ONBOARDING.add(
        f"onboard/source-webhook-{_label}",
        f"a source whose webhook fails ({_kind}) gives no keys",
        _failing("auth-src", _kind),
    )
    ONBOARDING.add(
        f"onboard/pccs-{_label}", f"nobody gives or takes keys while the PCCS fails ({_kind})", _failing("pccs", _kind)
    )
    ONBOARDING.add(
        f"onboard/agent-{_label}",
        f"a receiver whose guest agent fails ({_kind}) gets no keys",
        _failing(AGENT, _kind),
    )


@ONBOARDING.case("onboard/source-down", "a receiver says that the source cannot be reached")
async def _(t: Trial) -> None:
    await refuses(t, "Failed to send request: ", f"{NOBODY}/prpc")


@ONBOARDING.case("onboard/source-plain", "a receiver takes no keys over plain HTTP, nor from what is no URL")
async def _(t: Trial) -> None:
    await refuses(t, "", t.world.deployment.context.urls["pccs"])
    await refuses(t, "", "kms-src:1")


# ---- the source's evidence


def _state(change: Callable[[World], AbstractContextManager[None]], text: str) -> Act:
    async def act(t: Trial) -> None:
        with change(t.world):
            await refuses(t, text)

    return act


for _name, _what, _change, _text in (
    (
        "tcb-out-of-date",
        "is out of date",
        lambda world: world.platform("kms-src", tcb_status="OutOfDate"),
        f"{SOURCE_NOT_ALLOWED}boot denied: TCB status is not ",
    ),
    (
        "tcb-revoked",
        "has a revoked TCB",
        lambda world: world.platform("kms-src", tcb_status="Revoked"),
        f"{UNPROVEN}failed to verify TDX quote: TCB status is invalid: Revoked",
    ),
    (
        "pck-revoked",
        "has a revoked certificate",
        lambda world: world.platform("kms-src", pck_revoked=True),
        f"{UNPROVEN}failed to verify TDX quote: Failed to verify certificate chain: ",
    ),
):
    ONBOARDING.add(
        f"onboard/source-{_name}",
        f"a receiver takes no keys of a source whose platform {_what}",
        _state(_change, _text),
    )


def _other_root(world: World, key: Key) -> Attestation:
    with world.platform("kms-src", other_root=True):
        return bound(world.source, key)


def _debug(world: World, key: Key) -> Attestation:
    return bound(boot_domain(world.deployment.context, GuestSpec(name="kms-src", debug=True)), key)


def _impostor(make: Callable[[World, Key], Attestation | None], text: str) -> Act:
    async def act(t: Trial) -> None:
        key = new_key()
        source = await call(t.world.deployment.context.urls["kms-src"], "KMS.GetTempCaCert", patience=t.world.patience)
        body = json.dumps(source.body).encode()
        async with impostor_source(key, make(t.world, key), body, wall_clock()) as url:
            await refuses(t, text, f"{url}/prpc")

    return act


_QUOTE: Final = f"{UNPROVEN}failed to verify TDX quote: "
for _name, _what, _make, _text in (
    ("no-evidence", "without evidence", lambda w, k: None, "does not contain attestation"),
    ("other-root", "whose quote leads to another root", _other_root, f"{_QUOTE}Failed to verify certificate chain: "),
    ("debug", "in a debug domain", _debug, f"{_QUOTE}Debug mode is enabled"),
    (
        "another-key",
        "with the evidence of the true source",
        lambda w, k: bound(w.source, new_key()),
        f"{UNPROVEN}report data mismatch",
    ),
    (
        "bit",
        "whose quote has one bit changed",
        lambda w, k: forge.one_bit(bound(w.source, k), forge.QUOTE_FIELDS["mrtd"]),
        _QUOTE,
    ),
    (
        "log",
        "whose log has another event",
        lambda w, k: forge.with_payload(bound(w.source, k), "compose-hash", bytes(32)),
        f"{UNPROVEN}RTMR3 mismatch",
    ),
    (
        "other-kms",
        "that is another domain",
        lambda w, k: bound(w.apps.unknown, k),
        f"{SOURCE_NOT_ALLOWED}boot denied: aggregated MR not allowed",
    ),
):
    ONBOARDING.add(f"onboard/source-{_name}", f"a receiver takes no keys of a source {_what}", _impostor(_make, _text))


# ---- the keys


@ONBOARDING.case("onboard/allowed", "a receiver that both sides allow gets the root keys, once", is_followed=False)
async def _(t: Trial) -> None:
    body = t.released("Onboard", await onboard(t))
    source = await call(t.world.deployment.context.urls["kms-src"], "KMS.GetMeta", patience=t.world.patience)
    t.equal("k256_pubkey of the source", body.get("k256_pubkey"), source.body.get("k256_pubkey"))
    t.refused("Onboard, again", await onboard(t), "KMS has already been onboarded")
