"""Starts machines again that ended by themselves, as their restart policies decide."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from dstack_emu.transport.events import EventLog
from dstack_emu.vmm.config import AutoRestartSection
from dstack_emu.vmm.restart import Decision
from dstack_emu.vmm.vm import Vm

EXHAUSTED: Final = "vmm.auto_restart.exhausted"


@dataclass(frozen=True, slots=True)
class Restarter:
    """Looks at the machines `vms`, and starts one with `start`, which raises nothing.

    If it does not back off, it starts each that ended whenever it looks.
    """

    settings: AutoRestartSection
    vms: Mapping[str, Vm]
    start: Callable[[Vm], Awaitable[None]]
    log: EventLog
    backs_off: bool = True

    async def run(self) -> None:
        """Look at the machines every `interval`, until this is cancelled."""
        while True:
            await asyncio.sleep(self.settings.interval)
            await self.look(time.monotonic())

    async def look(self, now: float) -> None:
        """Look at the machines once; `now` is in seconds."""
        for vm in list(self.vms.values()):
            if vm.is_removing or not vm.is_started:
                vm.restart.reset()
            elif vm.is_alive:
                if vm.restart.observe_running(now, self.settings):
                    self.log.info("automatic restart retry budget reset after healthy window", id=vm.id)
            elif not self.backs_off:
                self.log.info("automatic restart", id=vm.id)
                await self.start(vm)
            else:
                await self._carry_out(vm, vm.restart.observe_exited(now, self.settings))

    async def _carry_out(self, vm: Vm, decision: Decision) -> None:
        match decision.kind:
            case "scheduled":
                self.log.info("automatic restart scheduled", id=vm.id, delay_secs=decision.number)
            case "exhausted":
                self.log.warning("automatic restart retry limit exhausted", id=vm.id, attempts=decision.number)
                vm.record(EXHAUSTED, f"Automatic restart stopped after {decision.number} failed attempts")
            case "restart":
                self.log.info("automatic restart attempt", id=vm.id, attempt=decision.number)
                await self.start(vm)
