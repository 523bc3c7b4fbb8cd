"""`dstack-emu ctl`: the control API from a shell."""

import json
import re
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

from dstack_emu.cli.commands.ctl import EXAMPLES
from tests.commands import ask, run_command
from tests.running import RunningStack


def _ctl(stack: RunningStack, *words: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    where = [] if environment else ["--url", stack.services["control"]]
    done = run_command("ctl", *where, *words, environment=environment)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


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
    assert (
        status,
        out,
        err.lower().startswith("error: failed to request app keys: failed to get app keys from kms: "),
    ) == (1, "", True)
    assert err.count("\n") == 1
    tail = ctl("tail", "-n", "1", "--no-follow")
    assert "stack → app Boot  400 Failed to request app keys: " in tail
    assert "kms-src → auth-src /bootAuth/app  denied: app not registered [app_registered]; app_id " in tail
    assert ctl("journal", "count", "call=/bootAuth/app", "outcome=denied") == "1\n"
    assert json.loads(ctl("fault"))[0]["status"] == 503
    ctl("clock", "freeze", "2026-06-01")
    assert json.loads(ctl("clock"))["now"] == 1_780_272_000
    ctl("load", str(tmp_path / "state.json"))
    assert ctl("fault") == "[]\n"
    assert json.loads(ctl("guest", "boot", "app"))["has_keys"] is True


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


def test_policy_allows_and_denies_by_compose_file_app_id_and_evidence(
    ready_stack: RunningStack, tmp_path: Path
) -> None:
    def policy(*words: str) -> Any:
        status, out, err = _ctl(ready_stack, "policy", *words)
        assert (status, err) == (0, ""), (words, err)
        return json.loads(out)

    compose, evidence = tmp_path / "app-compose.json", tmp_path / "quote.json"
    compose.write_text(json.dumps({"manifest_version": 2, "name": "mine", "runner": "docker-compose"}))
    made = run_command("quote", "--json", "--app-compose", str(compose), "--out", str(evidence))
    assert made.returncode == 0, made
    digest = subprocess.run(["sha256sum", compose], capture_output=True, text=True, check=True).stdout.split()[0]
    entry = {f"0x{digest[:40]}": {"composeHashes": [f"0x{digest}"], "allowAnyDevice": True}}
    before = policy("show", "src")
    for way in (["--app-compose", str(compose)], ["--evidence", str(evidence)]):
        assert policy("allow", "src", *way)["apps"] == before["apps"] | entry
        assert policy("deny", "src", *way)["apps"] == before["apps"]
    kms = ("--evidence", str(evidence), "--as-kms")
    allowed = policy("allow", "src", *kms)["kms"]["mrAggregated"]
    why = ("why", str(evidence), "--offline", "--as", "kms", "--policy", str(tmp_path / "policy.json"), "--json")
    (tmp_path / "policy.json").write_text("{}")
    measured = json.loads(run_command(*why).stdout)["boot_info"]["mrAggregated"]
    assert allowed == [*before["kms"]["mrAggregated"], f"0x{measured}"]
    assert policy("deny", "src", *kms)["kms"] == before["kms"]

    guest = json.loads(_ctl(ready_stack, "guest", "add", "mine", f"compose=@{compose}")[1])
    denied = _ctl(ready_stack, "guest", "boot", "mine")[2]
    assert "app not registered" in denied
    assert denied.endswith(f"(app id {guest['app_id']}, compose hash {digest})\n")
    policy("allow", "src", "--app-compose", str(compose), "--app-id", guest["app_id"])
    assert json.loads(_ctl(ready_stack, "guest", "boot", "mine")[1])["has_keys"] is True
    policy("deny", "src", "--app-id", guest["app_id"])
    assert "app not registered" in _ctl(ready_stack, "guest", "boot", "mine")[2]


def test_policy_says_whom_it_expects(ready_stack: RunningStack, tmp_path: Path) -> None:
    quote = tmp_path / "quote.bin"
    run_command("quote", "--out", str(quote))
    yaml = tmp_path / "docker-compose.yaml"
    yaml.write_text("services: {}")
    for words, expected in (
        ([], "--app-compose, --app-id or --evidence"),
        (["app", "--app-id", "ab" * 20], "--app-compose, --app-id or --evidence"),
        (["--app-id", "ab" * 20], "--app-compose FILE expected with --app-id"),
        (["--app-id", "ab"], "20 bytes expected, got 1"),
        (["--evidence", str(quote)], "evidence with an event log expected"),
        (["--app-compose", str(tmp_path / "none")], "cannot be read"),
        (["--app-compose", str(yaml)], "JSON expected, in which docker_compose_file is the text"),
        (["app", "--as-kms"], "--evidence FILE expected"),
    ):
        status, out, err = _ctl(ready_stack, "policy", "allow", "src", *words)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert expected in err
    control = ready_stack.services["control"].removeprefix("http://")
    for body, expected in (
        ({"app_id": "ab" * 20}, "compose_hash expected"),
        ({"app_id": "ab" * 19}, "app_id"),
        ({"guest": "app", "app_id": "ab" * 20}, "one of guest, app_id and mr_aggregated"),
        ({"mr_aggregated": "ab" * 32, "compose_hash": "cd" * 32}, "app_id expected"),
    ):
        status, answer = ask(f"http://{control}", "/policies/src/allow", body)
        assert (status, expected in answer["error"]) == (400, True), answer


def test_policy_show_warns_of_misspelt_keys(ready_stack: RunningStack, tmp_path: Path) -> None:
    policy = json.loads(_ctl(ready_stack, "policy", "show", "src")[1])
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(policy | {"osImage": []}))
    _ctl(ready_stack, "policy", "set", "src", str(file))
    status, out, err = _ctl(ready_stack, "policy", "show", "src")
    assert (status, json.loads(out)["osImage"]) == (0, [])
    assert err == "Warning: osImage: nothing reads this key, did you mean osImages?\n"


def test_denied_onboarding_names_the_measurement_that_was_denied(ready_stack: RunningStack) -> None:
    def onboard() -> str:
        status, _, err = _ctl(ready_stack, "kms", "onboard", "third")
        assert status == 1
        return err

    source = json.loads(_ctl(ready_stack, "kms", "show", "src")[1])["guest"]["mr_aggregated"]
    third = json.loads(_ctl(ready_stack, "kms", "add", "third")[1])["guest"]["mr_aggregated"]
    assert onboard().endswith(f" (kms-src has the mr_aggregated {source})\n")
    _ctl(ready_stack, "policy", "allow", "third", "kms-src")
    assert onboard().endswith(f" (kms-third has the mr_aggregated {third})\n")
    _ctl(ready_stack, "policy", "allow", "src", "kms-third")
    assert _ctl(ready_stack, "kms", "onboard", "third")[0] == 0
