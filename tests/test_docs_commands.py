"""Every command and every program of the documents works as it is shown, in the order of its page.

Ports and the state folder are replaced by those of a stack of this run, nothing else. A line whose comment begins with
`fails` must fail; every other command must succeed, and must print what the page shows after it.

The pages are run if DSTACK_EMU_DOCUMENTS is set (`make documents`).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from dstack_emu import StackConfig
from dstack_emu.transport.ports import PORTS
from tests.documents import DOCUMENTS, RUN_DOCUMENTS, Block, blocks, code, document, prose
from tests.processes import COMMAND_SERVER, END_TIMEOUT, command_for_shells, forked_by_anyone
from tests.repository import ROOT
from tests.running import READY_TIMEOUT, RunningStack, running_stack
from tests.scratch import run_pytest

STATE = "/tmp/emu"
WORK_TIMEOUT = 250
"""Seconds for the blocks of a page that run in one shell: they only work, which takes long on a busy machine."""
ANYTHING = "…"
TUTORIAL = "docs/tutorial.md"
PAGES = (
    "README.md",
    "docs/api.md",
    "docs/control.md",
    "docs/howto/app.md",
    "docs/howto/chain.md",
    "docs/howto/check-kms.md",
    "docs/howto/ci.md",
    "docs/howto/containers.md",
    "docs/howto/gateway.md",
    "docs/howto/kms.md",
    "docs/howto/observability.md",
    "docs/howto/verifier.md",
    "docs/howto/webhook.md",
    "docs/howto/your-app.md",
)
"""The pages whose blocks run beside one stack that is set up."""

OTHER_TESTS = {
    TUTORIAL: "the last test of this module, on stacks that the page itself starts",
    "docs/grpc.md": "tests/test_grpc.py",
    "docs/howto/kubernetes.md": "tests/test_kubernetes.py reads its commands; they need a cluster",
    "docs/pytest.md": "tests/test_pytest_plugin.py; its settings: here",
    "docs/recipes.md": "tests/test_recipes.py",
}
RUN_ELSEWHERE = ("make", "pip", "docker", "curl --cacert root-ca.crt")
"""What a command begins with that installs, or needs containers: .ci/run and tests/test_install.py run those."""

SERVER = re.compile(r"dstack-emu (up|agent|auth|chain|boot|pccs|kms|verifier|ctl tail$)")
"""A command that runs until it is stopped. In a block it is the last one."""

READY = re.compile(r"Ctrl-C stops it|protects nothing|→ \S+ \w+ +200")


class Terminal:
    """A shell in which a reader pastes blocks; `dstack-emu` and `python` are those of this checkout.

    The commands that a reader types are forked, those that a command starts are not.
    """

    def __init__(self, folder: Path, stack: RunningStack | None = None) -> None:
        for tool in ("bash", "curl", "jq"):
            if shutil.which(tool) is None:
                pytest.skip(f"the documents' commands need {tool}")
        self.folder = folder
        self.names: dict[str, str] = {}
        self.environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONPATH": str(ROOT)}
        (folder / "bin").mkdir(exist_ok=True)
        self.passed = command_for_shells(folder / "bin/dstack-emu")
        python = folder / "bin/python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        self.environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
        if stack:
            self.use(stack)

    @property
    def _shell(self) -> dict[str, Any]:
        """How a shell is started whose commands are forked."""
        return {
            "cwd": self.folder,
            "env": {**self.environment, COMMAND_SERVER: str(self.passed)},
            "pass_fds": (self.passed,),
            "text": True,
        }

    def use(self, stack: RunningStack) -> None:
        """Replace the documented folder and ports by those of a stack."""
        self.names[STATE] = stack.description["state"]
        for name, url in stack.services.items():
            if name in PORTS:  # documented
                self.names[f"127.0.0.1:{PORTS[name]}"] = url.partition("://")[2]
        self.environment["DSTACK_EMU_CONTROL"] = stack.services["control"]

    def here(self, text: str) -> str:
        """Return a text with this run's folder and ports."""
        for documented, actual in self.names.items():
            text = text.replace(documented, actual)
        return text

    def paste(self, pasted: list[tuple[Block, str]]) -> None:
        """Run blocks in one shell, and compare what each prints with what the page shows."""
        script = ["set -e", *(f"{checked(self.here(block.text))}\nprintf '\\n@@@\\n'" for block, _ in pasted)]
        done = subprocess.run(
            ["bash"],
            input="\n".join(script),
            capture_output=True,
            timeout=WORK_TIMEOUT,
            check=False,
            **self._shell,
        )
        outputs = done.stdout.split("\n@@@\n")
        assert done.returncode == 0, f"{pasted[len(outputs) - 1][0].text}\nfails:\n{done.stderr}"
        for (block, expected), seen in zip(pasted, outputs, strict=False):
            assert matches(expected, seen), f"{block.text}\nprints\n{seen}\ninstead of\n{expected}"

    @contextmanager
    def server(self, block: Block) -> Iterator[None]:
        """Run a block whose last command is a server, until the context ends; return when it is ready."""
        text = re.sub(r"--listen 127\.0\.0\.1:\d+", "--listen 127.0.0.1:0", block.text)
        before, _, last = self.here(text).rstrip().rpartition("\n")
        script = f"set -e\n{before}\n{last.replace('dstack-emu ', 'exec dstack-emu ', 1)}"
        process = subprocess.Popen(
            ["bash", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **self._shell,
        )
        deadline = threading.Timer(READY_TIMEOUT, process.kill)
        deadline.start()
        try:
            assert process.stdout
            said = []
            for line in process.stdout:
                said.append(line)
                if READY.search(line):
                    break
            deadline.cancel()
            assert READY.search("".join(said)), f"{block.text}\nis not ready in {READY_TIMEOUT} s:\n{''.join(said)}"
            threading.Thread(target=process.stdout.read, daemon=True).start()  # otherwise the pipe would fill
            if url := re.search(r"KMS \(onboard phase\) at http://(\S+)\.", said[-1]):
                self.names["127.0.0.1:9400"] = url[1]
            if url := re.search(r"Chain at http://(\S+) \(", said[-1]):
                self.names["127.0.0.1:8545"] = url[1]
            if url := re.search(r"auth-eth-bun at http://(\S+) ", said[-1]):
                self.names["127.0.0.1:3000"] = url[1]
            yield
        finally:
            deadline.cancel()
            process.terminate()
            process.wait(END_TIMEOUT)

    def run_python(self, block: Block, number: int) -> None:
        """Run a block in Python: with pytest if it defines tests, otherwise as a program."""
        if "def test_" in block.text:
            folder = self.folder / f"tests-{number}"
            folder.mkdir()
            (folder / "test_shown.py").write_text(block.text)
            done = run_pytest(folder)
            assert (done.returncode, "skipped" in done.stdout) == (0, False), done.stdout + done.stderr
        else:
            command = forked_by_anyone(self.here(block.text), module="tests.program")
            subprocess.run(command, cwd=ROOT, env=self.environment, check=True, timeout=WORK_TIMEOUT)


def checked(text: str) -> str:
    """Return a shell script that ends with status 99 if a command that must fail succeeds."""
    return re.sub(r"^(.*?)( +# fails.*)$", r"if \1; then exit 99; fi\2", text, flags=re.MULTILINE)


def matches(expected: str, seen: str) -> bool:
    """Return whether an output is as documented; `…` stands for anything, white space at the ends is ignored."""
    pattern = ".*".join(map(re.escape, expected.strip().split(ANYTHING)))
    return re.fullmatch(pattern, seen.strip(), re.DOTALL) is not None


def is_server(block: Block) -> bool:
    """Return whether the last command of a block is a server; a command in quotes is another one's argument."""
    return SERVER.search(re.sub("'[^']*'", "''", block.text.rstrip().splitlines()[-1])) is not None


def runs_elsewhere(block: Block) -> bool:
    """Return whether a block installs something, or needs containers."""
    return block.language == "yaml" or block.text.startswith(RUN_ELSEWHERE)


def run(shown: list[Block], terminal: Terminal) -> int:
    """Run all blocks in order, servers beside those that follow; return how many outputs were compared."""
    compared = 0
    pasted: list[tuple[Block, str]] = []
    with ExitStack() as servers:
        for number, block in enumerate(shown):
            following = shown[number + 1] if number + 1 < len(shown) else Block("", "")
            if block.language == "sh" and not is_server(block):
                pasted.append((block, following.text if following.language == "text" else ANYTHING))
                compared += following.language == "text"
                continue
            if block.language != "text" and pasted:
                terminal.paste(pasted)
                pasted = []
            if block.language == "sh":
                servers.enter_context(terminal.server(block))
            elif block.language == "python":
                terminal.run_python(block, number)
            elif block.language == "toml":
                (terminal.folder / "kms.toml").write_text(terminal.here(block.text).replace("9400", "0"))
            else:
                assert block.language == "text", f"a block in {block.language!r} that no test runs"
        if pasted:
            terminal.paste(pasted)
    return compared


@pytest.fixture(scope="module")
def stack() -> Iterator[RunningStack]:
    """A stack that is set up, in a folder whose path is short enough for sockets."""
    with (
        tempfile.TemporaryDirectory(prefix="emu", dir="/tmp") as name,
        running_stack("--state", f"{name}/s") as running,
    ):
        yield running


@pytest.fixture
def reset(stack: RunningStack) -> Iterator[RunningStack]:
    """The same stack, as it was when it became ready."""
    yield stack
    assert (
        stack.curl(f"{stack.services['control']}/reset", "-X", "POST", "-H", "Content-Type: application/json")[0] < 300
    )


@RUN_DOCUMENTS
@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_a_page_work(page: str, reset: RunningStack, tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, reset)
    terminal.names["127.0.0.1:8000"] = terminal.names[f"127.0.0.1:{PORTS['auth-src']}"]  # the reader's own webhook
    run([block for block in blocks(document(page)) if block.language and not runs_elsewhere(block)], terminal)


def test_every_page_with_commands_or_programs_is_run() -> None:
    shown = {
        str(path.relative_to(ROOT))
        for path in DOCUMENTS
        if {block.language for block in blocks(path.read_text())} - {"", "text"}
    }
    assert shown == {*PAGES, *OTHER_TESTS}


def test_settings_of_the_pytest_page_are_accepted() -> None:
    (settings,) = (b.text for b in blocks(document("docs/pytest.md")) if "def dstack_settings" in b.text)
    values = eval(re.findall(r"return (.*)", settings)[0])
    assert StackConfig(**values).patience == 1.0


def test_make_targets_of_the_documents_exist() -> None:
    named = {
        target
        for path in DOCUMENTS
        for text in (*code(prose(path.read_text())), *(block.text for block in blocks(path.read_text())))
        for target in re.findall(r"^make ([a-z]+)", text, re.MULTILINE)
    }
    assert {"up", "test", "venv"} <= named
    assert named <= set(re.findall(r"^([a-z]+):.*## ", document("Makefile"), re.MULTILINE))


@contextmanager
def tutorial_stack(command: str, terminal: Terminal) -> Iterator[RunningStack]:
    """Start the stack of a tutorial's block."""
    arguments = re.fullmatch(r"dstack-emu up (.*)", command)
    assert arguments, f"a command that starts a stack expected, got {command!r}"
    with running_stack(*terminal.here(arguments[1]).split()) as running:
        terminal.use(running)
        yield running


@RUN_DOCUMENTS
def test_tutorial_answers_as_written(tmp_path: Path) -> None:
    shown = blocks(document(TUTORIAL))
    starts = [number for number, block in enumerate(shown) if "dstack-emu up" in block.text]
    compared = 0
    for first, end in zip(starts, [*starts[1:], len(shown)], strict=True):
        with tempfile.TemporaryDirectory(prefix="emu", dir="/tmp") as name:
            terminal = Terminal(tmp_path)
            terminal.names[STATE] = f"{name}/s"
            command = shown[first].text.strip().splitlines()[-1]
            with tutorial_stack(command, terminal) as running:
                assert running.description["fresh"] is ("--fresh" in command)
                compared += run(shown[first + 1 : end], terminal)
    assert len(starts) == 2
    assert compared >= 9
