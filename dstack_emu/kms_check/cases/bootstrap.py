"""A fresh KMS that is bootstrapped: if it is denied, or if a service fails, it makes and stores no keys."""

from contextlib import AbstractContextManager
from typing import Any, Final

from dstack_emu.attest import attestation as attestations
from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.report_data import bootstrap_report_data
from dstack_emu.kms_check.case import Act, CaseList
from dstack_emu.kms_check.cases.webhook_answers import add_webhook_answers
from dstack_emu.kms_check.trial import DepartureError, Trial
from dstack_emu.kms_check.world import AGENT, CHECKED, World, info_of

DOMAIN: Final = "127.0.0.1"
BOOTSTRAP: Final = CaseList("bootstrap")
NOT_ALLOWED: Final = "KMS is not allowed to bootstrap: "


async def bootstrap(t: Trial) -> Any:
    """Call Bootstrap."""
    return await t.onboard("Bootstrap", domain=DOMAIN)


async def refuses(t: Trial, text: str = "", *, in_time: bool = True) -> None:
    """Require Bootstrap to be refused, and no key to be stored."""
    answer = await bootstrap(t)
    if in_time:
        t.refused("Bootstrap", answer, text)
    else:
        t.held("Bootstrap", answer)
    t.equal("root keys in core.cert_dir", t.world.kms.stored_keys(), [])


@BOOTSTRAP.case("bootstrap/measurements", "GetAttestationInfo tells what the KMS measures")
async def _(t: Trial) -> None:
    info, body = info_of(t.world.guest.domain), t.released("GetAttestationInfo", await t.onboard("GetAttestationInfo"))
    for name in ("mr_aggregated", "os_image_hash", "device_id"):
        t.equal(name, t.octets(name, body, name), getattr(info, name))


add_webhook_answers(
    BOOTSTRAP,
    "bootstrap",
    refuses,
    NOT_ALLOWED,
    denied="a KMS that its webhook denies makes no keys",
    undecided="a KMS without a decision of its webhook makes no keys",
)


@BOOTSTRAP.case("bootstrap/webhook-down", "a KMS whose webhook cannot be reached makes no keys")
async def _(t: Trial) -> None:
    async with t.world.webhook.down():
        await refuses(t, "Connection refused")


def _policy(change: Any, text: str) -> Act:
    async def act(t: Trial) -> None:
        with t.world.webhook.changed(change):
            await refuses(t, f"{NOT_ALLOWED}boot denied: {text}")

    return act


BOOTSTRAP.add(
    "bootstrap/measurements-not-registered",
    "a KMS whose measurements the policy does not list makes no keys",
    _policy(lambda policy: policy["kms"].update(mrAggregated=[]), "aggregated MR not allowed"),
)
BOOTSTRAP.add(
    "bootstrap/image-not-registered",
    "a KMS whose OS image the policy does not list makes no keys",
    _policy(lambda policy: policy.update(osImages=[]), "OS image is not allowed"),
)
BOOTSTRAP.add(
    "bootstrap/device-not-registered",
    "a KMS on a device that the policy does not list makes no keys",
    _policy(
        lambda policy: policy["kms"].update(devices=["0x" + "44" * 32], allowAnyDevice=False),
        "KMS is not allowed to boot on this device",
    ),
)


def _state(status: str, change: Any, text: str) -> Act:
    async def act(t: Trial) -> None:
        with change(t.world):
            await refuses(t, text)
        asked = [each.get("tcbStatus") for each in t.world.webhook.seen("kms")]
        t.true(f"tcbStatus in the requests of {status}", set(asked) <= {status}, str(asked), status)

    return act


def _platform(**state: Any) -> Any:
    def change(world: World) -> AbstractContextManager[None]:
        return world.platform(CHECKED, **state)

    return change


BOOTSTRAP.add(
    "bootstrap/tcb-out-of-date",
    "a KMS on a platform that is out of date tells its webhook so",
    _state("OutOfDate", _platform(tcb_status="OutOfDate"), f"{NOT_ALLOWED}boot denied: TCB status is not"),
)
BOOTSTRAP.add(
    "bootstrap/tcb-revoked",
    "a KMS on a platform whose TCB is revoked makes no keys",
    _state("Revoked", _platform(tcb_status="Revoked"), "TCB status is invalid: Revoked"),
)
BOOTSTRAP.add(
    "bootstrap/pck-revoked",
    "a KMS on a platform whose certificate is revoked makes no keys",
    _state("Revoked", _platform(pck_revoked=True), "Failed to verify certificate chain: "),
)
BOOTSTRAP.add(
    "bootstrap/other-root",
    "a KMS on a platform under another root makes no keys",
    _state("Revoked", _platform(other_root=True), "Failed to verify certificate chain: "),
)


def _outage(service: str, kind: str, **options: Any) -> Act:
    async def act(t: Trial) -> None:
        with t.world.reissued(), t.world.fault(service, kind, **options):
            await refuses(t)

    return act


for _service, _what in ((AGENT, "guest agent"), ("pccs", "PCCS")):
    _group = "agent" if _service == AGENT else "pccs"
    for _kind in ("status", "reset", "truncate", "malformed", "wrong-type"):
        BOOTSTRAP.add(
            f"bootstrap/{_group}-{'500' if _kind == 'status' else _kind}",
            f"a KMS whose {_what} fails ({_kind}) makes no keys",
            _outage(_service, _kind),
        )
BOOTSTRAP.add(
    "bootstrap/agent-400",
    "a KMS whose guest agent refuses to quote makes no keys",
    _outage(AGENT, "status", status=400, body='{"error": "no quote today"}'),
)


@BOOTSTRAP.case("bootstrap/webhook-request", "the webhook is told what the KMS measures, to the byte")
async def _(t: Trial) -> None:
    with t.world.webhook.changed(lambda policy: policy["kms"].update(mrAggregated=[])):
        await refuses(t)
    asked = t.world.webhook.seen("kms")
    t.true("requests about the KMS", len(asked) == 1, str(len(asked)), "one")
    expected = t.world.boot_info(t.world.guest.domain)
    for name, value in expected.items():
        t.equal(name, asked[0].get(name), value)


@BOOTSTRAP.case("bootstrap/allowed", "a KMS that its webhook allows makes keys, and attests them", is_followed=False)
async def _(t: Trial) -> None:
    body = t.released("Bootstrap", await bootstrap(t))
    ca_key, k256_key = (t.octets("Bootstrap", body, name) for name in ("ca_pubkey", "k256_pubkey"))
    try:
        evidence = attestations.decode(t.octets("Bootstrap", body, "attestation"))
    except AttestError as error:
        raise DepartureError("attestation of the keys", f"evidence that cannot be read: {error}", "evidence") from error
    t.equal("report_data of the keys' attestation", evidence.report_data, bootstrap_report_data(ca_key, k256_key))
    t.refused("Bootstrap, again", await bootstrap(t), "KMS has already been bootstrapped")
