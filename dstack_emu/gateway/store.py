"""The file of a gateway's state, in `core.sync.data_dir`: whole or as it was before, whatever ends the process.

Upstream has a write-ahead log and snapshots of WaveKV there, and writes an entry at once, too. This is one document,
which is replaced.
"""

from pathlib import Path
from typing import Final

from pydantic import ValidationError

from dstack_emu.gateway.errors import GatewayConfigError, GatewayError
from dstack_emu.gateway.state import GatewayState
from dstack_emu.transport.files import replace_file_durably
from dstack_emu.transport.validation import problems

FILE: Final = "gateway-state.json"
_MODE: Final = 0o600


class Store:
    """Reads and replaces the file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def load(self) -> GatewayState:
        """Create the folder, and return the stored state; a new one without a file.

        Raises `GatewayConfigError` if the file cannot be used: a gateway that began anew would give addresses twice.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return GatewayState.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return GatewayState()
        except OSError as error:
            raise GatewayConfigError(f"core.sync.data_dir: {error.filename}: {error.strerror}") from error
        except ValidationError as error:
            raise GatewayConfigError(f"{self.path} is no state of a gateway: {'; '.join(problems(error))}") from error

    def save(self, state: GatewayState) -> None:
        """Replace the file; raise `GatewayError` if that fails, and leave it as it was."""
        try:
            replace_file_durably(self.path, state.model_dump_json().encode(), _MODE)
        except OSError as error:
            raise GatewayError(f"failed to store the gateway's state in {self.path}: {error.strerror}") from error
