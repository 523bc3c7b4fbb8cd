"""A stack as a user runs it: the command in a process of its own, on free ports, asked over its sockets."""

import asyncio
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dstack_emu.attest.release import RELEASES
from tests.processes import Command, start

READY_TIMEOUT = 120


class RunningStack:
    """What a ready `dstack-emu up --json` printed, and curl to ask it with."""

    def __init__(self, description: dict[str, Any], process: Command, errors: IO[str]) -> None:
        self.description, self.process, self._errors = description, process, errors
        self.services: dict[str, str] = description["services"]
        self.release = RELEASES[description["release"]]
        self.policies = {side: Path(path) for side, path in description["policies"].items()}

    def curl(self, url: str, *arguments: str) -> tuple[int, str]:
        """Ask with curl as a person would; return status and body.

        With `-k`: certificates are checked where a test says so.
        """
        command = ["curl", "-sk", "--max-time", "20", "-w", "\n%{http_code}", *arguments, url]
        out = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
        body, _, status = out.rpartition("\n")
        return int(status), body

    def rpc(self, service: str, method: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """POST one pRPC in JSON at /prpc of a service; return status and parsed body."""
        scheme, rest = self.services[service].split("://")
        if service.startswith("kms") and not method.startswith("Onboard."):
            scheme = "https"  # the port speaks TLS once the onboard phase is over
        content = ("-H", "Content-Type: application/json", "-d", json.dumps(body or {}))
        status, text = self.curl(f"{scheme}://{rest}/prpc/{method}?json", "-X", "POST", *content)
        return status, json.loads(text)

    def reset(self) -> None:
        """Restore the state in which it became ready."""
        answer = self.curl(f"{self.services['control']}/reset", "-H", "Content-Type: application/json", "-d", "{}")
        assert answer[0] == 200, answer

    def said(self) -> str:
        """Return what the command has written to stderr so far."""
        return Path(f"/proc/self/fd/{self._errors.fileno()}").read_text()

    def ended(self) -> tuple[int, str]:
        """Wait until the command has ended by itself; return its exit status and what it wrote to stderr."""
        status = self.process.wait(READY_TIMEOUT)
        self._errors.seek(0)
        return status, self._errors.read()

    @contextmanager
    def policy_changed(self, side: str, change: Callable[[dict[str, Any]], object]) -> Iterator[None]:
        """Edit the policy file of one side while the block runs, and put the old text back after it."""
        path = self.policies[side]
        before = path.read_text()
        policy = json.loads(before)
        change(policy)
        path.write_text(json.dumps(policy))
        try:
            yield
        finally:
            path.write_text(before)


@contextmanager
def running_kms(config: Path, agent: str, said: dict[str, Any] | None = None, *arguments: str) -> Iterator[str]:
    """Run `dstack-emu kms` on a kms.toml until the block ends, and yield its URL; the agent's address is upstream's.

    The line that it prints when it is ready goes into `said`.
    """
    with tempfile.TemporaryFile("w+") as errors:  # more is logged than a pipe holds
        environment = {"DSTACK_AGENT_ADDRESS": agent}
        process = start("kms", "--config", str(config), "--json", *arguments, stderr=errors, environment=environment)
        try:
            line = process.stdout.readline()
            if not line:
                process.wait(READY_TIMEOUT)
                errors.seek(0)
                raise AssertionError(f"the KMS ended with {process.returncode}: {errors.read()}")
            description: dict[str, Any] = json.loads(line)
            if said is not None:
                said.update(description)
            yield description["url"]
        finally:
            process.end()


@contextmanager
def running_stack(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[RunningStack]:
    """Run `dstack-emu up --json --free-ports …` until the block ends."""
    with tempfile.TemporaryFile("w+") as errors:  # more is logged than a pipe holds
        process = start("up", "--json", "--free-ports", *arguments, stderr=errors, environment=environment)
        try:
            line = process.stdout.readline()
            if not line:
                process.wait(READY_TIMEOUT)
                errors.seek(0)
                raise AssertionError(f"the stack ended with {process.returncode}: {errors.read()}")
            yield RunningStack(json.loads(line), process, errors)
        finally:
            process.end()


@contextmanager
def counted_turns() -> Iterator[list[int]]:
    """Count the turns of the event loop."""
    turns = [0]

    async def turn() -> None:
        while True:
            await asyncio.sleep(0)
            turns[0] += 1

    task = asyncio.create_task(turn())
    try:
        yield turns
    finally:
        task.cancel()
