"""Checks whom a webhook allows: sends an allowed request, and it again with one thing changed, many times.

What is still allowed although dstack's auth servers deny it is `unsafe`. The check proves nothing about requests that
it does not send: a webhook could decide by something that no change here touches.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from dstack_emu.attest.app_info import BootInfo
from dstack_emu.attest.release import DEFAULT, Release
from dstack_emu.kms_emu.auth_api import TIMEOUT, WebhookAuth
from dstack_emu.kms_emu.errors import UnavailableError
from dstack_emu.transport.failures import NoAnswerError
from dstack_emu.webhook_check.allowed import SIDES, AllowedRequests, Contract, Side
from dstack_emu.webhook_check.changes import Change, changes_of
from dstack_emu.webhook_check.expectations import Wanted, is_met, resolve
from dstack_emu.webhook_check.expected import Expected, Outcome, decides, expected
from dstack_emu.webhook_check.sample_requests import Variation

MAX_UNANSWERED: Final = 5
"""Requests without any answer after which a path is given up."""

SafetyLevel = Literal["ok", "warning", "unsafe", "broken", "unexpected", "unproven"]
FAILURES: Final[frozenset[SafetyLevel]] = frozenset(("unsafe", "broken", "unexpected", "unproven"))
_CHANGE_FIRST: Final = "give one that it allows by --allowed FILE, or let it allow this one"
_IDENTITY: Final = ("mrAggregated", "osImageHash", "deviceId", "appId", "composeHash")
"""The members of a request that tell one trust domain from another."""


@dataclass(frozen=True, slots=True)
class RequestCheck:
    """One request, what dstack's server (or the expectations file) answers, and what the webhook did.

    `outcome` is empty if the request was not sent; `said` is the reason of the webhook, or the error of a KMS.
    """

    name: str
    side: Side
    member: str
    expected: Wanted
    outcome: Outcome | Literal[""]
    level: SafetyLevel
    said: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SafetyReport:
    """Every request about one webhook."""

    contract: Contract
    source: str
    requests: tuple[RequestCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is allowed that dstack's servers deny, and everything could be checked."""
        return not self.failures

    @property
    def failures(self) -> tuple[RequestCheck, ...]:
        """The requests that failed."""
        return tuple(each for each in self.requests if each.level in FAILURES)

    @property
    def unsafe(self) -> tuple[RequestCheck, ...]:
        """The requests that are still allowed although dstack's servers deny them."""
        return tuple(each for each in self.requests if each.level == "unsafe")

    def summary(self) -> Iterator[str]:
        """Yield one line for each path and member with which something was still allowed."""
        for side, member in dict.fromkeys((each.side, each.member) for each in self.unsafe):
            of_it = [each for each in self.requests if (each.side, each.member) == (side, member)]
            denied = [each for each in of_it if each.expected == "denied"]
            allowed = [each.name.removeprefix(f"{side} {member} ") for each in of_it if each.level == "unsafe"]
            if len(denied) > 1 and all(each.outcome == "allowed" for each in denied):
                yield f"{side}: {member} is not looked at: allowed with any value"
            else:
                yield f"{side}: {member}: still allowed: {', '.join(allowed)}"

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return {
            "contract": self.contract,
            "allowed": self.source,
            "summary": list(self.summary()),
            "requests": [asdict(each) for each in self.requests],
        }


Progress = Callable[[int, int, str], None]
"""Called before each request with its number, the number of all, and its name."""


def list_requests(allowed: AllowedRequests, contract: Contract) -> Mapping[str, Expected]:
    """Return the name of every request, and what dstack's servers answer: an expectations file that changes nothing."""
    found: dict[str, Expected] = {}
    for side in SIDES:
        facts = allowed.of(side).facts
        found[_unchanged(side)] = "allowed"
        found |= {f"{side} {each.name}": expected(each, side, contract, facts) for each in _changes(allowed, side)}
        found[_again(side)] = "allowed"
    return found


async def check_safety(
    url: str,
    allowed: AllowedRequests,
    contract: Contract,
    *,
    expectations: Mapping[str, Wanted] | None = None,
    patience: float = TIMEOUT,
    release: Release = DEFAULT,
    progress: Progress = lambda number, total, name: None,
) -> SafetyReport:
    """Send a webhook its allowed requests, and each change of them, and return the report.

    `expectations` replace what dstack's servers answer; they raise `SampleError` if they name no request.
    """
    names = list_requests(allowed, contract)
    own = resolve(expectations or {}, names)
    auth = WebhookAuth(url, timeout=patience, release=release)
    checks: list[RequestCheck] = []

    def begin(name: str) -> None:
        progress(len(checks) + 1, len(names), name)

    try:
        for side in SIDES:
            await _Path(auth, side, allowed, contract, own, checks, begin).check()
    finally:
        await auth.close()
    return SafetyReport(contract, allowed.source, tuple(checks))


@dataclass(slots=True)
class _Answer:
    outcome: Outcome
    said: str
    seconds: float
    is_silent: bool = False
    """Whether no HTTP answer came at all."""


class _Path:
    """The requests to one path of the webhook."""

    def __init__(
        self,
        auth: WebhookAuth,
        side: Side,
        allowed: AllowedRequests,
        contract: Contract,
        own: Mapping[str, Wanted],
        checks: list[RequestCheck],
        begin: Callable[[str], None],
    ) -> None:
        self._auth, self._side, self._allowed, self._contract = auth, side, allowed, contract
        self._own, self._checks, self._begin = own, checks, begin
        self._base = allowed.of(side)

    async def check(self) -> None:
        """Send the allowed request, its changes, and itself again; without the first nothing can be checked."""
        name = _unchanged(self._side)
        if self._base.missing and name not in self._own:
            self._record(name, "request", "allowed", None, "unproven", f"{self._base.missing}: {_CHANGE_FIRST}")
            return
        if not await self._unchanged(name):
            return
        silent = 0
        for change in _changes(self._allowed, self._side):
            answer = await self._changed(change)
            if answer.is_silent:
                silent += 1
                if silent == MAX_UNANSWERED or not await self._still_answers(change):
                    break
        await self._unchanged(_again(self._side))

    async def _unchanged(self, name: str) -> bool:
        """Send the allowed request, and return whether it was allowed."""
        answer = await self._send(name, _body(self._base.boot_info))
        is_allowed = answer.outcome == "allowed"
        own = self._own.get(name)
        if own is not None:
            self._record(name, "request", own, answer, "ok" if is_met(own, answer.outcome) else "unexpected")
        elif is_allowed:
            self._record(name, "request", "allowed", answer, "ok")
        else:
            document = _document(self._base.boot_info)
            this = ", ".join(f"{member} {document[member]}" for member in _IDENTITY)
            why = "nothing that is denied proves anything" if name == _unchanged(self._side) else "it was, before"
            said = f"the request that should be allowed is not ({answer.said}); {why}: {_CHANGE_FIRST}: {this}"
            self._record(name, "request", "allowed", answer, "unproven", said)
        return is_allowed

    async def _changed(self, change: Change) -> _Answer:
        name = f"{self._side} {change.name}"
        answer = await self._send(name, change.body)
        own = self._own.get(name)
        if own is not None:
            level: SafetyLevel = "ok" if is_met(own, answer.outcome) else "unexpected"
            self._record(name, change.member, own, answer, level)
            return answer
        facts = self._base.facts
        answered = expected(change, self._side, self._contract, facts)
        level = _level(change, answered, answer.outcome, decides(change, self._side, self._contract, facts))
        self._record(name, change.member, answered, answer, level)
        return answer

    async def _still_answers(self, change: Change) -> bool:
        """Return whether a request that got no answer has not ended the webhook; record it otherwise."""
        name = f"{self._side} unchanged, after {change.name}"
        answer = await self._send(name, _body(self._base.boot_info))
        if answer.outcome == "allowed":
            return True
        said = f"after a request without an answer the allowed one fails, too: {answer.said}"
        self._record(name, "request", "allowed", answer, "unproven", said)
        return False

    async def _send(self, name: str, body: bytes) -> _Answer:
        self._begin(name)
        request = Variation.of(self._base.boot_info, instead=body)
        began = time.monotonic()
        try:
            decision = await self._auth.decide(request, is_kms=self._side == "kms")
        except UnavailableError as error:
            seconds = time.monotonic() - began
            return _Answer("error", str(error), seconds, isinstance(error.__cause__, NoAnswerError))
        seconds = time.monotonic() - began
        return _Answer("allowed" if decision.is_allowed else "denied", decision.reason, seconds)

    def _record(
        self, name: str, member: str, wanted: Wanted, answer: _Answer | None, level: SafetyLevel, said: str = ""
    ) -> None:
        outcome: Outcome | Literal[""] = answer.outcome if answer is not None else ""
        text, seconds = (answer.said, answer.seconds) if answer is not None else ("", 0.0)
        self._checks.append(RequestCheck(name, self._side, member, wanted, outcome, level, said or text, seconds))


def _level(change: Change, answered: Expected, outcome: Outcome, is_deciding: bool) -> SafetyLevel:
    if outcome == "error":
        return "broken" if change.is_sent else "ok"
    if outcome == "denied" or answered in ("allowed", "any"):
        return "ok"
    # A member that no server decides by may be malformed, and a webhook that does not read it cannot know.
    return "unsafe" if answered == "denied" or is_deciding else "warning"


def _changes(allowed: AllowedRequests, side: Side) -> Iterator[Change]:
    other: Side = "app" if side == "kms" else "kms"
    return changes_of(_document(allowed.of(side).boot_info), _document(allowed.of(other).boot_info))


def _document(boot_info: BootInfo) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(_body(boot_info))
    return document


def _body(boot_info: BootInfo) -> bytes:
    return Variation.of(boot_info).to_json()


def _unchanged(side: Side) -> str:
    return f"{side} unchanged"


def _again(side: Side) -> str:
    return f"{side} unchanged, at the end"
