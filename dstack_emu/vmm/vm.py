"""One machine as the VMM knows it: its state, its events, and what runs it."""

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.attest.release import Release
from dstack_emu.transport.events import EventLog
from dstack_emu.vmm.checks import human_time
from dstack_emu.vmm.config import VmmConfig
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.logs import MachineLogs
from dstack_emu.vmm.machine import Launch, Machine, MachineFactory
from dstack_emu.vmm.manifest import Manifest
from dstack_emu.vmm.restart import RestartState
from dstack_emu.vmm.store import INSTANCE_INFO, MachineFolder

MAX_PAYLOAD: Final = 4096
"""The size of an event's payload in bytes, above which the event is dropped."""

Status = Literal["running", "stopping", "stopped", "exited", "removing"]
ProcessStatus = Literal["running", "stopped", "exited(0)"]

_log = EventLog("dstack_emu.vmm")


@dataclass(frozen=True, slots=True)
class GuestEvent:
    """An event that a guest reported; `time` is in milliseconds since 1970."""

    event: str
    payload: str
    time: int


class Vm:
    """A machine: its folder, whether it is to run, and the machine that runs. It is the host API of its guest.

    `process` is the status of its process, None before its first start and after it was removed.
    """

    def __init__(
        self,
        folder: MachineFolder,
        manifest: Manifest,
        cid: int,
        *,
        clock: Callable[[], float],
        config: VmmConfig,
        release: Release,
    ) -> None:
        self.folder, self.manifest, self.cid = folder, manifest, cid
        cvm = config.cvm
        self.logs = MachineLogs(
            folder.path,
            cvm.log.max_bytes,
            cvm.log.max_backups,
            rotates=release.vmm_rotates_logs,
            history_bytes=cvm.serial_history_max_bytes,
        )
        self.is_started = folder.is_started()
        self.is_removing = False
        self.boot_progress = self.boot_error = self.shutdown_progress = ""
        self.events: deque[GuestEvent] = deque(maxlen=config.event_buffer_size)
        self.restart = RestartState()
        self.process: ProcessStatus | None = None
        self._clock = clock
        self._machine: Machine | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self._started_at: float | None = None
        self._exited_at: float | None = None

    # ---- what it says of itself

    @property
    def id(self) -> str:
        """Its id."""
        return self.manifest.id

    @property
    def is_alive(self) -> bool:
        """Return whether a machine runs."""
        return self._machine is not None

    @property
    def status(self) -> Status:
        """Return its status, as VmInfo has it."""
        if self.is_removing:
            return "removing"
        if self.is_started:
            return "running" if self.is_alive else "exited"
        return "stopping" if self.is_alive else "stopped"

    @property
    def is_at_rest(self) -> bool:
        """Return whether its resources may be changed."""
        return self.status in ("stopped", "exited")

    @property
    def instance_id(self) -> str:
        """Return the instance id that its guest reported (hex), empty before."""
        return self.folder.instance_info().get("instance_id", "")

    def uptime(self) -> str:
        """Return how long it has run, or ran the last time."""
        if self._started_at is None:
            return "never"
        end = self._clock() if self.is_alive or self._exited_at is None else self._exited_at
        return human_time(end - self._started_at)

    def exited_at(self) -> str:
        """Return how long ago it ended, `never` if it did not."""
        return "never" if self._exited_at is None else f"{human_time(self._clock() - self._exited_at)} ago"

    def recorded_events(self) -> list[pb.GuestEvent]:
        """Return the last events of its guest."""
        return [pb.GuestEvent(event=each.event, body=each.payload, timestamp=each.time) for each in self.events]

    # ---- running

    async def start(self, launch: Callable[[], Launch], factory: MachineFactory) -> None:
        """Start it unless it runs; raise `VmmError` if it cannot be started.

        `launch` is called when no other start or stop is in progress.
        """
        async with self._changing:
            if self.is_removing:
                raise VmmError("VM is being removed")
            prepared = launch()
            self.set_started(True)
            self.boot_error = self.shutdown_progress = ""
            if self._machine is not None:
                self.boot_progress = "running"
                return
            self.boot_progress = "booting"
            self._begin_logs()
            self._machine = await factory.start(prepared, self)
            self.process = "running"
            self._started_at, self._exited_at = self._clock(), None
            self._watcher = asyncio.create_task(self._watch(self._machine), name=f"machine {self.id}")

    async def _watch(self, machine: Machine) -> None:
        await machine.wait()
        self._machine, self._exited_at, self.process = None, self._clock(), "exited(0)"

    async def stop(self) -> None:
        """End it at once, and mark it as not started."""
        self.set_started(False)
        await self.end_process()

    async def shutdown(self) -> None:
        """Let its guest power off; raise `VmmError` if it does not run."""
        await self.machine().shutdown()

    async def close(self) -> None:
        """End the machine; what is stored of it stays as it is, so that the next start of the VMM starts it again."""
        await self.end_process()
        self.logs.close()

    async def end_process(self) -> None:
        """End what runs it, whether or not it is to run."""
        async with self._changing:
            if self._machine is not None:
                await self._machine.stop()
                if self._watcher is not None:
                    with contextlib.suppress(asyncio.CancelledError):
                        await self._watcher
            if self.process is not None:
                self.process = "stopped"

    def machine(self) -> Machine:
        """Return the machine that runs; raise `VmmError` if none does."""
        if self._machine is None:
            raise VmmError(f"vm {self.id} is not running")
        return self._machine

    def set_started(self, started: bool) -> None:
        """Store whether it is to run."""
        if started != self.is_started:
            self.folder.set_started(started)
        self.is_started = started

    def _begin_logs(self) -> None:
        try:
            self.logs.begin_boot(self._clock())
        except OSError as error:
            raise VmmError(f"{self.folder.path}: {error.strerror}") from error

    # ---- the host API

    def notify(self, event: str, payload: str) -> None:
        """Handle an event of its guest."""
        if len(payload.encode()) > MAX_PAYLOAD:
            return
        match event:
            case "boot.progress":
                self.boot_progress = payload
            case "boot.error":
                self.boot_error = payload
            case "shutdown.progress":
                self.shutdown_progress = payload
                if payload == "powering off":
                    self.set_started(False)
            case "instance.info":
                self.folder.write(INSTANCE_INFO, json.dumps(json.loads(payload)).encode())
        self.record(event, payload)

    def record(self, event: str, payload: str) -> None:
        """Keep an event, and drop the oldest one if there are too many."""
        self.events.append(GuestEvent(event, payload, int(self._clock() * 1000)))

    def log(self, text: str, channel: str = "serial") -> None:
        """Append a text to one of its logs; a text that cannot be written is lost, and the machine runs on."""
        try:
            self.logs.append(channel, text)
        except OSError as error:
            _log.warning("log not written", id=self.id, channel=channel, reason=error.strerror or str(error))
