"""The options of a webhook that asks a chain, each of which stands for a variable of auth-eth-bun."""

import argparse
from collections.abc import Mapping
from typing import Final

_VARIABLES: Final[Mapping[str, tuple[str, str, str]]] = {
    "--eth-rpc-url": ("ETH_RPC_URL", "URL", "the JSON-RPC of the chain (ETH_RPC_URL, else http://localhost:8545)"),
    "--kms-contract": ("KMS_CONTRACT_ADDR", "ADDRESS", "the address of the DstackKms contract (KMS_CONTRACT_ADDR)"),
    "--eth-chain-id": ("ETH_CHAIN_ID", "N", "deny if the chain has another id (ETH_CHAIN_ID, else any)"),
    "--eth-confirmations": (
        "ETH_FINALITY_CONFIRMATIONS",
        "N",
        "ask about the state of N blocks before the latest (ETH_FINALITY_CONFIRMATIONS, else 0)",
    ),
    "--eth-block-cache": (
        "AUTH_ETH_BLOCK_CACHE",
        "SECONDS",
        "use the number of the latest block again for that long, as upstream does for 4 s: what was revoked meanwhile "
        "is still allowed (AUTH_ETH_BLOCK_CACHE, else 0)",
    ),
    "--eth-compat": ("AUTH_ETH_COMPAT", "REVISION", "0.5.11 or next (AUTH_ETH_COMPAT, else that of --release)"),
}
_BASIC: Final = 2
"""How many of them, the first, say which contract is asked; the others say how."""


def add_eth_options(parser: argparse.ArgumentParser, *, with_tuning: bool) -> None:
    """Add the options that say which contract is asked, and with `with_tuning` those that say how."""
    group = parser.add_argument_group("a webhook that asks a chain (`eth`)")
    for option, (_, metavar, text) in list(_VARIABLES.items())[: None if with_tuning else _BASIC]:
        group.add_argument(option, metavar=metavar, help=text)


def eth_variables(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the variables that the options stand for, of those that were given."""
    return {_VARIABLES[option][0]: _value(arguments, option) or "" for option in given_eth_options(arguments)}


def given_eth_options(arguments: argparse.Namespace) -> list[str]:
    """Return the options that were given."""
    return [option for option in _VARIABLES if _value(arguments, option) is not None]


def _value(arguments: argparse.Namespace, option: str) -> str | None:
    value: str | None = getattr(arguments, option.removeprefix("--").replace("-", "_"), None)
    return value
