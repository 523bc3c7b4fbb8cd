"""The containers of a machine, run by Docker Compose on the engine of this host.

The steps are those of dstack's `app-compose.sh` (312dc605), without its prune of images and volumes. What a machine
made has its labels, so that it can be taken away whatever happened to this process.
"""

import asyncio
import contextlib
import datetime
import hashlib
import ipaddress
import json
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from dstack_emu.attest.app_compose import CONTAINER_RUNNERS
from dstack_emu.deployment.compose_project import ComposeProject
from dstack_emu.deployment.container_engine import Engine, passed_on
from dstack_emu.deployment.guest_compose import GuestFolders, GuestPort, GuestProject, adapt
from dstack_emu.deployment.guest_network import HOST_IN_GUEST, LOOPBACK
from dstack_emu.deployment.guest_scripts import ScriptRunner, script_of
from dstack_emu.deployment.host_relays import HOST_SUBNET, HostRelays
from dstack_emu.deployment.workloads import BootedGuest, Endpoint, ServiceStatus
from dstack_emu.simulator.errors import GuestError
from dstack_emu.transport.background import begin_in_background
from dstack_emu.transport.events import EventLog
from dstack_emu.vmm.config import Protocol

VMM_LABEL: Final = "dstack-emu.vmm"
"""The label with the path of a VMM's machines."""
MACHINE_LABEL: Final = "dstack-emu.machine"
"""The label with a machine's id."""
PROJECT_LABEL: Final = "dstack-emu.project"
"""The label with a machine's project, which no machine of another VMM has."""
STOP_SECONDS: Final = 3
"""How long the containers of a machine that powers off have to end after SIGTERM."""
_MEMBERS: Final = ("Names", "Image", "State", "Status", "ID", "Command", "CreatedAt")
_LISTED: Final = "{" + ",".join(f'"{name}":{{{{json .{name}}}}}' for name in _MEMBERS) + "}"
"""What is listed of containers. For `{{json .}}` the engine would measure their files, which takes it seconds."""
_STATES: Final[Mapping[str, Literal["created", "running", "exited"]]] = {
    "created": "created",
    "running": "running",
    "restarting": "running",
    "paused": "running",
}


@dataclass(frozen=True, slots=True)
class DockerWorkloads:
    """Makes the workloads of a VMM whose machines are in the folder `machines`.

    `host_ports` are ports of 127.0.0.1 that machines reach at 10.0.2.2, beside the ports that are mapped to machines.
    Scripts run in containers of `script_image` (empty: of the image of the app's first service); `pccs_url` is what
    `PCCS_URL` is for an app's files.
    """

    machines: Path
    pccs_url: str = ""
    script_image: str = ""
    strict_pre_launch: bool = True
    host_ports: frozenset[int] = frozenset()
    relays: HostRelays = field(default_factory=HostRelays)
    engine: Engine = field(default_factory=Engine)
    log: EventLog = field(default_factory=lambda: EventLog("dstack_emu.vmm"))

    async def open(self, known: Collection[str]) -> None:
        """Check the engine, and take away what an earlier run left; `known` are the ids of the machines.

        Volumes of a known machine stay. Raises `GuestError` if the engine does not answer.
        """
        await self.engine.check()
        label = f"{VMM_LABEL}={self.machines}"
        await self.engine.end(label)
        for vm_id in await self.engine.values(label, MACHINE_LABEL) - set(known):
            await self.engine.discard(f"{PROJECT_LABEL}={self.project(vm_id)}")

    def of(self, guest: BootedGuest) -> "DockerWorkload":
        """Return the workload of a machine."""
        return DockerWorkload(self, guest)

    async def discard(self, vm_id: str) -> None:
        """Take away what a machine that does not run left on the engine; what fails is logged, and done by `open`."""
        label = f"{PROJECT_LABEL}={self.project(vm_id)}"
        try:
            await self.engine.end(label)
            await self.engine.discard(label)
        except GuestError as error:
            self.log.warning("containers not removed", id=vm_id, reason=str(error))

    async def close(self) -> None:
        """Release what the machines shared; the address of the host too, if no machine of another stack needs it."""
        await self.relays.close()
        with contextlib.suppress(GuestError):
            await self.engine.drop_host_address(VMM_LABEL)

    def project(self, vm_id: str) -> str:
        """Return the name of a machine's compose project: that of no machine of another VMM."""
        return f"dstack-emu-{hashlib.sha256(f'{self.machines}/{vm_id}'.encode()).hexdigest()[:12]}"

    def labels(self, vm_id: str) -> dict[str, str]:
        """Return the labels of all that is made for a machine."""
        return {VMM_LABEL: str(self.machines), MACHINE_LABEL: vm_id, PROJECT_LABEL: self.project(vm_id)}


class DockerWorkload:
    """The containers of one machine."""

    def __init__(self, workloads: DockerWorkloads, guest: BootedGuest) -> None:
        self._workloads, self._guest, self._engine = workloads, guest, workloads.engine
        self._id = guest.launch.manifest.id
        self._project = workloads.project(self._id)
        self._label = f"{PROJECT_LABEL}={self._project}"
        folder = guest.launch.folder
        self._folders = GuestFolders(guest.run, folder / "dstack", folder / "root")
        self._compose = ComposeProject(self._engine, self._project, self._folders.home, guest.host.log)
        self._published: Mapping[GuestPort, int] = {}
        self._logs: asyncio.Task[None] | None = None
        self._relays = HostRelays()

    # ---- starting

    async def start(self) -> None:
        """Run scripts and containers, and report the steps; raise `GuestError`."""
        guest = self._guest
        guest.progress("setting up docker")
        runner = guest.domain.manifest.runner
        if runner not in (*CONTAINER_RUNNERS, "bash"):
            raise GuestError(f"unsupported runner: {runner}")
        await self._engine.end(self._label)  # what a run that was killed has left
        self._write_home()
        await self._add_host_address()
        environment = {"PCCS_URL": self._workloads.pccs_url, **guest.environment}
        self._report_dropped(environment)
        environment = await self._run_scripts(environment)
        if runner == "bash":
            await self._run_main(environment)
        else:
            await self._start_containers(environment)

    def _write_home(self) -> None:
        """Write the files of `/dstack`, and make the folders of the guest; docker-compose.yaml only if it is absent."""
        launch = self._guest.launch
        for folder in (self._folders.run, self._folders.home, self._folders.root):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o755)  # a container's user may be anyone
        self._folders.write("app-compose.json", launch.compose_file)
        self._folders.write("user_config", launch.user_config)
        compose = self._guest.domain.manifest.docker_compose_file
        if compose is not None:
            self._folders.write("docker-compose.yaml", compose)

    async def _add_host_address(self) -> None:
        failed = await self._engine.add_host_address(HOST_IN_GUEST, HOST_SUBNET)
        if failed:
            self._say(f"{HOST_IN_GUEST} is not this host ({failed}); containers reach it as host.docker.internal")
            return
        await self._workloads.relays.open(self._workloads.host_ports)
        mapped = self._guest.launch.manifest.port_map
        await self._relays.open(
            port.host_port
            for port in mapped
            if port.protocol == "tcp" and ipaddress.ip_address(port.address).is_loopback
        )

    def _report_dropped(self, environment: Mapping[str, str]) -> None:
        for name in sorted(environment.keys() - passed_on(environment).keys()):
            self._say(f"{name} is not passed on: it would configure the Docker CLI of this host")

    async def _run_scripts(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Run init and pre-launch scripts; return the environment with what the latter exports."""
        guest, environment = self._guest, dict(environment)
        manifest = guest.domain.manifest
        pre_launch = script_of(guest.launch.compose_file, "pre_launch_script")
        if not manifest.init_script and pre_launch is None:
            return environment
        runner = await self._script_runner(environment)
        if manifest.init_script:
            guest.progress("init-script")
            for number, script in enumerate(manifest.init_script):
                await runner.source(f"init-script-{number}", script, {}, options="-e")
        if pre_launch is not None:
            guest.progress("pre-launch")
            options = "-euo pipefail" if self._workloads.strict_pre_launch else ""
            environment |= await runner.source("pre-launch-script", pre_launch, environment, options=options)
        return environment

    async def _script_runner(self, environment: Mapping[str, str]) -> ScriptRunner:
        image = self._workloads.script_image
        if not image and self._guest.domain.manifest.docker_compose_file is not None:
            try:
                services = (await self._compose.configured(environment)).get("services") or {}
            except GuestError as error:  # perhaps for want of a file that a script makes
                raise GuestError(f"{error}\n(--vmm-script-image names the image for scripts without it)") from error
            image = next((service["image"] for service in services.values() if service.get("image")), "")
        if not image:
            raise GuestError(
                "a script runs in a container, and no service names an image for it: name one by --vmm-script-image"
            )
        labels = self._workloads.labels(self._id)
        return ScriptRunner(self._engine, image, self._project, labels, self._folders, self._print)

    async def _run_main(self, environment: Mapping[str, str]) -> None:
        self._guest.progress("running main script")
        script = script_of(self._guest.launch.compose_file, "bash_script")
        if script is None:
            raise GuestError("app-compose.json: bash_script expected with the runner bash")
        self._published = {port: _free_port(port[0]) for port in self._mapped}
        await (await self._script_runner(environment)).main(script, environment, self._published)

    async def _start_containers(self, environment: Mapping[str, str]) -> None:
        self._guest.progress("starting containers")
        if self._guest.domain.manifest.docker_compose_file is None:
            raise GuestError("failed to start containers: app-compose.json: docker_compose_file expected")
        try:
            labels = self._workloads.labels(self._id)
            project = GuestProject(self._project, labels, self._folders, self._mapped, self._has_gateway)
            adapted = adapt(await self._compose.configured(environment), project, _free_port)
            self._folders.require_inside(adapted.document)
            self._published = adapted.published
            await self._compose.start(adapted.document, environment)
            self._logs = begin_in_background(self._compose.follow(self._print), f"logs of {self._project}")
            await self._compose.wait(adapted.with_health_check, adapted.document, environment)
        except GuestError as error:
            raise GuestError(f"failed to start containers: {error}") from error
        await self._add_host_address()  # another stack may have taken it away before there were containers

    @property
    def _has_gateway(self) -> bool:
        return self._guest.domain.manifest.has_gateway and bool(self._guest.launch.gateway_urls)

    @property
    def _mapped(self) -> frozenset[GuestPort]:
        """The ports of the guest that are mapped to the host, or that the app names to its gateway."""
        named = self._guest.domain.manifest.port_policy.ports if self._has_gateway else ()
        mapped = frozenset((port.protocol, port.vm_port) for port in self._guest.launch.manifest.port_map)
        return mapped | {("tcp", port.port) for port in named}

    # ---- logs

    def _say(self, text: str) -> None:
        self._guest.host.log(f"[dstack] {text}\n")

    def _print(self, line: str, stream: str) -> None:
        """Log a line of what runs in the machine."""
        self._guest.host.log(line)
        self._guest.host.log(line, stream)

    # ---- running

    def endpoint(self, protocol: Protocol, port: int) -> Endpoint | None:
        """Return where a port of the guest is published on this host."""
        found = self._published.get((protocol, port))
        return None if found is None else (LOOPBACK, found)

    async def services(self) -> Sequence[ServiceStatus]:
        """Return the containers of the machine."""
        listed = await self._engine.run(
            "container", "ls", "--all", "--no-trunc", "--filter", f"label={self._label}", "--format", _LISTED
        )
        return [_status(json.loads(line)) for line in listed.stdout.splitlines()]

    async def logs(self, service: str, lines: int) -> bytes:
        """Return the last lines of a container; raise `GuestError` if the machine has none of that name."""
        if service not in {status.name for status in await self.services()}:
            raise GuestError(f"no container {service!r:.100} in this machine")
        printed: list[str] = []
        arguments = ("container", "logs", "--tail", str(lines), service)
        await self._engine.run(*arguments, output=lambda line, _: printed.append(line))
        return "".join(printed).encode()

    async def shutdown(self) -> None:
        """Let the containers end after SIGTERM."""
        with contextlib.suppress(GuestError):  # `stop` says why
            await self._engine.stop(self._label, seconds=STOP_SECONDS)

    async def stop(self) -> None:
        """Kill and remove the containers, and remove the networks; named volumes stay."""
        try:
            await self._engine.end(self._label)
        except GuestError as error:
            self._workloads.log.warning("containers not removed", id=self._id, reason=str(error))
        if self._logs is not None:
            self._logs.cancel()
            await asyncio.gather(self._logs, return_exceptions=True)
        await self._relays.close()


def _free_port(protocol: str) -> int:
    """Return a port of 127.0.0.1 that was free a moment ago."""
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind((LOOPBACK, 0))
        port: int = sock.getsockname()[1]
    return port


def _status(listed: Mapping[str, str]) -> ServiceStatus:
    created = datetime.datetime.strptime(listed["CreatedAt"][:25], "%Y-%m-%d %H:%M:%S %z")
    return ServiceStatus(
        name=listed["Names"],
        image=listed["Image"],
        state=_STATES.get(listed["State"], "exited"),
        status=listed["Status"],
        id=listed["ID"],
        command=listed["Command"].strip('"'),
        created=int(created.timestamp()),
    )
