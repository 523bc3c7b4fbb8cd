"""Fixtures that several test files share."""

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from dstack_emu.attest.release import DEFAULT, RELEASES
from tests.processes import share
from tests.running import RunningStack, running_stack

if TYPE_CHECKING:
    from dstack_emu.testing import LiveStack
    from tests.browser import Browser, Tab
    from tests.vmm import VmmClient

# A background job of a script, or of nohup, is started with these ignored, and so would be what the tests start here.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGQUIT, signal.SIG_DFL),
):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)


# A slow machine fails no test: Hypothesis ends an example after 200 ms by default.
settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")


LONGEST = (
    "test_webhook_safety",
    "test_faults",
    "test_runbook_command",
    "test_check_kms",
    "test_ratls_server",
    "test_stack_chain",
    "test_grpc_limits",
    "test_vmm_standalone",
    "test_inspect",
    "test_command_ends",
    "test_decisions",
    "test_bounds",
    "test_ingress",
    "test_auth_contract",
    "test_pytest_plugin",
    "test_vmm_lifecycle",
    "test_onboarding_releases",
    "test_kms_operators",
    "test_stack_state",
    "test_webhook_failures",
    "test_fuzz",
    "test_dcap",
    "test_stack_foreign_kms",
    "test_chain_contracts",
    "test_policy_under_load",
    "test_exec",
    "test_inspect_command",
    "test_check_webhook",
    "test_crash",
    "test_stack",
    "test_attest_properties",
    "test_chain",
    "test_gateway_stack",
    "test_chain_acts",
    "test_control",
    "test_boot_by_release",
    "test_journal",
    "test_sdk",
    "test_request_vm_config",
    "test_auth_server",
)
"""Files that take longest. They begin first, so that no worker is left alone with one of them at the end."""


def pytest_configure(config: pytest.Config) -> None:
    """Let all workers have one process that forks commands."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        share()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect without the garbage collector, and keep what was collected from it.

    All of it lives until the end, and each worker would search it again and again. Then it searches less often than by
    default, which saves a fifteenth of the tests' time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.hookimpl(optionalhook=True)  # xdist's
def pytest_xdist_auto_num_workers() -> int:
    """Return how many workers `-n auto` starts: two more than there are processors, because tests also wait."""
    return len(os.sched_getaffinity(0)) + 2


@pytest.fixture(scope="session")
def shared_stack() -> Iterator[RunningStack]:
    """The ready stack of this worker; `ready_stack` has it as it began."""
    with running_stack() as stack:
        yield stack


@pytest.fixture(scope="session")
def shared_stack_0_5() -> Iterator[RunningStack]:
    """The ready stack of release 0.5 of this worker; `ready_stack_0_5` has it as it began."""
    with running_stack("--release", "0.5") as stack:
        yield stack


@pytest.fixture(scope="session")
def shared_fresh_stack() -> Iterator[RunningStack]:
    """The stack without keys of this worker; `fresh_stack` has it as it began."""
    with running_stack("--fresh") as stack:
        yield stack


@pytest.fixture(scope="session")
def shared_vmm_stack() -> "Iterator[LiveStack]":
    """The stack with a VMM of this worker; `vmm_stack` has it as it began."""
    from dstack_emu.testing import LiveStack  # slow to import, and few files need it

    with LiveStack(vmm=True) as stack:
        yield stack


@pytest.fixture(scope="module")
def ready_stack(shared_stack: RunningStack) -> RunningStack:
    """A ready stack for the tests of a file; a test that changes a policy restores it."""
    shared_stack.reset()
    return shared_stack


@pytest.fixture(scope="module")
def ready_stack_0_5(shared_stack_0_5: RunningStack) -> RunningStack:
    """A ready stack of release 0.5, for what it does differently."""
    shared_stack_0_5.reset()
    return shared_stack_0_5


@pytest.fixture(scope="module", params=list(RELEASES))
def each_ready_stack(request: pytest.FixtureRequest) -> RunningStack:
    """A ready stack of each release, one after the other."""
    shared = "shared_stack" if request.param == DEFAULT.name else "shared_stack_0_5"
    stack: RunningStack = request.getfixturevalue(shared)
    stack.reset()
    return stack


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path is short enough for sockets below it."""
    with tempfile.TemporaryDirectory(prefix="emu", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def fresh_stack(shared_fresh_stack: RunningStack) -> RunningStack:
    """A stack at the runbook's starting point, for one test that does not end it."""
    shared_fresh_stack.reset()
    return shared_fresh_stack


@pytest.fixture(scope="session")
def dstack_settings() -> dict[str, Any]:
    """The plugin's stack, one for all tests of a worker: a fault hangs that long, and a busy machine answers in it."""
    return {"patience": 5.0}


@pytest.fixture(scope="module")
def vmm_stack(shared_vmm_stack: "LiveStack") -> "LiveStack":
    """A stack with a VMM, as it began."""
    shared_vmm_stack.reset()
    return shared_vmm_stack


@pytest.fixture
def vmm(vmm_stack: "LiveStack") -> "Iterator[VmmClient]":
    """The VMM of that stack; every machine is removed afterwards."""
    from tests.vmm import VmmClient

    client = VmmClient(vmm_stack.services["vmm"])
    yield client
    for vm in client.rpc("Status")["vms"]:
        client.gone(vm["id"])


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Browser]":
    """One Chromium for all files."""
    from tests.browser import chromium, program

    if program() is None:
        pytest.fail("DSTACK_EMU_BROWSER is set, but there is no Chromium: install Debian's chromium-headless-shell")
    with chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture(scope="session")
def shared_full_stack() -> Iterator[RunningStack]:
    """The stack with all parts that the console is used over; `full_stack` has it as it began."""
    with running_stack("--vmm", "--gateway") as stack:
        yield stack


@pytest.fixture
def full_stack(shared_full_stack: RunningStack) -> Iterator[RunningStack]:
    """A stack with all parts, as it became ready."""
    yield shared_full_stack
    shared_full_stack.reset()


@pytest.fixture
def console_tab(browser: "Browser") -> "Iterator[Tab]":
    """An empty page, which must have asked nobody but the stack, and complained of nothing."""
    tab = browser.tab()
    tab.resize(1280, 900)
    yield tab
    assert tab.complaints == []
    assert {url.split("/")[2] for url in tab.requests if url.startswith("http")} <= {tab.run("location.host")}
