"""The pytest plugin: fixtures `dstack_…`, options, a marker, and the journal in the report of a failed test.

Every pytest run in an environment with this package loads it, so it imports nothing of the emulator before a fixture is
used. The fixtures return classes of `testing`; docs/pytest.md is their reference.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from dstack_emu.testing import (
        LiveChain,
        LiveClock,
        LiveFault,
        LiveGateway,
        LiveImage,
        LiveJournal,
        LiveKms,
        LivePlatform,
        LivePolicy,
        LiveStack,
        LiveTrustDomain,
        LiveVendor,
        Refusal,
    )
    from dstack_emu.testing.stack_thread import SyncControl
    from dstack_emu.webhook_check.check import Report
    from dstack_emu.webhook_check.safety import SafetyReport


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option and the ini key."""
    help_text = "the seed: the text from which all keys and ids of the emulated dstack stacks are derived"
    parser.getgroup("dstack-emu").addoption("--dstack-seed", metavar="TEXT", help=help_text)
    parser.addini("dstack_seed", help_text)
    help_text = "the dstack release that the emulated stacks are of: 0.5 or 0.6"
    parser.getgroup("dstack-emu").addoption("--dstack-release", metavar="NAME", help=help_text)
    parser.addini("dstack_release", help_text)
    help_text = "the contract of the emulated stacks' webhooks: readme, upstream, next or 0.6"
    parser.getgroup("dstack-emu").addoption("--dstack-auth-contract", metavar="NAME", help=help_text)
    parser.addini("dstack_auth_contract", help_text)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line("markers", "dstack_release(name): run this test on a stack of that dstack release")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the calls in a test's stack to its report if it failed: their caller, service and refusal."""
    report = yield
    used = getattr(item, "funcargs", {})
    if report.when == "call" and report.failed:
        stacks = (used.get(name) for name in ("dstack_fresh_stack", "dstack_stack", "dstack_current"))
        for live in {id(live): live for live in stacks if live is not None}.values():
            if calls := _calls_of(live):
                report.sections.append(("Calls in the dstack stack", calls))
    return report


def _calls_of(live: "LiveStack") -> str:
    from dstack_emu.deployment.errors import StackError

    try:
        return live.journal.text()
    except StackError as error:
        return str(error)


# ---- stacks


@pytest.fixture(scope="session")
def dstack_settings() -> dict[str, Any]:
    """The settings of the stacks (fields of `StackConfig`): override it in a conftest.py."""
    return {}


@pytest.fixture(scope="session")
def _dstack_stacks(
    pytestconfig: pytest.Config, dstack_settings: dict[str, Any]
) -> "Iterator[Callable[[str | None], LiveStack]]":
    """The ready stack of each dstack release that a test of the session uses, by the release's name."""
    from dstack_emu.attest.release import DEFAULT
    from dstack_emu.testing import LiveStack

    with ExitStack() as running:
        stacks: dict[str, LiveStack] = {}

        def of(name: str | None) -> LiveStack:
            settings = {"release": DEFAULT.name, **_settings(pytestconfig, dstack_settings, name)}
            if settings["release"] not in stacks:
                stacks[settings["release"]] = running.enter_context(LiveStack(**settings))
            return stacks[settings["release"]]

        yield of


@pytest.fixture(scope="session")
def dstack_session_stack(_dstack_stacks: "Callable[[str | None], LiveStack]") -> "LiveStack":
    """A ready stack for the session; changes by fixtures of a wider scope are not undone."""
    return _dstack_stacks(None)


@pytest.fixture
def dstack_stack(
    request: pytest.FixtureRequest, _dstack_stacks: "Callable[[str | None], LiveStack]"
) -> "Iterator[LiveStack]":
    """The session's ready stack; after the test its state from before the test is restored."""
    with _dstack_stacks(_marked_release(request)).put_back() as live:
        yield live


@pytest.fixture
def dstack_fresh_stack(
    request: pytest.FixtureRequest, pytestconfig: pytest.Config, dstack_settings: dict[str, Any]
) -> "Iterator[LiveStack]":
    """A stack for this test alone, as the runbook begins: two KMS without keys, and policies that allow nobody."""
    from dstack_emu.testing import LiveStack

    settings = _settings(pytestconfig, dstack_settings, _marked_release(request))
    with LiveStack(**settings, fresh=True) as live:
        yield live


def _marked_release(request: pytest.FixtureRequest) -> str | None:
    marker = request.node.get_closest_marker("dstack_release")
    if marker is None:
        return None
    if len(marker.args) != 1 or marker.kwargs or not isinstance(marker.args[0], str):
        raise pytest.UsageError(f'@pytest.mark.dstack_release("0.5") expected, got {marker.args} {marker.kwargs}')
    name: str = marker.args[0]
    return name


_SETTINGS = ("seed", "release", "auth_contract")
"""The fields of `StackConfig` that have an option and an ini key."""


def _settings(config: pytest.Config, settings: dict[str, Any], marked_release: str | None) -> dict[str, Any]:
    """Join the settings: the marker's over the option's over the fixture's over the ini file's."""
    written = {key: value for key in _SETTINGS if (value := config.getini(f"dstack_{key}"))}
    given = {key: value for key in _SETTINGS if (value := config.getoption(f"dstack_{key}"))}
    marked = {} if marked_release is None else {"release": marked_release}
    return {**written, **settings, **given, **marked}


@pytest.fixture
def dstack_current(request: pytest.FixtureRequest) -> "LiveStack":
    """The stack that the fixtures below use: `dstack_fresh_stack` if the test requests it, else `dstack_stack`."""
    fresh = "dstack_fresh_stack" in request.fixturenames
    live: LiveStack = request.getfixturevalue("dstack_fresh_stack" if fresh else "dstack_stack")
    return live


# ---- its parts


@pytest.fixture
def dstack_vmm(dstack_current: "LiveStack") -> str:
    """The URL of the stack's VMM; machines that the test deploys are removed after it."""
    if "vmm" not in dstack_current.services:
        raise pytest.UsageError("dstack_vmm: the stack has no VMM: add vmm=True to the fixture dstack_settings")
    return dstack_current.services["vmm"]


@pytest.fixture
def dstack_gateway(dstack_current: "LiveStack") -> "LiveGateway":
    """The stack's gateway: its addresses and CA, and what is registered."""
    if "ingress" not in dstack_current.services:
        raise pytest.UsageError(
            "dstack_gateway: the stack has no gateway: add gateway=True to the fixture dstack_settings"
        )
    return dstack_current.gateway


@pytest.fixture
def dstack_chain(dstack_current: "LiveStack") -> "LiveChain":
    """`dstack_chain.remove_compose_hash(app)`: transactions on the chain whose contracts decide in the stack."""
    if "chain" not in dstack_current.services:
        raise pytest.UsageError(
            'dstack_chain: the stack has no chain: add auth={"src": "eth", "dst": "eth"} to the fixture dstack_settings'
        )
    return dstack_current.chain


@pytest.fixture
def dstack_app(dstack_current: "LiveStack") -> "Callable[..., LiveTrustDomain]":
    """`dstack_app()`: the stack's own app; `dstack_app("wallet", compose={…})`: a new one."""
    return dstack_current.app


@pytest.fixture
def dstack_trust_domain(dstack_current: "LiveStack") -> "Callable[..., LiveTrustDomain]":
    """`dstack_trust_domain("forger", debug=True)`: a trust domain of any identity."""
    return dstack_current.trust_domain


@pytest.fixture
def dstack_kms(dstack_current: "LiveStack") -> "Callable[..., LiveKms]":
    """`dstack_kms("src")`: a KMS of the stack; `dstack_kms("third")`: a new one, without keys."""
    return dstack_current.kms


@pytest.fixture
def dstack_policy(dstack_current: "LiveStack") -> "Callable[..., LivePolicy]":
    """`dstack_policy("src").deny(app)`: the policy of a KMS's webhook."""
    return dstack_current.policy


@pytest.fixture
def dstack_platform(dstack_current: "LiveStack") -> "Callable[..., LivePlatform]":
    """`dstack_platform("another host", tcb_status="OutOfDate")`: a platform."""
    return dstack_current.platform


@pytest.fixture
def dstack_image(dstack_current: "LiveStack") -> "Callable[..., LiveImage]":
    """`dstack_image("mine", "0.6.0")`: an OS image, for `dstack_app` and `dstack_kms` to boot."""
    return dstack_current.image


@pytest.fixture
def dstack_vendor(dstack_current: "LiveStack") -> "LiveVendor":
    """The state of the emulated Intel, which applies to all platforms."""
    return dstack_current.vendor


# ---- actions


@pytest.fixture
def dstack_boot(dstack_current: "LiveStack") -> "Callable[..., LiveTrustDomain]":
    """`dstack_boot(app)`: let an app fetch keys from a KMS."""
    return dstack_current.boot


@pytest.fixture
def dstack_refused() -> "Callable[..., AbstractContextManager[Refusal]]":
    """`with dstack_refused("KMS is not allowed"):` as `testing.refused`."""
    from dstack_emu.testing import refused

    return refused


@pytest.fixture
def dstack_fault(dstack_current: "LiveStack") -> "Callable[..., LiveFault]":
    """`with dstack_fault(service="auth-src", kind="status", status=503):` a fault in a service."""
    return dstack_current.fault


@pytest.fixture
def dstack_clock(dstack_current: "LiveStack") -> "LiveClock":
    """The clock of the whole stack."""
    return dstack_current.clock


@pytest.fixture
def dstack_journal(dstack_current: "LiveStack") -> "LiveJournal":
    """The calls since the test began: `dstack_journal.calls("/bootAuth/kms") == 2`."""
    return dstack_current.journal


@pytest.fixture
def dstack_check_webhook(dstack_current: "LiveStack") -> "Callable[[str], Report]":
    """`dstack_check_webhook(url).broken == ()`: whether a KMS understands a webhook of your own."""
    return dstack_current.check_webhook


@pytest.fixture
def dstack_check_webhook_safety(dstack_current: "LiveStack") -> "Callable[..., SafetyReport]":
    """`dstack_check_webhook_safety(url).unsafe == ()`: whether a webhook of your own allows what it should not."""
    return dstack_current.check_webhook_safety


@pytest.fixture
def dstack_control(dstack_current: "LiveStack") -> "SyncControl":
    """Every call of the control API, without `await`."""
    return dstack_current.control


@pytest.fixture
def dstack_env(dstack_current: "LiveStack", monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment variables by which SDKs and programs find the stack, set for the test."""
    from dstack_emu.deployment.environment import environment

    variables = environment(dstack_current.description)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables
