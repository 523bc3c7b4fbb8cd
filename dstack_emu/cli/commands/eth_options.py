"""The options of a webhook that asks a chain, each of which stands for a variable of auth-eth-bun."""

import argparse
from collections.abc import Mapping
from typing import Final

_TITLE: Final = "a webhook that asks a chain (`eth`)"
_VARIABLES: Final[Mapping[str, tuple[str, str, str, str]]] = {
    "--eth-rpc-url": ("ETH_RPC_URL", "URL", "the JSON-RPC of the chain", "else http://localhost:8545"),
    "--kms-contract": ("KMS_CONTRACT_ADDR", "ADDRESS", "the address of the DstackKms contract", ""),
    "--eth-block-cache": (
        "AUTH_ETH_BLOCK_CACHE",
        "SECONDS",
        "use the number of the latest block again for that long, as upstream does for 4 s: what was revoked meanwhile "
        "is still allowed",
        "else 0",
    ),
    "--eth-chain-id": ("ETH_CHAIN_ID", "N", "deny if the chain has another id", "else any"),
    "--eth-confirmations": (
        "ETH_FINALITY_CONFIRMATIONS",
        "N",
        "ask about the state of N blocks before the latest",
        "else 0",
    ),
    "--eth-compat": ("AUTH_ETH_COMPAT", "REVISION", "0.5.11 or next", "else that of --release"),
}
"""The variable of each option, its argument, what it means, and what holds without option and variable."""


def add_eth_options(parser: argparse.ArgumentParser) -> None:
    """Add all options, each in place of its variable."""
    group = parser.add_argument_group(_TITLE)
    for option, (variable, metavar, text, otherwise) in _VARIABLES.items():
        group.add_argument(option, metavar=metavar, help=f"{text} ({', '.join(filter(None, (variable, otherwise)))})")


def add_stack_eth_options(parser: argparse.ArgumentParser) -> None:
    """Add those that a stack has; it reads no variable for them."""
    group = parser.add_argument_group(_TITLE)
    for option, kind in {"--eth-rpc-url": str, "--kms-contract": str, "--eth-block-cache": float}.items():
        _, metavar, text, _ = _VARIABLES[option]
        group.add_argument(option, type=kind, metavar=metavar, help=text)


def eth_variables(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the variables that the options stand for, of those that were given."""
    return {_VARIABLES[option][0]: _value(arguments, option) or "" for option in given_eth_options(arguments)}


def given_eth_options(arguments: argparse.Namespace) -> list[str]:
    """Return the options that were given."""
    return [option for option in _VARIABLES if _value(arguments, option) is not None]


def _value(arguments: argparse.Namespace, option: str) -> str | None:
    value: str | None = getattr(arguments, option.removeprefix("--").replace("-", "_"), None)
    return value
