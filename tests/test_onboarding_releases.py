"""Onboarding between the releases, by pRPC, by gRPC and on the page: each side refuses, and then the keys are given.

Both KMS and their guest agents are those of `onboarding_cases`; node runs the page's script.
"""

import shutil
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.kms_emu.server import KmsServer
from tests.decision_cases import HOSTS
from tests.decision_model import Event, Webhook
from tests.onboarding_cases import Ask, OnboardingDraw, Pair, by_prpc, pair
from tests.onboarding_model import Onboarding
from tests.reflected import reflected
from tests.test_setup_page import Browser

EVERYTHING = Webhook("mock", "allow-all")
NOTHING = Webhook("mock", "deny-all")


def by_grpc(receiver: KmsServer, request: dict[str, Any]) -> str:
    """Call Onboard by gRPC, with the descriptors that the receiver itself has."""
    with reflected(receiver.grpc_targets["port"]) as client:
        outcome = client.call("kms.Onboard/Onboard", **request)
        return "" if outcome.code == "OK" else outcome.text


@contextmanager
def on_the_page(folder: Path, receiver: KmsServer) -> Iterator[Ask]:
    """Load the page once; then fill in its form, and return its error."""
    if shutil.which("node") is None:
        pytest.skip("the page's script needs node to run outside a browser")
    with urllib.request.urlopen(f"{receiver.url}/", timeout=20) as answer:
        (folder / "page.html").write_bytes(answer.read())
    browser = Browser(receiver.url, folder / "page.html")
    try:
        yield lambda _, request: str(browser.do("submit", section="onboard", fields=request)["onboard"]["error"])
    finally:
        browser.process.kill()
        browser.process.communicate(timeout=100)


WAYS: dict[str, Callable[[Path, KmsServer], AbstractContextManager[Ask]]] = {
    "prpc": lambda folder, receiver: nullcontext(by_prpc),
    "grpc": lambda folder, receiver: nullcontext(by_grpc),
    "page": on_the_page,
}


@pytest.fixture(scope="module")
def kms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair(tmp_path_factory.mktemp("releases"), "releases", grpc=True) as made:
        yield made


def onboarding(kms: Pair, source: str, receiver: str) -> Onboarding:
    """An onboarding from a source of one release to a receiver of another one, in which everything is right."""
    draw = OnboardingDraw(kms.forger, "releases")
    of_source, of_receiver = (draw.side(host) for host in HOSTS)
    return Onboarding(
        handover=replace(of_receiver, release=source, webhook=EVERYTHING),
        source=of_source.evidence,
        source_form="versioned",
        source_enforces_self=True,
        source_is_public=True,
        release=receiver,
        webhook=EVERYTHING,
        listener="main",
        token="",
    )


@pytest.mark.parametrize(("receiver", "way"), [("0.5", "prpc"), ("0.6", "prpc"), ("0.6", "grpc"), ("0.6", "page")])
@pytest.mark.parametrize("source", ["0.5", "0.6"])
def test_either_release_takes_keys_of_either_one_unless_a_side_refuses(
    kms: Pair, tmp_path: Path, source: str, receiver: str, way: str
) -> None:
    right = onboarding(kms, source, receiver)
    without_evidence = replace(right, source_form="none")
    denied_source = replace(right, webhook=NOTHING)
    denied_receiver = replace(right, handover=replace(right.handover, webhook=Webhook("mock", "deny-kms")))
    denied_receiver = replace(denied_receiver, source_enforces_self=False)
    with WAYS[way](tmp_path, kms.receivers[receiver]) as ask:
        for wrong, said in (
            (without_evidence, "Source KMS certificate does not contain attestation"),
            (denied_source, "Source KMS is not allowed for onboarding: boot denied: "),
            (denied_receiver, "Boot denied: "),
        ):
            released, refusal = kms.answers(wrong, ask)
            assert (released, said in refusal.removeprefix("Failed to onboard: ")) == (False, True), refusal
        assert kms.answers(right, ask) == (True, "")
        legacy = replace(right, source_form="legacy")
        assert kms.answers(legacy, ask) == (True, ""), "a source of 0.5.8 or so"


@pytest.mark.parametrize("way", WAYS)
def test_keys_of_a_source_with_a_token_are_handed_over_in_every_way(kms: Pair, tmp_path: Path, way: str) -> None:
    right = replace(onboarding(kms, "0.6", "0.6"), listener="admin", source_is_public=False)
    with WAYS[way](tmp_path, kms.receivers["0.6"]) as ask:
        for token in ("", "wrong"):
            released, refusal = kms.answers(replace(right, token=token), ask)
            assert (released, "status=401 Unauthorized" in refusal) == (False, True), refusal
        assert kms.answers(replace(right, token="right"), ask) == (True, "")


# ---- event logs that can be read in two ways


def twice(events: tuple[Event, ...]) -> tuple[Event, ...]:
    """Events with another app id behind the first."""
    return (*events, ("app-id", bytes(20)))


def renamed(events: tuple[Event, ...]) -> tuple[Event, ...]:
    """Events with one whose name continues that of a system event: its digest is that of another payload, too."""
    return (*events, ("compose-hash:", bytes(31)))


@pytest.mark.parametrize(("change", "said"), [(twice, "'app-id' occurs twice"), (renamed, "compose-hash:")])
@pytest.mark.parametrize("receiver", ["0.5", "0.6"])
@pytest.mark.parametrize("side", ["source", "receiver"])
def test_log_that_can_be_read_in_two_ways_is_refused_on_either_side(
    kms: Pair, side: str, receiver: str, change: Callable[[tuple[Event, ...]], tuple[Event, ...]], said: str
) -> None:
    right = replace(onboarding(kms, "0.6", receiver), source_enforces_self=False)
    evidence = right.source if side == "source" else right.handover.evidence
    events = change(evidence.logged)
    ambiguous = replace(evidence, measured=events, logged=events)
    wrong = replace(right, handover=replace(right.handover, evidence=ambiguous))
    if side == "source":
        wrong = replace(right, source=ambiguous)
    released, refusal = kms.answers(wrong)
    context = {"source": "failed to validate the server attestation of ", "receiver": "invalid quote: "}[side]
    assert (released, context in refusal, " is ambiguous: " in refusal) == (False, True, True), refusal
    assert said in refusal
    assert kms.answers(right) == (True, "")
