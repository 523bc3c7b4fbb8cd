"""Where the recorded bytes lie: hardware evidence and answers of the real programs, kept outside this repository.

`DSTACK_EMU_VECTORS` names another folder; the default is `../shared/vectors` beside the checkout. A test that needs a
file that is not there skips, and says which.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
VECTORS = Path(os.environ.get("DSTACK_EMU_VECTORS") or ROOT.parent / "shared" / "vectors")


def vector_path(name: str) -> Path:
    """Path of one recorded file, or skip the test where the vectors are not at hand."""
    path = VECTORS / name
    if not path.exists():
        pytest.skip(f"vector {name} is not at {VECTORS} (set DSTACK_EMU_VECTORS to the folder that has it)")
    return path


def golden(name: str) -> Any:
    """One recorded answer file of the real programs, parsed."""
    return json.loads(vector_path(f"golden/{name}").read_text())
