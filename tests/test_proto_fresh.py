"""The generated messages in attest/proto/ are what proto/ says, and the check notices where they are not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ROOT / "attest" / "proto"


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    tool = ROOT / "tools" / "generate_proto.py"
    return subprocess.run(
        [sys.executable, str(tool), "--check", "--into", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "proto"
    shutil.copytree(GENERATED, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_check_passes_for_the_committed_code() -> None:
    result = check(GENERATED)
    assert (result.returncode, result.stdout) == (0, "attest/proto is fresh\n"), result.stderr


def test_check_fails_where_a_field_was_edited(copy: Path) -> None:
    module = copy / "kms_pb2.pyi"
    module.write_text(module.read_text().replace("tee_variant: str", "tee_kind: str"))
    result = check(copy)
    assert (result.returncode, result.stdout) == (1, "stale: kms_pb2.pyi\n"), result.stderr


def test_check_fails_where_a_module_is_missing_or_left_over(copy: Path) -> None:
    (copy / "kms_pb2.py").rename(copy / "old_pb2.py")
    result = check(copy)
    assert (result.returncode, result.stdout) == (1, "missing: kms_pb2.py\nsuperfluous: old_pb2.py\n")


def test_check_passes_where_only_the_compilers_version_differs(copy: Path) -> None:
    module = copy / "kms_pb2.py"
    text = module.read_text()
    stamp = next(line for line in text.splitlines() if line.startswith("# Protobuf Python Version"))
    module.write_text(text.replace(stamp, "# Protobuf Python Version: 1.2.3"))
    assert check(copy).returncode == 0
