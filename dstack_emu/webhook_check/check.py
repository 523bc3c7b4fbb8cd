"""Checks a webhook: sends every request that a KMS sends, and reports the answers that a KMS does not understand.

The emulated KMS's own client (`kms_emu.auth_api`) reads the answers, and its errors are reported. Whether a decision is
right is checked in `safety`; here are warnings about decisions and answers that are probably mistakes.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from dstack_emu.attest.app_info import BootInfo
from dstack_emu.attest.release import DEFAULT, Release
from dstack_emu.kms_emu.auth_api import MAX_ANSWER, TIMEOUT, Decision, WebhookAuth, kms_user_agent
from dstack_emu.kms_emu.errors import UnavailableError
from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError
from dstack_emu.transport.http_client import HttpClient
from dstack_emu.transport.urls import shown_url
from dstack_emu.webhook_check.hints import hint_for
from dstack_emu.webhook_check.sample_requests import SampleRequests, Variation

IN_A_ROW: Final = 20
"""The number of requests one after another."""
AT_ONCE: Final = 16
"""The number of simultaneous requests."""
SLOW: Final = 1.0
"""Seconds from which an answer causes a warning: GetAppKey waits for two answers."""
LONG_REASON: Final = 1000
"""Characters from which a reason causes a warning."""
SHOWN_CHARACTERS: Final = 120
"""Characters shown of an expected error."""

Level = Literal["ok", "warning", "broken", "skipped"]

_NOBODY: Final = bytes.fromhex("ee" * 20)
_SELF_CHECK: Final = "no KMS with this webhook boots, and a running one releases no keys"
_NO_APP: Final = "no app gets keys or certificates"
_META: Final = "GetMeta fails, and with it the boot of every app, which calls it"


@dataclass(frozen=True, slots=True)
class AnswerCheck:
    """One check: the request, what a KMS reads from the answer, and if it is `broken`, the consequence."""

    name: str
    level: Level
    said: str
    breaks: str = ""
    hint: str = ""
    seconds: float = 0.0
    """The time of its slowest request."""


@dataclass(frozen=True, slots=True)
class Report:
    """All checks of one webhook."""

    url: str
    findings: tuple[AnswerCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether a KMS understands every answer."""
        return not self.broken

    @property
    def broken(self) -> tuple[AnswerCheck, ...]:
        """The answers that a KMS does not understand."""
        return tuple(finding for finding in self.findings if finding.level == "broken")

    @property
    def warnings(self) -> tuple[AnswerCheck, ...]:
        """The answers that a KMS understands, but that are probably mistakes."""
        return tuple(finding for finding in self.findings if finding.level == "warning")

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return {"ok": self.ok, "url": shown_url(self.url), "checks": [asdict(finding) for finding in self.findings]}


@dataclass(frozen=True, slots=True)
class _RequestCase:
    """A request, its path, and the consequence if no decision comes."""

    name: str
    is_kms: bool
    boot_info: BootInfo
    breaks: str
    unlikely: str = ""
    """Why it is probably a mistake to allow the request; empty if it is not."""


async def check_webhook(
    url: str, requests: SampleRequests, *, patience: float = TIMEOUT, release: Release = DEFAULT
) -> Report:
    """Send a webhook every request that a KMS sends, and return the report; wait `patience` seconds for each answer.

    The KMS is of a dstack release, which the User-Agent says. Members that only other releases send are sent, too.
    """
    checker = _Checker(url, requests, patience, release)
    try:
        return Report(url, tuple([finding async for finding in checker.all()]))
    finally:
        await checker.auth.close()


class _Checker:
    def __init__(self, url: str, requests: SampleRequests, patience: float, release: Release) -> None:
        self.url, self.requests, self._patience, self._release = url, requests, patience, release
        self.auth = WebhookAuth(url, timeout=patience, release=release)
        self._slowest = 0.0
        self._slow: list[str] = []
        self._times: list[float] = []
        self._unexplained: list[str] = []
        self._long: list[str] = []

    async def all(self) -> AsyncIterator[AnswerCheck]:
        """Yield one check after another, with the time of its slowest request."""
        async for finding in self._all():
            seconds, self._times = max(self._times, default=0.0), []
            self._slowest = max(self._slowest, seconds)
            if seconds > SLOW:
                self._slow.append(finding.name)
            yield replace(finding, seconds=seconds)
            if finding.level == "skipped":
                return
        for finding in self._overall():
            yield finding

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._times.append(time.monotonic() - began)

    async def _all(self) -> AsyncIterator[AnswerCheck]:
        """Yield one check after another; skip the rest if one of the first two requests gets no decision."""
        yield await self._info()
        plain = [
            _RequestCase("bootAuth/kms", True, self.requests.kms, _SELF_CHECK),
            _RequestCase("bootAuth/app", False, self.requests.app, _NO_APP),
        ]
        answered = []
        for case in plain:
            finding = await self._decision(case)
            yield finding
            if finding.level != "broken":
                answered.append(case)
        if len(answered) < len(plain):
            yield AnswerCheck("variations, load, connections", "skipped", "these need a decision on both paths")
            return
        for case in self._variations():
            yield await self._decision(case)
        for case in self._malformed():
            yield await self._refusal(case)
        for case in plain:
            yield await self._repeated(case)
        yield await self._at_once()
        yield await self._plain_answer()

    def _variations(self) -> Iterator[_RequestCase]:
        """Yield the requests of KMS of other releases, and those for other platforms and other apps."""
        kms, app = self.requests.kms, self.requests.app
        for is_kms, boot_info in ((True, kms), (False, app)):
            who, breaks = ("kms", _SELF_CHECK) if is_kms else ("app", _NO_APP)
            yield _RequestCase(
                f"{who}, as 0.5.x sends it: attestationMode",
                is_kms,
                Variation.of(boot_info, variant_members=("attestationMode",)),
                f"with a KMS of 0.5.x: {breaks}",
            )
            yield _RequestCase(
                f"{who}, as next sends it: teeVariant",
                is_kms,
                Variation.of(boot_info, variant_members=("teeVariant",)),
                f"with a KMS of next: {breaks}",
            )
            yield _RequestCase(
                f"{who}, as 0.6.5 sends it: launchTicketHash",
                is_kms,
                Variation.of(boot_info, more=f'{{"launchTicketHash": "{bytes(32).hex()}"}}'),
                f"with a KMS of 0.6.5 or later: {breaks}",
            )
            yield _RequestCase(
                f"{who}, with fields of a later release",
                is_kms,
                Variation.of(boot_info, more='{"somethingNew": "00", "alsoNew": {"nested": [1, null]}}'),
                f"after an update of the KMS: {breaks}",
            )
            yield _RequestCase(
                f"{who}, TCB out of date, with advisories",
                is_kms,
                replace(boot_info, tcb_status="OutOfDate", advisory_ids=("INTEL-SA-00837", "INTEL-SA-01079")),
                f"on a platform that needs an update the caller gets an error, not a refusal: {breaks}",
                "it allows a platform whose TCB is out of date",
            )
        yield _RequestCase(
            "app without instance id and key provider",
            False,
            replace(app, instance_id=b"", key_provider_info=b""),
            "apps whose compose has no_instance_id get no keys",
        )
        yield _RequestCase(
            "unknown app",
            False,
            replace(app, app_id=_NOBODY, compose_hash=bytes(32), mr_aggregated=bytes(32)),
            "whoever deploys an app that is not registered gets an error, not a refusal",
            "it allows an app that nobody can have registered",
        )
        yield _RequestCase(
            "unknown KMS",
            True,
            replace(kms, mr_aggregated=bytes(32), os_image_hash=bytes(32)),
            "whoever starts a KMS that is not registered gets an error, not a refusal",
            "it allows a KMS, and so releases the root keys, whatever its measurements are",
        )

    def _malformed(self) -> Iterator[_RequestCase]:
        """Yield requests that no KMS sends. The webhook may answer them with an error or a denial."""
        for is_kms, boot_info in ((True, self.requests.kms), (False, self.requests.app)):
            who = "kms" if is_kms else "app"
            yield _RequestCase(f"{who}, an empty object", is_kms, Variation.of(boot_info, instead=b"{}"), "")
            yield _RequestCase(f"{who}, no JSON", is_kms, Variation.of(boot_info, instead=b"isAllowed"), "")

    async def _info(self) -> AnswerCheck:
        try:
            with self._timed():
                info = await self.auth.info()
        except UnavailableError as error:
            return _broken("GET /", error, _META)
        return AnswerCheck("GET /", "ok", f"gatewayAppId {info.gateway_app_id!r}, chainId {info.chain_id}")

    async def _decide(self, case: _RequestCase) -> Decision:
        with self._timed():
            decision = await self.auth.decide(case.boot_info, is_kms=case.is_kms)
        if not decision.is_allowed and not decision.reason:
            self._unexplained.append(case.name)
        if len(decision.reason) > LONG_REASON:
            self._long.append(case.name)
        return decision

    async def _decision(self, case: _RequestCase) -> AnswerCheck:
        try:
            decision = await self._decide(case)
        except UnavailableError as error:
            return _broken(case.name, error, case.breaks)
        if decision.is_allowed and case.unlikely:
            return AnswerCheck(case.name, "warning", f"allowed: {case.unlikely}")
        return AnswerCheck(case.name, "ok", _said(decision))

    async def _refusal(self, case: _RequestCase) -> AnswerCheck:
        try:
            with self._timed():
                decision = await self.auth.decide(case.boot_info, is_kms=case.is_kms)
        except UnavailableError as error:
            return AnswerCheck(case.name, "ok", f"an error, as expected: {str(error)[:SHOWN_CHARACTERS]}")
        if decision.is_allowed:
            return AnswerCheck(case.name, "warning", "allowed: it decides without the fields of the request")
        return AnswerCheck(case.name, "ok", _said(decision))

    async def _repeated(self, case: _RequestCase) -> AnswerCheck:
        name = f"{case.name}, {IN_A_ROW} times, one after another"
        decisions = set()
        for number in range(IN_A_ROW):
            try:
                decisions.add((await self._decide(case)).is_allowed)
            except UnavailableError as error:
                return _broken(name, error, f"now and then: {case.breaks}", f"request {number + 1}: ")
        return _steady(name, decisions)

    async def _at_once(self) -> AnswerCheck:
        name, breaks = f"{AT_ONCE} requests at once", "when many apps boot together, some get no keys"
        case = _RequestCase("bootAuth/app", False, self.requests.app, breaks)
        answers = await asyncio.gather(*(self._decide(case) for _ in range(AT_ONCE)), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, UnavailableError):
                failed = sum(isinstance(a, UnavailableError) for a in answers)
                return _broken(name, answer, breaks, f"{failed} of them: ")
            if isinstance(answer, BaseException):
                raise answer
        return _steady(name, {answer.is_allowed for answer in answers if isinstance(answer, Decision)})

    async def _plain_answer(self) -> AnswerCheck:
        """Check the headers of an answer, which a KMS ignores."""
        name, url = "headers of an answer", f"{self.url.rstrip('/')}/bootAuth/app"
        client = HttpClient(
            timeout=self._patience, max_answer=MAX_ANSWER, headers={"User-Agent": kms_user_agent(self._release)}
        )
        try:
            headers = {"Content-Type": "application/json"}
            with self._timed():
                answer = await client.send("POST", url, self.requests.app.to_json(), headers)
        except (NoAnswerError, AnswerTooLongError) as error:
            return AnswerCheck(name, "warning", f"the repeated request got no answer: {error}")
        finally:
            await client.close()
        content_type = answer.headers.get("content-type", "none")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            said = f"Content-Type is {content_type}: a KMS ignores that, other clients do not"
            return AnswerCheck(name, "warning", said)
        return AnswerCheck(name, "ok", content_type)

    def _overall(self) -> Iterator[AnswerCheck]:
        """Yield the checks of all answers together."""
        level: Level = "warning" if self._slow else "ok"
        said = f"the slowest took {self._slowest:.2f} s; GetAppKey waits for two, and gives up after {TIMEOUT:g} s each"
        if self._slow:
            said += f"; over {SLOW:g} s: {', '.join(self._slow)}"
        yield AnswerCheck("time", level, said)
        if self._unexplained:
            said = f"{_some(self._unexplained)}: denied without a reason: an operator sees `Boot denied: ` and no more"
            yield AnswerCheck("reasons", "warning", said)
        elif self._long:
            said = f"{_some(self._long)}: a reason of more than {LONG_REASON} characters, which every error repeats"
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
        return AnswerCheck(name, "warning", "equal requests are sometimes allowed and sometimes denied")
    return AnswerCheck(name, "ok", "the same decision each time")


def _some(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    return unique[0] if len(unique) == 1 else f"{unique[0]} and {len(unique) - 1} more"
