"""The package installs from a Git repository, by the command that the documents show, and contains all of its parts.

The installation runs if DSTACK_EMU_PACKAGE is set (`make package`).

Git is configured to find the documented URL on this disk. The dependencies are those of this environment.
"""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.documents import DOCUMENTS, PACKAGES
from tests.repository import ROOT

URL = "https://github.com/OWNER/dstack-emu"
SHOWN = f"'dstack-emu[pytest] @ git+{URL}'"
FILES = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture
def git_environment(tmp_path: Path) -> dict[str, str]:
    """Environment in which Git clones the documented URL from a repository with the package's present files."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.test", "-c", "commit.gpgsign=false")
    for command in (["init", "--quiet"], ["add", "--all"], [*identity, "commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True, capture_output=True, timeout=30)
    replaced = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{folder}.insteadOf",
        "GIT_CONFIG_VALUE_0": URL,
    }
    return {**os.environ, **replaced}


@pytest.mark.skipif("DSTACK_EMU_PACKAGE" not in os.environ, reason="DSTACK_EMU_PACKAGE is not set: `make package`")
def test_package_installs_from_a_git_repository(git_environment: dict[str, str], tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    installed = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input", "install"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--target", str(installed)]
    command = [*pip, *options, SHOWN.strip("'")]
    done = subprocess.run(command, env=git_environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} - {"bin"}
    assert names == {"dstack_emu"}

    (installed / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = "import dstack_emu.simulator, dstack_emu.kms_emu, dstack_emu.auth as auth; print(auth.__file__)"
    for arguments, expected in (
        (["-c", program], str(installed / "dstack_emu" / "auth")),
        (["-m", "dstack_emu", "--version"], "dstack-emu"),
    ):
        python = [str(environment / "bin" / "python"), *arguments]
        done = subprocess.run(python, cwd=tmp_path, env=bare, capture_output=True, text=True, timeout=60, check=False)
        assert expected in done.stdout, done.stderr


def test_documents_install_the_package_by_its_repository_alone() -> None:
    commands = [
        command
        for path in DOCUMENTS
        for command in re.findall(r"pip install ([^`#\n]*dstack-emu[^`#\n]*)", path.read_text())
    ]
    assert SHOWN in {command.strip() for command in commands}
    extras = (SHOWN.replace("[pytest]", f"[{extra}]") for extra in ("eth", "otel"))
    others = (*extras, "--constraint dstack-emu/constraints.txt ./dstack-emu")
    assert {command.strip() for command in commands} <= {SHOWN, *others}
