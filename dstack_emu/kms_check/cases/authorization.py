"""Decisions of the webhook in the runtime phase: about the KMS itself, and about those who call it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from dstack_emu.kms_check.calls import Answer
from dstack_emu.kms_check.case import Act, CaseList
from dstack_emu.kms_check.evidence import bound, new_key, signing_request
from dstack_emu.kms_check.replies import DENIALS, NO_DECISION
from dstack_emu.kms_check.trial import Trial
from dstack_emu.kms_check.webhook import Question, Reply
from dstack_emu.kms_check.world import AGENT

FIRST_CALL: Final = CaseList("keyed")
AUTHORIZATION: Final = CaseList("runtime")
SELF: Final = "KMS self authorization failed: "
DENIED_SELF: Final = f"{SELF}KMS is not allowed: "

Call = Callable[[Trial], Awaitable[Answer]]


async def _sign_cert(t: Trial) -> Answer:
    key = new_key()
    return await t.sign(signing_request(key, bound(t.world.apps.app, key)))


TRUSTED: Final[Mapping[str, Call]] = {
    "GetTempCaCert": lambda t: t.temp_ca(),
    "GetAppKey": lambda t: t.app_key(),
    "GetKmsKey": lambda t: t.kms_key(),
    "GetAppEnvEncryptPubKey": lambda t: t.env_key(t.world.apps.app.app_id),
    "SignCert": _sign_cert,
}
"""The RPCs that a KMS answers only if it is still allowed itself, each called as an honest caller does."""

_ASKED: Final[Mapping[str, Question]] = {"GetAppKey": "app", "SignCert": "app", "GetKmsKey": "kms"}
"""The question about the caller, of the RPCs that have one."""


@FIRST_CALL.case("self-check/agent-down-at-first", "a KMS that cannot attest itself yet releases nothing")
async def _(t: Trial) -> None:
    with t.world.fault(AGENT, "status"):
        answer = await t.temp_ca()
    t.advised("GetTempCaCert, the first call", answer, "a KMS attests itself at its first call, unless it has before")


def _self(method: str, reply: Reply, text: str, *, times: int = 1) -> Act:
    async def act(t: Trial) -> None:
        with t.world.webhook.replies("kms", reply, about=t.world.guest.domain.app_id):
            await t.settle()
            for _ in range(times):
                t.refused(method, await TRUSTED[method](t), text)
        t.released(f"{method}, allowed again", await TRUSTED[method](t))

    return act


for _name, (_reply, _text) in DENIALS.items():
    for _method in TRUSTED if _name == "denied" else ("GetTempCaCert",):
        AUTHORIZATION.add(
            f"self-check/{_name}-{_method}",
            f"{_method} is refused by a KMS that its webhook denies",
            _self(_method, _reply, f"{DENIED_SELF}{_text}", times=1 + ("late" in _name)),
        )
for _name, (_reply, _text) in NO_DECISION.items():
    for _method in TRUSTED if _name in ("500", "500-allows", "closed") else ("GetTempCaCert",):
        AUTHORIZATION.add(
            f"self-check/webhook-{_name}-{_method}",
            f"{_method} is refused by a KMS without a decision about itself",
            _self(_method, _reply, _text or SELF),
        )


@AUTHORIZATION.case("self-check/request", "the webhook is told what the KMS measures, before anything about a caller")
async def _(t: Trial) -> None:
    await t.settle()
    t.world.webhook.asked.clear()
    t.released("GetAppKey", await t.app_key())
    asked = [each.question for each in t.world.webhook.asked]
    t.equal("questions", asked, ["kms", "app"])
    body = t.world.webhook.seen("kms")[0]
    for name, value in t.world.boot_info(t.world.guest.domain).items():
        t.equal(name, body.get(name), value)


@AUTHORIZATION.case("self-check/each-call", "every call asks anew whether the KMS itself is allowed")
async def _(t: Trial) -> None:
    for _ in range(3):
        await t.settle()
        t.world.webhook.asked.clear()
        t.released("GetTempCaCert", await t.temp_ca())
        t.equal("questions", [each.question for each in t.world.webhook.asked], ["kms"])


# ---- the caller


def _caller(method: str, reply: Reply, text: str, *, times: int = 1) -> Act:
    """Spoil the answer about the caller alone; that about the KMS itself is right."""

    async def act(t: Trial) -> None:
        about = t.world.receiver if method == "GetKmsKey" else t.world.apps.app
        with t.world.webhook.replies(_ASKED[method], reply, about=about.app_id):
            for _ in range(times):
                t.refused(method, await TRUSTED[method](t), text)
        t.released(f"{method}, allowed again", await TRUSTED[method](t))

    return act


for _name, (_reply, _text) in DENIALS.items():
    for _method in _ASKED:
        AUTHORIZATION.add(
            f"caller/{_name}-{_method}",
            f"{_method} is refused to a caller that the webhook denies",
            _caller(_method, _reply, f"Boot denied: {_text}", times=1 + ("late" in _name)),
        )
for _name, (_reply, _text) in NO_DECISION.items():
    for _method in _ASKED if _name in ("500", "500-allows", "closed") else ("GetAppKey",):
        AUTHORIZATION.add(
            f"caller/webhook-{_name}-{_method}",
            f"{_method} is refused without a decision about the caller",
            _caller(_method, _reply, _text),
        )


def _denied(change: Callable[[dict[str, Any]], object], text: str) -> Act:
    async def act(t: Trial) -> None:
        with t.world.webhook.changed(change):
            t.refused("GetAppKey", await t.app_key(), f"App not allowed: Boot denied: {text}")
            t.refused("SignCert", await _sign_cert(t), f"Boot denied: {text}")

    return act


AUTHORIZATION.add(
    "caller/app-not-registered",
    "an app that the policy does not list gets nothing",
    _denied(lambda policy: policy.update(apps={}), "app not registered"),
)


def _of_every_app(**members: Any) -> Callable[[dict[str, Any]], object]:
    return lambda policy: [app.update(members) for app in policy["apps"].values()]


AUTHORIZATION.add(
    "caller/compose-hash-not-registered",
    "an app whose compose hash the policy does not list gets nothing",
    _denied(_of_every_app(composeHashes=["0x" + "33" * 32]), "compose hash not allowed"),
)
AUTHORIZATION.add(
    "caller/device-not-registered",
    "an app on a device that the policy does not list gets nothing",
    _denied(
        _of_every_app(devices=["0x" + "44" * 32], allowAnyDevice=False), "app is not allowed to boot on this device"
    ),
)


@AUTHORIZATION.case("caller/unknown-app", "an app that is not registered gets nothing, by its own evidence")
async def _(t: Trial) -> None:
    unknown = t.world.issuer.honest(t.world.apps.unknown)
    t.refused("GetAppKey", await t.app_key(unknown), "App not allowed: Boot denied: app not registered")


@AUTHORIZATION.case("caller/request", "the webhook is told what the app measures, to the byte")
async def _(t: Trial) -> None:
    t.released("GetAppKey", await t.app_key())
    body = t.world.webhook.seen("app")[0]
    for name, value in t.world.boot_info(t.world.apps.app).items():
        t.equal(name, body.get(name), value)


@AUTHORIZATION.case("caller/app-is-no-kms", "root keys go to no app")
async def _(t: Trial) -> None:
    t.refused("GetKmsKey", await t.kms_key(t.world.app_identity), "Boot denied: aggregated MR not allowed")


@AUTHORIZATION.case("caller/kms-not-registered", "root keys go to no KMS whose measurements the policy does not list")
async def _(t: Trial) -> None:
    own = t.world.boot_info(t.world.guest.domain)["mrAggregated"]
    with t.world.webhook.changed(lambda policy: policy["kms"].update(mrAggregated=[own])):
        t.refused("GetKmsKey", await t.kms_key(), "Boot denied: aggregated MR not allowed")
    t.released("GetKmsKey, registered again", await t.kms_key())


@AUTHORIZATION.case("caller/webhook-down", "without a webhook nothing is released, and once it is back everything is")
async def _(t: Trial) -> None:
    async with t.world.webhook.down():
        await t.settle()
        for method, call in TRUSTED.items():
            t.refused(method, await call(t), "Connection refused")


@AUTHORIZATION.case("caller/webhook-hangs", "a webhook that does not answer is no permission")
async def _(t: Trial) -> None:
    with t.world.webhook.replies("app", t.world.webhook.hang):
        t.held("GetAppKey", await t.app_key())


@AUTHORIZATION.case("self-check/webhook-hangs", "a webhook that does not answer about the KMS itself is no permission")
async def _(t: Trial) -> None:
    with t.world.webhook.replies("kms", t.world.webhook.hang):
        await t.settle()
        t.held("GetTempCaCert", await t.temp_ca())


@AUTHORIZATION.case("caller/webhook-down-for-meta", "GetMeta is refused without an answer of the webhook")
async def _(t: Trial) -> None:
    reply, _ = NO_DECISION["500"]
    with t.world.webhook.replies("info", reply):
        await t.settle()
        t.refused("GetMeta", await t.call("KMS.GetMeta"), "returned 500 Internal Server Error: ")
    t.released("GetMeta, answered again", await t.call("KMS.GetMeta"))


# ---- decisions that change


def _flips(method: str, change: Callable[[dict[str, Any]], object], text: str, *, is_self: bool = False) -> Act:
    async def act(t: Trial) -> None:
        for _ in range(3):
            t.released(method, await TRUSTED[method](t))
            with t.world.webhook.changed(change):
                if is_self:
                    await t.settle()
                t.refused(f"{method}, denied after it was allowed", await TRUSTED[method](t), text)

    return act


AUTHORIZATION.add(
    "policy/app-denied-after-allowed",
    "the very next call of an app follows a changed policy: no decision about it is kept",
    _flips("GetAppKey", lambda policy: policy.update(apps={}), "App not allowed: Boot denied: app not registered"),
)
AUTHORIZATION.add(
    "policy/certificate-denied-after-allowed",
    "the very next SignCert follows a changed policy",
    _flips("SignCert", lambda policy: policy.update(apps={}), "Boot denied: app not registered"),
)
AUTHORIZATION.add(
    "policy/kms-denied-after-allowed",
    "the very next call follows a policy that no longer allows the KMS itself",
    _flips(
        "GetTempCaCert",
        lambda policy: policy["kms"].update(mrAggregated=[]),
        f"{DENIED_SELF}aggregated MR not allowed",
        is_self=True,
    ),
)
AUTHORIZATION.add(
    "policy/image-withdrawn",
    "the very next call follows a policy that no longer allows the OS image",
    _flips("GetAppKey", lambda policy: policy.update(osImages=[]), "OS image is not allowed", is_self=True),
)

CLIENTS: Final = 6
CALLS_FOR_EACH_FLIP: Final = 12


@dataclass(frozen=True, slots=True)
class _Span:
    began: float
    ended: float
    is_released: bool


def _under_load(change: Callable[[dict[str, Any]], object], *, is_self: bool) -> Act:
    """Let clients call without a pause while the policy flips: a call that began after a flip must follow it."""

    async def act(t: Trial) -> None:
        calls: list[_Span] = []
        flips: list[_Span] = [_Span(0, 0, True)]
        slack = t.world.self_check_cache if is_self else 0.0
        is_over, answered = False, asyncio.Condition()

        async def client() -> None:
            while not is_over:
                began = time.monotonic()
                answer = await t.app_key()
                calls.append(_Span(began, time.monotonic(), answer.is_success))
                async with answered:
                    answered.notify_all()

        async def enough() -> None:
            """Wait for some calls, and until a kept answer about the KMS itself has expired."""
            wanted = len(calls) + CALLS_FOR_EACH_FLIP
            await asyncio.sleep(2 * slack)
            async with asyncio.timeout(t.world.long_patience), answered:
                await answered.wait_for(lambda: len(calls) >= wanted)

        clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
        try:
            for _ in range(2):
                await enough()
                began = time.monotonic()
                with t.world.webhook.changed(change):
                    flips.append(_Span(began, time.monotonic(), False))
                    await enough()
                    began = time.monotonic()
                flips.append(_Span(began, time.monotonic(), True))
            await enough()
        finally:
            is_over = True
            await asyncio.gather(*clients)
        wrong = [call for call in calls if call.is_released and not _may_release(call, flips, slack)]
        t.true(f"keys released against the policy in {len(calls)} calls", not wrong, str(len(wrong)), "none")
        kept = [call for call in calls if not call.is_released and not _may_refuse(call, flips)]
        t.true(f"calls refused against the policy in {len(calls)} calls", not kept, str(len(kept)), "none")

    return act


def _may_release(call: _Span, flips: list[_Span], slack: float) -> bool:
    return any(outcome for outcome in _in_force(call, flips, slack))


def _may_refuse(call: _Span, flips: list[_Span]) -> bool:
    return any(not outcome for outcome in _in_force(call, flips, 0))


def _in_force(call: _Span, flips: list[_Span], slack: float) -> list[bool]:
    """Return whether each policy allows that was in force at some moment of a call."""
    began = call.began - slack
    before = [flip for flip in flips if flip.ended <= began]
    meanwhile = [flip for flip in flips if flip.ended > began and flip.began < call.ended]
    return [before[-1].is_released, *(flip.is_released for flip in meanwhile)]


AUTHORIZATION.add(
    "policy/app-flips-under-load",
    "no key is released by a policy that was replaced before the call began, with six clients at once",
    _under_load(lambda policy: policy.update(apps={}), is_self=False),
)
AUTHORIZATION.add(
    "policy/kms-flips-under-load",
    "no key is released by a KMS that was denied before the call began, with six clients at once",
    _under_load(lambda policy: policy["kms"].update(mrAggregated=[]), is_self=True),
)
