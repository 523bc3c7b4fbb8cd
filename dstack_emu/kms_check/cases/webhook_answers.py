"""The cases in which the webhook denies a KMS in its onboard phase, or gives no decision."""

from collections.abc import Awaitable, Callable

from dstack_emu.kms_check.case import Act, CaseList
from dstack_emu.kms_check.replies import DENIALS, NO_DECISION
from dstack_emu.kms_check.trial import Trial
from dstack_emu.kms_check.webhook import Reply

Refuses = Callable[[Trial, str], Awaitable[None]]
"""Requires a call to be refused by a text that contains this one."""


def add_webhook_answers(
    cases: CaseList, group: str, refuses: Refuses, words: str, *, denied: str, undecided: str
) -> None:
    """Add a case for each denial, described as `denied`, and for each answer that is no decision (`undecided`).

    `words` are those of a KMS before the reason.
    """
    for name, (reply, text) in DENIALS.items():
        cases.add(f"{group}/webhook-{name}", denied, _replied(reply, refuses, f"{words}boot denied: {text}"))
    for name, (reply, text) in NO_DECISION.items():
        cases.add(f"{group}/webhook-{name}", undecided, _replied(reply, refuses, text or words))


def _replied(reply: Reply, refuses: Refuses, text: str) -> Act:
    async def act(t: Trial) -> None:
        with t.world.webhook.replies("kms", reply):
            await refuses(t, text)

    return act
