"""Platforms of callers: every TCB status, revocation, and collateral that is outdated or does not come."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

from dstack_emu.attest.pcs import PCK_CRL_PATH, QE_IDENTITY_PATH, ROOT_CA_CRL_PATH, TCB_INFO_PATH
from dstack_emu.attest.release import Release
from dstack_emu.kms_check.case import Act, CaseList
from dstack_emu.kms_check.evidence import bound, new_key, signing_request
from dstack_emu.kms_check.trial import Trial
from dstack_emu.kms_check.world import World
from dstack_emu.simulator.platform import PART_STATUSES, TCB_STATUSES

PLATFORMS: Final = CaseList("runtime")
HANGS: Final = 2.0
"""Seconds to wait for a KMS that waits for its PCCS; how long that is cannot be configured."""
ADVISORY: Final = "INTEL-SA-00001"
UNVERIFIED: Final = "failed to verify TDX quote: "

State = Callable[[World], AbstractContextManager[None]]


def _app_platform(**state: Any) -> State:
    return lambda world: world.platform("app", **state)


def _kms_platform(**state: Any) -> State:
    return lambda world: world.platform("kms-dst", **state)


def _vendor(**state: Any) -> State:
    return lambda world: world.vendor(**state)


async def _calls(t: Trial, refusal: str) -> None:
    key = new_key()
    request = signing_request(key, bound(t.world.apps.app, key))
    t.refused("GetAppKey", await t.app_key(), refusal)
    t.refused("SignCert", await t.sign(request), refusal)


def _told(state: State, status: str) -> Act:
    """Require the webhook to be told a status, and its denial to count."""

    async def act(t: Trial) -> None:
        with state(t.world):
            await _calls(t, "Boot denied: TCB status is not ")
        asked = [each.get("tcbStatus") for each in t.world.webhook.seen("app")]
        t.equal("tcbStatus of the app in the requests", asked, [status, status])

    return act


def _unverifiable(state: State, text: str) -> Act:
    async def act(t: Trial) -> None:
        with state(t.world):
            await _calls(t, f"{UNVERIFIED}{text}")
        t.equal("requests about the app to the webhook", t.world.webhook.seen("app"), [])

    return act


for _status in TCB_STATUSES:
    _about = f"the status {_status} of the app's platform reaches the webhook, whose denial counts"
    if _status == "UpToDate":
        continue
    if _status == "Revoked":
        _about = "evidence of a platform whose TCB is revoked is refused"
        PLATFORMS.add(
            "tcb/Revoked", _about, _unverifiable(_app_platform(tcb_status=_status), "TCB status is invalid: Revoked")
        )
        continue
    PLATFORMS.add(f"tcb/{_status}", _about, _told(_app_platform(tcb_status=_status), _status))
for _status in PART_STATUSES[1:]:
    for _part, _state in (
        ("module", _app_platform(module_status=_status)),
        ("quoting-enclave", _vendor(qe_status=_status)),
    ):
        _act = (
            _told(_state, _status) if _status != "Revoked" else _unverifiable(_state, "TCB status is invalid: Revoked")
        )
        PLATFORMS.add(f"tcb/{_part}-{_status}", f"the status {_status} of the platform's {_part} counts", _act)


def _configures_tcb(release: Release) -> bool:
    return release.auth_contract == "0.6"


@PLATFORMS.case(
    "tcb/allowed-by-policy",
    "a status that the policy allows is no reason to refuse",
    applies=_configures_tcb,
)
async def _(t: Trial) -> None:
    allowed = ["UpToDate", "OutOfDate"]
    with t.world.platform("app", tcb_status="OutOfDate"):
        t.refused("GetAppKey", await t.app_key(), "Boot denied: TCB status is not allowed")
        with t.world.webhook.changed(lambda policy: policy.update(allowedTcbStatuses=allowed)):
            t.released("GetAppKey, allowed", await t.app_key())


@PLATFORMS.case("tcb/advisories", "advisories of the platform reach the webhook")
async def _(t: Trial) -> None:
    with t.world.platform("app", tcb_status="SWHardeningNeeded", advisory_ids=(ADVISORY,)):
        t.refused("GetAppKey", await t.app_key(), "Boot denied: TCB status is not ")
    asked = [each.get("advisoryIds") for each in t.world.webhook.seen("app")]
    t.equal("advisoryIds in the requests", asked, [[ADVISORY]])


@PLATFORMS.case("tcb/kms", "the platform of a KMS that asks for root keys counts as an app's")
async def _(t: Trial) -> None:
    with t.world.platform("kms-dst", tcb_status="OutOfDate"):
        t.refused("GetKmsKey, OutOfDate", await t.kms_key(), "Boot denied: TCB status is not ")
    for state in (_kms_platform(tcb_status="Revoked"), _kms_platform(pck_revoked=True)):
        with state(t.world):
            t.refused("GetKmsKey, revoked", await t.kms_key(), f"invalid quote: {UNVERIFIED}")
    t.released("GetKmsKey, up to date again", await t.kms_key())


_CHAIN: Final = "Failed to verify certificate chain: "
PLATFORMS.add(
    "revocation/pck",
    "evidence of a platform whose certificate is revoked is refused",
    _unverifiable(_app_platform(pck_revoked=True), _CHAIN),
)
PLATFORMS.add(
    "revocation/pck-ca",
    "evidence of platforms whose CA is revoked is refused",
    _unverifiable(_vendor(pck_ca_revoked=True), _CHAIN),
)


@PLATFORMS.case("revocation/other-root", "evidence that leads to another root is refused")
async def _(t: Trial) -> None:
    key = new_key()
    with t.world.platform("app", other_root=True):
        evidence = bound(t.world.apps.app, key)
    t.refused("GetAppKey", await t.app_key(t.world.issuer.with_evidence(key, evidence)), f"{UNVERIFIED}{_CHAIN}")
    t.refused("SignCert", await t.sign(signing_request(key, evidence)), f"{UNVERIFIED}{_CHAIN}")


# A verifier does not look at the beginning of a CRL.
for _document, _datings in (
    ("tcb_info", ("expired", "not-yet-valid")),
    ("qe_identity", ("expired", "not-yet-valid")),
    ("pck_crl", ("expired",)),
    ("root_ca_crl", ("expired",)),
):
    for _dating in _datings:
        PLATFORMS.add(
            f"collateral/{_document.replace('_', '-')}-{_dating}",
            f"evidence cannot be verified by a {_document} that is {_dating}",
            _unverifiable(_vendor(**{f"{_document}_dating": _dating}), ""),
        )


# ---- the PCCS


def _fails(kind: str, **options: Any) -> Act:
    async def act(t: Trial) -> None:
        with t.world.reissued(), t.world.fault("pccs", kind, **options):
            await _calls(t, "")

    return act


for _kind in ("status", "reset", "drop", "truncate", "malformed", "wrong-type", "stale"):
    PLATFORMS.add(
        f"pccs/{'500' if _kind == 'status' else _kind}",
        f"no evidence counts while the PCCS fails ({_kind})",
        _fails(_kind),
    )
PLATFORMS.add("pccs/404", "no evidence counts while the PCCS knows nothing", _fails("status", status=404))
for _name, _path in (
    ("tcb-info", TCB_INFO_PATH),
    ("qe-identity", QE_IDENTITY_PATH),
    ("pck-crl", PCK_CRL_PATH),
    ("root-ca-crl", ROOT_CA_CRL_PATH),
):
    for _kind in ("status", "malformed"):
        PLATFORMS.add(
            f"pccs/{_name}-{'500' if _kind == 'status' else _kind}",
            f"no evidence counts without the {_name} ({_kind})",
            _fails(_kind, call=_path),
        )


@PLATFORMS.case("pccs/hangs", "a PCCS that does not answer is no proof")
async def _(t: Trial) -> None:
    with t.world.fault("pccs", "hang"):
        t.held("GetAppKey", await t.app_key_within(HANGS))


@PLATFORMS.case("pccs/slow", "a PCCS that answers after a moment is waited for")
async def _(t: Trial) -> None:
    with t.world.fault("pccs", "delay", seconds=0.2):
        t.released("GetAppKey", await t.app_key())
