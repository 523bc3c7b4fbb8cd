"""Does a KMS understand this webhook? Every question that it asks, and what would break it.

The judge is the KMS's own client (`kms_emu.auth_api`): what it takes for a decision is one, and what breaks it is said
in its words. Whether a decision is right is not judged, beyond warnings about answers that can hardly be meant.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from dstack_emu.attest.app_info import BootInfo
from dstack_emu.attest.release import DEFAULT
from dstack_emu.kms_emu.auth_api import MAX_ANSWER, TIMEOUT, Decision, WebhookAuth, kms_user_agent
from dstack_emu.kms_emu.errors import UnavailableError
from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError
from dstack_emu.transport.http_client import HttpClient
from dstack_emu.webhook_check.hints import hint_for
from dstack_emu.webhook_check.questions import Questions, Variation

IN_A_ROW: Final = 20
"""Questions over one connection."""
AT_ONCE: Final = 16
SLOW: Final = 1.0
"""Seconds from which an answer is worth a warning: GetAppKey waits for two."""
LONG_REASON: Final = 1000
SHOWN: Final = 120
"""Characters of an error that nobody has to mind."""

Level = Literal["ok", "warning", "broken", "skipped"]

_NOBODY: Final = bytes.fromhex("ee" * 20)
_SELF_CHECK: Final = "no KMS with this webhook boots, and one that runs gives nothing away"
_NO_APP: Final = "no app gets keys or certificates"
_META: Final = "GetMeta fails, and every app that asks for it while it boots"


@dataclass(frozen=True, slots=True)
class AnswerCheck:
    """One check: what was asked, what the KMS makes of the answer, and where it is `broken`, what that breaks."""

    name: str
    level: Level
    said: str
    breaks: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All checks of one webhook."""

    url: str
    findings: tuple[AnswerCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing breaks a KMS."""
        return not self.broken

    @property
    def broken(self) -> tuple[AnswerCheck, ...]:
        """What breaks a KMS."""
        return tuple(finding for finding in self.findings if finding.level == "broken")

    @property
    def warnings(self) -> tuple[AnswerCheck, ...]:
        """What is understood, and can hardly be meant."""
        return tuple(finding for finding in self.findings if finding.level == "warning")

    def to_json(self) -> dict[str, Any]:
        """As JSON says it."""
        return {"ok": self.ok, "url": self.url, "checks": [asdict(finding) for finding in self.findings]}


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question, where it is asked, and what is broken where no decision comes."""

    name: str
    is_kms: bool
    question: BootInfo
    breaks: str
    unlikely: str = ""
    """Why it can hardly be meant to be allowed."""


async def check_webhook(url: str, questions: Questions, *, patience: float = TIMEOUT) -> Report:
    """Ask a webhook everything that a KMS asks, with `patience` seconds for each answer; none of them is raised."""
    checker = _Checker(url, questions, patience)
    try:
        return Report(url, tuple([finding async for finding in checker.all()]))
    finally:
        await checker.auth.close()


class _Checker:
    def __init__(self, url: str, questions: Questions, patience: float) -> None:
        self.url, self.questions, self._patience = url, questions, patience
        self.auth = WebhookAuth(url, timeout=patience)
        self._slowest = 0.0
        self._unexplained: list[str] = []
        self._long: list[str] = []

    async def all(self) -> AsyncIterator[AnswerCheck]:
        """Check after check; what cannot be asked for want of an answer is skipped."""
        yield await self._info()
        plain = [
            _Asked("bootAuth/kms", True, self.questions.kms, _SELF_CHECK),
            _Asked("bootAuth/app", False, self.questions.app, _NO_APP),
        ]
        answered = []
        for asked in plain:
            finding = await self._decision(asked)
            yield finding
            if finding.level != "broken":
                answered.append(asked)
        if len(answered) < len(plain):
            yield AnswerCheck("variations, load, connections", "skipped", "no sense before both paths give decisions")
            return
        for asked in self._variations():
            yield await self._decision(asked)
        for asked in self._nonsense():
            yield await self._refusal(asked)
        for asked in plain:
            yield await self._repeated(asked)
        yield await self._at_once()
        yield await self._plain_answer()
        for finding in self._noticed():
            yield finding

    def _variations(self) -> Iterator[_Asked]:
        """What KMS of other releases, other machines and other apps ask."""
        kms, app = self.questions.kms, self.questions.app
        for is_kms, question in ((True, kms), (False, app)):
            who, breaks = ("kms", _SELF_CHECK) if is_kms else ("app", _NO_APP)
            yield _Asked(
                f"{who}, as 0.5.x asks: attestationMode",
                is_kms,
                Variation.of(question, variant_members=("attestationMode",)),
                f"with a KMS of 0.5.x: {breaks}",
            )
            yield _Asked(
                f"{who}, as next asks: teeVariant",
                is_kms,
                Variation.of(question, variant_members=("teeVariant",)),
                f"with a KMS of next: {breaks}",
            )
            yield _Asked(
                f"{who}, with fields of a later release",
                is_kms,
                Variation.of(question, more='{"somethingNew": "00", "alsoNew": {"nested": [1, null]}}'),
                f"after an update of the KMS: {breaks}",
            )
            yield _Asked(
                f"{who}, TCB out of date, with advisories",
                is_kms,
                replace(question, tcb_status="OutOfDate", advisory_ids=("INTEL-SA-00837", "INTEL-SA-01079")),
                f"on a machine that wants an update the caller sees an error, not a refusal: {breaks}",
                "it allows a machine whose TCB is out of date",
            )
        yield _Asked(
            "app without instance id and key provider",
            False,
            replace(app, instance_id=b"", key_provider_info=b""),
            "apps whose compose has no_instance_id get no keys",
        )
        yield _Asked(
            "app that nobody knows",
            False,
            replace(app, app_id=_NOBODY, compose_hash=bytes(32), mr_aggregated=bytes(32)),
            "whoever deploys an app that is not registered sees an error, not a refusal",
            "it allows an app that nobody can have registered",
        )
        yield _Asked(
            "KMS that nobody knows",
            True,
            replace(kms, mr_aggregated=bytes(32), os_image_hash=bytes(32)),
            "whoever starts a KMS that is not registered sees an error, not a refusal",
            "it allows a KMS, and so gives away the root keys, whatever it measures",
        )

    def _nonsense(self) -> Iterator[_Asked]:
        """What no KMS asks. An error is as good an answer as a denial."""
        for is_kms, question in ((True, self.questions.kms), (False, self.questions.app)):
            who = "kms" if is_kms else "app"
            yield _Asked(f"{who}, an empty object", is_kms, Variation.of(question, instead=b"{}"), "")
            yield _Asked(f"{who}, no JSON", is_kms, Variation.of(question, instead=b"isAllowed"), "")

    async def _info(self) -> AnswerCheck:
        try:
            info = await self.auth.info()
        except UnavailableError as error:
            return _broken("GET /", error, _META)
        return AnswerCheck("GET /", "ok", f"gatewayAppId {info.gateway_app_id!r}, chainId {info.chain_id}")

    async def _ask(self, asked: _Asked) -> Decision:
        began = time.monotonic()
        decision = await self.auth.decide(asked.question, is_kms=asked.is_kms)
        self._slowest = max(self._slowest, time.monotonic() - began)
        if not decision.is_allowed and not decision.reason:
            self._unexplained.append(asked.name)
        if len(decision.reason) > LONG_REASON:
            self._long.append(asked.name)
        return decision

    async def _decision(self, asked: _Asked) -> AnswerCheck:
        try:
            decision = await self._ask(asked)
        except UnavailableError as error:
            return _broken(asked.name, error, asked.breaks)
        if decision.is_allowed and asked.unlikely:
            return AnswerCheck(asked.name, "warning", f"allowed: {asked.unlikely}")
        return AnswerCheck(asked.name, "ok", _said(decision))

    async def _refusal(self, asked: _Asked) -> AnswerCheck:
        try:
            decision = await self.auth.decide(asked.question, is_kms=asked.is_kms)
        except UnavailableError as error:
            return AnswerCheck(asked.name, "ok", f"an error, as it should be: {str(error)[:SHOWN]}")
        if decision.is_allowed:
            return AnswerCheck(asked.name, "warning", "allowed: it decides without having been told about whom")
        return AnswerCheck(asked.name, "ok", _said(decision))

    async def _repeated(self, asked: _Asked) -> AnswerCheck:
        name = f"{asked.name}, {IN_A_ROW} times over one connection"
        decisions = set()
        for number in range(IN_A_ROW):
            try:
                decisions.add((await self._ask(asked)).is_allowed)
            except UnavailableError as error:
                return _broken(name, error, f"now and then: {asked.breaks}", f"question {number + 1}: ")
        return _steady(name, decisions)

    async def _at_once(self) -> AnswerCheck:
        name, breaks = f"{AT_ONCE} questions at once", "when many apps boot together, some get no keys"
        asked = _Asked("bootAuth/app", False, self.questions.app, breaks)
        answers = await asyncio.gather(*(self._ask(asked) for _ in range(AT_ONCE)), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, UnavailableError):
                failed = sum(isinstance(a, UnavailableError) for a in answers)
                return _broken(name, answer, breaks, f"{failed} of them: ")
            if isinstance(answer, BaseException):
                raise answer
        return _steady(name, {answer.is_allowed for answer in answers if isinstance(answer, Decision)})

    async def _plain_answer(self) -> AnswerCheck:
        """Look at what a KMS does not look at: an answer's headers."""
        name, url = "headers of an answer", f"{self.url.rstrip('/')}/bootAuth/app"
        client = HttpClient(
            timeout=self._patience, max_answer=MAX_ANSWER, headers={"User-Agent": kms_user_agent(DEFAULT)}
        )
        try:
            headers = {"Content-Type": "application/json"}
            answer = await client.send("POST", url, self.questions.app.to_json(), headers)
        except (NoAnswerError, AnswerTooLongError) as error:
            return AnswerCheck(name, "warning", f"asked once more, it did not answer: {error}")
        finally:
            await client.close()
        content_type = answer.headers.get("content-type", "none")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            said = f"Content-Type is {content_type}: a KMS does not mind, but other clients will"
            return AnswerCheck(name, "warning", said)
        if answer.headers.get("connection", "").lower() == "close":
            return AnswerCheck(
                name, "warning", "it ends the connection after each answer: each question needs a new one"
            )
        return AnswerCheck(name, "ok", content_type)

    def _noticed(self) -> Iterator[AnswerCheck]:
        """What there is to say of all answers together."""
        level: Level = "warning" if self._slowest > SLOW else "ok"
        said = f"the slowest took {self._slowest:.2f} s; GetAppKey waits for two, and gives up after {TIMEOUT:g} s each"
        yield AnswerCheck("time", level, said)
        if self._unexplained:
            said = f"{_some(self._unexplained)}: denied without a reason: an operator reads `Boot denied: ` and no more"
            yield AnswerCheck("reasons", "warning", said)
        elif self._long:
            said = f"{_some(self._long)}: a reason longer than {LONG_REASON} characters is in every error and every log"
            yield AnswerCheck("reasons", "warning", said)
        else:
            yield AnswerCheck("reasons", "ok", "every refusal has one")


def _said(decision: Decision) -> str:
    if not decision.is_allowed:
        return f"denied: {decision.reason}"
    return f"allowed{f': {decision.reason}' if decision.reason else ''}, gatewayAppId {decision.gateway_app_id!r}"


def _broken(name: str, error: UnavailableError, breaks: str, which: str = "") -> AnswerCheck:
    text = str(error)
    return AnswerCheck(name, "broken", which + text, breaks, hint_for(text))


def _steady(name: str, decisions: set[bool]) -> AnswerCheck:
    if len(decisions) > 1:
        return AnswerCheck(name, "warning", "now allowed, now denied, though nothing differs")
    return AnswerCheck(name, "ok", "the same decision each time")


def _some(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    return unique[0] if len(unique) == 1 else f"{unique[0]} and {len(unique) - 1} more"
