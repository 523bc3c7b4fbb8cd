"""Commands of a container engine whose caller was cancelled: which are killed, and which are awaited."""

import asyncio
import os
from pathlib import Path

import pytest

from dstack_emu.deployment.container_engine import Engine
from dstack_emu.simulator.errors import GuestError

CLIENT = """#!/bin/sh
# A command with a plugin, which has its pipes, and does not end with it.
sh -c 'echo began; read end < "$0/end"; touch "$0/made"' "$(dirname "$0")" &
wait
"""


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    program = tmp_path / "docker"
    program.write_text(CLIENT)
    program.chmod(0o755)
    os.mkfifo(tmp_path / "end")
    return Engine(str(program))


async def cancelled(engine: Engine, *, creates: bool) -> "asyncio.Task[object]":
    """Return a command that has begun, and whose caller was cancelled."""
    began = asyncio.Event()
    task: asyncio.Task[object] = asyncio.create_task(engine.run("x", output=lambda *_: began.set(), creates=creates))
    await began.wait()
    task.cancel()
    return task


async def test_command_that_is_cancelled_ends_with_its_plugin(engine: Engine, tmp_path: Path) -> None:
    task = await cancelled(engine, creates=False)
    with pytest.raises(asyncio.CancelledError):
        await task  # which waits until nothing has its pipes
    with pytest.raises(OSError, match="No such device"):  # nothing reads the end of a plugin that runs
        os.open(tmp_path / "end", os.O_WRONLY | os.O_NONBLOCK)


async def test_command_that_creates_is_awaited_by_a_caller_that_is_cancelled(engine: Engine, tmp_path: Path) -> None:
    task = await cancelled(engine, creates=True)
    await asyncio.to_thread((tmp_path / "end").write_text, "\n")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (tmp_path / "made").exists()


async def test_caller_that_is_cancelled_does_not_wait_for_ever(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstack_emu.deployment.container_engine.DEADLINE", 0.2)
    task = await cancelled(engine, creates=True)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_creates_has_a_deadline(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstack_emu.deployment.container_engine.DEADLINE", 0.1)
    late = r"docker compose`: the container engine did not answer within 0\.1 s"
    with pytest.raises(GuestError, match=late):
        await engine.run("compose", creates=True)
