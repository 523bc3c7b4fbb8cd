"""The result of a check as JUnit XML, in the form that CI systems read: one test case for each check and request."""

from xml.sax.saxutils import quoteattr

from dstack_emu.webhook_check.check import Report
from dstack_emu.webhook_check.safety import FAILURES, SafetyReport


def to_junit(url: str, answers: Report, safety: SafetyReport | None) -> str:
    """Return the XML text; characters that XML does not have, of a webhook's reasons, are escaped."""
    cases = [
        _case("answers", each.name, each.seconds, each.level, each.said, each.level == "broken")
        for each in answers.findings
    ]
    failed = len(answers.broken)
    if safety is not None:
        cases += [
            _case(
                f"safety.{each.side}",
                each.name,
                each.seconds,
                each.level,
                f"{each.outcome}: {each.said}",
                each.level in FAILURES,
            )
            for each in safety.requests
        ]
        failed += len(safety.failures)
    skipped = sum(each.level == "skipped" for each in answers.findings)
    counts = f'tests="{len(cases)}" failures="{failed}" errors="0" skipped="{skipped}"'
    head = f"<testsuite name={_text(f'check-webhook {url}')} {counts}>"
    return "\n".join(('<?xml version="1.0" encoding="utf-8"?>', head, *cases, "</testsuite>", ""))


def _case(suite: str, name: str, seconds: float, level: str, said: str, is_failure: bool) -> str:
    head = f'  <testcase classname="check-webhook.{suite}" name={_text(name)} time="{seconds:.3f}"'
    if is_failure:
        return f"{head}><failure type={_text(level)} message={_text(said)}/></testcase>"
    if level == "skipped":
        return f"{head}><skipped message={_text(said)}/></testcase>"
    return f"{head}/>"


def _text(text: str) -> str:
    """Return a quoted attribute."""
    return quoteattr("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))
