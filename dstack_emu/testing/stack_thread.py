"""A stack in a thread with its own event loop, for callers without a loop or with another one.

Every call runs in that thread while the caller's thread waits, and an exception is raised again in the caller's thread.
A caller in a coroutine blocks its own loop meanwhile.
"""

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

from dstack_emu.control.api import Control
from dstack_emu.deployment.config import StackConfig
from dstack_emu.deployment.errors import PartEndedError, StackError
from dstack_emu.stack import Stack

T = TypeVar("T")


class StackThread:
    """Runs one stack from `start` to `stop`."""

    def __init__(self, config: StackConfig) -> None:
        self._config = config
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._ready: Future[Stack] = Future()
        self._ended: Future[None] = Future()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="dstack-emu", daemon=True)

    def start(self) -> Stack:
        """Start the stack; raise the error if it does not start."""
        self._thread.start()
        return self._ready.result()

    def stop(self) -> None:
        """Stop the stack; raise the error of a part that has failed meanwhile."""
        if self._loop is not None and self._stopping is not None and not self._ended.done():
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._ended.result()

    def call(self, function: Callable[[], T]) -> T:
        """Call a function in the stack's thread."""

        async def called() -> T:
            return function()

        return self.wait(called())

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the stack's thread, and return its result."""
        if self._loop is None or self._ended.done() or threading.current_thread() is self._thread:
            work.close()
            raise self._not_running()
        try:
            result = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError as error:  # the loop was closed meanwhile
            work.close()
            raise self._not_running() from error
        either: list[Future[Any]] = [result, self._ended]
        wait(either, return_when=FIRST_COMPLETED)
        if not result.done() or result.cancelled():
            raise self._not_running()
        return result.result()

    def _not_running(self) -> StackError:
        if threading.current_thread() is self._thread:
            return StackError("the stack's own thread cannot wait for itself: use the `Stack` and its `control` there")
        why = "" if self._failure is None else f": {self._failure}"
        return StackError(f"the stack does not run{why}")

    def _run(self) -> None:
        try:
            asyncio.run(self._live())
        except BaseException as error:  # raised again by `start` or `stop`, in the thread that waits
            (self._ended if self._ready.done() else self._ready).set_exception(error)
        if not self._ended.done():
            self._ended.set_result(None)

    async def _live(self) -> None:
        self._stopping = asyncio.Event()
        try:
            async with Stack(self._config) as stack:
                self._loop = asyncio.get_running_loop()
                self._ready.set_result(stack)
                await self._stopping.wait()
        except PartEndedError as error:
            self._failure = error  # set before the loop cancels the calls that still wait
            raise


class SyncControl:
    """The calls of `control.api.Control` with the same names and arguments, without `await`."""

    def __init__(self, thread: StackThread, control: Control) -> None:
        self._thread, self._control = thread, control

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or not inspect.isfunction(getattr(Control, name, None)):
            raise AttributeError(f"the control has no call {name!r}")
        method = getattr(self._control, name)

        def call(*arguments: Any, **fields: Any) -> Any:
            if inspect.iscoroutinefunction(method):
                return self._thread.wait(method(*arguments, **fields))
            return self._thread.call(lambda: method(*arguments, **fields))

        return call
