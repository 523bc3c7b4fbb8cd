"""The folder where a KMS keeps its keys, with upstream's file names.

Either all keys are stored or none: they are written to a subfolder, made durable, and moved. The next start after a
crash completes the move, or deletes the unfinished subfolder. `cert_dir` may be an empty mount point, so all this is
done inside it. Private files have mode 0600. Source of the names: dstack `kms/src/config.rs` at 312dc605.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dstack_emu.kms_emu.errors import KmsConfigError
from dstack_emu.transport.files import UNFINISHED, replace_file_durably, sync_folder, write_durably

TMP_CA_CERT: Final = "tmp-ca.crt"
TMP_CA_KEY: Final = "tmp-ca.key"
ROOT_CA_CERT: Final = "root-ca.crt"
ROOT_CA_KEY: Final = "root-ca.key"
RPC_CERT: Final = "rpc.crt"
RPC_KEY: Final = "rpc.key"
RPC_DOMAIN: Final = "rpc-domain"
K256_KEY: Final = "root-k256.key"
BOOTSTRAP_INFO: Final = "bootstrap-info.json"

REQUIRED: Final = (TMP_CA_CERT, TMP_CA_KEY, ROOT_CA_CERT, ROOT_CA_KEY, RPC_CERT, RPC_KEY, K256_KEY)
PRIVATE: Final = frozenset((TMP_CA_KEY, ROOT_CA_KEY, RPC_KEY, K256_KEY))

_STAGING: Final = ".writing"
_COMMITTED: Final = ".committed"
_REMAINING: Final = ".remaining"
"""In the committed folder: the names of the files that remain, as JSON, if all others go."""


class CertDir:
    """One KMS's files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def prepare(self) -> None:
        """Create the folder, and complete or delete what was unfinished after a crash.

        Raises `KmsConfigError` if the folder cannot be used.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            if (self.path / _COMMITTED).is_dir():
                self._move_committed()
            shutil.rmtree(self.path / _STAGING, ignore_errors=True)
            for left in self.path.glob(UNFINISHED):
                left.unlink()
        except OSError as error:
            raise KmsConfigError(f"core.cert_dir {self.path} cannot be used: {error.strerror}") from error

    def has_keys(self) -> bool:
        """Return whether all files are there with which a KMS starts in its runtime phase."""
        return all((self.path / name).exists() for name in REQUIRED)

    def exists(self, name: str) -> bool:
        """Return whether one file is there."""
        return (self.path / name).exists()

    def read(self, name: str) -> bytes:
        """Read one file; raise `KmsConfigError` naming it."""
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise KmsConfigError(f"failed to open file `{self.path / name}`: {error.strerror}") from error

    def read_text(self, name: str) -> str:
        """Read one UTF-8 file; raise `KmsConfigError` naming it."""
        try:
            return self.read(name).decode()
        except UnicodeDecodeError as error:
            raise KmsConfigError(f"{self.path / name}: text expected ({error.reason})") from error

    def store(self, files: Mapping[str, bytes]) -> None:
        """Write a set of files; after a crash at any moment, the next start finds all of them or none."""
        try:
            self._commit(files)
        except OSError as error:
            raise KmsConfigError(f"cannot store keys in {self.path}: {error.strerror}") from error

    def replace(self, name: str, data: bytes) -> None:
        """Replace one file atomically; raise `KmsConfigError` naming it."""
        try:
            replace_file_durably(self.path / name, data, _mode(name))
        except OSError as error:
            raise KmsConfigError(f"cannot write {self.path / name}: {error.strerror}") from error

    def contents(self) -> dict[str, bytes]:
        """Return the content of every file by its name; empty if there is no folder."""
        if not self.path.is_dir():
            return {}
        return {path.name: path.read_bytes() for path in sorted(self.path.iterdir()) if path.is_file()}

    def overwrite(self, files: Mapping[str, bytes]) -> None:
        """Replace all files; after a crash at any moment, the next start finds those of before or these.

        Raises `OSError`.
        """
        self.path.mkdir(mode=0o700, exist_ok=True)
        self._commit({**files, _REMAINING: json.dumps(sorted(files)).encode()})

    def _commit(self, files: Mapping[str, bytes]) -> None:
        staging = self.path / _STAGING
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir(mode=0o700)
            for name, data in files.items():
                write_durably(staging / name, data, _mode(name))
            sync_folder(staging)
            staging.rename(self.path / _COMMITTED)  # from here on the next start completes the move
        except OSError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        sync_folder(self.path)
        self._move_committed()

    def _move_committed(self) -> None:
        committed = self.path / _COMMITTED
        remaining = committed / _REMAINING
        if remaining.exists():
            names = json.loads(remaining.read_bytes())
            for file in self.path.iterdir():
                if file.is_file() and file.name not in names:
                    file.unlink()
        for file in sorted(committed.iterdir()):
            if file != remaining:
                file.replace(self.path / file.name)
        sync_folder(self.path)
        remaining.unlink(missing_ok=True)
        committed.rmdir()


def _mode(name: str) -> int:
    return 0o600 if name in PRIVATE else 0o644
