"""A stack whose KMS is another program by name: the flow, the runbook, and what no snapshot can put back."""

import asyncio
import json
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from dstack_emu import Stack, StackConfig
from dstack_emu.control.schemas import ControlError
from dstack_emu.deployment.errors import PartEndedError, StackError
from tests.commands import run_command, usage_error
from tests.own_stack import own_stack
from tests.ports import free_port
from tests.running import running_kms
from tests.their_kms import script, their_kms
from tests.their_webhook import their_webhook


@pytest.mark.parametrize(
    ("sides", "release"), [(("src",), "0.6"), (("dst",), "0.5"), (("src", "dst"), "0.6")], ids=["src", "dst", "both"]
)
def test_flow_runs_through_a_kms_of_ones_own(
    tmp_path: Path, sides: tuple[str, ...], release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sides == ("src", "dst"):  # each gets it from the environment, and demands it
        monkeypatch.setenv("DSTACK_KMS_ONBOARD_TOKEN", "a token of the onboard phase")

    async def run() -> None:
        command = their_kms(tmp_path, "--release", release)
        async with own_stack(kms=dict.fromkeys(sides, command), release=release) as stack:
            await stack.control.refresh_kms()
            assert {name: kms.phase for name, kms in stack.kms.items()} == {"src": "runtime", "dst": "runtime"}
            for side in sides:
                assert f'url = "{stack.services[f"auth-{side}"]}"' in config_of(stack, side).read_text()
                assert any("runtime phase" in line for line in stack.kms[side].printed())
                asked = {(call["service"], call["call"]) for call in stack.control.journal.find()}
                assert {(f"agent-{side}", "Attest"), (f"auth-{side}", "/bootAuth/kms")} <= asked
            await boots_by_policy(stack)
            if "src" in sides:
                assert (await stack.control.restart_kms("src"))["phase"] == "runtime"
                assert (await stack.control.boot_guest("app", "src"))["has_keys"]
                await stack.control.reset()

    asyncio.run(run())


def config_of(stack: Stack, side: str) -> Path:
    """The kms.toml of a KMS that is another program."""
    return Path(stack.description()["foreign_kms"][side]["config"])


async def boots_by_policy(stack: Stack) -> None:
    """Deny the app, see both KMS refuse it, and reset the stack, after which the app boots."""
    for side in ("src", "dst"):
        stack.control.deny(side, "app")
        with pytest.raises(ControlError, match="Boot denied: app not registered"):
            await stack.control.boot_guest("app", "src")
    await stack.control.reset()
    assert (await stack.control.boot_guest("app", "dst"))["has_keys"]


RECORDER = """
import os
from dstack_emu.transport.http.headers import Headers
make = Headers.__init__
def note(self, raw):
    with open(os.environ["HEADERS_SEEN"], "a") as file:
        file.writelines(f"{name.decode().lower()}\\n" for name, _ in raw)
    make(self, raw)
Headers.__init__ = note
"""


def test_kms_of_ones_own_is_sent_no_header_of_the_emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program notes the names of all headers that it gets."""
    (tmp_path / "sitecustomize.py").write_text(RECORDER)
    seen = tmp_path / "seen"
    monkeypatch.setenv("HEADERS_SEEN", str(seen))
    line = f'PYTHONPATH="{tmp_path}:$PYTHONPATH" exec {sys.executable} -m dstack_emu kms --config "$1"'
    command = f"{script(tmp_path, 'noting-kms', line)} {{config}}"

    async def run() -> None:
        async with own_stack(kms={"src": command}) as stack:
            await stack.control.boot_guest("app", "src")

    asyncio.run(run())
    names = set(seen.read_text().split())
    assert "content-type" in names
    assert not {name for name in names if name.startswith(("x-dstack", "traceparent"))}


def test_keys_of_a_kms_of_ones_own_are_in_no_snapshot(tmp_path: Path) -> None:
    async def run() -> None:
        async with own_stack(kms={"src": their_kms(tmp_path)}, fresh=True) as stack:
            control = stack.control
            with pytest.raises(ControlError, match="kms-src: Bootstrap: .*boot denied"):
                await control.onboard_kms("src", None)
            assert control.kms("src")["phase"] == "onboard"
            await control.reset()
            saved = control.save()
            control.allow("src", "kms-src")
            assert (await control.onboard_kms("src", None))["phase"] == "runtime"
            with pytest.raises(ControlError, match="has keys already: it is in its runtime phase"):
                await control.onboard_kms("src", None)
            for put_back in (control.reset, lambda: control.load(saved)):
                expected = (
                    "kms-src is another program, .*: it is in its runtime phase, and was in its onboard phase then"
                )
                with pytest.raises(ControlError, match=expected):
                    await put_back()
            assert control.policy("src")["kms"]["mrAggregated"], "a refused call has changed something"
            control.snapshot("with keys")
            await control.revert("with keys")
            with pytest.raises(ControlError, match="the state is of a KMS of the emulator"):
                await control.load(await saved_by_an_emulated_stack())

    asyncio.run(run())


async def saved_by_an_emulated_stack() -> Any:
    async with own_stack(fresh=True) as stack:
        return stack.control.save()


def test_denial_by_the_policy_of_a_kms_of_ones_own_is_in_its_own_words(tmp_path: Path) -> None:
    async def run() -> None:
        with their_webhook() as webhook:
            with pytest.raises(StackError) as refused:
                async with own_stack(kms={"src": their_kms(tmp_path)}, webhooks={"src": webhook.url}):
                    pass
            assert re.match(r"kms-src: Bootstrap: .*boot denied: not on their list", str(refused.value))
            assert f"kms-src asks {webhook.url}, whose policy is yours" in str(refused.value)

    asyncio.run(run())


def test_kms_that_ends_while_the_stack_runs_ends_the_stack(tmp_path: Path) -> None:
    line = f'{their_kms(tmp_path).replace("{config}", "$1")} & echo $! > "$1.pid"; wait; echo it was me; exit 7'
    command = f"{script(tmp_path, 'ends', line)} {{config}}"

    async def run() -> None:
        async with own_stack(kms={"dst": command}, fresh=True) as stack:
            pid = config_of(stack, "dst").with_suffix(".toml.pid").read_text().strip()
            await asyncio.create_subprocess_exec("kill", pid)
            await asyncio.get_running_loop().create_future()

    with pytest.raises(PartEndedError, match="kms-dst ended: .*/ends {config}' ended with status 7") as ended:
        asyncio.run(run())
    assert str(ended.value).endswith("it was me")


def test_stack_does_not_start_without_its_kms(tmp_path: Path) -> None:
    sleeps = f"{script(tmp_path, 'sleeps', 'exec sleep 60')} {{config}}"
    ends = f"{script(tmp_path, 'ends', 'echo no licence; exit 1')} {{config}}"

    async def start(**settings: Any) -> None:
        async with own_stack(**settings):
            pass

    with pytest.raises(StackError, match="kms-src: the command .* ended with status 1 before it answered") as ended:
        asyncio.run(start(kms={"src": ends, "dst": sleeps}))
    assert str(ended.value).endswith("no licence")
    with pytest.raises(
        StackError, match="Connection refused; waited 0.2 s for it|does not answer; waited 0.2 s for it"
    ):
        asyncio.run(start(kms={"dst": sleeps}, kms_wait=0.2))


@pytest.mark.parametrize("named_by_url", [False, True])
def test_stack_waits_for_a_kms_that_somebody_else_starts(tmp_path: Path, named_by_url: bool) -> None:
    said: asyncio.Queue[str] = asyncio.Queue()
    program = f"http://127.0.0.1:{free_port()}" if named_by_url else "external"

    async def start_by_hand(stop: asyncio.Event, running: asyncio.Event) -> None:
        """Do what the stack says: run a KMS on the file and with the agent that it names."""
        while not (told := re.search(r"kms.toml is (\S+), its agent is DSTACK_AGENT_ADDRESS=(\S+)", await said.get())):
            pass
        with running_kms(Path(told[1]), told[2]):
            running.set()
            await stop.wait()

    async def run() -> None:
        stop, running = asyncio.Event(), asyncio.Event()
        by_hand = asyncio.create_task(start_by_hand(stop, running))
        config = StackConfig.on_free_ports(kms={"src": program})
        try:
            async with Stack(config, progress=said.put_nowait) as stack:
                assert running.is_set()
                assert not named_by_url or stack.services["kms-src"] == program.replace("http:", "https:")
                with pytest.raises(ControlError, match="kms-src is run by somebody else: restart it there"):
                    await stack.control.restart_kms("src")
                assert "log" not in stack.description()["foreign_kms"]["src"]
                await boots_by_policy(stack)
                stop.set()
                await by_hand
                await stack.control.refresh_kms()
                assert stack.control.kms("src")["phase"] == "no answer"
                with pytest.raises(ControlError, match="kms-src at https://127.0.0.1:[0-9]+ does not answer"):
                    stack.control.snapshot()
        finally:
            stop.set()
            await by_hand

    asyncio.run(run())


def test_runbook_judges_a_kms_of_ones_own(tmp_path: Path) -> None:
    command = their_kms(tmp_path)
    evidence = tmp_path / "evidence.tar.gz"
    both = ("runbook", "--kms", f"src={command}", "--kms", f"dst={command}")
    assert usage_error(*both, "--transport", "grpc").startswith("--transport grpc needs gRPC listeners")
    assert usage_error(*both, "--against", "stack.json").startswith("--kms is for the stack that the command starts")
    arguments = (*both, "--json", "--evidence", str(evidence))
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"]
    with tarfile.open(evidence) as archive:
        (name,) = (name for name in archive.getnames() if name.endswith("logs/kms-src.log"))
        log = archive.extractfile(name)
        assert log is not None
        assert b"runtime phase" in log.read()
