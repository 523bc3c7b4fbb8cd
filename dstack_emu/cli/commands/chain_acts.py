"""`dstack-emu chain ACT`: what operators do on chain, each a transaction through any node, or on a stack's chain."""

import argparse
import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eth_address import decode_address
from dstack_emu.chain import operations
from dstack_emu.chain.ask import remote_ask
from dstack_emu.chain.contracts import AppContract, Contract, KmsContract, KmsInfo, Sender, deploy_kms
from dstack_emu.chain.errors import ChainError
from dstack_emu.chain.operations import APP_SETTINGS, LISTINGS, OF_APP, Changed
from dstack_emu.chain.policy import read_document
from dstack_emu.chain.quantities import checksummed
from dstack_emu.cli.commands.common import UsageError, add_release, say
from dstack_emu.deployment.config import DESCRIPTION_FILE, STATE_VARIABLE
from dstack_emu.transport.http_client import HttpClient
from dstack_emu.transport.urls import is_http_url, shown_origin, shown_url

KEY_VARIABLE: Final = "PRIVATE_KEY"
"""The variable with the private key that signs, as upstream's scripts name it."""
_DISABLE_UPGRADES: Final = "disable-upgrades"
TIMEOUT: Final = 60.0
MAX_ANSWER: Final = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Node:
    """Where the acts go: an account of a node, DstackKms (None: not named), and the app (None: not named)."""

    sender: Sender
    kms_address: bytes | None
    app_id: bytes | None

    @property
    def kms(self) -> KmsContract:
        if self.kms_address is None:
            raise UsageError("the address of DstackKms expected: --kms-contract ADDRESS, or KMS_CONTRACT_ADDR")
        return KmsContract(self.sender.ask, self.kms_address)

    @property
    def app(self) -> AppContract:
        if self.app_id is None:
            raise UsageError("the app's id, the address of its contract, expected: --app ADDRESS")
        return AppContract(self.sender.ask, self.app_id)

    def contract(self, arguments: argparse.Namespace) -> Contract:
        """Return the app's contract if --app names one, else DstackKms."""
        return self.app if arguments.app is not None else self.kms


Act = Callable[[_Node, argparse.Namespace], Awaitable[Changed | dict[str, Any]]]


def add_acts(parser: argparse.ArgumentParser) -> None:
    """Add the acts; without one the command runs a chain."""
    acts = parser.add_subparsers(dest="chain_act", metavar="ACT", title="acts on any chain")

    def act(name: str, text: str, run: Act, *, app: bool = True) -> argparse.ArgumentParser:
        made = acts.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".")
        _add_where(made)
        if app:
            made.add_argument("--app", type=_address, metavar="ADDRESS", help="the app's id (that of the stack)")
        made.set_defaults(act_on_chain=run)
        return made

    add_release(act("deploy", "deploy DstackKms behind a proxy", _deploy, app=False), "whose contracts")
    act("show", "show what the contracts allow, in auth-simple's form", _show, app=False)
    info = act("kms-info", "show or set what the KMS publishes: keys, quote, event log", _kms_info, app=False)
    info.add_argument("file", nargs="?", type=Path, help="JSON with hex: k256_pubkey, ca_pubkey, quote, eventlog")
    for verb, text in (("allow", "allow a hash"), ("remove", "withdraw a hash")):
        made = act(verb, f"{text}: of an OS image, a KMS, or an app", _entry)
        made.add_argument("kind", choices=LISTINGS)
        made.add_argument("value", type=_hash, metavar="HEX", help="32 bytes")
        made.set_defaults(is_allowed=verb == "allow")
    app = act("app-deploy", "create the contract of an app, and register it", _app_deploy, app=False)
    app.add_argument("--compose-hash", type=_hash, default=bytes(32), metavar="HEX", help="allowed at once (none)")
    app.add_argument("--device", type=_hash, default=bytes(32), metavar="HEX", help="allowed at once (none)")
    for flag in ("--allow-any-device", "--require-tcb-up-to-date", "--disable-upgrades"):
        app.add_argument(flag, action="store_true")
    register = act("app-register", "register a contract that exists as an app", _app_register, app=False)
    register.add_argument("address", type=_address)
    setting = act("app-set", "change a setting of an app", _app_set)
    setting.add_argument("setting", choices=[*APP_SETTINGS, _DISABLE_UPGRADES])
    setting.add_argument("value", choices=("true", "false"), help=f"{_DISABLE_UPGRADES} stays true for ever")
    setting = act("kms-set", "change a setting of DstackKms", _kms_set, app=False)
    setting.add_argument("setting", choices=("gateway-app-id", "app-implementation"))
    setting.add_argument("value", help="the gateway's app as text, or an address")
    transfer = act("transfer-ownership", "hand DstackKms, or with --app an app, over", _transfer)
    transfer.add_argument("address", type=_address)
    act("accept-ownership", "become the owner that was named (0.6)", _accept)
    upgrade = act("upgrade", "replace the implementation of DstackKms, or with --app of an app", _upgrade)
    upgrade.add_argument("--implementation", type=_address, metavar="ADDRESS", help="(one of this project, deployed)")
    add_release(upgrade, "whose contract, if none is named")


def _add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rpc-url", metavar="URL", help="the JSON-RPC (that of the stack, else ETH_RPC_URL)")
    parser.add_argument(
        "--kms-contract", type=_address, metavar="ADDRESS", help="DstackKms (that of the stack, else KMS_CONTRACT_ADDR)"
    )
    parser.add_argument("--state", type=Path, metavar="FOLDER", help=f"the stack's state folder ({STATE_VARIABLE})")
    parser.add_argument(
        "--from",
        dest="sender",
        type=_address,
        metavar="ADDRESS",
        help=f"an account of the node (its first one; with the variable {KEY_VARIABLE} that key signs here)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_act(arguments: argparse.Namespace) -> int:
    """Send an act and print it; status 1 if a contract or the node refuses."""
    try:
        done = asyncio.run(_run(arguments))
    except ChainError as error:
        say(f"Error: {error}")
        return 1
    if isinstance(done, Changed):
        print(json.dumps(asdict(done)) if arguments.json else done.text)
    else:
        print(json.dumps(done, indent=None if arguments.json else 2))
    return 0


async def _run(arguments: argparse.Namespace) -> Changed | dict[str, Any]:
    stack = _stack(arguments)
    url = arguments.rpc_url or stack.get("rpc_url") or os.environ.get("ETH_RPC_URL")
    if url is None:
        raise UsageError("a chain expected: --rpc-url URL, ETH_RPC_URL, or --state FOLDER of a stack with --auth eth")
    if not is_http_url(url):
        raise UsageError(f"--rpc-url: http(s)://host:port expected, got {shown_url(url)!r:.200}")
    client = HttpClient(timeout=TIMEOUT, max_answer=MAX_ANSWER, shown=shown_origin)
    try:
        sender = await _sender(client, url, arguments)
        kms = arguments.kms_contract or _given_address(stack.get("kms") or os.environ.get("KMS_CONTRACT_ADDR"))
        app = getattr(arguments, "app", None) or _given_address(stack.get("app"))
        act: Act = arguments.act_on_chain
        return await act(_Node(sender, kms, app), arguments)
    finally:
        await client.close()


async def _sender(client: HttpClient, url: str, arguments: argparse.Namespace) -> Sender:
    ask = remote_ask(client, url)
    key = os.environ.get(KEY_VARIABLE)
    if key:
        try:
            signing, owner = operations.signing_ask(ask, bytes.fromhex(key.removeprefix("0x")))
        except ValueError as error:
            raise UsageError(f"{KEY_VARIABLE}: a private key of 32 bytes in hex expected") from error
        if arguments.sender not in (None, owner):
            raise UsageError(f"--from: {checksummed(owner)} expected, whose key {KEY_VARIABLE} has; unset one of both")
        return Sender(signing, owner)
    if arguments.sender is not None:
        return Sender(ask, arguments.sender)
    accounts = await ask("eth_accounts", [])
    if not accounts:
        raise UsageError(f"the node has no accounts: set {KEY_VARIABLE}, or name one by --from")
    return Sender(ask, decode_address(accounts[0]))


def _stack(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the chain of the stack whose state folder is named; nothing if none is, or a URL is given."""
    folder = arguments.state or os.environ.get(STATE_VARIABLE)
    if arguments.rpc_url or not folder:
        return {}
    path = Path(folder, DESCRIPTION_FILE)
    try:
        found = json.loads(path.read_text())
        return {
            "rpc_url": found["services"]["chain"],
            "kms": found["chain"]["contracts"]["kms"],
            "app": f"0x{found['app']['app_id']}",
        }
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"the stack in {folder} has no chain of its own: start it with --auth eth, "
            "or name another chain by --rpc-url and --kms-contract"
        ) from error


# ---- the acts


async def _deploy(node: _Node, arguments: argparse.Namespace) -> dict[str, Any]:
    kms = await deploy_kms(node.sender, arguments.release.auth_eth_revision)
    return {
        "kms": checksummed(kms.address),
        "app_implementation": checksummed(await kms.app_implementation()),
        "owner": checksummed(await kms.owner()),
    }


async def _show(node: _Node, arguments: argparse.Namespace) -> dict[str, Any]:
    return await read_document(node.sender.ask, node.kms.address)


async def _kms_info(node: _Node, arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.file is not None:
        await node.kms.set_info(node.sender, _read_info(arguments.file))
    return {name: value.hex() for name, value in asdict(await node.kms.info()).items()}


def _read_info(path: Path) -> KmsInfo:
    names = ("k256_pubkey", "ca_pubkey", "quote", "eventlog")
    try:
        document = json.loads(path.read_text())
        return KmsInfo(*(bytes.fromhex(document[name].removeprefix("0x")) for name in names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: JSON with hex in {', '.join(names)} expected ({error})") from error


async def _entry(node: _Node, arguments: argparse.Namespace) -> Changed:
    contract: Contract = node.app if arguments.kind in OF_APP else node.kms
    return await operations.list_entry(
        contract, node.sender, arguments.kind, arguments.value, allowed=arguments.is_allowed
    )


async def _app_deploy(node: _Node, arguments: argparse.Namespace) -> dict[str, Any]:
    app = await node.kms.deploy_app(
        node.sender,
        compose_hash=arguments.compose_hash,
        device_id=arguments.device,
        allow_any_device=arguments.allow_any_device,
        require_tcb_up_to_date=arguments.require_tcb_up_to_date,
        disable_upgrades=arguments.disable_upgrades,
    )
    return {"app_id": app.address.hex(), "address": checksummed(app.address)}


async def _app_register(node: _Node, arguments: argparse.Namespace) -> Changed:
    return await operations.register_app(node.kms, node.sender, arguments.address)


async def _app_set(node: _Node, arguments: argparse.Namespace) -> Changed:
    value = arguments.value == "true"
    if arguments.setting != _DISABLE_UPGRADES:
        return await operations.set_app(node.app, node.sender, arguments.setting, value)
    if not value:
        raise UsageError(f"{_DISABLE_UPGRADES} true expected: a contract whose upgrades are disabled stays as it is")
    return await operations.disable_upgrades(node.app, node.sender)


async def _kms_set(node: _Node, arguments: argparse.Namespace) -> Changed:
    if arguments.setting == "gateway-app-id":
        return await operations.set_gateway_app_id(node.kms, node.sender, arguments.value)
    try:
        implementation = _address(arguments.value)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"app-implementation: {error}") from error
    return await operations.set_app_implementation(node.kms, node.sender, implementation)


async def _transfer(node: _Node, arguments: argparse.Namespace) -> Changed:
    return await operations.transfer_ownership(node.contract(arguments), node.sender, arguments.address)


async def _accept(node: _Node, arguments: argparse.Namespace) -> Changed:
    return await operations.accept_ownership(node.contract(arguments), node.sender)


async def _upgrade(node: _Node, arguments: argparse.Namespace) -> Changed:
    revision = arguments.release.auth_eth_revision
    return await operations.upgrade(node.contract(arguments), node.sender, arguments.implementation, revision)


# ---- arguments


def _address(text: str) -> bytes:
    try:
        return decode_address(text if text.startswith("0x") else f"0x{text}")
    except FormatError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _given_address(text: str | None) -> bytes | None:
    try:
        return None if not text else decode_address(text)
    except FormatError as error:
        raise UsageError(str(error)) from error


def _hash(text: str) -> bytes:
    try:
        found = bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        found = b""
    if len(found) != 32:
        raise argparse.ArgumentTypeError(f"32 bytes in hex expected, got {text!r:.80}")
    return found
