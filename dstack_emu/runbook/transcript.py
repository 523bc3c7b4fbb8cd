"""The transcript of a run: each step with its request, its answer and what was expected, and the files of evidence."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from dstack_emu.observability.record import Record
from dstack_emu.runbook.kms_client import KmsAnswer
from dstack_emu.transport.secrets import Secrets

SHOWN_CHARACTERS: Final = 80
"""The length up to which a line shows a value in full; the files contain every value in full."""

BEGINNING: Final = 12
"""The number of characters that a line shows of a longer value."""
NAMES: Final = 4
"""The number of fields of an answer whose names a line shows."""
SHORTEST_KEY: Final = 32
"""The length of the shortest text that is taken for a key: that of 16 bytes in hex."""
REDACTED: Final = "(a private key was here)"
_PRIVATE: Final = frozenset(("temp_ca_key", "ca_key", "k256_key", "disk_crypt_key", "env_crypt_key"))


@dataclass(frozen=True, slots=True)
class Expected:
    """What an answer must be, as text and as a predicate. If it is a success, its status precedes the text."""

    text: str
    holds: Callable[[KmsAnswer], bool]
    is_success: bool = False

    def text_with(self, success: str) -> str:
        """Return the text; `success` is the status of a success in this transport."""
        return f"{success} {self.text}".rstrip() if self.is_success else self.text


@dataclass(frozen=True, slots=True)
class Step:
    """One step: `asked` is the request or the check. `ok` is None if it could not be made; `got` then says why."""

    name: str
    asked: str
    got: str
    expected: str
    ok: bool | None
    seconds: float


@dataclass(slots=True)
class Case:
    """One test case and its steps so far."""

    number: int
    title: str
    steps: list[Step] = field(default_factory=list)

    @property
    def ok(self) -> bool | None:
        """Whether every step that could be checked holds; None if none could."""
        checked = [step.ok for step in self.steps if step.ok is not None]
        return all(checked) if checked else None


class Transcript:
    """Records the cases and steps, and calls `on_case` and `on_step` with each one; none shows one of its `secrets`."""

    def __init__(
        self, on_case: Callable[[Case], None], on_step: Callable[[Step], None], secrets: Secrets | None = None
    ) -> None:
        self.secrets = secrets or Secrets()
        self.cases: list[Case] = []
        self.files: dict[str, str] = {}
        self.seen: dict[str, Record] = {}
        """The call of each step that is one, as the runbook saw it, by the step's name."""
        self._on_case, self._on_step = on_case, on_step
        self._since = time.monotonic()

    def begin(self, number: int, title: str) -> None:
        """Begin a case."""
        self.cases.append(Case(number, title))
        self._on_case(self.cases[-1])
        self._since = time.monotonic()

    @property
    def next_name(self) -> str:
        """The name of the next step, such as 3.2."""
        return f"{self.cases[-1].number}.{len(self.cases[-1].steps) + 1}"

    def record(self, subject: str, got: str, expected: str, ok: bool | None) -> bool:
        """Record a step about a request or a check (`subject`); return whether it holds."""
        now = time.monotonic()
        redact = self.secrets.redact
        step = Step(self.next_name, redact(subject), redact(got), redact(expected), ok, now - self._since)
        self._since = now
        self.cases[-1].steps.append(step)
        self._on_step(step)
        return bool(ok)

    def keep(self, folder: str, name: str, document: Any) -> None:
        """Keep a document as evidence of the next step."""
        # Two digits, so that a sorted listing of the folder has the steps in order.
        step = f"{self.cases[-1].number}.{len(self.cases[-1].steps) + 1:02}"
        self.files[f"{folder}/{step}-{name}.json"] = json.dumps(document, indent=2, sort_keys=True) + "\n"

    def learn_keys(self, document: Any) -> None:
        """Add the private keys of an answer to the secrets."""
        if isinstance(document, dict):
            for name, child in document.items():
                if name in _PRIVATE and isinstance(child, str) and len(child) >= SHORTEST_KEY:
                    self.secrets.learn(child)
                self.learn_keys(child)
        elif isinstance(document, list):
            for child in document:
                self.learn_keys(child)

    @property
    def ok(self) -> bool:
        """Whether every case was checked, and holds."""
        return all(case.ok for case in self.cases)

    def to_json(self, *, with_times: bool = True) -> list[dict[str, Any]]:
        """Return the cases with all their steps."""
        cases = []
        for case in self.cases:
            steps = [asdict(step) for step in case.steps]
            for step in steps:
                if with_times:
                    step["seconds"] = round(step["seconds"], 3)
                else:
                    del step["seconds"]
            cases.append({"case": case.number, "title": case.title, "ok": case.ok, "steps": steps})
        return cases


# ---- answers as text


def short(value: Any) -> str:
    """Return a value in at most SHOWN_CHARACTERS characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:BEGINNING]}… ({len(text)} characters)"


def arguments_of(arguments: Mapping[str, Any]) -> str:
    """Return the arguments of a call on one line."""
    return ", ".join(f"{name}={short(value)}" for name, value in arguments.items())


def summary_of(answer: KmsAnswer) -> str:
    """Return an answer on one line: its error in full, or the names of its fields."""
    if answer.status == 0:
        return answer.error
    if not answer.ok:
        return f"{answer.shown} {' '.join(answer.error.split())}"
    if isinstance(answer.body, dict):
        names = [*list(answer.body)[:NAMES], *(["…"] if len(answer.body) > NAMES else [])]
        return f"{answer.success} {', '.join(names) or '{}'}"
    return f"{answer.success} {short(answer.body)}"


def redacted(value: Any) -> Any:
    """Return a document without private keys."""
    if isinstance(value, dict):
        return {name: REDACTED if name in _PRIVATE and child else redacted(child) for name, child in value.items()}
    return [redacted(child) for child in value] if isinstance(value, list) else value


# ---- expectations


def answers(*names: str, **values: Any) -> Expected:
    """Expect a success that has these fields, not empty, and these values."""
    parts = [*names, *(f"{name} = {short(value)}" for name, value in values.items())]

    def holds(answer: KmsAnswer) -> bool:
        return (
            answer.ok
            and all(answer.field(name) for name in names)
            and all(answer.field(name) == value for name, value in values.items())
        )

    return Expected(f"with {', '.join(parts)}" if parts else "", holds, is_success=True)


def says(text: str) -> Expected:
    """Expect a success whose body is this text."""
    return Expected(text, lambda answer: answer.ok and answer.body == text, is_success=True)


def refuses(*reasons: str) -> Expected:
    """Expect an error that contains one of these texts, in upper or lower case."""

    def holds(answer: KmsAnswer) -> bool:
        text = answer.error.lower()
        return answer.status > 0 and any(reason.lower() in text for reason in reasons)

    return Expected(f"an error that says {_or(reasons)}", holds)


def _or(reasons: Iterable[str]) -> str:
    return " or ".join(f"'{reason}'" for reason in reasons)
