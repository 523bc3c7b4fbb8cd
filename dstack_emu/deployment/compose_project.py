"""The compose project of a machine, by `docker compose`.

The decrypted environment is passed to Compose as variables of its process, and the compose file by its standard input:
neither is written to the disk. Source of the commands: the reference of Docker Compose, from 2.24 on.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dstack_emu.deployment.compose_reads import require_own, require_own_files
from dstack_emu.deployment.container_engine import Engine, Output, passed_on

Document = Mapping[str, Any]
_PULLED_IF_MISSING: Final = (None, "missing", "if_not_present")


@dataclass(frozen=True, slots=True)
class ComposeProject:
    """A project on an engine: its name, the folder with its docker-compose.yaml, and where its steps are logged."""

    engine: Engine
    name: str
    home: Path
    log: Callable[[str], None]

    async def configured(self, environment: Mapping[str, str]) -> dict[str, Any]:
        """Return the compose file as Compose reads it, with the app's variables and files alone; raise `GuestError`."""
        file, variables = self.home / "docker-compose.yaml", self.home / ".env"
        require_own_files(file, self.home)
        require_own(variables, self.home, "/dstack/.env")
        command = self._command("--file", str(file), "config", "--format", "json", variables=variables)
        result = await self.engine.run(*command, variables=passed_on(environment), has_secrets=True, sees_host=False)
        document: dict[str, Any] = json.loads(result.succeeded("docker_compose_file").stdout)
        return document

    async def start(self, document: Document, environment: Mapping[str, str]) -> None:
        """Do what `docker compose up --detach --build --remove-orphans` does; raise `GuestError`.

        Its steps are commands of their own, because only the one that creates containers must not be killed.
        """
        services: Mapping[str, Any] = document.get("services") or {}
        if any(service.get("build") for service in services.values()):
            await self._step(document, environment, "build")
        pulled = [service for service in services.values() if not service.get("build") and service.get("image")]
        if not await self._has_images(pulled):
            for service in pulled:
                service.setdefault("pull_policy", "missing")
            await self._step(document, environment, "pull", "--ignore-buildable")
        options = ("--no-build", "--pull", "never", "--remove-orphans")
        await self._step(document, environment, "create", *options, creates=True)
        await self._step(document, environment, "start")

    async def wait(self, services: Sequence[str], document: Document, environment: Mapping[str, str]) -> None:
        """Wait until the health checks of some services succeed; raise `GuestError`."""
        if services:
            options = ("--detach", "--wait", "--no-recreate", "--no-deps")
            await self._step(document, environment, "up", *options, *services)

    async def follow(self, output: Output) -> None:
        """Pass on what the containers print, until they have ended."""
        await self.engine.run(*self._command("logs", "--follow", "--no-color"), output=output)

    async def _has_images(self, services: Sequence[Document]) -> bool:
        """Return whether the engine has what the policies of services demand without a pull."""
        if not all(service.get("pull_policy") in (*_PULLED_IF_MISSING, "never") for service in services):
            return False
        names = [service["image"] for service in services if service.get("pull_policy") in _PULLED_IF_MISSING]
        return not names or await self.engine.has_images(*names)

    async def _step(
        self, document: Document, environment: Mapping[str, str], command: str, *options: str, creates: bool = False
    ) -> None:
        result = await self.engine.run(
            *self._command("--file", "-", command, *options),
            text=json.dumps(document),
            variables=passed_on(environment),
            output=lambda line, _: self.log(line),
            creates=creates,
        )
        result.succeeded(f"docker compose {command}")

    def _command(self, *arguments: str, variables: Path = Path(os.devnull)) -> tuple[str, ...]:
        """Return the words of a command; `variables` is a file of them, which need not exist."""
        file = str(variables if variables.is_file() else os.devnull)
        options = ("--ansi", "never", "--progress", "plain", "--env-file", file, "--project-name", self.name)
        return ("compose", *options, "--project-directory", str(self.home), *arguments)
