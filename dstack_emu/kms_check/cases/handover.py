"""Root keys that go from one KMS to another: both have the same keys afterwards, for the same callers."""

from typing import Any, Final

from dstack_emu.kms_check.calls import Answer, call, request
from dstack_emu.kms_check.case import CaseList
from dstack_emu.kms_check.trial import Trial

AS_SOURCE: Final = CaseList("runtime")
AS_RECEIVER: Final = CaseList("onboarded")
SECRETS: Final = ("disk_crypt_key", "env_crypt_key", "k256_key", "k256_signature")


async def equal_keys(t: Trial, url: str) -> None:
    """Require an app to get the same keys from this KMS as from ours at a URL."""
    patience = t.world.patience
    mine = t.released("GetAppKey", await t.app_key())
    answer = await call(url, "KMS.GetAppKey", {"api_version": 1}, t.world.app_identity, patience=patience)
    other = t.released("GetAppKey of our KMS", answer)
    for name in SECRETS:
        t.same_secret(name, t.octets("GetAppKey", mine, name), t.octets("GetAppKey of our KMS", other, name))
    meta = t.released("GetMeta", await t.call("KMS.GetMeta"))
    other_meta = t.released("GetMeta of our KMS", await call(url, "KMS.GetMeta", patience=patience))
    t.equal("k256_pubkey", t.octets("GetMeta", meta, "k256_pubkey"), t.octets("GetMeta", other_meta, "k256_pubkey"))


@AS_RECEIVER.case("handover/from-source", "a KMS that has received its keys releases the same ones as their source")
async def _(t: Trial) -> None:
    await equal_keys(t, t.world.deployment.context.urls["kms-src"])


async def _onboard(t: Trial) -> Answer:
    """Let our receiver ask the KMS for its keys."""
    url = t.world.deployment.kms["dst"].onboarding.url
    arguments: dict[str, Any] = {"source_url": f"{t.world.kms.url}/prpc", "domain": "127.0.0.1"}
    return await call(url, "Onboard.Onboard", arguments, patience=t.world.long_patience)


@AS_SOURCE.case("handover/to-receiver", "our receiver gets the keys if both sides allow it, and not before")
async def _(t: Trial) -> None:
    own = t.world.boot_info(t.world.guest.domain)["mrAggregated"]
    with t.world.webhook.changed(lambda policy: policy["kms"].update(mrAggregated=[own])):
        t.refused(
            "Onboard, the source denies the receiver", await _onboard(t), "Boot denied: aggregated MR not allowed"
        )
    with t.world.webhook.changed(lambda policy: policy["kms"].update(mrAggregated=[])):
        await t.settle()
        t.refused("Onboard, the source denies itself", await _onboard(t), "KMS self authorization failed: ")
    with t.world.policy_of("dst", kms={"mrAggregated": [], "devices": [], "allowAnyDevice": True}):
        answer = await _onboard(t)
        t.refused("Onboard, the receiver denies the source", answer, "Source KMS is not allowed for onboarding: ")
    t.released("Onboard", await _onboard(t))
    receiver = t.world.deployment.kms["dst"]
    await request("GET", f"{receiver.onboarding.url}/finish", patience=t.world.patience)
    await receiver.reached_runtime()
    await equal_keys(t, receiver.url)
