"""The tokens that a KMS since 0.6 may ask for: that of its onboard phase, and that of a source's admin listener."""

import argparse
import os
from typing import Final

from dstack_emu.cli.commands.common import UsageError
from dstack_emu.transport.secrets import require_token

ONBOARD_VARIABLE: Final = "DSTACK_KMS_ONBOARD_TOKEN"
SOURCE_VARIABLE: Final = "DSTACK_KMS_SOURCE_TOKEN"


def add_tokens(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--onboard-token",
        metavar="TOKEN",
        help=f"core.onboard.auth_token of both KMS, if they have one (${ONBOARD_VARIABLE})",
    )
    parser.add_argument(
        "--source-token",
        metavar="TOKEN",
        help=f"core.admin.auth_token of the source, if --source-url is its admin listener (${SOURCE_VARIABLE})",
    )


def tokens(arguments: argparse.Namespace) -> tuple[str, str]:
    """Return the token of the onboard phase and that of the source, empty if not given; raise `UsageError`."""
    return (
        _token(arguments.onboard_token, "--onboard-token", ONBOARD_VARIABLE),
        _token(arguments.source_token, "--source-token", SOURCE_VARIABLE),
    )


def _token(given: str | None, option: str, variable: str) -> str:
    name, text = (variable, os.environ.get(variable, "")) if given is None else (option, given)
    try:
        return require_token(text.strip(), name)
    except ValueError as error:
        raise UsageError(str(error)) from None
