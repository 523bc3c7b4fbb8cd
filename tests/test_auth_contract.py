"""The contract of a stack's own webhooks: that of its release, or the one that is chosen, in each way to choose it."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from dstack_emu import Stack, StackConfig
from dstack_emu.deployment.errors import StackError
from dstack_emu.testing import LiveStack, refused
from tests.commands import usage_error
from tests.running import running_stack
from tests.scratch import run_pytest, write

ADVISORY = "advisory ID is not allowed"
DEVICE = "app is not allowed to boot on this device"
REFUSALS: dict[str, tuple[str, str]] = {
    "readme": ("", DEVICE),
    "upstream": ("", ""),
    "next": (ADVISORY, ""),
    "0.6": (ADVISORY, DEVICE),
}
"""What each contract says of an app on a platform with an advisory, and of one whose `devices` are empty."""


def require_outcome(stack: LiveStack, refusal: str) -> None:
    """Boot the stack's app: it has to be refused with that reason, or to get its keys if there is none."""
    with refused(refusal) if refusal else nullcontext():
        stack.boot()


@pytest.mark.parametrize(
    ("release", "contract"),
    [("0.5", None), ("0.5", "next"), ("0.5", "0.6"), ("0.6", None), ("0.6", "readme"), ("0.6", "upstream")],
)
def test_webhooks_decide_by_the_contract(release: str, contract: str | None) -> None:
    used = contract or {"0.5": "readme", "0.6": "0.6"}[release]
    with LiveStack(release=release, auth_contract=contract) as stack:
        assert stack.description["auth_contract"] == used
        for_advisory, for_device = REFUSALS[used]
        stack.app().platform.set(advisory_ids=["INTEL-SA-00001"])
        require_outcome(stack, for_advisory)
        stack.app().platform.set(advisory_ids=[])
        policy: dict[str, Any] = stack.policy().content
        for app in policy["apps"].values():
            app.update(devices=[], allowAnyDevice=False)
        stack.policy().set(policy)
        require_outcome(stack, for_device)


def test_command_chooses_the_contract_and_says_it() -> None:
    with running_stack("--release", "0.6", "--auth-contract", "next") as stack:
        assert (stack.description["release"], stack.description["auth_contract"]) == ("0.6", "next")


async def test_unknown_contract_is_refused_by_name() -> None:
    with pytest.raises(StackError, match='^auth_contract is "0.7", expected one of readme, upstream, next, 0.6$'):
        async with Stack(StackConfig.on_free_ports(auth_contract="0.7")):
            pass
    assert "invalid choice: '0.7'" in usage_error("up", "--auth-contract", "0.7")


def test_option_of_the_plugin_goes_before_the_fixture_and_that_before_the_ini_key(tmp_path: Path) -> None:
    test = (
        "import os\n\n\ndef test_it(dstack_session_stack):\n"
        "    assert dstack_session_stack.description['auth_contract'] == os.environ['EXPECTED']\n"
    )
    write(tmp_path, {"test_it.py": test, "pytest.ini": "[pytest]\ndstack_auth_contract = upstream\n"})
    expecting = "import os\n\nos.environ['EXPECTED'] = {!r}\n"
    write(tmp_path, {"conftest.py": expecting.format("upstream")})
    assert "1 passed" in run_pytest(tmp_path).stdout
    write(tmp_path, {"conftest.py": expecting.format("next")})
    assert "1 passed" in run_pytest(tmp_path, "--dstack-auth-contract", "next").stdout
