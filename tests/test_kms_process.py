"""A KMS that is another program: its kms.toml, its command, what is said where it does not answer, and its end."""

import asyncio
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dstack_emu.attest.release import RELEASES
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.kms_process import KmsFiles, KmsProcess
from dstack_emu.deployment.kms_toml import KmsSettings
from dstack_emu.kms_emu.config import KmsConfig
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import Seed
from tests.ports import free_port
from tests.their_kms import script, their_kms


def settings_in(folder: Path, **changes: object) -> KmsSettings:
    """Settings whose services do not exist: a KMS without keys asks none of them before its first call."""
    root_ca = folder / "root.pem"
    root_ca.write_text(Intel(Seed.of("foreign")).root_pem)
    given = {
        "host": "127.0.0.1",
        "port": free_port(),
        "cert_dir": folder / "certs",
        "image_cache": folder / "images",
        "pccs": "http://127.0.0.1:9/",
        "root_ca": root_ca,
        "webhook": "http://user:pass@127.0.0.1:9/auth",
    }
    return KmsSettings(**{**given, **changes})  # type: ignore[arg-type]  # fields by name


def foreign_kms(
    folder: Path, command: str | None, *, patience: float = 30, settings: KmsSettings | None = None
) -> KmsProcess:
    """A KMS of a command in a folder; what it reports is dropped."""
    settings = settings or settings_in(folder)
    url = f"http://{settings.host}:{settings.port}"
    files = KmsFiles.in_folder(folder)
    return KmsProcess(
        "kms-x",
        settings,
        files,
        url=url,
        agent="unix:/nowhere/dstack.sock",
        command=command,
        patience=patience,
        progress=lambda text: None,
    )


@asynccontextmanager
async def started(kms: KmsProcess) -> AsyncIterator[KmsProcess]:
    await kms.start()
    try:
        yield kms
    finally:
        await kms.stop()


def refusal(kms: KmsProcess) -> str:
    """What starting it and waiting for it is refused with."""

    async def attempt() -> None:
        async with started(kms):
            await kms.answers()

    with pytest.raises(StackError) as refused:
        asyncio.run(attempt())
    return str(refused.value)


@pytest.mark.parametrize("release", RELEASES.values(), ids=lambda release: release.name)
def test_written_kms_toml_is_read_back_by_a_kms(tmp_path: Path, release: object) -> None:
    odd = 'a "name" with \\, \x7f, \t and 😀'
    settings = settings_in(
        tmp_path, site_name=odd, settings={"image": {"verify": False}, "metrics": {"enabled": False}}, release=release
    )
    settings.write(tmp_path / "kms.toml")
    config = KmsConfig.load(tmp_path / "kms.toml")
    assert config == KmsConfig.from_document(settings.document(), "the document")
    core = config.core
    assert (core.site_name, core.image.verify, core.metrics.enabled) == (odd, False, False)
    assert core.auth_api.webhook.url == "http://user:pass@127.0.0.1:9/auth"
    assert core.pccs_url == ("http://127.0.0.1:9/" if release is RELEASES["0.5"] else "")
    assert core.cert_dir.is_dir()


def test_program_by_another_name_runs_until_it_is_stopped(tmp_path: Path) -> None:
    line = f"trap wait TERM; {their_kms(tmp_path).replace('{config}', '$1')} & wait"  # it ends when its child has ended
    run_by_a_child = script(tmp_path, "wrapper", line)
    kms = foreign_kms(tmp_path, f"{run_by_a_child} {{config}}")

    async def run() -> None:
        async with started(kms):
            assert await kms.answers() == "onboard"
            assert await kms.phase() == "onboard"
        with pytest.raises(StackError, match="Connection refused"):
            await kms.phase()

    asyncio.run(run())
    assert any("KMS (onboard phase)" in line for line in kms.last_lines())


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("no-such-program {config}", "kms-x: no-such-program: command not found"),
        ("/etc/passwd {config}", "kms-x: /etc/passwd cannot be run: Permission denied"),
        ("kms -c kms.toml", "the command 'kms -c kms.toml' has no {config}: write it where the path of kms.toml"),
        ("kms '{config}", "cannot be split into words: No closing quotation"),
    ],
)
def test_command_that_cannot_be_run_is_refused(tmp_path: Path, command: str, expected: str) -> None:
    assert expected in refusal(foreign_kms(tmp_path, command))


def test_program_that_ends_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    lines = [f"echo line {number}" for number in range(20)]
    command = f"{script(tmp_path, 'ends', *lines, 'echo no such key >&2; exit 3')} {{config}}"
    text = refusal(foreign_kms(tmp_path, command))
    assert re.search(r"kms-x: the command .*/ends \{config\}' ended with status 3 before it answered", text)
    assert text.splitlines()[1:] == [*(f"  line {number}" for number in range(13, 20)), "  no such key"]


def test_wrong_configuration_is_reported_in_the_programs_own_words(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, settings={"no_such_key": 1})
    text = refusal(foreign_kms(tmp_path, their_kms(tmp_path), settings=settings))
    assert "ended with status 2 before it answered" in text
    assert "core.no_such_key" in text


def test_program_that_never_listens_is_waited_for_no_longer_than_said(tmp_path: Path) -> None:
    command = f"{script(tmp_path, 'sleeps', 'echo compiling; exec sleep 60')} {{config}}"
    kms = foreign_kms(tmp_path, command, patience=2)
    text = refusal(kms)
    assert f"kms-x at {kms.url}: Connection refused; waited 2 s for it" in text
    assert f"kms.toml is {kms.files.config}, its agent is DSTACK_AGENT_ADDRESS=unix:/nowhere/dstack.sock" in text
    assert text.endswith("\n  compiling")


def test_port_in_use_is_not_taken_for_the_program(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        settings = settings_in(tmp_path, port=other.getsockname()[1])
        text = refusal(foreign_kms(tmp_path, "true {config}", settings=settings))
    assert text == f"kms-x: 127.0.0.1:{settings.port} cannot be its address: Address already in use"


def test_program_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstack_emu.deployment.kms_process.GRACE", 0.1)
    stubborn = script(tmp_path, "stubborn", "trap '' TERM", 'echo $$ > "$1.pid"', "while :; do sleep 1; done")
    kms = foreign_kms(tmp_path, f"{stubborn} {{config}}")
    pid_file = tmp_path / "kms.toml.pid"

    async def run() -> int:
        async with started(kms):
            await until(lambda: pid_file.exists() and bool(pid_file.read_text().strip()))
        return int(pid_file.read_text())

    pid = asyncio.run(run())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_port_is_given_to_nobody_before_the_program_answers(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)

    def bind() -> None:
        with socket.socket() as other:  # without SO_REUSEADDR, as for any free port
            other.bind((settings.host, settings.port))

    async with started(foreign_kms(tmp_path, "sh -c 'sleep 60' {config}", settings=settings)):
        with pytest.raises(OSError, match="Address already in use"):
            bind()
    bind()


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something that another process does is done; fail after half a minute."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def test_program_of_somebody_else_is_waited_for_until_it_answers(tmp_path: Path) -> None:
    waiting = foreign_kms(tmp_path, None)
    running = foreign_kms(tmp_path, their_kms(tmp_path), settings=waiting.settings)

    async def run() -> None:
        async with started(waiting):
            answer = asyncio.create_task(waiting.answers())
            await asyncio.sleep(0)
            async with started(running):
                assert await answer == "onboard"

    asyncio.run(run())
