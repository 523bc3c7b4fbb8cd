"""`dstack-emu chain`: run a chain with dstack's contracts, without a stack; or act on any chain."""

import argparse
import json
from pathlib import Path
from typing import Any

from dstack_emu.cli.commands.chain_acts import add_acts, run_act
from dstack_emu.cli.commands.common import WARNING, add_release, listen_address, run_server, stop_on_signals
from dstack_emu.deployment.standalone_chain import StandaloneChain, StandaloneChainSettings
from dstack_emu.simulator.seed import DEFAULT_SEED
from dstack_emu.transport.listen import bind_tcp
from dstack_emu.transport.ports import CHAIN_PORT

MAX_CHAIN_ID = 2**53 - 1

DESCRIPTION = (
    "Run a chain of one node, with the contracts DstackKms and DstackApp in it, and serve its JSON-RPC over HTTP and "
    "WebSocket. Every transaction is mined at once. Accounts, their keys and the addresses of the contracts follow "
    "from the seed. It needs the extra `eth`. With an act it sends transactions to any chain instead. " + WARNING
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--listen",
        type=listen_address,
        default=("127.0.0.1", CHAIN_PORT),
        metavar="HOST:PORT",
        help=f"address; port 0 takes a free one (127.0.0.1:{CHAIN_PORT})",
    )
    parser.add_argument("--seed", default=DEFAULT_SEED, metavar="TEXT", help="the text of the accounts (%(default)s)")
    parser.add_argument("--chain-id", type=_chain_id, default=31337, metavar="NUMBER", help="(%(default)s)")
    parser.add_argument("--state", type=Path, metavar="FOLDER", help="keep the chain in this folder")
    parser.add_argument("--no-contracts", action="store_true", help="deploy no contracts")
    add_release(parser, "whose contracts: in 0.6 a new owner accepts, and each policy change is an event")
    parser.add_argument("--json", action="store_true", help="print one line of JSON when ready, no more on stdout")
    add_acts(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the chain until a signal, or send an act to any chain."""
    if arguments.chain_act is not None:
        return run_act(arguments)
    settings = StandaloneChainSettings(
        seed=arguments.seed,
        release=arguments.release,
        chain_id=arguments.chain_id,
        state=arguments.state,
        deploys=not arguments.no_contracts,
    )
    return run_server(_run(settings, arguments.listen, as_json=arguments.json), has_grpc=False)


async def _run(settings: StandaloneChainSettings, address: tuple[str, int], *, as_json: bool) -> int:
    stop = stop_on_signals()
    async with StandaloneChain(settings, bind_tcp(*address, setting="--listen")) as chain:
        description = await chain.description()
        print(json.dumps(description) if as_json else banner(description), flush=True)
        await stop.wait()
    return 0


def banner(description: dict[str, Any]) -> str:
    """Return what a person is told when the chain is ready."""
    accounts = description["accounts"]
    lines = ["Accounts, 10000 ETH each at the beginning", ""]
    lines += [f"({number}) {account['address']}" for number, account in enumerate(accounts)]
    lines += ["", "Private keys", ""]
    lines += [f"({number}) {account['private_key']}" for number, account in enumerate(accounts)]
    if contracts := description["contracts"]:
        lines += ["", "Contracts", ""]
        lines += [f"DstackKms              {contracts['kms']}"]
        lines += [f"DstackApp (for apps)   {contracts['app_implementation']}"]
        lines += [f"owner                  {contracts['owner']}"]
    place = f"{description['url']} (chain id {description['chain_id']}, block {description['block']})"
    return "\n".join([*lines, "", f"Chain at {place}. {WARNING} Ctrl-C stops it."])


def _chain_id(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= MAX_CHAIN_ID:
        raise argparse.ArgumentTypeError(f"a number of 1 to {MAX_CHAIN_ID} expected, got {text!r:.40}")
    return int(text)
