"""The pods of kubernetes/, as far as a container engine can: with their user, rights, folders, limits and probes.

Not tested, because only a cluster has it: who may connect to whom (NetworkPolicy), the Service, when what is started.
It runs if DSTACK_EMU_CONTAINERS is set, as `.ci/run` sets it where a container engine answers.
"""

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.manifests import FOLDER, Manifest, only, pod_of
from tests.repository import ROOT

pytestmark = [
    pytest.mark.skipif(not os.environ.get("DSTACK_EMU_CONTAINERS"), reason="DSTACK_EMU_CONTAINERS is not set"),
    pytest.mark.timeout(600),
]

TOKEN = uuid.uuid4().hex


def run_docker(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run docker, whatever comes of it."""
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)


def docker(*arguments: str) -> str:
    """Run docker and return what it prints; fail with its errors."""
    done = run_docker(*arguments)
    assert done.returncode == 0, f"docker {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """The project's image, on this machine's base image."""
    name = f"dstack-emu-pods-{uuid.uuid4().hex[:8]}"
    base = os.environ.get("BASE_IMAGE", "python:3.11-slim-bookworm")
    secret = f"id=pip_ca,src={os.environ.get('PIP_CA_FILE', '/dev/null')}"
    network = os.environ.get("BUILD_NETWORK", "default")
    docker("build", "--tag", name, "--build-arg", f"BASE_IMAGE={base}", "--network", network, "--secret", secret, ".")
    yield name
    docker("image", "rm", "--force", name)


class Node:
    """Runs pods in containers: each with what its manifest says, in a network that leads nowhere else."""

    def __init__(self, image: str, folder: Path) -> None:
        self.image, self.folder = image, folder
        self.name = f"dstack-emu-pods-{uuid.uuid4().hex[:8]}"
        self.started: list[str] = []
        self.volumes: list[str] = []
        docker("network", "create", "--internal", self.name)
        words = ("--network", self.name, "--no-healthcheck", "--entrypoint", "sleep")
        self._kubelet = docker("run", "--detach", "--init", *words, image, "600")
        self.started.append(self._kubelet)

    def close(self) -> None:
        """Remove everything."""
        if self.started:
            docker("rm", "--force", *self.started)
        if self.volumes:
            docker("volume", "rm", *self.volumes)
        docker("network", "rm", self.name)

    def folders(self, root: Path, pod: Manifest) -> dict[str, str]:
        """Make the volumes of a pod; return the source of each."""
        made = {}
        for volume in pod["spec"]["volumes"]:
            if "configMap" in volume:
                source = self.folder / volume["name"]
                source.mkdir()
                for name, text in only(root, "ConfigMap", volume["configMap"]["name"])["data"].items():
                    (source / name).write_text(text)
                made[volume["name"]] = str(source)
            else:  # as a kubelet makes a folder in memory
                assert volume["emptyDir"]["medium"] == "Memory"
                size = volume["emptyDir"]["sizeLimit"].removesuffix("i").lower()
                options = ("type=tmpfs", "device=tmpfs", f"o=size={size},mode=0777")
                name = f"{self.name}-{uuid.uuid4().hex[:8]}"
                docker("volume", "create", *(word for option in options for word in ("--opt", option)), name)
                self.volumes.append(name)
                made[volume["name"]] = name
        return made

    def create(self, root: Path, pod: Manifest, container: Manifest, folders: dict[str, str], *network: str) -> str:
        """Create a container of a pod, and return its id."""
        rights, own = pod["spec"]["securityContext"], container["securityContext"]
        limits = container["resources"]["limits"]
        words = ["create", "--no-healthcheck", "--user", f"{rights['runAsUser']}:{rights['runAsGroup']}", *network]
        # The engine's own profile is what RuntimeDefault means.
        assert (rights["seccompProfile"], own["allowPrivilegeEscalation"]) == ({"type": "RuntimeDefault"}, False)
        words += ["--security-opt", "no-new-privileges"]
        words += ["--read-only"] * own["readOnlyRootFilesystem"]
        words += [word for each in own["capabilities"]["drop"] for word in ("--cap-drop", each)]
        words += ["--cpus", limits["cpu"], "--memory", limits["memory"].removesuffix("i").lower()]
        for mount in container.get("volumeMounts", []):
            suffix = ":ro" if mount.get("readOnly") else ""
            words += ["--volume", f"{folders[mount['name']]}:{mount['mountPath']}{suffix}"]
        for each in container.get("envFrom", []):
            data = only(root, "ConfigMap", each["configMapRef"]["name"])["data"]
            words += [word for name, value in data.items() for word in ("--env", f"{name}={value}")]
        for variable in container.get("env", []):
            words += ["--env", f"{variable['name']}={variable.get('value', TOKEN)}"]
        command, arguments = container.get("command", []), container.get("args", [])
        words += ["--entrypoint", command[0]] if command else []
        self.started.append(docker(*words, self.image, *command[1:], *arguments))
        return self.started[-1]

    def ended(self, created: str) -> str:
        """Run a container to its end, which must be a success; return what it printed."""
        done = run_docker("start", "--attach", created)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def probe(self, started: str, container: Manifest, name: str) -> None:
        """Perform a probe until it succeeds; fail if it has failed as often as it may."""
        probe, answers = container[name], []
        for _ in range(probe.get("failureThreshold", 3)):
            if "exec" in probe:
                done = run_docker("exec", started, *probe["exec"]["command"])
            else:  # by the address of the pod, which a kubelet names as the host, too
                (port,) = (each for each in container["ports"] if each["name"] == probe["httpGet"]["port"])
                url = f"http://{self._address(started)}:{port['containerPort']}{probe['httpGet']['path']}"
                done = run_docker("exec", self._kubelet, "healthcheck", url)
            if done.returncode == 0:
                return
            answers.append(done.stdout)
        raise AssertionError(f"{name}: {answers[-1]}\n{run_docker('logs', started).stderr}")

    def _address(self, started: str) -> str:
        (found,) = json.loads(docker("inspect", started))
        return str(found["NetworkSettings"]["Networks"][self.name]["IPAddress"])


@pytest.fixture
def node(image: str, tmp_path: Path) -> Iterator[Node]:
    node = Node(image, tmp_path)
    yield node
    node.close()


def test_suite_passes_beside_the_stack_of_its_namespace(node: Node) -> None:
    root = FOLDER / "run"
    pod, suite = pod_of(only(root, "Deployment", "dstack-emu")), pod_of(only(root, "Job", "suite"))
    (stack,), (ready,), (tests,) = (
        pod["spec"]["containers"],
        suite["spec"]["initContainers"],
        suite["spec"]["containers"],
    )
    service = only(root, "Service", "dstack-emu")["metadata"]["name"]
    folders, joined = node.folders(root, suite), ("--network", node.name)
    waits = node.create(root, suite, ready, folders, *joined)
    docker("start", waits)  # before there is a stack, or its name
    started = node.create(root, pod, stack, node.folders(root, pod), *joined, "--network-alias", service)
    docker("start", started)
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        node.probe(started, stack, name)
    assert (docker("wait", waits), docker("logs", waits)) == ("0", "ready")
    assert "OK" in node.ended(node.create(root, suite, tests, folders, *joined)).splitlines()
    check_confinement(started, stack)
    # Its process ends within the grace period, and without an error.
    docker("stop", "--time", str(pod["spec"]["terminationGracePeriodSeconds"]), started)
    assert docker("inspect", "--format", "{{.State.ExitCode}} {{.State.OOMKilled}}", started) == "0 false"


def test_runbook_passes_beside_its_sidecar(node: Node) -> None:
    root = FOLDER / "parallel"
    pod = pod_of(only(root, "Job", "parallel"))
    (stack,), (tests,) = pod["spec"]["initContainers"], pod["spec"]["containers"]
    folders = node.folders(root, pod)
    started = node.create(root, pod, stack, folders, "--network", node.name)
    docker("start", started)
    node.probe(started, stack, "startupProbe")
    said = node.ended(node.create(root, pod, tests, folders, "--network", f"container:{started}"))
    assert said.rstrip().endswith("The runbook passes."), said
    check_confinement(started, stack)


def check_confinement(started: str, container: Manifest) -> None:
    """Check that the manifest's restrictions hold in a container, and what it can write to."""
    status = docker("exec", started, "cat", "/proc/1/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert (int(fields["CapEff"], 16), int(fields["CapBnd"], 16)) == (0, 0)
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    assert fields["Uid"].split()[0] == "1000"
    for folder in ("/", "/opt/venv", "/run/app"):
        assert "Read-only file system" in run_docker("exec", started, "touch", f"{folder}/new").stderr
    for mount in container["volumeMounts"]:
        docker("exec", started, "touch", f"{mount['mountPath']}/new")
