"""The pytest plugin in projects of others: installed from a wheel, under xdist, in tests of either kind."""

import inspect
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from dstack_emu import pytest_plugin, testing
from tests.documents import PACKAGES, blocks, code, document, rows, section
from tests.repository import ROOT
from tests.scratch import run_pytest, write

PAGE = document("docs/pytest.md")


def shown_project() -> str:
    """The tests at the top of the page."""
    return blocks(PAGE.partition("\n## ")[0])[0].text


# ---- installed elsewhere

ASYNC_AND_ENVIRONMENT = """
import asyncio
import json
import os
import urllib.request
from pathlib import Path

import pytest

import dstack_emu
from aiohttp import web
from dstack_emu.testing import LiveStack, refused


def test_package_is_the_installed_one():
    folder = Path(dstack_emu.__file__).parent
    assert "site-packages" in folder.parts and Path(os.environ["VIRTUAL_ENV_OF_TEST"]) in folder.parents
    assert (folder / "py.typed").exists()


def test_environment_leads_a_program_to_the_app(dstack_env):
    assert os.environ["DSTACK_SIMULATOR_ENDPOINT"].endswith("/app/dstack.sock")
    assert Path(os.environ["TAPPD_SIMULATOR_ENDPOINT"]).is_socket()
    info = json.load(urllib.request.urlopen(os.environ["DSTACK_EMU_APP"] + "/Info"))
    assert info["app_name"] == "app"


def test_environment_is_gone_after_it():
    assert "DSTACK_SIMULATOR_ENDPOINT" not in os.environ


@pytest.mark.anyio
async def test_under_anyio(dstack_stack):
    dstack_stack.policy().deny("app")
    with refused("app not registered"):
        await asyncio.to_thread(dstack_stack.boot)


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.mark.asyncio
async def test_under_asyncio_with_a_webhook_in_its_loop(dstack_kms):
    async def deny(request):
        return web.json_response({"isAllowed": False, "reason": "not by me", "gatewayAppId": ""})

    app = web.Application()
    app.router.add_post("/bootAuth/kms", deny)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        kms = await asyncio.to_thread(dstack_kms, "mine", webhook=url)
        with refused("boot denied: not by me"):
            await asyncio.to_thread(kms.bootstrap)
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("time", [1, 2])
def test_state_is_clean_each_time(dstack_stack, dstack_app, dstack_kms, dstack_fault, dstack_clock, time):
    assert not dstack_stack.control.faults() and "third" not in dstack_stack.control.all_kms()
    assert "OutOfDate" not in str(dstack_stack.control.platforms())
    assert not dstack_stack.control.clock()["touched"]
    quote = dstack_app().rpc("GetQuote", report_data="00")["quote"]
    Path(os.environ["VIRTUAL_ENV_OF_TEST"], f"quote {time}").write_text(quote)
    dstack_app().platform.set(tcb_status="OutOfDate")
    dstack_kms("third")
    dstack_fault(service="pccs", kind="hang")
    dstack_clock.freeze("2030-01-01")


@pytest.fixture(scope="module")
def dstack_of_the_module(dstack_session_stack):
    dstack_session_stack.policy("src").deny("app")
    yield
    dstack_session_stack.policy("src").allow("app")


def test_what_a_wider_fixture_did_stays(dstack_of_the_module, dstack_boot):
    with refused("app not registered"):
        dstack_boot()
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with the package installed from a wheel; dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input"]
    make = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(make, check=True, capture_output=True, timeout=100)
    shutil.rmtree(source)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=60)
    installed = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))
    install = [*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", str(installed), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=60)
    (installed / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return str(environment / "bin" / "python")


@pytest.mark.timeout(180)
def test_project_with_nothing_but_the_package_runs_on_two_workers(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = Path(python).parents[1]
    monkeypatch.setenv("VIRTUAL_ENV_OF_TEST", str(environment))
    shown = shown_project()
    assert len([line for line in shown.splitlines() if line.strip()]) <= 25
    write(tmp_path, {"test_shown.py": shown, "test_more.py": ASYNC_AND_ENVIRONMENT})
    done = run_pytest(tmp_path, "-v", "-n", "2", "--dist", "loadfile", python=python, path="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
    assert {"[gw0]", "[gw1]"} <= set(re.findall(r"\[gw\d\]", done.stdout))
    quotes = {(environment / f"quote {time}").read_text() for time in (1, 2)}
    assert len(quotes) == 1, "the same bytes alone and among others"


def test_plugin_imports_nothing_of_the_emulator_until_a_fixture_is_used() -> None:
    program = (
        "import sys, dstack_emu.pytest_plugin; own = {'dstack_emu', 'dstack_emu.pytest_plugin'}; "
        "print([m for m in sys.modules if m.split('.')[0] in sys.argv[1:] and m not in own])"
    )
    heavy = ["aiohttp", "cryptography", "grpc", "pydantic", "google", "dstack_emu"]
    command = [sys.executable, "-c", program, *heavy]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
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


@pytest.mark.timeout(120)
def test_failed_test_shows_its_calls_and_the_option_goes_before_the_rest(tmp_path: Path) -> None:
    ini = "[pytest]\ndstack_seed = from the ini file\n"
    write(tmp_path, {"test_it.py": FAILING, "conftest.py": CONFTEST, "pytest.ini": ini})
    done = run_pytest(tmp_path, "--dstack-seed", "from the command line")
    assert "2 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "- Calls in the dstack stack -" in done.stdout
    assert "kms-src → auth-src /bootAuth/app  denied: app not registered [app_registered]" in done.stdout
    assert "AssertionError: nothing was refused: a refusal with 'KMS is not allowed' expected" in done.stdout
    assert "dstack_emu/testing/thread.py" not in done.stdout, "a report is about the test, not about how calls are made"


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
