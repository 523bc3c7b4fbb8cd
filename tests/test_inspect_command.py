"""`dstack-emu inspect` as a command: files and pipes, terminals, and its end, whatever it is given."""

import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstack_emu.attest import certificate
from dstack_emu.attest.quote import Quote
from dstack_emu.cli.commands.inspect import WIDTH
from tests.commands import run_command, run_inside, usage_error
from tests.evidence_samples import (
    issued,
    world,
)
from tests.repository import ROOT
from tests.test_attest_properties import THOROUGH, mutated, restructured
from tests.test_inspect import kinds, ours


def test_command_shows_a_file_and_standard_input_alike(tmp_path: Path) -> None:
    file = tmp_path / "quote"
    file.write_bytes(ours())
    by_name, by_pipe = run_command("inspect", str(file)), run_command("inspect", "-", stdin=ours())
    assert (by_name.returncode, by_name.stderr) == (0, b"")
    assert by_name.stdout == by_pipe.stdout
    text = by_name.stdout.decode()
    assert text.startswith("TDX quote, version 4 (TD10); binary, ")
    assert text.endswith("Read, not verified: use `dstack-emu verify`.\n")
    assert "\x1b" not in text


def test_command_prints_one_json_object() -> None:
    done = run_command("inspect", "-", "--json", stdin=ours().hex().encode())
    assert (done.returncode, done.stdout.count(b"\n")) == (0, 1)
    shown = json.loads(done.stdout)
    assert (shown["what"], shown["sure"], shown["form"]) == ("TDX quote, version 4 (TD10)", True, ["hex"])
    assert shown["td_report"]["mr_td"] == Quote.parse(ours()).report.mr_td.hex()


def test_command_colours_a_terminal_alone_and_not_under_no_color(tmp_path: Path) -> None:
    file = tmp_path / "quote"
    file.write_bytes(ours())

    def on_terminal(**environment: str) -> str:
        reader, writer = pty.openpty()
        command = [sys.executable, "-m", "dstack_emu", "inspect", str(file)]
        base = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
        with subprocess.Popen(command, cwd=ROOT, stdout=writer, env=base | environment) as process:
            os.close(writer)
            parts = []
            with contextlib.suppress(OSError):  # how a terminal ends
                while part := os.read(reader, 65536):
                    parts.append(part)
        os.close(reader)
        assert process.returncode == 0
        return b"".join(parts).decode()

    assert "\x1b[1mTD report\x1b[0m" in on_terminal()
    assert "\x1b" not in on_terminal(NO_COLOR="1")


def test_command_refuses_in_one_line_with_status_2(tmp_path: Path) -> None:
    missing, unknown = tmp_path / "missing", tmp_path / "unknown"
    unknown.write_text("hello")
    assert usage_error("inspect", str(missing)) == f"{missing} cannot be read: No such file or directory"
    assert usage_error("inspect", str(tmp_path)) == f"{tmp_path} cannot be read: Is a directory"
    assert usage_error("inspect", str(unknown)).startswith(f"{unknown}: unknown input: ")


def test_command_ends_quietly_when_nobody_reads_on() -> None:
    collateral = json.dumps(json.loads(world().collateral.to_json()) | {"padding": "x"}).encode()
    command = f"{sys.executable} -m dstack_emu inspect - --json | head -c 1"
    many = b"[" + b",".join([json.dumps(certificate.pem(issued())).encode()] * 20) + b"]"
    for data in (collateral, many):
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, input=data, capture_output=True, timeout=60
        )
        assert (done.stdout, done.stderr) == (b"{", b"")
        assert done.returncode in (0, 141)  # 0 if everything was written before the reader ended


# ---- whatever it is given


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inspect") / "input"


def assert_ends_well(file: Path, data: bytes) -> None:
    """Both views of the command end with 0 and an answer, or with 2 and one line."""
    file.write_bytes(data)
    for options in ((), ("--json",)):
        status, out, err = run_inside("inspect", *options, str(file))
        if status == 0:
            assert (bool(out), err) == (True, "")
            assert json.loads(out) if options else max(map(len, out.splitlines())) <= WIDTH
        else:
            assert (status, out, err.count("\n")) == (2, "", 1), data


@THOROUGH
@given(st.one_of(st.binary(max_size=400), st.text(max_size=400).map(str.encode)))
def test_any_bytes_end_with_0_or_2(file: Path, data: bytes) -> None:
    assert_ends_well(file, data)


@THOROUGH
@given(mutated(lambda: [data for data, _ in kinds().values()]))
def test_mutated_samples_end_with_0_or_2(file: Path, data: bytes) -> None:
    assert_ends_well(file, data)


@THOROUGH
@given(st.data())
def test_json_of_odd_structure_ends_with_0_or_2(file: Path, data: st.DataObject) -> None:
    names = [name for name, (sample, _) in kinds().items() if sample[:1] in b"{["]
    document = json.loads(kinds()[data.draw(st.sampled_from(names))][0])
    assert_ends_well(file, json.dumps(data.draw(restructured(document))).encode())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from((b"\x00", b"0", b"{", b"[[", b"\x81", b"aB", b"-----BEGIN ", b"\xa7version\x01", b"\x30\x80")))
def test_large_monotonous_inputs_end_with_0_or_2(file: Path, unit: bytes) -> None:
    assert_ends_well(file, unit * (1_000_000 // len(unit)))
