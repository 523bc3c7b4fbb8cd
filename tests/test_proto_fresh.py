"""The generated messages and stubs are what proto/ says, and the check notices where they are not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("attest/proto", "transport/stubs")


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
    assert (result.returncode, result.stdout) == (0, "attest/proto and transport/stubs are fresh\n"), result.stderr


def test_check_fails_where_a_field_was_edited(copy: Path) -> None:
    module = copy / "attest/proto/kms_pb2.pyi"
    module.write_text(module.read_text().replace("tee_variant: str", "tee_kind: str"))
    result = check(copy)
    assert (result.returncode, result.stdout) == (1, "stale: attest/proto/kms_pb2.pyi\n"), result.stderr


def test_check_fails_where_a_module_is_missing_or_left_over(copy: Path) -> None:
    package = copy / "attest/proto"
    (package / "kms_pb2.py").rename(package / "old_pb2.py")
    result = check(copy)
    expected = "missing: attest/proto/kms_pb2.py\nsuperfluous: attest/proto/old_pb2.py\n"
    assert (result.returncode, result.stdout) == (1, expected)


def test_check_passes_where_only_the_compilers_version_differs(copy: Path) -> None:
    module = copy / "attest/proto/kms_pb2.py"
    text = module.read_text()
    stamp = next(line for line in text.splitlines() if line.startswith("# Protobuf Python Version"))
    module.write_text(text.replace(stamp, "# Protobuf Python Version: 1.2.3"))
    assert check(copy).returncode == 0


def test_check_fails_where_a_clients_method_or_a_copied_source_was_edited(copy: Path) -> None:
    stub, source = copy / "transport/stubs/kms_pb2_grpc.pyi", copy / "attest/proto/kms.proto"
    stub.write_text(stub.read_text().replace("GetMeta:", "GetMetadata:"))
    source.write_text(source.read_text() + "\n")
    result = check(copy)
    expected = "stale: attest/proto/kms.proto\nstale: transport/stubs/kms_pb2_grpc.pyi\n"
    assert (result.returncode, result.stdout) == (1, expected)
