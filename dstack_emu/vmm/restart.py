"""The restart policy of one machine: when one that ended by itself is started again. Times are arguments, in seconds.

Source: dstack `vmm/src/app.rs` (AutoRestartState) at 312dc605.
"""

from dataclasses import dataclass
from typing import Literal

from dstack_emu.vmm.config import AutoRestartSection


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done about a machine that ended.

    `number` is the delay in seconds of `scheduled`, the number of the attempt of `restart`, and of all of `exhausted`.
    """

    kind: Literal["wait", "scheduled", "restart", "exhausted"]
    number: int = 0


_WAIT = Decision("wait")


class RestartState:
    """The attempts to restart one machine. They are forgotten when the VMM ends."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all attempts, as when a person starts or stops the machine."""
        self._attempts = 0
        self._next: float | None = None
        self._healthy_since: float | None = None
        self._is_reported = False

    def observe_running(self, now: float, settings: AutoRestartSection) -> bool:
        """Note that the machine runs; return whether it has run for so long that its attempts are forgotten."""
        if self._healthy_since is None:
            self._healthy_since = now
        if self._attempts == 0 or now - self._healthy_since < settings.reset_window:
            return False
        self.reset()
        return True

    def observe_exited(self, now: float, settings: AutoRestartSection) -> Decision:
        """Decide about a machine that ended by itself."""
        self._healthy_since = None
        if self._attempts >= settings.max_retries:
            decision = _WAIT if self._is_reported else Decision("exhausted", self._attempts)
            self._is_reported = True
            return decision
        if self._next is None:
            self._next = now + settings.initial_backoff
            return Decision("scheduled", settings.initial_backoff)
        if now < self._next:
            return _WAIT
        self._attempts += 1
        self._next = now + min(settings.initial_backoff * 2**self._attempts, settings.max_backoff)
        return Decision("restart", self._attempts)
