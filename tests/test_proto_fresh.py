"""The generated messages and stubs are what the .proto files say, and the check notices where they are not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("dstack_emu/attest/proto", "dstack_emu/transport/stubs")


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
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_check_passes_for_the_committed_code() -> None:
    result = check(ROOT)
    assert (result.returncode, result.stdout) == (
        0,
        "dstack_emu/attest/proto and dstack_emu/transport/stubs are fresh\n",
    ), result.stderr


def test_check_fails_where_a_field_was_edited(copy: Path) -> None:
    module = copy / "dstack_emu/attest/proto/kms_pb2.pyi"
    module.write_text(module.read_text().replace("tee_variant: str", "tee_kind: str"))
    result = check(copy)
    assert (result.returncode, result.stdout) == (1, "stale: dstack_emu/attest/proto/kms_pb2.pyi\n"), result.stderr


def test_check_fails_where_a_module_is_missing_or_left_over(copy: Path) -> None:
    package = copy / "dstack_emu/attest/proto"
    (package / "kms_pb2.py").rename(package / "old_pb2.py")
    result = check(copy)
    expected = "missing: dstack_emu/attest/proto/kms_pb2.py\nsuperfluous: dstack_emu/attest/proto/old_pb2.py\n"
    assert (result.returncode, result.stdout) == (1, expected)


def test_check_passes_where_only_the_compilers_version_differs(copy: Path) -> None:
    module = copy / "dstack_emu/attest/proto/kms_pb2.py"
    text = module.read_text()
    stamp = next(line for line in text.splitlines() if line.startswith("# Protobuf Python Version"))
    module.write_text(text.replace(stamp, "# Protobuf Python Version: 1.2.3"))
    assert check(copy).returncode == 0


def test_check_fails_if_a_method_of_a_client_was_edited(copy: Path) -> None:
    stub = copy / "dstack_emu/transport/stubs/kms_pb2_grpc.pyi"
    stub.write_text(stub.read_text().replace("GetMeta:", "GetMetadata:"))
    result = check(copy)
    expected = "stale: dstack_emu/transport/stubs/kms_pb2_grpc.pyi\n"
    assert (result.returncode, result.stdout) == (1, expected)
