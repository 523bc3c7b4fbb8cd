"""A KMS that is not ours by name: a script `their-kms` that takes the path of a kms.toml, and what it stands in for."""

import shlex
import stat
from pathlib import Path

from tests.processes import forked_by_anyone
from tests.repository import ROOT


def their_kms(folder: Path, *arguments: str) -> str:
    """Write a script that runs our `kms` command with further arguments; return the command line for `--kms`."""
    line = f'exec {shlex.join(forked_by_anyone("kms"))} --config "$1" {" ".join(arguments)}'
    return f"{script(folder, 'their-kms', line)} {{config}}"


def script(folder: Path, name: str, *lines: str) -> Path:
    """Write a shell script; return its path."""
    path = folder / name
    path.write_text("\n".join(["#!/bin/sh", f"export PYTHONPATH={ROOT}", *lines, ""]))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
