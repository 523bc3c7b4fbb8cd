"""Projects of somebody else, made for one test: files with tests, and a run of pytest on them."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.repository import ROOT


def run_pytest(
    folder: Path, *arguments: str, python: str = sys.executable, path: str = str(ROOT)
) -> subprocess.CompletedProcess[str]:
    """Run pytest in a folder, with the plugin as pytest finds it; `path` goes before what is installed."""
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHON"))}
    environment |= {"PYTHONPATH": path} if path else {}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250, check=False
    )


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Write a project's files, named by their paths in it."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
