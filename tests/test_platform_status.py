"""A platform that is downgraded or revoked at the PCCS, seen through a KMS: the very next call is refused.

And the next one after it was mended is not. The KMS is a process of its own with a stack's keys; each test goes over
one connection, with one certificate.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from dstack_emu.simulator.platform import TCB_STATUSES, PlatformState
from tests import foreign
from tests.foreign import Guest
from tests.kms_files import copy_keys, write_kms_toml
from tests.live_pccs import LivePccs, live_pccs
from tests.running import RunningStack, running_kms

APP_PLATFORM, KMS_PLATFORM = "host of app", "host of kms-src"
DENIED = "Boot denied: TCB status is not allowed"
INVALID = "failed to verify TDX quote: TCB status is invalid: Revoked"
REVOKED = "failed to verify TDX quote: Failed to verify certificate chain: CertRevoked"

STATES: dict[str, tuple[PlatformState, str]] = {
    **{
        status: (PlatformState(tcb_status=status), f"App not allowed: {DENIED}")
        for status in TCB_STATUSES
        if status not in ("UpToDate", "Revoked")
    },
    "module OutOfDate": (PlatformState(module_status="OutOfDate"), f"App not allowed: {DENIED}"),
    "Revoked": (PlatformState(tcb_status="Revoked"), f"invalid quote: {INVALID}"),
    "certificate revoked": (PlatformState(pck_revoked=True), f"invalid quote: {REVOKED}"),
}
"""What the vendor may say of the app's platform, and how GetAppKey refuses then."""


@pytest.fixture(scope="module")
def pccs(ready_stack: RunningStack) -> Iterator[LivePccs]:
    """A PCCS of the stack's seed that can be told what to say."""
    with live_pccs(ready_stack.description["seed"]) as pccs:
        yield pccs


@pytest.fixture(scope="module")
def guest(ready_stack: RunningStack, pccs: LivePccs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """The stack's app before a KMS that asks this PCCS."""
    folder = tmp_path_factory.mktemp("kms")
    copy_keys(folder, ready_stack)
    config = write_kms_toml(folder, ready_stack, webhook=ready_stack.services["auth-src"], pccs=pccs.url)
    with running_kms(config, ready_stack.services["agent-src"]) as url:
        yield Guest.of(url, ready_stack.description["app"]["dstack_sock"])


@pytest.mark.parametrize("name", STATES)
def test_getappkey_follows_the_platform_at_the_very_next_call(pccs: LivePccs, guest: Guest, name: str) -> None:
    state, refusal = STATES[name]
    with foreign.kms(guest.kms_url, identity=guest.identity(), root_ca=guest.root_ca) as connection:
        keys = connection.call("GetAppKey", api_version=1).value
        with pccs.says(APP_PLATFORM, state):
            assert connection.call("GetAppKey", api_version=1).error == refusal
        assert connection.call("GetAppKey", api_version=1).value == keys


def test_every_rpc_follows_a_revoked_platform(pccs: LivePccs, guest: Guest) -> None:
    key = foreign.new_key()
    evidence = foreign.attest(guest.agent, foreign.spki_of(key))
    request: dict[str, Any] = foreign.signing_request(key, evidence, "app.example.test")
    with (
        foreign.kms(guest.kms_url, identity=guest.temp_ca.issue(key, evidence), root_ca=guest.root_ca) as attested,
        foreign.kms(guest.kms_url, root_ca=guest.root_ca) as bare,
    ):
        with pccs.says(APP_PLATFORM, PlatformState(tcb_status="Revoked")):
            for method in ("GetMeta", "GetKmsKey", "GetTempCaCert", "GetAppKey"):
                assert attested.call(method).error == f"invalid quote: {INVALID}"
            assert bare.call("SignCert", **request).error == f"Quote verification failed: {INVALID}"
            assert bare.call("GetMeta").status == 200
        with pccs.says(APP_PLATFORM, PlatformState(tcb_status="OutOfDate")):
            assert attested.call("GetMeta").status == 200
            assert attested.call("GetKmsKey").error == DENIED
            assert bare.call("SignCert", **request).error == DENIED
        assert bare.call("SignCert", **request).status == 200
        assert attested.call("GetAppKey").status == 200


def test_own_evidence_is_judged_once_a_process(pccs: LivePccs, guest: Guest) -> None:
    """As upstream: the KMS's own boot info is kept, and only the webhook's decision about it is asked for anew."""
    with pccs.says(KMS_PLATFORM, PlatformState(tcb_status="Revoked")), foreign.kms(guest.kms_url) as connection:
        assert connection.call("GetTempCaCert").status == 200
