"""Recorded bytes that the tests compare with: answers of the real programs, and evidence of real hardware.

`tests/vectors/` belongs to the repository, so a test that uses it never skips. Seven more files are other projects'
and are read from a folder beside the checkout, `../shared/vectors` or the one that DSTACK_EMU_VECTORS names; a test
that needs one which is absent skips. `tests/README.md` lists both.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.repository import ROOT

COMMITTED = ROOT / "tests" / "vectors"
EXTERNAL = Path(os.environ.get("DSTACK_EMU_VECTORS") or ROOT.parent / "shared" / "vectors")


def golden(name: str) -> Any:
    """Return one recorded answer file of the real programs, parsed."""
    return json.loads((COMMITTED / "golden" / name).read_text())


def tdx_lite_steps() -> Any:
    """Return the computed steps of a lite image's measurement, parsed."""
    return json.loads((COMMITTED / "tdx-lite-steps.json").read_text())


def external_path(name: str) -> Path:
    """Return the path of a file that is not part of this repository; skip the test if it is absent."""
    path = EXTERNAL / name
    if not path.exists():
        pytest.skip(f"{name} is not in {EXTERNAL}: tests/README.md says what it is and where to get it")
    return path


def intel_root() -> bytes:
    """The root certificate in a quote of real hardware, PEM."""
    quote = external_path("intel-tdx-quote.bin").read_bytes()
    found: list[bytes] = re.findall(rb"-----BEGIN.*?-----END CERTIFICATE-----\n", quote, re.DOTALL)
    return found[-1]
