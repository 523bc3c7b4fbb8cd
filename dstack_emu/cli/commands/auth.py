"""`dstack-emu auth`: run one auth webhook: auth-simple, dstack-auth, auth-eth-bun or auth-mock.

The webhooks read the environment variables of upstream's programs: PORT and HOST are read here, the others in
`auth.simple`, `auth.eth_settings` and `auth.mock`; dstack-auth reads none. An option overrides its variable.
"""

import argparse
import json
import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from dstack_emu.auth.config_file import read_config
from dstack_emu.auth.errors import AuthConfigError
from dstack_emu.auth.eth_settings import NO_CONTRACT, EthSettings, unread_variables
from dstack_emu.auth.file import DEFAULT_ALLOWLIST_PATH, parse_allowlist_file
from dstack_emu.auth.file_server import file_app
from dstack_emu.auth.mock import MockSettings
from dstack_emu.auth.server import mock_app, simple_app
from dstack_emu.auth.simple import SimpleSettings, parse_policy
from dstack_emu.cli.commands.common import (
    WARNING,
    UsageError,
    add_release,
    listen_address,
    run_server,
    say,
    stop_on_signals,
)
from dstack_emu.cli.commands.eth_options import add_eth_options, eth_variables, given_eth_options
from dstack_emu.cli.commands.inspect import WIDTH
from dstack_emu.transport.listen import AnyApplication, bind_tcp, serve
from dstack_emu.transport.urls import shown_origin

DESCRIPTION: Final = (
    "Run one auth webhook. `simple` (auth-simple) and `file` (dstack-auth) decide by a JSON file that they read at "
    "every request; without that file they run and deny everyone. `eth` (auth-eth-bun) asks a DstackKms contract on a "
    "chain, over JSON-RPC, at every request; if the chain gives no decision, it denies. `mock` has a fixed policy that "
    "ignores the measurements: for tests only. Each request and its decision is logged to stderr. A KMS uses the "
    "webhook in core.auth_api.webhook.url. If an option is not given, upstream's variables are read: for all except "
    "`file` PORT; for `simple` AUTH_CONFIG_PATH and AUTH_SIMPLE_COMPAT; for `eth` ETH_RPC_URL, KMS_CONTRACT_ADDR, "
    "ETH_CHAIN_ID, ETH_FINALITY_CONFIRMATIONS and HOST, and of ours AUTH_ETH_COMPAT (0.5.11 or next) and "
    "AUTH_ETH_BLOCK_CACHE; for `mock` MOCK_POLICY (allow-all, deny-all, deny-kms, deny-app, allowlist-device, "
    "allowlist-mr), MOCK_ALLOWED_DEVICE_IDS, MOCK_ALLOWED_MR_AGGREGATED and the values of its answers. " + WARNING
)
EXAMPLES: Final = """\
examples:
  dstack-emu auth simple -c auth-config.json
  dstack-emu auth eth --eth-rpc-url http://127.0.0.1:8545 --kms-contract 0x5FbDB2315678afecb367f032d93F642f64180aa3
  dstack-emu auth eth -v …                   with -v it also logs why a chain gave no decision
  curl http://127.0.0.1:3000/                asks the contract for its gateway, as GetMeta of a KMS does
  dstack-emu check-webhook http://127.0.0.1:3000 --contract eth --allowed boot-info.json
"""

TALKATIVE: Final = ("auth",)
"""Loggers that show information without -v, because upstream's programs always write these lines."""

DEFAULT_PORT: Final = 3000
"""Upstream's port of `simple`, `eth` and `mock`, if PORT is not set."""
DEFAULT_FILE_PORT: Final = 8001
"""Upstream's port of `file`."""
LOOPBACK: Final = "127.0.0.1"
LISTEN: Final = "--listen HOST:PORT"
LISTEN_OR_PORT: Final = f"{LISTEN} or PORT"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = textwrap.fill(DESCRIPTION, WIDTH), EXAMPLES
    parser.add_argument("kind", choices=tuple(_WEBHOOKS), help="the webhook to run")
    parser.add_argument(
        "--listen",
        type=listen_address,
        metavar="HOST:PORT",
        help=f"address; port 0 takes a free one (127.0.0.1, and PORT or {DEFAULT_PORT}; `file`: {DEFAULT_FILE_PORT})",
    )
    parser.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        help="the policy of `simple` (AUTH_CONFIG_PATH, else ./auth-config.json), or the allowlist of `file` "
        f"({DEFAULT_ALLOWLIST_PATH})",
    )
    add_eth_options(parser)
    add_release(
        parser,
        "if AUTH_SIMPLE_COMPAT or AUTH_ETH_COMPAT is not set, `simple` has the contract, and `eth` the revision, of "
        "this dstack release",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON when ready, no more on stdout")
    parser.add_argument(
        "--seed", metavar="TEXT", help="accepted, as in every command that serves; has no effect on a webhook"
    )


@dataclass(frozen=True, slots=True)
class _Webhook:
    """An application, its description, and its address if --listen is not given."""

    app: AnyApplication
    title: str
    facts: Mapping[str, str]
    default_port: Callable[[], int]
    address_setting: str
    """The name of the setting of the address, for messages."""
    default_host: str = LOOPBACK


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal."""
    if arguments.kind != "eth" and (given := given_eth_options(arguments)):
        raise UsageError(f"{given[0]} is for `auth eth`; `auth {arguments.kind}` asks no chain")
    webhook = _WEBHOOKS[arguments.kind](arguments)
    address = arguments.listen or (webhook.default_host, webhook.default_port())
    return run_server(_serve(webhook, address, as_json=arguments.json), has_grpc=False)


def _simple(arguments: argparse.Namespace) -> _Webhook:
    settings = SimpleSettings.from_env(os.environ, default_contract=arguments.release.auth_contract)
    if arguments.config is not None:
        settings = replace(settings, config_path=arguments.config)
    path = settings.config_path
    _report_unusable(lambda: parse_policy(read_config(path), path))
    facts = {"config_path": os.path.abspath(settings.config_path), "compat": settings.contract}
    app = simple_app(settings.config_path, contract=settings.contract)
    return _Webhook(app, "auth-simple", facts, _port, LISTEN_OR_PORT)


def _file(arguments: argparse.Namespace) -> _Webhook:
    path = DEFAULT_ALLOWLIST_PATH if arguments.config is None else arguments.config
    _report_unusable(lambda: parse_allowlist_file(read_config(path), path))
    facts = {"config_path": os.path.abspath(path)}
    return _Webhook(file_app(path), "dstack-auth", facts, lambda: DEFAULT_FILE_PORT, LISTEN)


def _eth(arguments: argparse.Namespace) -> _Webhook:
    if arguments.config is not None:
        raise UsageError("--config is for `auth simple` and `auth file`; `auth eth` decides by the contract alone")
    from dstack_emu.auth.eth_server import eth_app  # its client costs the other webhooks time and memory

    environment = {**os.environ, **eth_variables(arguments)}
    settings = EthSettings.from_env(environment, default_revision=arguments.release.auth_eth_revision)
    for name in unread_variables(settings, environment):
        say(f"{name} has no effect: auth-eth-bun of {settings.revision} does not read it")
    if settings.kms_contract == NO_CONTRACT:
        say("KMS_CONTRACT_ADDR (--kms-contract) is not set: everything is denied, because no contract is at address 0")
    facts = {
        "rpc_url": shown_origin(settings.rpc_url),
        "kms_contract": settings.kms_contract,
        "compat": settings.revision,
    }
    host = os.environ.get("HOST") or LOOPBACK
    return _Webhook(eth_app(settings), "auth-eth-bun", facts, _port, f"{LISTEN}, or HOST and PORT", host)


def _mock(arguments: argparse.Namespace) -> _Webhook:
    if arguments.config is not None:
        raise UsageError(
            "--config is for `auth simple` and `auth file`; set MOCK_POLICY to choose what `auth mock` decides"
        )
    settings = MockSettings.from_env(os.environ)
    return _Webhook(mock_app(settings), "auth-mock", {"policy": settings.policy}, _port, LISTEN_OR_PORT)


def _report_unusable(read: Callable[[], object]) -> None:
    try:
        read()
    except AuthConfigError as error:
        say(f"{error}; everything is denied until this file can be used")


_WEBHOOKS: Final[Mapping[str, Callable[[argparse.Namespace], _Webhook]]] = {
    "simple": _simple,
    "file": _file,
    "eth": _eth,
    "mock": _mock,
}


def _port() -> int:
    text = os.environ.get("PORT") or str(DEFAULT_PORT)
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535):
        raise UsageError(f'PORT is "{text}", expected a number of 0 (a free one) to 65535')
    return int(text)


async def _serve(webhook: _Webhook, address: tuple[str, int], *, as_json: bool) -> int:
    stop = stop_on_signals()
    host, port = address
    server = await serve(webhook.app, bind_tcp(host, port, setting=webhook.address_setting))
    try:
        if as_json:
            print(json.dumps({"url": server.url, **webhook.facts}), flush=True)
        else:
            facts = ", ".join(f"{name} {value}" for name, value in webhook.facts.items())
            print(f"{webhook.title} at {server.url} ({facts}). Ctrl-C stops it.", flush=True)
        await stop.wait()
    finally:
        await server.close()
    return 0
