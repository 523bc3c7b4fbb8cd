"""The token of the control API: it is demanded wherever other machines could reach the API, and nowhere else."""

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstack_emu.control.schemas import ClockChange, ControlError, OnboardRequest, checked
from tests.commands import run_command, usage_error
from tests.running import RunningStack, running_stack

JSON = ("-H", "Content-Type: application/json", "-d", "{}")


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")


@pytest.fixture(scope="module")
def open_stack(state: Path) -> Iterator[RunningStack]:
    """A stack on every address of the machine."""
    with running_stack("--listen", "0.0.0.0", "--state", str(state)) as stack:
        yield stack


def token_in(state: Path) -> str:
    return (state / "control.token").read_text().strip()


def test_call_without_the_token_is_refused_and_says_where_it_is(open_stack: RunningStack, state: Path) -> None:
    control = open_stack.services["control"]
    status, answer = open_stack.curl(f"{control}/reset", "-i", *JSON)
    assert status == 401
    assert re.search(r'^WWW-Authenticate: Bearer realm="dstack-emu control"\r?$', answer, re.MULTILINE)
    assert "control.token of the stack's state folder" in json.loads(answer.splitlines()[-1])["error"]
    token = token_in(state)
    for header in (f"Bearer {token[:-1]}", f"Bearer {token}x", f"Basic {token}", "Bearer", token):
        status, answer = open_stack.curl(f"{control}/stack", "-i", "-H", f"Authorization: {header}")
        assert (status, 'error="invalid_token"' in answer) == (401, True), header
    assert open_stack.curl(f"{control}/stack", "-H", f"Authorization: Bearer {token}")[0] == 200
    assert open_stack.curl(f"{control}/stack", "-H", f"authorization: bearer {token}")[0] == 200


def test_health_needs_no_token_and_every_other_path_does(open_stack: RunningStack) -> None:
    control = open_stack.services["control"]
    assert open_stack.curl(f"{control}/health") == (200, '{"status": "ok", "service": "dstack-emu-control"}')
    for path in ("/openapi.json", "/journal/stream", "/metrics", "/nothing", "/health/", "//health"):
        assert open_stack.curl(control + path)[0] == 401, path


def test_with_the_token_a_name_of_a_network_works_and_a_foreign_page_does_not(
    open_stack: RunningStack, state: Path
) -> None:
    control = open_stack.services["control"]
    known = ("-H", f"Authorization: Bearer {token_in(state)}")
    assert open_stack.curl(f"{control}/stack", *known, "-H", "Host: stack:8070")[0] == 200
    for refused, status in (("Origin: http://evil.example", 403), ("Content-Type: text/plain", 415)):
        sent = (
            [*known, *JSON[2:], "-H", "Content-Type: application/json"] if "Origin" in refused else [*known, *JSON[2:]]
        )
        assert open_stack.curl(f"{control}/journal/on", *sent, "-H", refused)[0] == status
    assert open_stack.curl(f"{control}/journal/on", *known, *JSON)[0] == 200


def test_ctl_finds_the_token_by_folder_by_variable_and_by_option(open_stack: RunningStack, state: Path) -> None:
    url, token = open_stack.services["control"], token_in(state)
    assert re.fullmatch("[0-9a-f]{64}", token)  # no value of an option may begin with a hyphen
    ways: list[tuple[list[str], dict[str, str]]] = [
        (["--state", str(state)], {}),
        (["--url", url, "--token", token], {}),
        (["--url", url], {"DSTACK_EMU_TOKEN": token}),
        ([], {"DSTACK_EMU_CONTROL": url, "DSTACK_EMU_TOKEN": token}),
        ([], {"DSTACK_EMU_STATE": str(state)}),
    ]
    for words, environment in ways:
        done = run_command("ctl", *words, "health", environment=environment)
        assert (done.returncode, done.stdout) == (0, b"ready\n"), (words, done.stderr)
    for words in (["--url", url], ["--url", url, "--token", "another-token-of-it"]):
        done = run_command("ctl", *words, "health", environment={"DSTACK_EMU_STATE": str(state)})
        assert (done.returncode, b"a token is needed on this address" in done.stderr) == (1, True), words
    assert "the token has characters" in usage_error("ctl", "--url", url, "--token", "é\n", "health")


def test_token_is_in_a_file_of_its_owner_and_printed_once_and_nowhere_else(
    open_stack: RunningStack, state: Path
) -> None:
    token = token_in(state)
    assert stat.S_IMODE((state / "control.token").stat().st_mode) == 0o600
    assert len(token) > 40
    assert run_command("ctl", "--state", str(state), "guest", "boot", "app").returncode == 0
    for words in (["info"], ["journal", "find"], ["save", str(state / "saved")]):
        assert token not in run_command("ctl", "--state", str(state), *words).stdout.decode()
    for path in state.rglob("*"):
        if path.is_file() and path.name != "control.token":
            assert token.encode() not in path.read_bytes(), path
    assert token not in json.dumps(open_stack.description)
    assert open_stack.said().count(token) == 1


def test_stack_that_resumes_keeps_its_token_and_takes_one_that_is_given(tmp_path: Path) -> None:
    given = "chosen-for-this-test"
    seen = []
    for environment in ({"DSTACK_EMU_TOKEN": given}, None):
        words = ("--fresh", "--listen", "0.0.0.0", "--state", str(tmp_path))
        with running_stack(*words, environment=environment) as stack:
            header = ("-H", f"Authorization: Bearer {given}")
            seen.append(stack.curl(f"{stack.services['control']}/stack", *header)[0])
    assert (seen, token_in(tmp_path)) == ([200, 200], given)
    done = run_command("up", "--free-ports", "--listen", "0.0.0.0", environment={"DSTACK_EMU_TOKEN": "short"})
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"DSTACK_EMU_TOKEN: 16 to 512 visible ASCII characters expected, got 5 characters" in done.stderr


def test_loopback_address_needs_no_token(ready_stack: RunningStack) -> None:
    assert ready_stack.curl(f"{ready_stack.services['control']}/stack")[0] == 200
    assert not (Path(ready_stack.description["state"]) / "control.token").exists()


def test_tokens_are_not_in_the_text_of_a_request() -> None:
    assert repr(OnboardRequest(source_token="one", onboard_token="two")) == "OnboardRequest(source='src')"


def test_refused_choice_is_named_in_words() -> None:
    with pytest.raises(ControlError, match="; freeze.time: Input should be greater than or equal to 0$"):
        checked(ClockChange, {"freeze": -1})
