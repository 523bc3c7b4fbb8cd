"""axe-core, which finds what on a page a person with a disability cannot use: https://github.com/dequelabs/axe-core.

`make browser` puts it into `.axe`. It runs in a world of its own beside the page's scripts, so that the page's
Content-Security-Policy stays in force, and shares only the document with them.
"""

import functools
import json

import pytest

from tests.browser import Tab
from tests.repository import ROOT

SCRIPT = ROOT / ".axe" / "axe_playwright_python" / "axe.min.js"
TAGS = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")
"""The rules that run: WCAG 2.2 on the levels A and AA, and what its authors call best practice."""

_RUN = f"axe.run(document, {{runOnly: {json.dumps(TAGS)}, resultTypes: ['violations', 'incomplete']}})"
_TOLD = (
    "({violations}) => violations.flatMap(({id, help, nodes}) => "
    "nodes.map(({html, failureSummary}) => `${id} (${help}): ${html.slice(0, 300)} ${failureSummary}`))"
)


@functools.cache
def _source() -> str:
    if not SCRIPT.is_file():
        pytest.fail(f"there is no axe-core in {SCRIPT}: `make browser` installs it")
    return SCRIPT.read_text()


def violations(tab: Tab) -> list[str]:
    """Return what axe-core objects to on the page as it is shown, each with the element and the reason."""
    world = tab.world("axe")
    if not tab.run("typeof axe === 'object'", world):
        tab.run(f"{_source()}; true", world)
    return list(tab.run(f"{_RUN}.then({_TOLD})", world))
