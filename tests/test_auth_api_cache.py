"""What a KMS of 0.6 uses again of its webhook's answers: for a second of the stack's clock, and if it is told to."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dstack_emu import Stack, StackConfig, StackError
from dstack_emu.control.schemas import ControlError
from dstack_emu.kms_emu.auth_cache import ShortLived
from dstack_emu.testing import LiveStack
from tests import foreign
from tests.foreign import Answer, Guest
from tests.kms_process import World, ends
from tests.own_stack import PATIENCE, own_stack

REFUSED = "KMS self authorization failed: KMS is not allowed: aggregated MR not allowed"


@pytest.fixture(scope="module")
def shared() -> Iterator[LiveStack]:
    with LiveStack(release="0.6", auth_api_cache=True, patience=PATIENCE) as live:
        yield live


@pytest.fixture
def live(shared: LiveStack) -> Iterator[LiveStack]:
    """A stack whose clock stands still, and whose KMS have kept nothing yet."""
    with shared.put_back() as stack:
        stack.clock.freeze()
        stack.clock.advance(1)
        yield stack


def temp_ca(live: LiveStack) -> Answer:
    with foreign.kms(live.services["kms-src"]) as connection:
        return connection.call("GetTempCaCert")


def meta(live: LiveStack) -> Answer:
    with foreign.kms(live.services["kms-src"]) as connection:
        return connection.call("GetMeta")


def flip(live: LiveStack, *, allowed: bool) -> None:
    (live.control.allow if allowed else live.control.deny)("src", "kms-src")


# ---- a KMS


def test_denial_is_seen_when_the_second_is_over(live: LiveStack) -> None:
    assert temp_ca(live).status == 200
    flip(live, allowed=False)
    assert temp_ca(live).status == 200
    live.clock.advance(0.9)
    assert temp_ca(live).status == 200
    live.clock.advance(0.1)
    assert temp_ca(live).error == REFUSED


def test_denial_is_not_kept(live: LiveStack) -> None:
    flip(live, allowed=False)
    assert temp_ca(live).error == REFUSED
    assert temp_ca(live).error == REFUSED
    flip(live, allowed=True)
    assert temp_ca(live).status == 200
    assert live.journal.calls("/bootAuth/kms", caller="kms-src") == 3


@pytest.mark.parametrize(("call", "path"), [(temp_ca, "/bootAuth/kms"), (meta, "/")])
def test_failure_of_the_webhook_is_not_kept(live: LiveStack, call: Callable[[LiveStack], Answer], path: str) -> None:
    with live.fault(service="auth-src", call=path, kind="status", status=500):
        assert "returned 500 Internal Server Error" in call(live).error
    assert call(live).status == 200


def test_every_trusted_rpc_uses_the_kept_success(live: LiveStack) -> None:
    guest = Guest.of(live.services["kms-src"], live.services["app"])
    identity = guest.identity()
    live.journal.start()
    with foreign.kms(guest.kms_url, identity=identity) as connection:
        assert connection.call("GetAppEnvEncryptPubKey", app_id="11" * 20).status == 200
        assert connection.call("GetAppKey", api_version=1).status == 200
        assert connection.call("GetAppKey", api_version=1).status == 200
    assert live.journal.calls("/bootAuth/kms", caller="kms-src") == 0  # the guest's own GetTempCaCert came before
    assert live.journal.calls("/bootAuth/app", caller="kms-src") == 2


def test_denied_app_is_refused_within_the_second(live: LiveStack) -> None:
    guest = Guest.of(live.services["kms-src"], live.services["app"])
    identity = guest.identity()
    assert guest.get_app_key(identity).status == 200
    live.control.deny("src", "app")
    assert guest.get_app_key(identity).error.startswith("App not allowed: Boot denied: ")


def test_meta_is_requested_once_a_second_and_not_for_a_self_check(live: LiveStack) -> None:
    first = meta(live).value
    assert meta(live).value == first
    assert temp_ca(live).status == 200
    assert live.journal.calls("/", caller="kms-src") == 1
    live.clock.advance(1)
    assert meta(live).value == first
    assert live.journal.calls("/", caller="kms-src") == 2


def test_clock_that_is_set_back_keeps_nothing(live: LiveStack) -> None:
    assert temp_ca(live).status == 200
    live.clock.advance(-3600)
    flip(live, allowed=False)
    assert temp_ca(live).error == REFUSED


def test_restored_stack_has_kept_nothing(live: LiveStack) -> None:
    live.snapshot("allowed")
    assert temp_ca(live).status == 200
    live.revert("allowed")
    flip(live, allowed=False)
    assert temp_ca(live).error == REFUSED


async def test_concurrent_callers_share_one_request() -> None:
    async with own_stack(release="0.6", auth_api_cache=True, patience=PATIENCE) as stack:
        control = stack.control
        control.set_clock(freeze=True)
        control.set_clock(advance=1)
        url = stack.services["kms-src"]

        def call(method: str) -> int:
            with foreign.kms(url) as connection:
                return connection.call(method).status

        control.add_fault(service="auth-src", kind="delay", seconds=0.3)
        position = control.journal.position
        calls = (asyncio.to_thread(call, method) for method in ["GetTempCaCert", "GetMeta"] * 4)
        assert await asyncio.gather(*calls) == [200] * 8
        assert control.journal.calls("/bootAuth/kms", caller="kms-src", since=position) == 1
        assert control.journal.calls("/", caller="kms-src", since=position) == 1


def test_without_the_option_the_next_call_heeds_a_policy() -> None:
    with LiveStack(release="0.6", patience=PATIENCE) as live:
        live.clock.freeze()
        assert temp_ca(live).status == 200
        live.kms("cached", webhook="src", auth_api_cache=True)
        live.control.allow("src", "kms-cached")
        live.kms("cached").onboard("src")
        assert live.kms("cached").rpc("GetTempCaCert")["temp_ca_key"]
        live.control.deny("src", "kms-cached")
        assert live.kms("cached").rpc("GetTempCaCert")["temp_ca_key"]
        flip(live, allowed=False)
        assert temp_ca(live).error == REFUSED


# ---- what cannot be


async def test_stack_of_0_5_has_no_such_cache() -> None:
    with pytest.raises(StackError, match="auth_api_cache: a KMS of dstack 0.5 keeps no answer of its webhook"):
        async with Stack(StackConfig.on_free_ports(release="0.5", auth_api_cache=True)):
            pass


def test_added_kms_of_0_5_has_no_such_cache(live: LiveStack) -> None:
    with pytest.raises(ControlError, match="^kms-old: emulator.auth_api_cache: false expected, since a KMS of "):
        live.kms("old", release="0.5", auth_api_cache=True)
    assert live.kms("old", release="0.5").rpc("GetAttestationInfo")["mr_aggregated"], "the stack's option is not for it"


def test_kms_of_0_5_has_no_such_cache(tmp_path: Path) -> None:
    status, last = ends(tmp_path, World("unix:/nowhere", "", "", ""), "--release", "0.5", "--auth-api-cache")
    said = "emulator.auth_api_cache: false expected, since a KMS of dstack 0.5 keeps no answer of its webhook; got true"
    assert (status, last.rpartition("Error: ")[2]) == (2, said)


# ---- what keeps it


async def test_waiting_callers_share_a_failure_and_the_next_one_requests_anew() -> None:
    cache, requests = ShortLived[str](1, lambda: 0.0), 0
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def request() -> str:
        nonlocal requests
        requests += 1
        return await answer

    callers = [asyncio.create_task(cache.get(request)) for _ in range(3)]
    await asyncio.sleep(0)
    answer.set_exception(ConnectionError("down"))
    found = await asyncio.gather(*callers, return_exceptions=True)
    assert ([str(error) for error in found], requests) == (["down"] * 3, 1)
    answer = asyncio.get_running_loop().create_future()
    answer.set_result("up")
    assert (await cache.get(request), await cache.get(request), requests) == ("up", "up", 2)


async def test_caller_that_gives_up_takes_the_answer_from_nobody() -> None:
    cache = ShortLived[str](1, lambda: 0.0)
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def request() -> str:
        return await answer

    first, second = (asyncio.create_task(cache.get(request)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait((first,))
    answer.set_result("allowed")
    assert (first.cancelled(), await second) == (True, "allowed")


async def test_answer_to_a_request_from_before_forgetting_is_not_kept() -> None:
    cache = ShortLived[str](1, lambda: 0.0)
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def old() -> str:
        return await answer

    async def new() -> str:
        return "new"

    waiting = asyncio.create_task(cache.get(old))
    await asyncio.sleep(0)
    cache.forget()
    answer.set_result("old")
    assert (await waiting, await cache.get(new)) == ("old", "new")
