"""Work in the background: an error that ends it is logged at once, and a cancellation is not."""

import asyncio
import logging

import pytest

from dstack_emu.transport.background import begin_in_background


async def _fail() -> None:
    raise ZeroDivisionError("of the work")


async def _wait() -> None:
    await asyncio.Event().wait()


async def test_error_that_ends_the_work_is_logged_while_the_task_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    task = begin_in_background(_fail(), "polls")
    await asyncio.wait((task,))
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.ERROR, "polls: ended by an error")
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "of the work"


async def test_cancellation_and_an_end_of_its_own_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    endless = begin_in_background(_wait(), "endless")
    short = begin_in_background(asyncio.sleep(0), "short")
    await short
    endless.cancel()
    await asyncio.wait((endless,))
    assert endless.cancelled()
    assert not caplog.records
