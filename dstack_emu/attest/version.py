"""Which emulator this is; which dstack it is taken for, `release` says."""

from typing import Final

EMULATOR: Final = "0.1.0"
"""This project's own version (the same as in pyproject.toml; a test holds them together)."""

REVISION: Final = f"dstack-emu-{EMULATOR}"
"""What stands where upstream names its git revision."""
