"""The policy of a KMS flips while eight clients ask for keys: nobody gets any by a decision that was taken back.

At least 800 calls, of which eight are under way at each flip; `DSTACK_EMU_CALLS` asks for more. A flip is one
`os.replace` of the policy file, and it is answered when that returns: from then on the file is another one for whoever
reads it. A call that began after that must go by the new policy, and one that ended before it by the old one; only
those that were under way may have gone by either.
"""

import json
import os
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import foreign
from tests.foreign import Guest
from tests.running import RunningStack

CLIENTS = 8
CALLS = int(os.environ.get("DSTACK_EMU_CALLS", "800"))

ALLOWED = ""
NO_APP = "App not allowed: Boot denied: app not registered"
NO_KMS = "KMS self authorization failed: KMS is not allowed: aggregated MR not allowed"
FLIPS = (NO_APP, ALLOWED, NO_KMS, ALLOWED, NO_APP)
"""What GetAppKey says after each flip; the first calls are allowed. As many calls begin before the next one."""


@dataclass(frozen=True)
class Span:
    """Something that was done, when, and what came of it: a call and its refusal, or a flip and what it brings."""

    began: float
    ended: float
    outcome: str


def replace_policy(path: Path, outcome: str, allowing: dict[str, Any]) -> Span:
    """Flip the policy at once to one under which calls end so."""
    changed = {NO_APP: {"apps": {}}, NO_KMS: {"kms": {**allowing["kms"], "mrAggregated": []}}, ALLOWED: {}}[outcome]
    new = path.with_suffix(".new")
    new.write_text(json.dumps({**allowing, **changed}))
    began = time.monotonic()
    os.replace(new, path)
    return Span(began, time.monotonic(), outcome)


def possible(call: Span, flips: list[Span]) -> set[str]:
    """The outcomes that a call may have: of the flip that was answered before it began, and of each one meanwhile."""
    before = [flip for flip in flips if flip.ended <= call.began]
    meanwhile = [flip for flip in flips if flip.ended > call.began and flip.began < call.ended]
    return {before[-1].outcome, *(flip.outcome for flip in meanwhile)}


@pytest.mark.timeout(600)
def test_no_call_that_began_after_a_flip_was_answered_goes_by_the_old_policy(ready_stack: RunningStack) -> None:
    guest = Guest.of(ready_stack.services["kms-src"], ready_stack.description["app"]["dstack_sock"])
    path = ready_stack.policies["src"]
    allowing = json.loads(path.read_text())
    answered: queue.SimpleQueue[Span | None] = queue.SimpleQueue()
    enough = threading.Event()

    def ask() -> None:
        try:
            with foreign.kms(guest.kms_url, identity=guest.identity(), root_ca=guest.root_ca) as connection:
                while not enough.is_set():
                    began = time.monotonic()
                    answer = connection.call("GetAppKey", api_version=1)
                    outcome = ALLOWED if answer.status == 200 else answer.error
                    answered.put(Span(began, time.monotonic(), outcome))
        finally:
            answered.put(None)

    flips = [Span(0, 0, ALLOWED)]
    calls: list[Span] = []
    clients = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    try:
        for client in clients:
            client.start()
        for outcome in (*FLIPS, None):
            began_since = 0
            while began_since < CALLS // (len(FLIPS) + 1):
                call = answered.get()
                assert call is not None, "a client failed; its thread says why"
                calls.append(call)
                began_since += call.began >= flips[-1].ended
            if outcome is not None:
                flips.append(replace_policy(path, outcome, allowing))
    finally:
        enough.set()
        for client in clients:
            client.join()
        path.write_text(json.dumps(allowing, indent=2))
    while not answered.empty():
        if (call := answered.get()) is not None:
            calls.append(call)
    assert [call for call in calls if call.outcome not in possible(call, flips)] == []
    settled = {call.outcome for call in calls if len(possible(call, flips)) == 1}
    assert settled == {ALLOWED, NO_APP, NO_KMS}, "each policy was in force for calls that were under way in no flip"
    assert guest.get_app_key().status == 200
