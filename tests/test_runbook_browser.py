"""The page of a runbook's evidence in a real Chromium, opened from its folder.

It runs if DSTACK_EMU_BROWSER is set (`make browser`): starting a browser takes seconds.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.axe import violations
from tests.browser import Browser, Tab, chromium, program
from tests.commands import run_command

pytestmark = [
    pytest.mark.skipif("DSTACK_EMU_BROWSER" not in os.environ, reason="DSTACK_EMU_BROWSER is not set: `make browser`"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for the file."""
    if program() is None:
        pytest.fail("DSTACK_EMU_BROWSER is set, but there is no Chromium: install Debian's chromium-headless-shell")
    with chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run."""
    folder = tmp_path_factory.mktemp("runbook")
    done = run_command("runbook", "--evidence", str(folder))
    assert done.returncode == 0, done.stderr.decode()
    return folder / "index.html"


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    """An empty page, which must have loaded files alone, and complained of nothing."""
    tab = browser.tab()
    tab.resize(1280, 900)
    yield tab
    assert tab.complaints == []
    assert {url.partition(":")[0] for url in tab.requests} <= {"file", "about"}


def test_page_opens_from_its_folder_and_requests_nothing_else(page: Path, tab: Tab) -> None:
    tab.open(page.as_uri())
    tab.see("KMS authorization runbook")
    assert [url for url in tab.requests if url != "about:blank"] == [page.as_uri()]
    assert tab.unnamed() == []
    assert tab.run(
        "[...document.querySelectorAll('header, nav, main, footer')].map((each) => each.localName).join()"
    ) == ("header,nav,main,footer")
    tab.tab_to("Case 1")
    tab.press("Enter")
    tab.wait("location.hash === '#case-1' && document.getElementById('case-1').getBoundingClientRect().top < 50")
    named = "[...document.querySelectorAll('article a')].find((each) => each.innerText.includes('1.03'))"
    tab.run(f"{named}.click()")
    tab.see("boot denied: aggregated MR not allowed")
    assert tab.requests[-1].endswith("responses/1.03-bootstrap-src-denied-by-deny-self.json")


@pytest.mark.parametrize(("width", "dark"), [(640, False), (390, True)])
def test_page_fits_a_phone_and_large_print(page: Path, tab: Tab, width: int, dark: bool) -> None:
    tab.resize(width, 800, dark=dark)
    tab.open(page.as_uri())
    tab.see("KMS authorization runbook")
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    ground = tab.run("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)")
    assert tab.run("getComputedStyle(document.querySelector('svg')).backgroundColor") == ground


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_violates_no_rule_of_axe(page: Path, tab: Tab, dark: bool) -> None:
    tab.resize(1280, 900, dark=dark)
    tab.open(page.as_uri())
    tab.see("KMS authorization runbook")
    tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    # All steps are made alike; those of the last cases have only larger pictures, which take axe half a minute.
    tab.run("[...document.querySelectorAll('article')].slice(12).forEach((each) => each.remove())")
    assert violations(tab) == []


def test_printed_page_shows_what_is_folded_on_a_screen(page: Path, tab: Tab) -> None:
    tab.open(page.as_uri())
    tab.see("KMS authorization runbook")
    folded = "document.querySelector('details:not([open]) svg').checkVisibility()"
    assert tab.run(folded) is False
    tab.send("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert tab.run(folded) is True
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    pdf = tab.send("Page.printToPDF", preferCSSPageSize=True)["data"]
    assert pdf.startswith("JVBERi")  # %PDF-
