"""Which dstack this is taken for, and which emulator it is."""

from typing import Final

UPSTREAM: Final = "0.5.11"
"""The release whose behaviour is the baseline; what clients and webhooks are told."""

EMULATOR: Final = "0.1.0"
"""This project's own version (the same as in pyproject.toml; a test holds them together)."""

REVISION: Final = f"dstack-emu-{EMULATOR}"
"""What stands where upstream names its git revision."""
