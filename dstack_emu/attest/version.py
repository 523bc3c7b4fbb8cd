"""Which emulator this is; which dstack it is taken for, `release` says."""

from typing import Final

EMULATOR: Final = "0.1.0"
"""This project's own version. The build reads it here, so that there is one place for it."""

REVISION: Final = f"dstack-emu-{EMULATOR}"
"""What stands where upstream names its git revision."""
