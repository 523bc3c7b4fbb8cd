"""The page "Your app beside the stack", with real containers: each of its ways, as root and as another user.

They need Docker with Compose and buildx, so the suite runs them only where DSTACK_EMU_CONTAINERS is set, as `.ci/run`
does. BASE_IMAGE, BUILD_NETWORK and PIP_CA_FILE are those of docker-compose.yaml.
"""

import ipaddress
import json
import os
import re
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.documents import blocks, document
from tests.ports import free_port
from tests.repository import ROOT
from tests.running import RunningStack, running_stack

pytestmark = [
    pytest.mark.skipif(not os.environ.get("DSTACK_EMU_CONTAINERS"), reason="DSTACK_EMU_CONTAINERS is not set"),
    pytest.mark.timeout(600),
]

PAGE = "docs/howto/your-app.md"
USERS = ("0:0", "4711:4711")
TOKEN = 'it costs $5 "or" so'
SERVICES = (
    "pccs",
    "auth-src",
    "auth-dst",
    "agent-src",
    "agent-dst",
    "kms-src",
    "kms-dst",
    "app",
    "verifier",
    "control",
)


def docker(*arguments: str, text: str | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Run docker and return what it prints; fail with its errors."""
    done = run_docker(*arguments, text=text, environment=environment)
    assert done.returncode == 0, f"docker {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def run_docker(
    *arguments: str, text: str | None = None, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run docker, whatever comes of it."""
    return subprocess.run(
        ["docker", *arguments],
        input=text,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**_environment(), **(environment or {})},
        check=False,
    )


def _environment() -> dict[str, str]:
    """The environment of the tests, without settings of docker-compose.yaml."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("EMU_", "COMPOSE_"))}


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """The image of the page, on this machine's base image."""
    (shown,) = (block.text for block in blocks(document(PAGE)) if block.text.startswith("docker build --tag wallet"))
    command = re.findall(r"^CMD .*$", shown, re.MULTILINE)[0]
    base = os.environ.get("BASE_IMAGE", "python:3.11-slim-bookworm")
    ca = os.environ.get("PIP_CA_FILE", "/dev/null")
    name = f"dstack-emu-wallet-{uuid.uuid4().hex[:8]}"
    recipe = f"""
FROM {base}
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
RUN --mount=type=secret,id=pip_ca \\
    if [ -s /run/secrets/pip_ca ]; then export PIP_CERT=/run/secrets/pip_ca; fi && pip install dstack-sdk
{command}
"""
    network = os.environ.get("BUILD_NETWORK", "default")
    docker("build", "--tag", name, "--network", network, "--secret", f"id=pip_ca,src={ca}", "-", text=recipe)
    yield name
    docker("image", "rm", "--force", name)


class App:
    """The page's app: its files in a folder, and its compose project."""

    def __init__(self, folder: Path, image: str) -> None:
        self.folder = folder
        self.project = f"dstack-emu-{folder.name.replace('_', '-').lower()}-{uuid.uuid4().hex[:8]}"
        for block in blocks(document(PAGE)):
            if name := re.match(r"# (\S+\.yaml)\n", block.text):
                (folder / name[1]).write_text(block.text.replace("image: wallet", f"image: {image}"))
        (folder / "app-compose.json").write_text(
            json.dumps(
                {
                    "manifest_version": 2,
                    "name": "wallet",
                    "runner": "docker-compose",
                    "docker_compose_file": (folder / "compose.yaml").read_text(),
                    "allowed_envs": ["TOKEN"],
                }
            )
        )
        (folder / "app.env").write_text(f"TOKEN={TOKEN}\nOTHER=dropped\n")

    @property
    def options(self) -> tuple[str, ...]:
        """The options with which a stack has this app."""
        return ("--app-compose", str(self.folder / "app-compose.json"), "--env-file", str(self.folder / "app.env"))

    def compose(self, *arguments: str, files: tuple[str, ...], env_file: Path | str = "/dev/null") -> tuple[str, ...]:
        """Return the words of a call of Compose for `docker`."""
        paths = [word for name in files for word in ("-f", str(self.folder / name))]
        return ("compose", "--env-file", str(env_file), "--project-name", self.project, *paths, *arguments)

    def remove(self, *files: str, environment: Mapping[str, str]) -> None:
        """Remove its containers, volumes and networks."""
        docker(*self.compose("down", "--volumes", "--timeout", "1", files=files), environment=environment)


@pytest.fixture
def app(short_folder: Path, image: str) -> App:
    return App(short_folder, image)


@contextmanager
def stack_of(app: App, *options: str) -> Iterator[RunningStack]:
    with running_stack("--state", str(app.folder / "state"), *app.options, *options) as stack:
        yield stack


def key_of(stack: RunningStack) -> str:
    """The app's key, asked for on this machine."""
    return str(json.loads(stack.curl(f"{stack.services['app']}/GetKey?path=wallet")[1])["key"])


@pytest.mark.parametrize("way", ["sockets.yaml", "tcp.yaml"])
def test_app_beside_the_stack_has_its_keys_and_its_environment(app: App, way: str) -> None:
    files = ("compose.yaml", way)
    with stack_of(app) as stack:
        variables = stack.description["env"]
        env_file = Path(variables["DSTACK_EMU_SOCKETS"], ".decrypted-env")
        try:
            for user in USERS:
                run = app.compose("run", "--rm", "--user", user, "wallet", files=files, env_file=env_file)
                assert docker(*run, environment=variables) == key_of(stack)
                assert docker(*run, "sh", "-c", 'id -u && echo "$TOKEN"', environment=variables).splitlines() == [
                    user.partition(":")[0],
                    TOKEN,
                ]
        finally:
            app.remove(*files, environment=variables)


def test_app_in_a_network_of_its_own_reaches_the_address_of_the_bridge(app: App, image: str) -> None:
    files = ("compose.yaml", "tcp.yaml")
    override = app.folder / "tcp.yaml"
    override.write_text(re.sub(r"^ +network_mode: host\n", "", override.read_text(), flags=re.MULTILINE))
    routes = docker("run", "--rm", image, "cat", "/proc/net/route").splitlines()
    gateway = next(fields[2] for fields in map(str.split, routes) if fields[1] == "00000000")
    bridge = str(ipaddress.IPv4Address(bytes.fromhex(gateway)[::-1]))  # the kernel prints the bytes in its own order
    with stack_of(app, "--listen", bridge) as stack:
        variables = stack.description["env"]
        try:
            run = app.compose("run", "--rm", "--user", USERS[1], "wallet", files=files)
            assert docker(*run, environment=variables) == key_of(stack)
        finally:
            app.remove(*files, environment=variables)


def test_container_runs_on_while_the_stack_is_restarted(app: App) -> None:
    files = ("compose.yaml", "sockets.yaml")
    ask = ("python3", "-c", "from dstack_sdk import DstackClient; print(DstackClient().get_key('wallet').key)")
    with stack_of(app) as stack:
        variables, key = stack.description["env"], key_of(stack)
        container = docker(
            *app.compose("run", "--detach", "--user", USERS[1], "wallet", "sleep", "600", files=files),
            environment=variables,
        )
        assert docker("exec", container, *ask) == key
    try:
        assert run_docker("exec", container, *ask).returncode != 0
        with stack_of(app):
            assert docker("exec", container, *ask) == key
    finally:
        docker("rm", "--force", container)
        app.remove(*files, environment=variables)


def test_folder_without_sockets_is_an_error_and_is_not_made(app: App) -> None:
    run = app.compose("run", "--rm", "wallet", "true", files=("compose.yaml", "sockets.yaml"))
    unset = run_docker(*run)
    assert "paste the export lines that dstack-emu up prints" in unset.stderr
    gone = app.folder / "gone"
    try:
        refused = run_docker(*run, environment={"DSTACK_EMU_SOCKETS": str(gone)})
        assert (refused.returncode != 0, str(gone) in refused.stderr, gone.exists()) == (True, True, False)
        gone.mkdir()
        docker(*run, environment={"DSTACK_EMU_SOCKETS": str(gone)})
    finally:
        app.remove("compose.yaml", "sockets.yaml", environment={"DSTACK_EMU_SOCKETS": str(gone)})


def test_app_that_joins_the_stack_has_its_keys_and_its_environment(app: App) -> None:
    (app.folder / "policies").mkdir()
    ports = {f"EMU_PORT_{name.upper().replace('-', '_')}": str(free_port()) for name in SERVICES}
    variables = {
        **ports,
        "EMU_IMAGE": app.project,
        "EMU_POLICIES": str(app.folder / "policies"),
        "EMU_APP_COMPOSE": str(app.folder / "app-compose.json"),
        "EMU_ENV_FILE": str(app.folder / "app.env"),
    }
    files = (str(ROOT / "docker-compose.yaml"), "compose.yaml", "joined.yaml")
    env_file = app.folder / "compose.env"
    env_file.write_text(f"TOKEN='{TOKEN}'\n")
    try:
        docker(*app.compose("up", "--build", "--wait", "stack", files=files), environment=variables)
        keys = set()
        for user in USERS:
            run = app.compose("run", "--rm", "--no-deps", "--user", user, "wallet", files=files, env_file=env_file)
            keys.add(docker(*run, environment=variables))
            assert docker(*run, "sh", "-c", 'echo "$TOKEN"', environment=variables) == TOKEN
            endpoint = f"DSTACK_SIMULATOR_ENDPOINT=http://stack:{ports['EMU_PORT_APP']}"
            by_tcp = ("run", "--rm", "--no-deps", "--env", endpoint, "wallet")
            keys.add(docker(*app.compose(*by_tcp, files=files, env_file=env_file), environment=variables))
        inside = ("exec", "-T", "stack", "sh", "-c")
        decrypted = docker(*app.compose(*inside, "cat app/.decrypted-env.json", files=files), environment=variables)
        assert json.loads(decrypted) == {"TOKEN": TOKEN}
        ask = f"python3 -c 'import urllib.request as r; print(r.urlopen(\"http://127.0.0.1:{ports['EMU_PORT_APP']}/GetKey?path=wallet\").read().decode())'"
        answer = json.loads(docker(*app.compose(*inside, ask, files=files), environment=variables))
        assert keys == {answer["key"]}
    except AssertionError:
        print(run_docker(*app.compose("logs", "--no-color", files=files), environment=variables).stdout)
        raise
    finally:
        app.remove(*files, environment=variables)
        docker("image", "rm", "--force", app.project)
