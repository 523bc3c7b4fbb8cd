"""Projects of somebody else, made for one test: files with tests, and a run of pytest on them."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.processes import forked_by_anyone

PYTEST = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in a folder, with the plugin as pytest finds it, in a process that is forked.

    `test_wheel.py` starts the interpreter, too.
    """
    quiet = ("-p", "no:cacheprovider", "-W", "ignore:Module already imported so cannot be rewritten")
    command = forked_by_anyone(PYTEST, *quiet, *arguments, module="tests.program")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHON"))}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250, check=False
    )


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Write a project's files, named by their paths in it."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
