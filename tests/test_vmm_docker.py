"""Machines of a VMM whose containers run on the engine of this host: deployed by its RPCs, seen with `docker`.

They need Docker with Compose, so the suite runs them only where DSTACK_EMU_CONTAINERS is set, as `.ci/run` does.
BASE_IMAGE, BUILD_NETWORK and PIP_CA_FILE are those of docker-compose.yaml.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from dstack_emu.attest.release import RELEASES
from dstack_emu.testing import LiveStack
from tests.ports import free_port
from tests.running import RunningStack, running_stack
from tests.test_containers_app import docker, image, run_docker
from tests.vmm import PATIENCE, VmmClient, app_id_of, sealed

__all__ = ["image"]

pytestmark = [
    pytest.mark.skipif(not os.environ.get("DSTACK_EMU_CONTAINERS"), reason="DSTACK_EMU_CONTAINERS is not set"),
    pytest.mark.timeout(600),
]

KEY = "from dstack_sdk import DstackClient; print('key', DstackClient().get_key('wallet').key, flush=True)"
ENVIRONMENT = (
    "import os; print('env', sorted('='.join(v) for v in os.environ.items() if v[0][:4] == 'APP_'), flush=True)"
)
ANSWERS = "python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", 8000))' 2>/dev/null"
KINDS = ("container", "network", "volume", "image")


def app_compose(services: dict[str, Any], *, volumes: tuple[str, ...] = (), **members: Any) -> str:
    """Return an app-compose.json, as vmm-cli.py writes it."""
    compose = {"services": services, "volumes": {name: {} for name in volumes}}
    document = {
        "manifest_version": 2,
        "name": "app1",
        "runner": "docker-compose",
        "docker_compose_file": json.dumps(compose),
        "kms_enabled": True,
        "gateway_enabled": False,
        "allowed_envs": ["APP_TOKEN"],
        "secure_time": False,
    }
    return json.dumps(document | members, indent=4)


class Engine:
    """What is on the engine, by `docker`."""

    def __init__(self, stack: LiveStack | RunningStack) -> None:
        self.label = f"dstack-emu.vmm={stack.description['state']}/vms"

    def made(self) -> dict[str, list[str]]:
        """What the VMM's machines have there now."""
        listed = {}
        for kind in KINDS:
            every = ("--all",) if kind == "container" else ()
            listed[kind] = docker(kind, "ls", "--quiet", *every, "--filter", f"label={self.label}").split()
        return listed


class Deployer:
    """Deploys apps on a VMM, and encrypts their environments as vmm-cli.py does."""

    def __init__(self, stack: LiveStack | RunningStack) -> None:
        self.stack, self.vmm, self.engine = stack, VmmClient(stack.services["vmm"]), Engine(stack)

    def allow(self, compose_file: str, app_id: str = "") -> None:
        """Allow a compose file in the policy of the source KMS; of a new app if no id is given."""
        path = Path(self.stack.description["policies"]["src"])
        policy = json.loads(path.read_text())
        compose_hash = hashlib.sha256(compose_file.encode()).hexdigest()
        app = {"composeHashes": [f"0x{compose_hash}"], "devices": [], "allowAnyDevice": True}
        policy["apps"][f"0x{app_id or app_id_of(compose_file)}"] = app
        path.write_text(json.dumps(policy))

    def deploy(self, compose_file: str, **changed: Any) -> str:
        """Create a machine of an app that is allowed."""
        self.allow(compose_file)
        return self.vmm.deploy(compose_file=compose_file, **changed)

    def encrypted(self, compose_file: str, variables: dict[str, str]) -> str:
        """Encrypt variables with the key that the KMS names for the app."""
        content = ("-H", "Content-Type: application/json", "-d", json.dumps({"app_id": app_id_of(compose_file)}))
        kms = self.stack.services["kms-src"]
        url = f"{kms}/prpc/KMS.GetAppEnvEncryptPubKey?json"
        command = ["curl", "-sS", "--insecure", "--max-time", PATIENCE, *content, url]
        answer = json.loads(subprocess.run(command, capture_output=True, timeout=100, check=True).stdout)
        return sealed(variables, bytes.fromhex(answer["public_key"]))

    def serial(self, vm_id: str, channel: str = "serial") -> str:
        return self.vmm.ask(f"/logs?id={vm_id}&ch={channel}")[1].decode()

    def line(self, vm_id: str, beginning: str, channel: str = "stdout") -> str:
        """Wait for a line that a container prints, and return the rest of it."""
        while True:
            found = re.findall(rf"{beginning} (.*)$", self.serial(vm_id, channel), re.MULTILINE)
            if found:
                return str(found[-1])


@pytest.fixture(scope="module")
def stack() -> Iterator[LiveStack]:
    with LiveStack(vmm=True, vmm_workload="docker") as live:
        yield live
    if not docker("ps", "--all", "--quiet", "--filter", "label=dstack-emu.vmm"):  # of another stack on this engine
        assert "dstack-emu-host" not in docker("network", "ls", "--format", "{{.Name}}").split()


@pytest.fixture
def deployer(stack: LiveStack) -> Iterator[Deployer]:
    """A deployer; every machine is removed afterwards, and nothing of it is left on the engine."""
    made = Deployer(stack)
    yield made
    for vm in made.vmm.rpc("Status")["vms"]:
        made.vmm.gone(vm["id"])
    assert made.engine.made() == {kind: [] for kind in KINDS}


def test_app_gets_key_and_allowed_variables_as_another_user(deployer: Deployer, image: str) -> None:
    service = {
        "image": image,
        "user": "4711:4711",
        "command": ["python3", "-c", f"{KEY}\n{ENVIRONMENT}\nimport time; time.sleep(600)"],
        "init": True,
        "environment": {"APP_TOKEN": "${APP_TOKEN}", "APP_OTHER": "${APP_OTHER:-unset}"},
        "volumes": ["/var/run/dstack.sock:/var/run/dstack.sock"],
    }
    compose_file = app_compose({"wallet": service})
    token = 'it costs $5 "or" so'
    blob = deployer.encrypted(compose_file, {"APP_TOKEN": token, "APP_OTHER": "dropped"})
    vm_id = deployer.deploy(compose_file, encrypted_env=blob)
    info = deployer.vmm.booted(vm_id)
    assert (info["boot_progress"], info["boot_error"]) == ("done", "")
    steps = [event["body"] for event in info["events"] if event["event"] == "boot.progress"]
    assert steps[-3:] == ["setting up docker", "starting containers", "done"]
    assert len(deployer.line(vm_id, "key")) == 64
    assert deployer.line(vm_id, "env") == str(["APP_OTHER=unset", f"APP_TOKEN={token}"])


def test_environment_that_the_app_cannot_have_ends_the_boot_without_a_container(deployer: Deployer, image: str) -> None:
    compose_file = app_compose({"wallet": {"image": image, "command": "true"}})
    foreign_key = X25519PrivateKey.generate().public_key().public_bytes_raw()
    for blob, text in (
        (sealed({"APP_TOKEN": "x"}, foreign_key), "Failed to decrypt env file: Decryption failed: aead::Error"),
        ("00", "Failed to decrypt env file: Invalid ephemeral public key length"),
    ):
        vm_id = deployer.deploy(compose_file, encrypted_env=blob)
        info = deployer.vmm.booted(vm_id)
        assert (info["status"], info["boot_error"]) == ("exited", text)
        assert deployer.engine.made()["container"] == []
        right = deployer.encrypted(compose_file, {"APP_TOKEN": "x"})
        assert deployer.vmm.rpc("UpgradeApp", id=vm_id, encrypted_env=right) == {"id": ""}
        deployer.vmm.rpc("StartVm", id=vm_id)
        assert deployer.vmm.booted(vm_id)["boot_progress"] == "done"
        assert len(deployer.engine.made()["container"]) == 1
        deployer.vmm.gone(vm_id)


def test_app_that_is_not_allowed_has_no_container_until_it_is(deployer: Deployer, image: str) -> None:
    compose_file = app_compose({"wallet": {"image": image, "command": "true"}}, name="not allowed")
    vm_id = deployer.vmm.deploy(compose_file=compose_file)
    assert "App not allowed: Boot denied: app not registered" in deployer.vmm.booted(vm_id)["boot_error"]
    assert deployer.engine.made()["container"] == []
    deployer.allow(compose_file)
    deployer.vmm.rpc("StartVm", id=vm_id)
    assert deployer.vmm.booted(vm_id)["boot_progress"] == "done"
    assert len(deployer.engine.made()["container"]) == 1


def test_two_machines_have_the_names_of_one_file_and_both_reach_the_host(deployer: Deployer, image: str) -> None:
    pccs = deployer.stack.services["pccs"].replace("127.0.0.1", "10.0.2.2")
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        ask = f"""
import os, socket, urllib.request
for host in ("10.0.2.2", "host.docker.internal"):
    with socket.create_connection((host, {port}), 20) as asked:
        print(host, asked.recv(10).decode(), flush=True)
print("name", socket.gethostbyname("app-main") == socket.gethostbyname("main"), flush=True)
print("pccs", urllib.request.urlopen("{pccs}/health", timeout=90).status, flush=True)
os.chdir("/usr/share/doc")
os.execvp("python3", ["python3", "-m", "http.server", "8000"])
"""
        test = ["CMD", "python3", "-c", "import socket; socket.create_connection(('127.0.0.1', 8000))"]
        service = {
            "image": image,
            "command": ["python3", "-c", ask],
            "container_name": "app-main",
            "init": True,
            "ports": ["8000:8000"],
            "healthcheck": {"test": test, "interval": "200ms", "retries": 100},
        }
        compose_file = app_compose({"main": service}, volumes=("data",))
        mapped = [free_port() for _ in range(2)]
        machines = [
            deployer.deploy(
                compose_file,
                ports=[{"protocol": "tcp", "host_address": "127.0.0.1", "host_port": each, "vm_port": 8000}],
            )
            for each in mapped
        ]
        for _ in range(4):
            with server.accept()[0] as asking:
                asking.sendall(b"answered")
        for vm_id in machines:
            assert deployer.vmm.booted(vm_id)["boot_error"] == ""
            for host in ("10.0.2.2", "host.docker.internal"):
                assert deployer.line(vm_id, host) == "answered"
            assert deployer.line(vm_id, "name") == "True"
            assert deployer.line(vm_id, "pccs") == "200"
            (container,) = deployer.vmm.rpc("../guest/ListContainers", id=vm_id)["containers"]
            assert container["state"] == "running"
    for each in mapped:
        fetched = subprocess.run(
            ["curl", "-sf", f"http://127.0.0.1:{each}/"], capture_output=True, timeout=90, check=True
        )
        assert b"Directory listing" in fetched.stdout
    inside = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=90).status)"
    for vm_id, other in zip(machines, reversed(mapped), strict=True):
        found = docker("ps", "--quiet", "--filter", f"label=dstack-emu.machine={vm_id}")
        assert docker("exec", found, "python3", "-c", inside, f"http://10.0.2.2:{other}/") == "200"
    made = deployer.engine.made()
    assert (len(made["container"]), len(made["network"])) == (2, 2)


def test_scripts_run_in_containers_before_those_of_the_app(deployer: Deployer, image: str) -> None:
    service = {
        "image": image,
        "command": ["sh", "-c", f'cat /given; python3 -c "{ENVIRONMENT}"'],
        "environment": ["APP_TOKEN", "APP_MADE"],
        "volumes": ["./made:/given:ro"],
    }
    scripts: dict[str, Any] = {
        "init_script": 'echo "init as $(id -u) without ${APP_TOKEN:-token}" | tee made',
        "pre_launch_script": f'export APP_MADE="of $APP_TOKEN"\necho before >> /dstack/made\npython3 -c "{KEY}"',
    }
    compose_file = app_compose({"main": service}, **scripts)
    blob = deployer.encrypted(compose_file, {"APP_TOKEN": "t"})
    vm_id = deployer.deploy(compose_file, encrypted_env=blob)
    info = deployer.vmm.booted(vm_id)
    assert info["boot_error"] == ""
    steps = [event["body"] for event in info["events"] if event["event"] == "boot.progress"]
    assert steps[-5:] == ["setting up docker", "init-script", "pre-launch", "starting containers", "done"]
    assert deployer.line(vm_id, "env") == str(["APP_MADE=of t", "APP_TOKEN=t"])
    assert "init as 0 without token" in deployer.serial(vm_id)
    assert re.search("before$", deployer.serial(vm_id), re.MULTILINE)
    assert len(deployer.line(vm_id, "key", "stderr")) == 64  # what a script prints is in the log of errors
    assert not (Path(deployer.stack.description["state"]) / "vms" / vm_id / ".decrypted-env").exists()


def test_script_that_fails_starts_no_container(deployer: Deployer, image: str) -> None:
    service = {"image": image, "command": "true"}
    needs_file = deployer.deploy(app_compose({"main": service | {"env_file": "x"}}, pre_launch_script="true"))
    assert deployer.vmm.booted(needs_file)["boot_error"].endswith(
        "(--vmm-script-image names the image for scripts without it)"
    )
    for script, text in (
        ("echo why\nfalse\necho on", "pre-launch-script failed with status 1: why"),
        ("echo $UNSET", "pre-launch-script failed with status 1: .*UNSET: unbound variable"),
        ("exit 0", "pre-launch-script ended its shell: nothing is started after it"),
    ):
        vm_id = deployer.deploy(app_compose({"main": service}, pre_launch_script=script))
        info = deployer.vmm.booted(vm_id)
        assert info["boot_progress"] == "pre-launch"
        assert re.fullmatch(text, info["boot_error"], re.DOTALL)
        assert deployer.engine.made()["container"] == []
        deployer.vmm.gone(vm_id)


def test_app_reads_no_file_and_no_variable_of_this_host(
    deployer: Deployer, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "secret")  # which the client of the engine has
    shows = "import os; print('env', [os.environ.get(name) for name in ('APP_A', 'APP_B', 'no_proxy')], flush=True)"
    service = {
        "image": image,
        "command": ["python3", "-c", shows],
        "environment": {"APP_A": "${no_proxy:-unset}", "APP_B": "${HOME}", "no_proxy": None},
    }
    vm_id = deployer.deploy(app_compose({"main": service}))
    assert deployer.vmm.booted(vm_id)["boot_error"] == ""
    assert deployer.line(vm_id, "env") == str(["unset", "/root", None])
    vm_id = deployer.deploy(app_compose({"main": service | {"env_file": "/etc/passwd"}}))
    assert deployer.vmm.booted(vm_id)["boot_error"] == (
        "failed to start containers: docker_compose_file: env_file: /etc/passwd: Compose would read it on this host; "
        "a relative path of a file below /dstack is expected, without variables"
    )


def test_machine_that_is_stopped_while_it_starts_leaves_nothing(deployer: Deployer, image: str) -> None:
    service = {"image": image, "command": "sleep 600", "init": True}
    late = service | {"healthcheck": {"test": ["CMD", "false"], "interval": "1h"}}
    compose_files = (
        app_compose({"main": service}, pre_launch_script="echo waits; sleep 600"),
        app_compose({"main": late | {"command": "sh -c 'echo waits; exec sleep 600'"}}),
    )
    for compose_file in compose_files:
        vm_id = deployer.deploy(compose_file)
        while "waits" not in deployer.serial(vm_id):
            assert deployer.vmm.info(vm_id)["boot_error"] == ""
        assert deployer.vmm.rpc("StopVm", id=vm_id) is None
        assert deployer.vmm.info(vm_id)["status"] == "stopped"
        assert deployer.engine.made()["container"] == []


def test_stop_keeps_named_volumes_and_removal_deletes_them(deployer: Deployer, image: str) -> None:
    def compose(text: str) -> str:
        ends = 'trap "echo ended >> /data/log; exit" TERM; sleep 600 & wait'
        shell = f"echo {text} >> /data/log; echo log $(cat /data/log); {ends}"
        service = {
            "image": image,
            "command": ["sh", "-c", shell.replace("$", "$$")],
            "init": True,
            "volumes": ["data:/data", "/anonymous"],
        }
        return app_compose({"main": service}, volumes=("data",))

    volumes = set(docker("volume", "ls", "--quiet").split())
    vm_id = deployer.deploy(compose("first"))
    assert deployer.vmm.booted(vm_id)["boot_error"] == ""
    assert deployer.line(vm_id, "log") == "first"
    assert len(set(docker("volume", "ls", "--quiet").split()) - volumes) == 2
    deployer.vmm.rpc("StopVm", id=vm_id)
    made = deployer.engine.made()
    assert (made["container"], made["network"], len(made["volume"])) == ([], [], 1)
    deployer.allow(compose("second"), app_id_of(compose("first")))
    deployer.vmm.rpc("UpgradeApp", id=vm_id, compose_file=compose("second"))
    deployer.vmm.rpc("StartVm", id=vm_id)
    assert deployer.vmm.booted(vm_id)["boot_error"] == ""
    assert deployer.line(vm_id, "log") == "first second"  # StopVm has killed the first, ShutdownVm lets the second end
    assert deployer.vmm.rpc("ShutdownVm", id=vm_id) is None
    while deployer.vmm.info(vm_id)["status"] != "stopped":
        deployer.vmm.ask("/prpc/Version")  # the start of a process, which leaves the engine time
    assert deployer.engine.made()["volume"] == made["volume"]
    (kept,) = made["volume"]
    assert docker("run", "--rm", "--volume", f"{kept}:/data", image, "tail", "-1", "/data/log") == "ended"
    deployer.vmm.gone(vm_id)
    assert set(docker("volume", "ls", "--quiet").split()) == volumes


def test_removal_takes_what_was_built_and_nothing_of_others(deployer: Deployer, image: str) -> None:
    name = f"dstack-emu-foreign-{uuid.uuid4().hex[:8]}"
    docker("volume", "create", name)
    docker("network", "create", name)
    docker("tag", image, f"{name}:other")
    docker("run", "--name", name, "--volume", f"{name}:/data", image, "true")
    dangling = docker("build", "--quiet", "-", text=f"FROM {image}\nRUN echo {name}\n")
    try:
        service = {"build": {"dockerfile_inline": f"FROM {image}\nRUN echo {name} > /built"}, "command": "cat /built"}
        vm_id = deployer.deploy(app_compose({"main": service}))
        assert deployer.vmm.booted(vm_id)["boot_error"] == ""
        assert len(deployer.engine.made()["image"]) == 1
        assert name in deployer.line(vm_id, "main-1  \\|")
        deployer.vmm.gone(vm_id)
        assert deployer.engine.made() == {kind: [] for kind in KINDS}
        for kind, found in (("container", name), ("volume", name), ("network", name), ("image", f"{name}:other")):
            docker(kind, "inspect", found)
        docker("image", "inspect", dangling)
    finally:
        run_docker("rm", "--force", name)
        run_docker("volume", "rm", name)
        run_docker("network", "rm", name)
        run_docker("image", "rm", f"{name}:other", dangling)


def test_containers_that_cannot_start_are_a_boot_error_and_leave_the_agent(deployer: Deployer, image: str) -> None:
    unhealthy = {"test": ["CMD", "false"], "interval": "100ms", "retries": 1, "timeout": "5s"}
    idle = {"image": image, "command": "sleep 600", "init": True}
    for service, text in (
        (idle | {"healthcheck": unhealthy}, "failed to start containers: docker compose up: .*is unhealthy"),
        (idle | {"image": "127.0.0.1:1/absent"}, "failed to start containers: docker compose pull: .*127.0.0.1:1"),
        (idle | {"privileged": True}, "failed to start containers: service main: privileged: .*"),
        (
            idle | {"volumes": ["/var/run/docker.sock:/var/run/docker.sock"]},
            "failed to start containers: service main: /var/run/docker.sock: the engine of this host .*",
        ),
        (idle | {"ports": "x"}, "failed to start containers: docker_compose_file: .*ports.*"),
    ):
        vm_id = deployer.deploy(app_compose({"main": service}))
        info = deployer.vmm.booted(vm_id)
        assert (info["status"], info["boot_progress"]) == ("running", "starting containers")
        assert re.match(text, info["boot_error"], re.DOTALL), info["boot_error"]
        deployer.vmm.gone(vm_id)
    without = deployer.deploy(app_compose({}, docker_compose_file=None))
    text = "failed to start containers: app-compose.json: docker_compose_file expected"
    assert deployer.vmm.booted(without)["boot_error"] == text
    linked = app_compose({"main": idle | {"volumes": ["./x:/x"]}}, pre_launch_script="ln -s /etc x")
    info = deployer.vmm.booted(deployer.deploy(linked))
    assert info["boot_error"].endswith(
        "service main: /x: it is a link to a file of this host, which an app must not have"
    )
    vm_id = deployer.deploy(app_compose({"main": idle | {"healthcheck": unhealthy | {"test": ["CMD", "true"]}}}))
    assert deployer.vmm.booted(vm_id)["boot_progress"] == "done"
    assert docker("ps", "--filter", f"label=dstack-emu.machine={vm_id}", "--format", "{{.Status}}").endswith(
        "(healthy)"
    )


def test_bash_app_runs_in_a_container_that_runs_on(image: str) -> None:
    script = (
        f'python3 -c "{KEY}"\npython3 -c "{ENVIRONMENT}"\npython3 -m http.server 8000 &\nuntil {ANSWERS}; do :; done'
    )
    bash: dict[str, Any] = {"runner": "bash", "docker_compose_file": None}
    with LiveStack(vmm=True, vmm_workload="docker", vmm_script_image=image) as live:
        deployer = Deployer(live)
        compose_file = app_compose({}, bash_script=script, **bash)
        blob = deployer.encrypted(compose_file, {"APP_TOKEN": "t"})
        port = {"protocol": "tcp", "host_address": "127.0.0.1", "host_port": free_port(), "vm_port": 8000}
        vm_id = deployer.deploy(compose_file, encrypted_env=blob, ports=[port])
        info = deployer.vmm.booted(vm_id)
        assert (info["boot_error"], info["boot_progress"]) == ("", "done")
        curl = ["curl", "-sf", "--max-time", PATIENCE, f"http://127.0.0.1:{port['host_port']}/"]
        assert b"app-compose.json" in subprocess.run(curl, capture_output=True, timeout=100, check=True).stdout
        assert len(deployer.line(vm_id, "key")) == 64
        assert deployer.line(vm_id, "env") == str(["APP_TOKEN=t"])
        failing = deployer.deploy(app_compose({}, bash_script="echo why >&2; exit 3", **bash))
        info = deployer.vmm.booted(failing)
        assert (info["boot_error"], info["boot_progress"]) == (
            "main script failed with status 3: why",
            "running main script",
        )
        # With an image for scripts, a script may make a file that the compose file needs to be read.
        service = {"image": image, "command": ["python3", "-c", ENVIRONMENT], "env_file": "made.env"}
        made = app_compose({"main": service}, pre_launch_script="echo APP_MADE=m > made.env")
        vm_id = deployer.deploy(made)
        assert deployer.vmm.booted(vm_id)["boot_error"] == ""
        assert deployer.line(vm_id, "env") == str(["APP_MADE=m"])
        linked = app_compose({"main": service}, pre_launch_script="ln -s /etc/hostname made.env")
        assert deployer.vmm.booted(deployer.deploy(linked))["boot_error"] == (
            "failed to start containers: docker_compose_file: env_file: made.env: it is a link to a file of this host, "
            "which an app must not read"
        )
    assert deployer.engine.made() == {kind: [] for kind in KINDS}  # a stack without --state leaves nothing


def test_failing_command_of_a_pre_launch_script_ends_no_launch_in_0_5(image: str) -> None:
    service = {"image": image, "command": ["python3", "-c", ENVIRONMENT], "environment": ["APP_MADE"]}
    compose_file = app_compose({"main": service}, pre_launch_script='false\nexport APP_MADE="m$UNSET"')
    with LiveStack(release="0.5", vmm=True, vmm_workload="docker") as live:
        deployer = Deployer(live)
        vm_id = deployer.deploy(compose_file, image=f"dstack-emu-{RELEASES['0.5'].version}")
        assert deployer.vmm.booted(vm_id)["boot_error"] == ""
        assert deployer.line(vm_id, "env") == str(["APP_MADE=m"])


def test_stack_that_was_killed_leaves_nothing_that_the_next_one_does_not_take(short_folder: Path, image: str) -> None:
    shell = "echo start >> /data/log; echo log $(cat /data/log); exec sleep 600"
    service = {"image": image, "command": ["sh", "-c", shell], "init": True, "volumes": ["data:/data"]}
    compose_file = app_compose({"main": service}, volumes=("data",))
    options = ("--state", str(short_folder), "--vmm", "--vmm-workload", "docker")
    with running_stack(*options) as killed:
        deployer = Deployer(killed)
        kept, gone = (deployer.deploy(compose_file) for _ in range(2))
        for vm_id in (kept, gone):
            assert deployer.vmm.booted(vm_id)["boot_error"] == ""
        before = deployer.engine.made()
        assert [len(before[kind]) for kind in ("container", "network", "volume")] == [2, 2, 2]
        killed.process.end(signal.SIGKILL)
    shutil.rmtree(short_folder / "vms" / gone)
    assert deployer.engine.made() == before
    with running_stack(*options) as again:
        deployer = Deployer(again)
        assert deployer.vmm.booted(kept)["boot_error"] == ""
        after = deployer.engine.made()
        assert [len(after[kind]) for kind in ("container", "network", "volume")] == [1, 1, 1]
        assert not set(after["container"]) & set(before["container"])
        assert deployer.line(kept, "log") == "start start"
        deployer.vmm.gone(kept)
    assert deployer.engine.made() == {kind: [] for kind in KINDS}
