"""The process of a KMS that is another program: its kms.toml is written, its command is run, and it is waited for.

The program finds its guest agent by the variable DSTACK_AGENT_ADDRESS, as upstream's does. Whoever runs it without a
command of ours, in a debugger or a container, gets the same file and the same address. Nothing here knows what a KMS
answers, except that `/health` has the status 200 in both phases, without TLS in the first one and with TLS after that.
"""

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dstack_emu.deployment.authorization import Phase, PolledPhase, plain_url, tls_url
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.kms_toml import KmsSettings

PLACE_OF_CONFIG: Final = "{config}"
AGENT_VARIABLE: Final = "DSTACK_AGENT_ADDRESS"

PAUSE: Final = 0.05
"""Seconds between two attempts to reach a KMS that does not answer yet."""
ATTEMPT: Final = 5.0
"""The timeout of one attempt in seconds."""
TELLING: Final = 1.0
"""Seconds without an answer from which on an attempt tells that the program does not answer."""
REPORTED_EVERY: Final = 5.0
"""Seconds between two lines that tell what is waited for."""
GRACE: Final = 5.0
"""Seconds that a program has to end after SIGTERM, before it is killed."""
LAST_LINES, LAST_BYTES = 8, 4096
"""How much of a program's output an error shows."""


def command_words(command: str, config: Path) -> list[str]:
    """Split a command line as a shell does, and put the path of kms.toml in the place of `{config}`.

    Raises `StackError`, which says what is wrong with it.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise StackError(f"the command {command!r:.200} cannot be split into words: {error}") from error
    if not any(PLACE_OF_CONFIG in word for word in words):
        raise StackError(
            f"the command {command!r:.200} has no {PLACE_OF_CONFIG}: "
            f"write it where the path of kms.toml belongs, as in 'dstack-kms -c {PLACE_OF_CONFIG}'"
        )
    return [word.replace(PLACE_OF_CONFIG, str(config)) for word in words]


@dataclass(frozen=True, slots=True)
class KmsFiles:
    """The files of a foreign KMS: its configuration, and what it prints."""

    config: Path
    log: Path

    @classmethod
    def in_folder(cls, folder: Path) -> "KmsFiles":
        """Name the files in a folder."""
        return cls(folder / "kms.toml", folder / "kms.log")


class KmsProcess:
    """A KMS that is another program. `start` it, wait until it `answers`, and `stop` it.

    `name` is what messages call it, `url` where it answers (of either scheme), `agent` the address of its guest agent
    (unix:/path or http://host:port). `command` is run without a shell; with None, somebody else starts the program, and
    it is only waited for. `patience` is how many seconds it has until it answers, `progress` tells what is waited for.
    """

    def __init__(
        self,
        name: str,
        settings: KmsSettings,
        files: KmsFiles,
        *,
        url: str,
        agent: str,
        command: str | None,
        patience: float,
        progress: Callable[[str], None],
    ) -> None:
        self.name, self.settings, self.files, self.url, self.agent = name, settings, files, url, agent
        self._command, self._patience, self._progress = command, patience, progress
        self._phases = PolledPhase(name, url)
        self._process: asyncio.subprocess.Process | None = None
        self._restarting = asyncio.Lock()
        self._claim: socket.socket | None = None

    # ---- starting and stopping

    async def start(self) -> None:
        """Write kms.toml and run the command, if there is one; raise `StackError` if that cannot be done."""
        words = None if self._command is None else command_words(self._command, self.files.config)
        try:
            self.settings.write(self.files.config)
        except OSError as error:
            raise StackError(f"{self.name}: {self.files.config} cannot be written: {error.strerror}") from error
        if words is None:
            self._progress(f"{self.name} is yours to start: {self._how_to_start}")
            return
        self._claim = self._claimed_port()
        try:
            with self.files.log.open("wb") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *words,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, AGENT_VARIABLE: self.agent},
                    start_new_session=True,  # a terminal's Ctrl-C is for us, and its children are stopped with it
                )
        except OSError as error:
            self._release_port()
            missing = isinstance(error, FileNotFoundError)
            reason = ": command not found" if missing else f" cannot be run: {error.strerror}"
            raise StackError(f"{self.name}: {words[0]}{reason}") from error

    def _claimed_port(self) -> socket.socket:
        """Bind its port, so that the system gives it to nobody until it answers: others would be taken for this KMS.

        The socket does not listen, so a program that sets SO_REUSEADDR, as servers do, can bind the port as well.
        Raises `StackError` if another program listens there.
        """
        host, port = self.settings.host, self.settings.port
        claim = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            claim.bind((host, port))
        except OSError as error:
            claim.close()
            raise StackError(f"{self.name}: {host}:{port} cannot be its address: {error.strerror}") from error
        return claim

    def _release_port(self) -> None:
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    async def stop(self) -> None:
        """End the program that was started here, and the processes that it started: SIGTERM, after 5 s SIGKILL."""
        self._release_port()
        process = self._process
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.returncode is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), GRACE)

    async def restart(self) -> Phase:
        """Stop the program, run its command again, and return its phase.

        Raises `StackError` if it does not answer, or if it is not run here.
        """
        if self._process is None:
            raise StackError(f"{self.name} is run by somebody else: restart it there")
        async with self._restarting:
            await self.stop()
            await self.start()
        return await self.answers()

    # ---- waiting

    async def answers(self) -> Phase:
        """Wait until it answers, and return its phase.

        Raises `StackError` if the program ends, or does not answer in time; the text says what was waited for, and has
        the last lines of the program.
        """
        began, reported, problem = time.monotonic(), 0.0, ""
        while (waited := time.monotonic() - began) < self._patience:
            self._require_running("before it answered")
            if waited - reported >= REPORTED_EVERY:
                reported = waited
                self._progress(
                    f"waiting for {self.name} at {self.url} ({waited:.0f} of {self._patience:g} s): {problem}"
                )
            attempt = min(ATTEMPT, self._patience - waited)
            try:
                async with asyncio.timeout(attempt):
                    phase = await self.phase()
                self._release_port()
                return phase
            except TimeoutError:
                # The last attempt may be too short to tell anything: what the one before it met is the better reason.
                if not problem or attempt >= TELLING:
                    problem = "it accepts connections and does not answer"
            except StackError as error:
                problem = str(error)
            await asyncio.sleep(PAUSE)
        self._require_running("before it answered")
        raise StackError(f"{problem}; waited {self._patience:g} s for it: {self._how_to_start}{self._output}")

    async def phase(self) -> Phase:
        """Return its phase; raise `StackError` if it does not answer, or is neither in the one nor the other."""
        return await self._phases.current()

    async def reached_runtime(self) -> None:
        """Wait until it answers over TLS; raise `StackError` after 30 s, or if the program ends."""
        reached, ended = asyncio.ensure_future(self._phases.reached_runtime()), asyncio.ensure_future(self.ended())
        try:
            await asyncio.wait((reached, ended), return_when=asyncio.FIRST_COMPLETED)
            if not reached.done():
                self._require_running("instead of its runtime phase")
            try:
                reached.result()
            except StackError as error:
                raise StackError(f"{error}{self._output}") from error
        finally:
            reached.cancel()
            ended.cancel()
            await asyncio.gather(reached, ended, return_exceptions=True)

    async def ended(self) -> None:
        """Wait until the program ends, which is an error whatever its status is: raise `StackError`.

        A program that somebody else started is not watched; then this does not return.
        """
        while (process := self._process) is not None:
            await process.wait()
            async with self._restarting:
                if self._process is process:
                    self._require_running("while it was needed")
        await asyncio.get_running_loop().create_future()

    def _require_running(self, when: str) -> None:
        process = self._process
        if process is None or process.returncode is None:
            return
        status = process.returncode
        how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
        raise StackError(f"{self.name}: the command {self._command!r:.200} ended {how} {when}{self._output}")

    @property
    def is_run_here(self) -> bool:
        """Whether it is run by a command of ours."""
        return self._command is not None

    def url_of(self, phase: Phase) -> str:
        """Return its URL in a phase."""
        return plain_url(self.url) if phase == "onboard" else tls_url(self.url)

    # ---- what messages say

    @property
    def _how_to_start(self) -> str:
        where = f"kms.toml is {self.files.config}, its agent is {AGENT_VARIABLE}={self.agent}"
        if self._command is not None:
            return f"it is run by {self._command!r:.200}; {where}"
        return f"start it at {self.url}; {where}"

    @property
    def _output(self) -> str:
        if self._process is None:
            return ""
        lines = self.last_lines()
        if not lines:
            return f"; it printed nothing to {self.files.log}"
        return "".join([f"; the last lines in {self.files.log}:", *(f"\n  {line}" for line in lines)])

    def last_lines(self) -> list[str]:
        """Return the last lines of the program's output, at most 8."""
        try:
            with self.files.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - LAST_BYTES))
                return log.read().decode(errors="backslashreplace").splitlines()[-LAST_LINES:]
        except OSError:
            return []
