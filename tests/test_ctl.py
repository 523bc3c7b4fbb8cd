"""`dstack-emu ctl`: the control API from a shell."""

import json
import re
import shlex
import stat
from pathlib import Path

import pytest

from dstack_emu.cli.commands.ctl import EXAMPLES
from tests.commands import run_command
from tests.running import RunningStack


def _ctl(stack: RunningStack, *words: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    where = [] if environment else ["--url", stack.services["control"]]
    done = run_command("ctl", *where, *words, environment=environment)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.timeout(120)
def test_shell_revokes_breaks_and_turns_back(ready_stack: RunningStack, tmp_path: Path) -> None:
    def ctl(*words: str) -> str:
        status, out, err = _ctl(ready_stack, *words)
        assert (status, err) == (0, ""), (words, err)
        return out

    assert ctl("health") == "ready\n"
    ctl("save", str(tmp_path / "state.json"))
    assert stat.S_IMODE((tmp_path / "state.json").stat().st_mode) == 0o600
    ctl("policy", "deny", "src", "app")
    ctl("fault", "service=auth-dst", "kind=status", "status=503")
    status, out, err = _ctl(ready_stack, "guest", "boot", "app")
    assert (status, out, err.lower().startswith("error: failed to get app keys from kms: ")) == (1, "", True)
    assert err.count("\n") == 1
    tail = ctl("tail", "-n", "1", "--no-follow")
    assert "stack → app Boot  400 failed to get app keys" in tail.replace("Failed", "failed")
    assert "kms-src → auth-src /bootAuth/app  denied: app not registered [app_registered]; app_id " in tail
    assert ctl("journal", "count", "call=/bootAuth/app", "outcome=denied") == "1\n"
    assert json.loads(ctl("fault"))[0]["status"] == 503
    ctl("clock", "freeze", "2026-06-01")
    assert json.loads(ctl("clock"))["now"] == 1_780_272_000
    ctl("load", str(tmp_path / "state.json"))
    assert ctl("fault") == "[]\n"
    assert json.loads(ctl("guest", "boot", "app"))["has_keys"] is True


@pytest.mark.timeout(120)
def test_shell_finds_the_stack_by_its_folder_and_by_the_environment(ready_stack: RunningStack, tmp_path: Path) -> None:
    environment = {"DSTACK_EMU_CONTROL": ready_stack.services["control"]}
    assert _ctl(ready_stack, "health", environment=environment)[1] == "ready\n"
    environment = {"DSTACK_EMU_CONTROL": "http://127.0.0.1:1"}
    state = ready_stack.description["state"]
    assert _ctl(ready_stack, "--state", state, "health", environment=environment)[1] == "ready\n"
    status, _, err = _ctl(ready_stack, "health", environment=environment)
    assert (status, "no stack answers at http://127.0.0.1:1" in err) == (2, True)
    status, _, err = _ctl(ready_stack, "--state", str(tmp_path), "health", environment=environment)
    assert (status, f"no stack is ready in {tmp_path}" in err) == (2, True)


def test_journal_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    done = run_command("up", "--free-ports", "--journal", str(tmp_path / "no" / "journal"))
    assert (done.returncode, done.stdout) == (2, b"")
    assert f"--journal: the journal {tmp_path / 'no' / 'journal'} cannot be written" in done.stderr.decode()


EXAMPLE_COMMANDS = [
    re.split(r" {3,}", line.strip())[0] for line in EXAMPLES.splitlines() if line.startswith("  dstack-emu ctl ")
]


@pytest.mark.timeout(120)
def test_each_example_of_the_help_runs_as_written(ready_stack: RunningStack, tmp_path: Path) -> None:
    environment = {"DSTACK_EMU_CONTROL": ready_stack.services["control"]}
    commands = [shlex.split(command) for line in EXAMPLE_COMMANDS for command in re.split(r" && |; ", line)]
    assert {tuple(words[:2]) for words in commands} == {("dstack-emu", "ctl")}
    try:
        for words in commands:
            if words[2] in ("guest", "kms") and words[3] == "add":
                ready_stack.reset()  # the examples before have left a webhook that hangs and a policy that denies
            more = ["--no-follow"] if words[2] == "tail" else []
            done = run_command(*words[1:], *more, environment=environment, folder=tmp_path)
            assert (done.returncode, done.stderr) == (0, b""), words
    finally:
        ready_stack.reset()
