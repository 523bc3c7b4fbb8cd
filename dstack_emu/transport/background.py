"""Work that goes on until it is cancelled, and that nobody waits for."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final

_log: Final = logging.getLogger(__name__)


def begin_in_background(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """Begin work as a task of that name, for a caller that keeps the task and cancels it at its end.

    An error that ends the work is logged at once, with its traceback: nobody else would hear of it.
    """
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_report)
    return task


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("%s: ended by an error", task.get_name(), exc_info=error)
