"""The pytest plugin: what it shows, what can be set, and that its page describes it. test_wheel.py has it installed."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

from dstack_emu import pytest_plugin, testing
from tests.documents import blocks, code, document, rows, section
from tests.repository import ROOT
from tests.scratch import run_pytest, write

PAGE = document("docs/pytest.md")


def test_plugin_imports_nothing_of_the_emulator_until_a_fixture_is_used() -> None:
    program = (
        "import sys, dstack_emu.pytest_plugin; own = {'dstack_emu', 'dstack_emu.pytest_plugin'}; "
        "print([m for m in sys.modules if m.split('.')[0] in sys.argv[1:] and m not in own])"
    )
    heavy = ["aiohttp", "cryptography", "grpc", "pydantic", "google", "dstack_emu"]
    command = [sys.executable, "-c", program, *heavy]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "[]\n"


# ---- what it shows, and what can be set

FAILING = """
from dstack_emu.testing import refused


def test_allowed_by_mistake(dstack_app, dstack_policy, dstack_boot):
    dstack_policy("src").deny(dstack_app())
    dstack_boot(dstack_app())


def test_not_refused(dstack_boot):
    with refused("KMS is not allowed"):
        dstack_boot()


def test_seed(dstack_session_stack):
    assert dstack_session_stack.description["seed"] == "from the command line"
    assert dstack_session_stack.in_thread(lambda stack: stack.config.patience) == 7
"""

CONFTEST = """
import pytest


@pytest.fixture(scope="session")
def dstack_settings():
    return {"seed": "from the conftest", "patience": 7.0}
"""


def test_failed_test_shows_its_calls_and_the_option_goes_before_the_rest(tmp_path: Path) -> None:
    ini = "[pytest]\ndstack_seed = from the ini file\n"
    write(tmp_path, {"test_it.py": FAILING, "conftest.py": CONFTEST, "pytest.ini": ini})
    done = run_pytest(tmp_path, "--dstack-seed", "from the command line")
    assert "2 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "- Calls in the dstack stack -" in done.stdout
    assert "kms-src → auth-src /bootAuth/app  denied: app not registered [app_registered]" in done.stdout
    assert "AssertionError: nothing was refused; expected a refusal that contains 'KMS is not allowed'" in done.stdout
    assert "dstack_emu/testing/thread.py" not in done.stdout, "a report is about the test, not about how calls are made"


RELEASES = """
import pytest


@pytest.fixture(scope="session")
def dstack_settings():
    return {"patience": 5.0}


def test_option(dstack_stack, dstack_session_stack, dstack_check_webhook, dstack_check_webhook_safety):
    assert dstack_stack is dstack_session_stack
    assert dstack_stack.description["release"] == "0.5"
    assert dstack_stack.image("another").version == "0.5.11"
    assert dstack_check_webhook(dstack_stack.services["auth-src"]).broken == ()
    assert dstack_check_webhook_safety(dstack_stack.services["auth-src"]).ok
    checks = dstack_stack.journal.find("/bootAuth/kms", service="auth-src")
    assert checks[0]["decision"]["allowed"]


@pytest.mark.dstack_release("0.6")
def test_marker(dstack_stack, dstack_session_stack):
    assert dstack_stack is not dstack_session_stack
    assert dstack_stack.description["release"] == "0.6"


@pytest.mark.dstack_release("0.6")
def test_marker_of_a_fresh_stack(dstack_fresh_stack):
    assert dstack_fresh_stack.description["release"] == "0.6"


@pytest.mark.dstack_release("0.7")
def test_unknown(dstack_stack):
    pass


@pytest.mark.dstack_release(0.5)
def test_number(dstack_stack):
    pass
"""


def test_release_is_that_of_the_marker_then_of_the_option_then_of_the_ini_file(tmp_path: Path) -> None:
    (shown,) = (block.text for block in blocks(PAGE) if "mark.dstack_release" in block.text)
    write(tmp_path, {"test_it.py": RELEASES, "test_page.py": shown, "pytest.ini": "[pytest]\ndstack_release = 0.6\n"})
    done = run_pytest(tmp_path, "--dstack-release", "0.5", "--strict-markers")
    assert "6 passed, 2 errors" in done.stdout, done.stdout + done.stderr
    assert "dstack release: 0.5 or 0.6 expected, got '0.7'" in done.stdout
    assert '@pytest.mark.dstack_release("0.5") expected, got (0.5,) {}' in done.stdout


# ---- the page


def test_fixtures_of_the_page_are_the_plugins() -> None:
    made = {name: value for name, value in vars(pytest_plugin).items() if name.startswith("dstack_")}
    table = {code(row[0])[0]: row[1] for row in rows(section(PAGE, "## Fixtures"), "fixture")}
    session = {"dstack_session_stack", "dstack_settings"}
    assert table == {name: "session" if name in session else "test" for name in made}
    assert all(value.__doc__ for value in made.values())


def test_classes_of_the_page_have_what_it_says_and_no_more() -> None:
    table = {code(row[0])[0]: row[1] for row in rows(section(PAGE, "## Classes"), "class")}
    classes = {name: getattr(testing, name) for name in testing.__all__ if inspect.isclass(getattr(testing, name))}
    assert table.keys() == classes.keys()
    for name, cls in classes.items():
        spans = code(table[name])
        documented = {span.removesuffix("()") for span in spans}
        made = inspect.getsource(cls).partition("def __enter__")[0]
        members = {*vars(cls), *re.findall(r"self\.(\w+)(?=,| =)", made)}
        assert {member for member in members if not member.startswith("_")} - documented == set(), name
        assert {span.removesuffix("()") for span in spans if span.endswith("()")} <= members, name
