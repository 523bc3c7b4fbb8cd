"""The result of a check as JUnit XML, in the form that CI systems read: one test case for each thing checked."""

from collections.abc import Iterable
from dataclasses import dataclass
from xml.sax.saxutils import quoteattr


@dataclass(frozen=True, slots=True)
class JunitCase:
    """One test case: its class and name, how long it took, what it ended with (`level`), and what was said."""

    suite: str
    name: str
    seconds: float
    level: str
    said: str
    is_failure: bool

    @property
    def is_skipped(self) -> bool:
        """Whether nothing was checked."""
        return self.level == "skipped" and not self.is_failure


def to_junit(title: str, cases: Iterable[JunitCase]) -> str:
    """Return the XML text; characters that XML does not have are escaped."""
    made = list(cases)
    failed, skipped = sum(case.is_failure for case in made), sum(case.is_skipped for case in made)
    counts = f'tests="{len(made)}" failures="{failed}" errors="0" skipped="{skipped}"'
    head = f"<testsuite name={_text(title)} {counts}>"
    return "\n".join(('<?xml version="1.0" encoding="utf-8"?>', head, *map(_case, made), "</testsuite>", ""))


def _case(case: JunitCase) -> str:
    head = f'  <testcase classname={_text(case.suite)} name={_text(case.name)} time="{case.seconds:.3f}"'
    if case.is_failure:
        return f"{head}><failure type={_text(case.level)} message={_text(case.said)}/></testcase>"
    if case.is_skipped:
        return f"{head}><skipped message={_text(case.said)}/></testcase>"
    return f"{head}/>"


def _text(text: str) -> str:
    """Return a quoted attribute."""
    return quoteattr("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))
