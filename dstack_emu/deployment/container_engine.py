"""The container engine of this host, by the `docker` command: what machines made on it is found by labels alone.

Nothing here prunes: what has no label of a machine is never touched. Source of the commands: the reference of the
Docker CLI; they work from Docker 20.10 with Compose 2.24 on.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dstack_emu.simulator.errors import GuestError
from dstack_emu.transport.open_calls import Asked

HOST_NETWORK: Final = "dstack-emu-host"
"""The network whose gateway is 10.0.2.2: the engine gives this host that address, and no container joins it."""

_CLIENT: Final = re.compile(
    r"PATH|HOME|USER|TMPDIR|LANG|LC_ALL|XDG_RUNTIME_DIR|SSH_AUTH_SOCK|DOCKER_\w+|BUILDKIT_\w+|BUILDX_\w+"
    r"|(?i:https?_proxy|no_proxy)"
)
"""The variables of this process that the commands of the engine need."""
_NOT_FROM_APPS: Final = re.compile(rf"{_CLIENT.pattern}|LD_\w+|COMPOSE_(?!PROFILES$)\w+|GO\w+|SSL_CERT_\w+")
"""The variables of an app that would configure the commands on this host."""
_LINES, _LINE_SIZE = 12, 400
"""How much of a failed command's output an error has: lines, and characters of each."""
_ATTEMPTS: Final = 3
"""How often the removal of what has a label is tried."""
DEADLINE: Final = 120.0
"""Seconds that the engine has for a command that neither pulls, builds, starts, nor waits for a container."""
_SHORT: Final = frozenset(
    (
        ("version",),
        ("container",),
        ("network",),
        ("volume",),
        ("rm",),
        ("compose", "version"),
        ("image", "inspect"),
        ("image", "ls"),
        ("image", "rm"),
    )
)
_END: Final = 5.0
"""Seconds until a killed command is no longer waited for."""
_MAX_LINE: Final = 1 << 20
"""The size in bytes above which a line of output is read in parts."""

Output = Callable[[str, str], None]
"""Takes a text, and the name of its stream: `stdout` or `stderr`."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended: its status, what was kept of its stdout, and the last lines of its output."""

    status: int
    stdout: str
    last_lines: str

    def succeeded(self, what: str) -> "Result":
        """Return it if its status is 0; otherwise raise `GuestError`: `what`, and the last lines."""
        if self.status != 0:
            raise GuestError(f"{what}: {self.last_lines or f'status {self.status}, without a word'}")
        return self


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of an app that its commands on this host may have."""
    return {name: value for name, value in environment.items() if is_passed_on(name)}


def is_passed_on(name: str) -> bool:
    """Return whether a variable of an app with this name is one for its commands on this host."""
    return not _NOT_FROM_APPS.fullmatch(name)


@dataclass(frozen=True, slots=True)
class Engine:
    """The engine that the `docker` command of this process reaches."""

    program: str = "docker"

    async def check(self) -> None:
        """Raise `GuestError` if engine or Compose do not answer; the text says what to do."""
        hint = "or choose --vmm-workload process"
        (await self.run("version", "--format", "{{.Server.Version}}")).succeeded(
            f"`{self.program} version`: no container engine answers; start it, {hint}"
        )
        (await self.run("compose", "version", "--short")).succeeded(
            f"`{self.program} compose version`: install the compose plugin of the Docker CLI, {hint}"
        )

    async def run(
        self,
        *arguments: str,
        text: str = "",
        variables: Mapping[str, str] | None = None,
        output: Output | None = None,
        has_secrets: bool = False,
        creates: bool = False,
        sees_host: bool = True,
    ) -> Result:
        """Run a command to its end; it is killed if the caller is cancelled.

        A command that `creates` something is not killed, but awaited also by a caller that is cancelled: the engine
        would go on without it, and what it made would appear after everything was removed. So such a command must not
        pull, build, or wait for a container: it has DEADLINE.

        `text` is its standard input, `variables` are set beside what the client
        needs of this process, or of a guest's environment without `sees_host`, with which no engine is reached. Each
        line of its output is passed on to `output` as it comes, or kept; with `has_secrets` stdout is kept, and in no
        error. Raises `GuestError` if there is no such program.
        """
        environment = {**(variables or {}), **(_client() if sees_host else _client_in_guest())}
        is_short = creates or not sees_host or arguments[:1] in _SHORT or arguments[:2] in _SHORT
        running = self._run(
            *arguments,
            text=text,
            environment=environment,
            output=output,
            has_secrets=has_secrets,
            seconds=DEADLINE if is_short else None,
        )
        return await (_finished(running) if creates else running)

    async def _run(
        self,
        *arguments: str,
        text: str,
        environment: Mapping[str, str],
        output: Output | None,
        has_secrets: bool,
        seconds: float | None,
    ) -> Result:
        last: deque[str] = deque(maxlen=_LINES)
        printed: list[str] = []

        def took(line: str, stream: str) -> None:
            is_kept = stream == "stdout" and (has_secrets or output is None)
            if is_kept:
                printed.append(line)
            elif output is not None:
                output(line, stream)
            if line.strip() and not (is_kept and has_secrets):
                last.append(line.strip()[:_LINE_SIZE])

        what = f"`{' '.join((self.program, *arguments[:2]))}`"
        with Asked(what):
            try:
                async with asyncio.timeout(seconds):
                    status = await self._end_of(arguments, text, environment, took)
            except TimeoutError as error:
                raise GuestError(
                    f"{what}: the container engine did not answer within {DEADLINE:g} s; see whether "
                    f"`{self.program} info` answers"
                ) from error
        return Result(status, "".join(printed), "\n".join(last))

    async def _end_of(self, arguments: tuple[str, ...], text: str, environment: Mapping[str, str], took: Output) -> int:
        """Run a command, and return its status."""
        async with self.process(*arguments, environment=environment) as process:
            assert process.stdin is not None  # noqa: S101 - they are pipes
            assert process.stdout is not None  # noqa: S101
            assert process.stderr is not None  # noqa: S101
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                process.stdin.write(text.encode())
                await process.stdin.drain()
            process.stdin.close()
            await asyncio.gather(
                _pass_on(process.stdout, "stdout", took), _pass_on(process.stderr, "stderr", took), process.wait()
            )
        return process.returncode or 0

    @asynccontextmanager
    async def process(
        self, *arguments: str, environment: Mapping[str, str]
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        """Run a command with pipes; kill it on the way out, if it still runs. Raises `GuestError`."""
        try:
            process = await asyncio.create_subprocess_exec(
                shutil.which(self.program) or self.program,
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
                limit=_MAX_LINE,
                start_new_session=True,  # Ctrl-C in a terminal ends the machine, which then kills the group
            )
        except OSError as error:
            raise GuestError(
                f"`{self.program}`: {error.strerror}: install the Docker CLI with its compose plugin, put it on PATH, "
                "or choose --vmm-workload process"
            ) from error
        try:
            yield process
        finally:
            await _end(process)

    # ---- what has a label

    async def inspect(self, label: str) -> list[dict[str, Any]]:
        """Return the engine's description of each container with a label (`name` or `name=value`)."""
        ids = await self._listed("container", "--all", label=label)
        if not ids:
            return []
        found = await self.run("container", "inspect", *ids)  # fails if one of them ended meanwhile, and has the others
        described: list[dict[str, Any]] = json.loads(found.stdout or "[]")
        return described

    async def stop(self, label: str, *, seconds: int) -> None:
        """Let the containers with a label end after SIGTERM; kill those that run after that many seconds."""
        containers = await self._listed("container", label=label)
        if containers:
            await self.run("container", "stop", "--time", str(seconds), *containers)

    async def end(self, label: str) -> None:
        """Kill and remove all containers and networks with a label; named volumes stay, anonymous ones go.

        Raises `GuestError` if something cannot be removed.
        """
        await self._remove("container", "--force", "--volumes", label=label)
        await self._remove("network", label=label)

    async def discard(self, label: str) -> None:
        """Remove what `end` leaves of a machine with a label: its volumes, and the images that were built for it.

        Raises `GuestError` if something cannot be removed.
        """
        await self._remove("volume", label=label)
        await self._remove("image", label=label)

    async def values(self, label: str, wanted: str) -> set[str]:
        """Return the values of another label on volumes and images with a label."""
        found: set[str] = set()
        for kind, path in (("volume", ".Labels"), ("image", ".Config.Labels")):
            names = await self._listed(kind, label=label)
            if names:
                shown = await self.run(kind, "inspect", "--format", f'{{{{index {path} "{wanted}"}}}}', *names)
                found.update(shown.stdout.split())
        return found

    async def require_image(self, name: str) -> None:
        """Pull an image unless the engine has it; raise `GuestError`."""
        if not await self.has_images(name):
            (await self.run("image", "pull", "--quiet", name)).succeeded("docker image pull")

    async def has_images(self, *names: str) -> bool:
        """Return whether the engine has all of these images."""
        return (await self.run("image", "inspect", "--format", "{{.Id}}", *names)).status == 0

    async def _listed(self, kind: str, *options: str, label: str) -> list[str]:
        listed = await self.run(kind, "ls", "--quiet", *options, "--filter", f"label={label}")
        return list(dict.fromkeys(listed.succeeded(f"`docker {kind} ls`").stdout.split()))

    async def _remove(self, kind: str, *options: str, label: str) -> None:
        """Remove all of a kind that have a label, again if something of it was in use; raise `GuestError`."""
        every = ("--all",) if kind == "container" else ()
        removed = Result(0, "", "")
        for _ in range(_ATTEMPTS):
            names = await self._listed(kind, *every, label=label)
            if not names:
                return
            removed = await self.run(kind, "rm", *options, *names)
            if removed.status == 0:
                return
        removed.succeeded(f"`docker {kind} rm`")

    # ---- the address of the host

    async def add_host_address(self, address: str, subnet: str) -> str:
        """Give this host an address that every container can route to; return why that failed, empty if it did not."""
        if _is_own(address):
            return ""
        made = await self.run("network", "create", "--subnet", subnet, "--gateway", address, HOST_NETWORK, creates=True)
        is_there = made.status == 0 or (await self.run("network", "inspect", HOST_NETWORK)).status == 0
        return "" if is_there else made.last_lines

    async def drop_host_address(self, label: str) -> None:
        """Take the address away unless there are containers with a label, of whichever stack."""
        if not await self._listed("container", "--all", label=label):
            await self.run("network", "rm", HOST_NETWORK)


def _client() -> dict[str, str]:
    """Return the variables of this process that the commands need."""
    return {name: value for name, value in os.environ.items() if _CLIENT.fullmatch(name)}


def _client_in_guest() -> dict[str, str]:
    """Return what a command has in a guest, and where the client's plugins are."""
    plugins = os.environ.get("DOCKER_CONFIG") or str(Path.home() / ".docker")
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "HOME": "/root", "DOCKER_CONFIG": plugins}


async def _finished(running: Coroutine[Any, Any, Result]) -> Result:
    """Await a command to its end, even if that is no longer asked for."""
    task = asyncio.create_task(running)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        with contextlib.suppress(asyncio.CancelledError, GuestError):
            task.result()  # an error that nobody asks for would be logged
        raise


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill a command that still runs, with the plugin that it has started, which would hold its pipes open."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):  # what it started in a session of its own may hold its pipes open
            async with asyncio.timeout(_END):
                await process.communicate()


def _is_own(address: str) -> bool:
    """Return whether this host has an IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.bind((address, 0))
        return True
    return False


async def _pass_on(stream: asyncio.StreamReader, name: str, took: Callable[[str, str], None]) -> None:
    while line := await read_line(stream):
        took(line, name)


async def read_line(stream: asyncio.StreamReader) -> str:
    """Read a line with its end, or a part of one that is too long; empty at the end."""
    try:
        line = await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        line = error.partial
    except asyncio.LimitOverrunError as error:
        line = await stream.readexactly(error.consumed)
    return line.decode(errors="replace")
