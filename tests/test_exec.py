"""`dstack-emu exec`: what the command sees, what becomes of its streams, signals and exit status, and of the stack."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.deployment.environment import URLS
from tests.commands import run_command, usage_error
from tests.processes import forked
from tests.repository import ROOT
from tests.running import RunningStack


@contextmanager
def executing(script: str, short_folder: Path, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a Python script in a stack until the block ends, with temporary folders in one of ours."""
    command, settings = forked("exec", *options, "--", sys.executable, "-c", script)
    settings["env"]["TMPDIR"] = str(short_folder)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes, **settings)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=20)


ASK = """
import json, os, ssl, urllib.request
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.load_verify_locations(os.environ["DSTACK_EMU_KMS_CA"])
for side in ("SRC", "DST"):
    url = os.environ["DSTACK_EMU_KMS_" + side] + "/prpc/KMS.GetMeta?json"
    print(json.load(urllib.request.urlopen(url, context=context))["k256_pubkey"])
    print(json.load(open(os.environ["DSTACK_EMU_POLICY_" + side]))["kms"]["allowAnyDevice"])
print(urllib.request.urlopen(os.environ["DSTACK_EMU_PCCS"] + "/root-ca.pem").read() ==
      open(os.environ["DSTACK_EMU_ROOT_CA"], "rb").read())
from dstack_sdk import DstackClient
print(DstackClient().info().app_name)
print(json.dumps({name: value for name, value in os.environ.items() if name.startswith("DSTACK_EMU_")}))
print(open(os.environ["DSTACK_EMU_STACK"]).read())
"""


def test_command_finds_the_stack_by_its_environment(short_folder: Path) -> None:
    with executing(ASK, short_folder) as process:
        out, err = process.communicate(timeout=50)
    assert (process.returncode, err) == (0, "")
    src, first, dst, second, root, name, variables, line = out.splitlines()[:8]
    assert src == dst
    assert (first, second, root, name) == ("True", "True", "True", "app")
    description, seen = json.loads(line), json.loads(variables)
    assert {variable: seen[variable] for variable in URLS} == {
        variable: description["services"][service] for variable, service in URLS.items()
    }
    assert set(URLS.values()) == set(description["services"])
    assert seen["DSTACK_EMU_STATE"] == description["state"]
    assert list(short_folder.iterdir()) == [], "the stack is gone, and its folder with it"


def test_streams_go_through_untouched_and_the_status_is_the_commands(short_folder: Path) -> None:
    script = "import sys; d = sys.stdin.buffer.read(); sys.stdout.buffer.write(d); print('e', file=sys.stderr); exit(3)"
    command = [sys.executable, "-m", "dstack_emu", "exec", "--fresh", "--", sys.executable, "-c", script]
    data = bytes(range(256)) * 1000
    done = subprocess.run(command, cwd=ROOT, input=data, capture_output=True, timeout=50, check=False)
    assert (done.returncode, done.stdout == data, done.stderr) == (3, True, b"e\n")


@pytest.mark.parametrize(
    ("words", "status", "out", "err"),
    [
        (["echo", "a", "--", "--fresh", "-v"], 0, "a -- --fresh -v\n", ""),
        (["sh", "-c", "kill -9 $$"], 137, "", ""),
        (["no-such-command", "--help"], 127, "", "Error: no-such-command: command not found\n"),
        (["--", "/etc/passwd"], 126, "", "Error: /etc/passwd: Permission denied\n"),
    ],
)
def test_status_is_a_shells(words: list[str], status: int, out: str, err: str) -> None:
    done = run_command("exec", "--fresh", *words)
    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (status, out, err)


def test_exec_without_a_command_is_refused() -> None:
    assert usage_error("exec") == "a command expected, as in: dstack-emu exec -- pytest"
    assert usage_error("exec", "--fresh", "--") == "a command expected, as in: dstack-emu exec -- pytest"


def test_stack_that_does_not_come_up_is_no_status_of_the_command(fresh_stack: RunningStack) -> None:
    port = fresh_stack.services["pccs"].rpartition(":")[2]
    text = usage_error("exec", "--port", f"pccs={port}", "--", "echo", "ran")
    assert text.startswith(f"cannot listen on 127.0.0.1:{port}: the address is in use (set by --port pccs=PORT")


WAIT = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIG{name}])  # one that comes before it waits is not lost
print("ready", flush=True)
sys.exit(signal.sigwait([signal.SIG{name}]) + 50)
"""


@pytest.mark.parametrize("name", ["TERM", "INT", "USR1"])
def test_signal_goes_to_the_command(name: str, short_folder: Path) -> None:
    number = signal.Signals[f"SIG{name}"]
    with executing(WAIT.format(name=name), short_folder, "--fresh") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == number + 50
    assert err.endswith("end of what the process waits for\n") if name == "USR1" else err == ""
    assert list(short_folder.iterdir()) == []


def test_command_that_a_signal_ends_has_a_shells_status(short_folder: Path) -> None:
    with executing("print('ready', flush=True); import signal; signal.pause()", short_folder, "--fresh") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert list(short_folder.iterdir()) == []


def test_stack_that_fails_ends_the_command_and_names_the_part(short_folder: Path) -> None:
    script = """
import os, signal, urllib.request
print(urllib.request.urlopen(os.environ["DSTACK_EMU_KMS_SRC"] + "/finish").read().decode(), flush=True)
signal.pause()
"""
    with executing(script, short_folder, "--fresh") as process:
        out, err = process.communicate(timeout=50)
    assert process.returncode == 1
    assert out.strip() in ("OK", "")  # the stack may end while the command prints the answer
    assert err.splitlines()[-1] == f"Error: kms-src ended: Failed to onboard; {sys.executable} was stopped"
    assert list(short_folder.iterdir()) == []
