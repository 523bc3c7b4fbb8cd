"""How any command ends if nobody reads its output, and if it is interrupted: quietly, and with the usual status."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from dstack_emu.cli.main import COMMANDS
from tests.processes import start
from tests.repository import ROOT
from tests.running import READY_TIMEOUT, RunningStack

NOISE = re.compile(r"Traceback|BrokenPipe|Exception ignored|KeyboardInterrupt")


@pytest.fixture
def unread() -> Iterator[BinaryIO]:
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb", buffering=0) as pipe:
        yield pipe


def ended(*arguments: str, stdout: BinaryIO, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a command to its end; return its status and what it said on stderr."""
    with tempfile.TemporaryFile("w+") as errors:
        command = start(*arguments, stdout=stdout, stderr=errors, environment=environment, finalizes=True)
        status = command.wait(READY_TIMEOUT)
        errors.seek(0)
        return status, errors.read()


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_that_nobody_reads_ends_quietly(name: str, unread: BinaryIO) -> None:
    status, said = ended(*filter(None, (name, "--help")), stdout=unread)
    assert (status, said) == (141, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("up", "--free-ports", "--json"),
        ("agent", "--listen", "127.0.0.1:0"),
        ("pccs", "--listen", "127.0.0.1:0"),
        ("auth", "mock", "--listen", "127.0.0.1:0"),
        ("quote",),
        ("verifier", "--listen", "127.0.0.1:0", "--json"),
        ("ctl", "info"),
        ("ctl", "tail", "--no-follow"),
        ("inspect", "{root_ca}"),
    ],
    ids=" ".join,
)
def test_output_that_nobody_reads_ends_a_command_quietly(
    arguments: tuple[str, ...], unread: BinaryIO, ready_stack: RunningStack
) -> None:
    words = (word.format(root_ca=ready_stack.description["root_ca"]) for word in arguments)
    variables = {"DSTACK_EMU_CONTROL": ready_stack.services["control"]}
    status, said = ended(*words, stdout=unread, environment=variables)
    assert not NOISE.search(said), said
    assert status == 141, said


INTERRUPTING = """
import importlib.abc, os, signal, sys
moment = sys.argv[1]
class At(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == moment:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
        return None
sys.meta_path.insert(0, At())
from dstack_emu.cli.entry import main
sys.argv[:2] = ["dstack-emu"]
main()
"""


@pytest.mark.parametrize(
    ("moment", "arguments"),
    [
        ("dstack_emu.cli.main", ("proto",)),
        ("dstack_emu.cli.commands.up", ("up", "--free-ports")),
        ("dstack_emu.stack", ("up", "--free-ports")),
        ("dcap_qvl", ("kms", "--config", "missing.toml")),
        ("dstack_emu.stack", ("exec", "--", "true")),
    ],
)
def test_interrupt_while_a_command_imports_ends_it_quietly(
    moment: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", INTERRUPTING, moment, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=READY_TIMEOUT)
    assert not NOISE.search(done.stderr), done.stderr
    assert done.returncode in (-signal.SIGINT, 128 + signal.SIGINT, 0)


def test_check_that_is_interrupted_while_it_works_ends_quietly(tmp_path: Path) -> None:
    with (tmp_path / "errors").open("w+") as errors:
        command = start(
            "check-kms", "--kms", "dstack-emu kms -c {config}", "--only", "keys/*", stderr=errors, finalizes=True
        )
        while not Path(errors.name).read_text():  # its first line of progress
            assert command.poll(0.01) is None
        command.send_signal(signal.SIGINT)
        assert command.wait(READY_TIMEOUT) in (-signal.SIGINT, 128 + signal.SIGINT)
    assert not NOISE.search(Path(errors.name).read_text())
