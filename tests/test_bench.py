"""The benchmarks run: each gives its figures and they can be written. How fast anything is, no test says.

Those that start processes take their time: the suite runs them where DSTACK_EMU_BENCH is `all`, as `.ci/run` does.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import BENCHMARKS, run, write
from bench.figure import Bar, Effort, Figure, ratio
from bench.load import Connection, LoadError, closed_loop, connect_unix, post
from bench.processes import ProcessError, running
from tests.repository import ROOT
from tests.running import RunningStack

TINY = Effort(rounds=1, seconds=0.05, starts=1, calls=40)

FIGURES = {
    "quotes": ["quotes_per_second", "quotes_to_two_signatures"],
    "verification": ["verify_per_second", "verify_to_dcap_qvl"],
    "getquote": ["getquote_socket", "getquote_to_bare_server", "getquote_per_cpu_second"],
    "startup": ["stack_ready", "stack_stop", "stack_memory"],
    "runbook": ["runbook"],
    "kms_start": ["kms_ready", "kms_ready_memory"],
    "agent": ["agent_ready", "agent_memory"],
    "getappkey": ["getappkey_keepalive", "getappkey_to_bare_server", "getappkey_per_cpu_second"],
    "getappkey_new": [
        "getappkey_new_connection",
        "getappkey_new_to_dcap_qvl",
        "getappkey_new_to_bare_server",
        "getappkey_new_per_cpu_second",
    ],
    "auth_eth_chain": [f"auth_eth_chain_{what}" for what in ("again", "other_boot", "other_state")],
    "auth_eth": ["auth_eth_decisions", "auth_eth_per_cpu_second"],
    "image_verify": ["image_verify_to_without", "image_verify_first_time", "image_verify_known"],
    "gettempcacert": ["gettempcacert_keepalive", "gettempcacert_to_bare_server"],
    "memory": ["kms_memory", "kms_memory_growth"],
    "grpc": [
        f"{name}_{figure}"
        for name in ("getquote", "getappkey")
        for figure in ("grpc", "grpc_to_prpc", "grpc_per_cpu_second", "prpc_per_cpu_second")
    ],
    "caches": [
        f"cache_{name}_saves"
        for name in (
            "verdict",
            "collateral_key",
            "client_certificate",
            "boot_info",
            "image_registers",
            "app_keys",
            "packed_evidence",
            "shown_log",
            "vendor_documents",
            "policy",
        )
    ],
    "ingress": [
        "terminated_throughput",
        "terminated_to_copy",
        "terminated_to_copy_per_cpu_second",
        "passthrough_throughput",
        "passthrough_to_copy",
        "passthrough_to_copy_per_cpu_second",
        "copy_throughput",
        "ingress_idle_memory",
    ],
    "journal": ["getappkey_with_journal", "journal_to_no_journal", "snapshot", "revert"],
    "console": ["calls_unfollowed", "calls_followed", "console_to_no_console", "four_consoles_to_none"],
}


IN_PROCESS = ("quotes", "verification", "caches")
RUN = BENCHMARKS if os.environ.get("DSTACK_EMU_BENCH") == "all" else IN_PROCESS


def test_every_benchmark_has_its_figures_named() -> None:
    assert set(FIGURES) == set(BENCHMARKS)


@pytest.mark.parametrize("name", RUN)
def test_benchmark_gives_its_figures_with_little_effort(name: str, tmp_path: Path) -> None:
    figures = list(run([name], TINY))
    path = tmp_path / "latest.json"
    write(figures, path)
    written = json.loads(path.read_text())
    assert list(written) == FIGURES[name]
    for key, figure in written.items():
        assert set(figure) == {"value", "unit", "bar", "ok"}
        assert figure["value"] > 0 or (figure["value"] == 0 and key == "kms_memory_growth")
        assert math.isfinite(figure["value"])


def test_command_refuses_a_benchmark_that_is_none() -> None:
    command = [sys.executable, "-m", "bench", "--only", "everything"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert "invalid choice: 'everything'" in done.stderr


def test_figure_holds_its_bar_from_its_side() -> None:
    assert Figure("rate", 2000, "calls/s", Bar(2000)).ok
    assert not Figure("rate", 1999, "calls/s", Bar(2000)).ok
    assert Figure("stop", 0.5, "s", Bar(0.5, at_most=True)).ok
    assert not Figure("stop", 0.51, "s", Bar(0.5, at_most=True)).ok
    assert Figure("rate", 1, "calls/s").ok
    assert str(Figure("stop", 0.51, "s", Bar(0.5, at_most=True))).endswith("bar <= 0.5: MISSED")


def test_ratio_compares_neighbouring_rounds() -> None:
    assert ratio([10, 1, 30], [20, 2, 30]) == 0.5


def test_load_generator_refuses_an_answer_that_is_no_success(ready_stack: RunningStack) -> None:
    path = ready_stack.description["app"]["dstack_sock"]
    connection = Connection(connect_unix(path), post("/Nothing", b"{}"))
    with pytest.raises(LoadError, match="404 Not Found"):
        closed_loop([connection])(0.01)
    connection.close()


def test_process_that_ends_before_it_is_ready_is_reported_with_what_it_said() -> None:
    command = (sys.executable, "-m", "dstack_emu", "kms", "--config", "/nonexistent/kms.toml")
    with pytest.raises(ProcessError, match=r"cannot read /nonexistent/kms\.toml"), running(command, ready_on="stderr"):
        pass
