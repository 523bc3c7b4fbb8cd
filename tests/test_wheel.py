"""The package as others install it: what the wheel has, and that it leaves everybody else's names alone.

It runs if DSTACK_EMU_PACKAGE is set (`make package`). Every install here is made of a copy of the packaged files, in an
environment of its own whose dependencies are those of this one.
"""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.documents import PACKAGES, blocks, document
from tests.repository import ROOT
from tests.scratch import write

pytestmark = pytest.mark.skipif(
    "DSTACK_EMU_PACKAGE" not in os.environ, reason="DSTACK_EMU_PACKAGE is not set: `make package`"
)

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input")
OFFLINE = ("--no-deps", "--no-index")


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment."""

    folder: Path

    def command(self, name: str) -> str:
        """Return the path of one of its commands."""
        return str(self.folder / "bin" / name)

    def run(self, project: Path, *command: str) -> subprocess.CompletedProcess[str]:
        """Run one of its commands in a project."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHON"))}
        environment |= {"VIRTUAL_ENV_OF_TEST": str(self.folder), "PATH": f"{self.folder}/bin:{os.environ['PATH']}"}
        words = [self.command(command[0]), *command[1:]]
        return subprocess.run(
            words, cwd=project, env=environment, capture_output=True, text=True, timeout=100, check=False
        )


def environment_with(folder: Path, *what: str) -> Environment:
    """Make an environment and install something into it; pytest's own command is there, too."""
    made = Environment(folder)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    installed = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    (installed / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    install = [*PIP, "--python", made.command("python"), "install", *OFFLINE, "--no-build-isolation", "--no-compile"]
    subprocess.run([*install, *what], check=True, capture_output=True, timeout=60)
    script = Path(made.command("pytest"))
    script.write_text(f"#!{made.command('python')}\nimport pytest\nraise SystemExit(pytest.console_main())\n")
    script.chmod(0o755)
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, as a checkout has it."""
    folder = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of it."""
    folder = tmp_path_factory.mktemp("wheel")
    make = [*PIP, "wheel", *OFFLINE, "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(make, check=True, capture_output=True, timeout=100)
    shutil.rmtree(source / "build")
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel installed."""
    return environment_with(tmp_path_factory.mktemp("installed") / "venv", str(wheel))


@pytest.fixture(scope="module")
def editable(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with an editable install."""
    return environment_with(tmp_path_factory.mktemp("editable") / "venv", "--editable", str(source))


# ---- what the wheel has


def test_wheel_has_one_package_and_all_of_it(source: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"dstack_emu", f"dstack_emu-{wheel.name.split('-')[1]}.dist-info"}
    packaged = {name for name in names if name.startswith("dstack_emu/")}
    # os.walk, because Path.rglob does not follow the links to the folders at the top.
    files = [
        Path(folder, name) for folder, _, names in os.walk(source / "dstack_emu", followlinks=True) for name in names
    ]
    assert packaged == {str(path.relative_to(source)) for path in files}
    assert "dstack_emu/py.typed" in packaged
    assert {".py", ".pyi", ".proto", ".typed", ".html", ".css", ".js", ".svg", ".vy", ".evm", ".json"} == {
        Path(name).suffix for name in packaged
    }


# ---- beside packages of others

TAKEN = ("attest", "auth", "control", "kms_emu", "simulator", "stack", "testing", "transport", "verifier")
"""Names that other projects have packages of."""

OWN_TESTS = """
import auth.server
import control
import simulator
import stack.parts
import transport
import tests.values


def test_packages_are_our_own():
    for module in (auth.server, control, simulator, stack.parts, transport, tests.values):
        assert module.OURS == module.__name__, module.__file__
"""

EMULATED_TESTS = """
import dstack_emu.auth.server
import pytest
from dstack_emu.testing import refused


def test_app_gets_its_keys(dstack_app):
    assert dstack_app().rpc("GetKey", path="/")["key"]


def test_app_that_is_denied_gets_none(dstack_app, dstack_policy, dstack_boot):
    dstack_policy("src").deny(dstack_app())
    with refused("app not registered"):
        dstack_boot(dstack_app())


def test_package_is_not_ours():
    assert not hasattr(dstack_emu.auth.server, "OURS")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with packages whose names are also folders of this one, and tests of each kind."""
    folder = tmp_path_factory.mktemp("project")
    own = "OURS = __name__\n"
    write(folder, {f"{name}/{module}.py": own for name in TAKEN for module in ("__init__", "server", "parts")})
    write(folder, {"tests/__init__.py": "", "tests/values.py": own})
    write(folder, {"tests/test_own.py": OWN_TESTS, "tests/test_emulated.py": EMULATED_TESTS})
    write(folder, {"tests/test_shown.py": shown_tests(), "tests/test_more.py": ASYNC_AND_ENVIRONMENT})
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ("pytest",),
        ("python", "-m", "pytest"),
        ("dstack-emu", "exec", "--fresh", "--", "pytest"),
    ],
    ids=" ".join,
)
def test_project_with_packages_of_those_names_runs_its_tests_and_the_fixtures(
    command: tuple[str, ...], installed: Environment, project: Path
) -> None:
    done = installed.run(project, *command, "-p", "no:cacheprovider", "tests/test_own.py", "tests/test_emulated.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


@pytest.mark.parametrize("kind", ["installed", "editable"])
def test_install_adds_one_name(kind: str, project: Path, request: pytest.FixtureRequest) -> None:
    environment: Environment = request.getfixturevalue(kind)
    program = (
        "import importlib, dstack_emu.simulator, dstack_emu.kms_emu, dstack_emu.auth; "
        f"print(*(importlib.import_module(n).OURS for n in {TAKEN}))"
    )
    done = environment.run(project, "python", "-c", program)
    assert done.stdout.split() == [*TAKEN], done.stderr
    done = environment.run(project, "dstack-emu", "--version")
    assert (done.returncode, done.stderr) == (0, "")


TYPED = """
from dstack_emu import Stack, StackConfig
from dstack_emu.testing import refused

stack = Stack(StackConfig(seed="mine"))
with refused("denied") as refusal:
    pass
reveal_type(stack)
reveal_type(stack.config)
reveal_type(refusal)
StackConfig(sede="mine")
"""


def test_types_of_public_names_are_known_in_another_project(installed: Environment, project: Path) -> None:
    write(project, {"typed.py": TYPED})
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", installed.command("python"), "typed.py"],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert re.findall(r'Revealed type is "dstack_emu\.[\w.]*\.(\w+)"', checked.stdout) == [
        "Stack",
        "StackConfig",
        "Refusal",
    ]
    assert re.findall(r"error: .*", checked.stdout) == [
        'error: Unexpected keyword argument "sede" for "StackConfig"  [call-arg]'
    ]


# ---- in tests of either kind

ASYNC_AND_ENVIRONMENT = """
import asyncio
import json
import os
import urllib.request
from pathlib import Path

import pytest

import dstack_emu
from aiohttp import web
from dstack_emu import Stack, StackConfig
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


@pytest.mark.anyio
async def test_stack_of_ones_own_beside_the_workers(dstack_stack):
    async with Stack(StackConfig.on_free_ports(seed="mine")) as stack:
        ask = lambda: json.load(urllib.request.urlopen(stack.services["app"] + "/Info"))
        assert (await asyncio.to_thread(ask))["app_id"] == stack.app.domain.app_id.hex()


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


def shown_tests() -> str:
    """Return the tests at the top of the page."""
    return blocks(document("docs/pytest.md").partition("\n## ")[0])[0].text


def test_that_project_runs_tests_of_each_kind_on_two_workers(installed: Environment, project: Path) -> None:
    assert len([line for line in shown_tests().splitlines() if line.strip()]) <= 25
    done = installed.run(project, "pytest", "-p", "no:cacheprovider", "-v", "-n", "2", "--dist", "loadfile", "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    for file in ("own", "emulated", "shown", "more"):
        assert f"PASSED tests/test_{file}.py::" in done.stdout
    assert "skipped" not in done.stdout
    assert {"[gw0]", "[gw1]"} <= set(re.findall(r"\[gw\d\]", done.stdout))
    quotes = {(installed.folder / f"quote {time}").read_text() for time in (1, 2)}
    assert len(quotes) == 1, "the same bytes alone and among others"
