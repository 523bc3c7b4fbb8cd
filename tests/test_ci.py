"""What a CI uses: the GitHub actions, whose steps run in bash as a runner runs them; the compose files; the image.

The job is run if DSTACK_EMU_DOCUMENTS is set (`make documents`).
"""

import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from dstack_emu.transport.ports import PORTS
from tests.documents import RUN_DOCUMENTS, blocks, document
from tests.repository import ROOT

BASH = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail"]
"""How a runner starts a step with `shell: bash`."""


class Runner:
    """A job on a runner: it runs the steps of composite actions, and keeps what they pass on."""

    def __init__(self, folder: Path) -> None:
        self.temp = folder / "temp"
        self.checkout = folder / "action"
        for made in (self.temp, self.checkout):
            made.mkdir()
        self.environment: dict[str, str] = {}
        self.path: list[str] = []
        self.outputs: dict[str, dict[str, str]] = {}
        self.said = ""

    def uses(self, action: str, expected: int = 0, **inputs: str) -> dict[str, str]:
        """Run an action, and return its outputs; the last step must end with the expected status."""
        document = yaml.safe_load((self.checkout / action / "action.yml").read_text())
        assert document["runs"]["using"] == "composite"
        assert inputs.keys() <= document["inputs"].keys()
        values = {name: each["default"] for name, each in document["inputs"].items()} | inputs
        status = 0
        for step in document["runs"]["steps"]:
            assert (step["shell"], "${{" in step["run"]) == ("bash", False)
            variables = {name: self._filled(text, values) for name, text in step.get("env", {}).items()}
            status = self._run(step, variables, self.checkout / action)
            if status != 0:
                break
        assert status == expected, self.said
        return {name: self._filled(each["value"], values) for name, each in document.get("outputs", {}).items()}

    def _filled(self, text: str, inputs: dict[str, str]) -> str:
        """Replace the expressions of a text."""

        def value(found: re.Match[str]) -> str:
            match found[1].split("."):
                case ["inputs", name]:
                    return inputs[name]
                case ["steps", step, "outputs", name]:
                    return self.outputs.get(step, {}).get(name, "")
            raise AssertionError(f"an expression that this runner does not know: {found[0]}")

        return re.sub(r"\$\{\{ (.*?) \}\}", value, text)

    def _run(self, step: dict[str, Any], variables: dict[str, str], path: Path) -> int:
        files = {name: self.temp / f"_{name}" for name in ("GITHUB_ENV", "GITHUB_OUTPUT", "GITHUB_PATH")}
        for file in files.values():
            file.write_text("")
        done = self.shell(step["run"], {**variables, **{name: str(file) for name, file in files.items()}}, path)
        self.environment |= _pairs(files["GITHUB_ENV"])
        self.outputs.setdefault(step.get("id", ""), {}).update(_pairs(files["GITHUB_OUTPUT"]))
        self.path = [*files["GITHUB_PATH"].read_text().splitlines(), *self.path]
        self.said = done.stdout
        return done.returncode

    def shell(
        self, script: str, variables: dict[str, str] | None = None, path: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a script in bash with what earlier steps have passed on."""
        file = self.temp / "step.sh"
        file.write_text(script)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DSTACK_", "PYTHON"))}
        own = {"RUNNER_TEMP": str(self.temp), "GITHUB_ACTION_PATH": str(path or self.checkout)}
        # pip takes this project from the checkout, and its dependencies from those that are installed for the tests.
        offline = {f"PIP_{name}": "1" for name in ("NO_INDEX", "NO_DEPS")}
        offline["PIP_NO_BUILD_ISOLATION"] = "0"  # the value of the option: pip reads this variable the other way round
        found = ":".join([*self.path, os.environ["PATH"]])
        return subprocess.run(
            [*BASH, str(file)],
            env={**kept, **own, **offline, **self.environment, "PATH": found, **(variables or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=self.temp,
            text=True,
            timeout=250,
            check=False,
        )


def _pairs(file: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in file.read_text().splitlines())


@pytest.fixture(scope="module")
def job() -> Iterator[Runner]:
    """A job whose path is short enough for sockets, with the committed files of this repository as the checkout."""
    for tool in ("bash", "curl", "git"):
        if shutil.which(tool) is None:
            pytest.skip(f"the steps need {tool}")
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder))
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=20).stdout
        with tarfile.open(fileobj=BytesIO(_packed(files)), mode="r") as packed:
            packed.extractall(runner.checkout, filter="data")
        yield runner
        runner.uses("stop")


def _packed(names: bytes) -> bytes:
    """Pack the files of these names, without the tests."""
    command = ["tar", "--create", "--null", "--exclude=tests", "--files-from=-"]
    return subprocess.run(command, input=names, cwd=ROOT, capture_output=True, check=True, timeout=20).stdout


@pytest.fixture(scope="module")
def python(job: Runner) -> str:
    """A Python whose venvs see the packages of the tests, because the steps install without an index."""
    script = job.temp / "python"
    packages = job.temp / "tests.pth"
    packages.write_text("\n".join(site.getsitepackages()) + "\n")
    script.write_text(
        f"""#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
  {shlex.quote(sys.executable)} -m venv --without-pip "$3"
  cp {packages} "$3"/lib/python*/site-packages/
else
  exec {shlex.quote(sys.executable)} "$@"
fi
"""
    )
    script.chmod(0o755)
    return str(script)


@RUN_DOCUMENTS
@pytest.mark.timeout(600)  # pip installs twice
def test_job_has_a_stack_between_the_two_actions_and_files_after_them(job: Runner, python: str) -> None:
    job.uses("", expected=1, python=python, options="--free-ports --no-such-option")
    assert "::error::the stack does not start: Error: unrecognized arguments: --no-such-option" in job.said
    outputs = job.uses(
        "", python=python, release="0.5", seed="a seed", options="--free-ports --auth-contract 'upstream'"
    )
    assert job.environment["DSTACK_EMU_STATE"] == outputs["state"]
    # A later step has the variables of `exec`, and the command on its path, but no other program of the venv.
    done = job.shell(
        """
        curl -s "$DSTACK_EMU_APP/prpc/Version" && curl -s --unix-socket "$DSTACK_SIMULATOR_ENDPOINT" http://x/Info
        dstack-emu ctl guest boot app >/dev/null && dstack-emu ctl info
        """
    )
    assert done.returncode == 0, done.stdout
    assert '"version":"0.5.11"' in done.stdout
    assert ('"seed": "a seed"' in done.stdout, '"auth_contract": "upstream"' in done.stdout) == (True, True)
    assert str(job.temp) not in job.shell("command -v python3").stdout
    job.uses("", expected=1, python=python)
    assert "::error::a stack of this job is there already: use the action in stop/ first" in job.said

    files = Path(job.uses("stop", files=str(job.temp / "kept files"))["files"])
    assert {str(path.relative_to(files)) for path in files.rglob("*") if path.is_file()} == {
        *(f"evidence/{name}" for name in ("app.json", "agent-src.json", "agent-dst.json", "root-ca.pem")),
        *(f"policies/auth-{side}.json" for side in ("src", "dst")),
        *("info.json", "journal.jsonl", "stack.json", "stack.log"),
    }
    records = [json.loads(line) for line in (files / "journal.jsonl").read_text().splitlines()]
    assert "GetAttestationInfo" in {record["call"] for record in records}
    assert len(bytes.fromhex(json.loads((files / "evidence/app.json").read_text())["quote"])) > 4000
    assert job.shell("curl -s $DSTACK_EMU_APP/prpc/Version").returncode == 7  # nothing listens


def test_stop_without_a_stack_keeps_what_there_is_and_succeeds(job: Runner) -> None:
    assert Path(job.uses("stop")["files"]) == job.temp / "dstack-emu-files"
    assert "::warning::no stack runs" in job.said


def test_python_that_is_too_old_is_said(job: Runner) -> None:
    old = job.temp / "old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2\nexit 1\n')
    old.chmod(0o755)
    job.uses("", expected=1, python=str(old))
    assert "::error::dstack-emu needs Python 3.11 to 3.13, got Python 3.9.2: use actions/setup-python" in job.said


def test_documented_workflows_use_inputs_and_outputs_that_exist() -> None:
    page = [yaml.safe_load(block.text) for block in blocks(document("docs/howto/ci.md")) if block.language == "yaml"]
    uses = {
        (step["uses"].partition("@")[0].partition("dstack-emu")[2].strip("/"), *step.get("with", {}))
        for workflow in page
        for step in workflow.get("steps", [])
        if step.get("uses", "").startswith("OWNER/")
    }
    assert {action for action, *_ in uses} == {"", "stop"}
    for action, *inputs in uses:
        known = yaml.safe_load((ROOT / action / "action.yml").read_text())
        assert set(inputs) <= set(known["inputs"])
    assert "steps.emulator.outputs.files" in document("docs/howto/ci.md")


def test_compose_file_of_the_vmm_publishes_its_port() -> None:
    (stack,) = yaml.safe_load(document("compose/vmm.yaml"))["services"].values()
    port = f"${{EMU_PORT_VMM:-{PORTS['vmm']}}}"
    assert stack["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert stack["environment"] == {"EMU_VMM": "${EMU_VMM:-1}", "EMU_PORT_VMM": "${EMU_PORT_VMM:-}"}


def test_compose_file_of_the_gateway_publishes_its_ports() -> None:
    (stack,) = yaml.safe_load(document("compose/gateway.yaml"))["services"].values()
    names = {name: name.upper().replace("-", "_") for name in ("gateway", "gateway-admin", "ingress")}
    ports = [f"${{EMU_PORT_{variable}:-{PORTS[name]}}}" for name, variable in names.items()]
    assert stack["ports"] == [f"127.0.0.1:{port}:{port}" for port in ports]
    options = {f"EMU_{name}": f"${{EMU_{name}:-}}" for name in ("BASE_DOMAIN", "APP_HOST")}
    numbers = {f"EMU_PORT_{name}": f"${{EMU_PORT_{name}:-}}" for name in names.values()}
    assert stack["environment"] == {"EMU_GATEWAY": "${EMU_GATEWAY:-1}", **options, **numbers}


def test_compose_file_of_the_chain_publishes_its_port() -> None:
    services = yaml.safe_load(document("compose/chain.yaml"))["services"]
    stack, (script,) = services["stack"], services["runbook"]["command"]
    (plain,) = yaml.safe_load(document("docker-compose.yaml"))["services"]["runbook"]["command"]
    assert script == plain.rstrip() + " --auth eth\n"
    port = f"${{EMU_PORT_CHAIN:-{PORTS['chain']}}}"
    assert stack["ports"] == [f"127.0.0.1:{port}:{port}"]
    names = ("EMU_ETH_RPC_URL", "EMU_KMS_CONTRACT", "EMU_ETH_BLOCK_CACHE", "EMU_PORT_CHAIN")
    optional = {name: f"${{{name}:-}}" for name in names}
    assert stack["environment"] == {"EMU_AUTH": "${EMU_AUTH:-eth}", **optional}


@pytest.mark.parametrize("file", ["docker-compose.yaml", "docker-compose.parts.yaml"])
def test_compose_files_publish_every_port_on_this_machine_only(file: str) -> None:
    services = yaml.safe_load(document(file))["services"]
    published = [port for service in services.values() for port in service.get("ports", [])]
    names = {re.fullmatch(r"127\.0\.0\.1:\$\{EMU_PORT_(\w+):-(\d+)\}:.*", port).groups() for port in published}  # type: ignore[union-attr]  # each matches
    absent = {"vmm", "gateway", "gateway-admin", "ingress", "agent-gateway", "chain"}  # only if asked for
    absent |= {"control"} if "parts" in file else set()
    expected = {name: port for name, port in PORTS.items() if name not in absent}
    assert names == {(name.upper().replace("-", "_"), str(port)) for name, port in expected.items()}


def test_image_exposes_every_port() -> None:
    (exposed,) = re.findall(r"^EXPOSE (.*)", document("Dockerfile"), re.MULTILINE)
    assert sorted(map(int, exposed.split())) == sorted(PORTS.values())
