"""The workload of a machine without a container engine: the programs of dstack's own deployments run in this process.

Services of the compose file whose image is one of theirs run; the log and the boot progress name the others. Scripts of
the app are never run: they would run on the host.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

from dstack_emu.deployment.compose_file import ComposeFile, ComposeService
from dstack_emu.deployment.guest_network import ContainerFiles, GuestNetwork
from dstack_emu.deployment.guest_programs import (
    Container,
    GuestProgram,
    KmsProgram,
    ProgramSite,
    program_for,
)
from dstack_emu.deployment.service_logs import ServiceLogs
from dstack_emu.deployment.workloads import BootedGuest, Endpoint, ServiceStatus
from dstack_emu.simulator.errors import GuestError
from dstack_emu.transport.background import begin_in_background
from dstack_emu.vmm.config import Protocol
from dstack_emu.vmm.machine import HostApi

RESTART_PAUSE: Final = 0.1
"""Seconds before a program that ended is started again, if its service says so."""


class _MachineLogs(ServiceLogs):
    """The logs of one machine's programs, which also go to the machine's log `stdout`."""

    def __init__(self, host: HostApi) -> None:
        super().__init__()
        self._host, self._loop = host, asyncio.get_running_loop()

    def keep(self, service: str, record: logging.LogRecord) -> None:
        """Keep a record, and append it to the log: from the event loop, since a thread may have logged it."""
        super().keep(service, record)
        text = f"{service}: {record.levelname} {record.getMessage()}\n"
        self._loop.call_soon_threadsafe(self._host.log, text, "stdout")


@dataclass(slots=True)
class _Running:
    """One service: what it is, its program if it has one, and how it is."""

    name: str
    image: str
    program: GuestProgram | None = None
    service: ComposeService | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    ended: str = ""

    def status(self, machine: str) -> ServiceStatus:
        """Return how it is, in the words of `docker ps`."""
        text = f"Exited (1): {self.ended}" if self.ended else "Up"
        if self.program is None:
            text = "Created: not run without containers"
        return ServiceStatus(
            self.name,
            self.image,
            "created" if self.program is None else "exited" if self.ended else "running",
            text,
            hashlib.sha256(f"{machine}/{self.name}".encode()).hexdigest(),
            " ".join(self.service.command) if self.service else "",
            self.created,
        )


class ProcessWorkload:
    """Runs what it knows of one machine's services."""

    def __init__(self, guest: BootedGuest, site: ProgramSite) -> None:
        self._guest, self._site = guest, site
        self._services: dict[str, _Running] = {}
        self._logs = _MachineLogs(guest.host)
        self._exit = AsyncExitStack()
        self._network = GuestNetwork(())

    async def start(self) -> None:
        """Start the programs, the webhooks before the KMS."""
        guest, manifest = self._guest, self._guest.domain.manifest
        guest.progress("setting up docker")
        if manifest.init_script:
            self._log("init scripts are not run")
        if json.loads(guest.launch.compose_file).get("pre_launch_script"):
            self._log("the pre-launch script is not run")
        if manifest.runner == "bash":
            guest.progress("running main script")
            self._log("scripts are not run: the guest's agent alone runs")
            return
        guest.progress("starting containers")
        try:
            await self._start_all(ComposeFile.parse(manifest.docker_compose_file or "", guest.environment))
        except OSError as error:
            raise GuestError(f"failed to start containers: {error.filename}: {error.strerror}") from error
        except GuestError as error:
            raise GuestError(f"failed to start containers: {error}") from error
        if others := [each.name for each in self._services.values() if each.program is None]:
            self._log(f"without containers these services are not started: {', '.join(others)}")
            guest.progress(f"not started: {', '.join(others)}"[:1000])

    def _log(self, text: str) -> None:
        self._guest.host.log(f"[dstack] {text}\n")

    async def _start_all(self, file: ComposeFile) -> None:
        self._logs.attach()
        self._exit.callback(self._logs.detach)
        self._network = GuestNetwork(tuple(file.services))
        for name in file.services:
            image = file.image(name)
            make = program_for(image, file.command(name))
            running = self._services[name] = _Running(name, image)
            if make is not None:
                running.service = file.service(name)
                running.program = make(self._container(running.service))
        self._require_ports()
        programs = [each for each in self._services.values() if each.program is not None]
        for each in sorted(programs, key=lambda each: isinstance(each.program, KmsProgram)):
            await self._start(each)

    def _container(self, service: ComposeService) -> Container:
        launch = self._guest.launch
        return Container(
            service,
            ContainerFiles.of(service, launch.folder, self._guest.run),
            self._network.route_of(service.name),
            self._site,
            self._site.seed.child(f"machine {launch.manifest.id}").child(f"service {service.name}"),
            lambda text: self._log(f"{service.name}: {text}"),
        )

    def _require_ports(self) -> None:
        """Raise `GuestError` if two services have one port of the machine."""
        taken: dict[tuple[Protocol, int], str] = {}
        for name, each in self._services.items():
            for key in (each.service.ports or {}) if each.service else ():
                if key in taken:
                    raise GuestError(f"{name}: port {key[1]}/{key[0]} of the machine is that of {taken[key]} already")
                taken[key] = name

    async def _start(self, running: _Running) -> None:
        program = running.program
        assert program is not None  # noqa: S101 - the caller's choice
        self._exit.push_async_callback(program.stop)
        self._network.running[running.name] = program.endpoint
        with self._logs.of(running.name):
            await program.start()
            task = begin_in_background(self._watch(running, program), f"service {running.name}")
        self._exit.push_async_callback(_cancelled, task)

    async def _watch(self, running: _Running, program: GuestProgram) -> None:
        """Report that a program ended, and start it again if its service says so."""
        while True:
            reason = await program.wait()
            self._log(f"{running.name} ended: {reason}")
            running.ended = reason
            if running.service is None or not running.service.restarts:
                return
            await asyncio.sleep(RESTART_PAUSE)
            await program.stop()
            try:
                await program.start()
            except GuestError as error:
                self._log(f"{running.name} does not start again: {error}")
                running.ended = str(error)
                return
            running.ended = ""

    def endpoint(self, protocol: Protocol, port: int) -> Endpoint | None:
        """Return what a service has published at a port of the machine, or has there in the machine's own network."""
        for each in self._services.values():
            if each.program is None or each.service is None:
                continue
            inside = port if each.service.host_network else (each.service.ports or {}).get((protocol, port))
            endpoint = None if inside is None or protocol != "tcp" else each.program.endpoint(inside)
            if endpoint is not None:
                return endpoint
        return None

    async def services(self) -> Sequence[ServiceStatus]:
        """Return the services of the compose file."""
        return [each.status(self._guest.launch.manifest.id) for each in self._services.values()]

    async def logs(self, service: str, lines: int) -> bytes:
        """Return the last lines that a program logged."""
        if service not in self._services:
            raise GuestError(f"no service {service!r:.100} runs in this machine")
        found = self._logs.lines(service)[-lines:] if lines else []
        return "".join(f"{line}\n" for line in found).encode()

    async def shutdown(self) -> None:
        """Do nothing: the programs end in order at any time."""

    async def stop(self) -> None:
        """End the programs."""
        await self._exit.aclose()


async def _cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class ProcessWorkloads:
    """Makes workloads that need no container engine."""

    site: ProgramSite

    def of(self, guest: BootedGuest) -> ProcessWorkload:
        """Return the workload of a machine."""
        return ProcessWorkload(guest, self.site)

    async def discard(self, vm_id: str) -> None:
        """Do nothing: a machine leaves nothing outside its folder."""
