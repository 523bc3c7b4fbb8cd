"""The options of the commands that start a whole stack."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dstack_emu.auth.policy import CONTRACTS
from dstack_emu.cli.commands.common import add_release
from dstack_emu.cli.commands.eth_options import add_stack_eth_options
from dstack_emu.cli.commands.guest_options import add_collateral_issued
from dstack_emu.cli.commands.workload_options import add_workload
from dstack_emu.deployment.config import AUTH_KINDS, BASE_DOMAIN, TOKEN_VARIABLE, StackConfig
from dstack_emu.simulator.seed import DEFAULT_SEED
from dstack_emu.transport.ports import GRPC_PORTS, PORTS
from dstack_emu.transport.urls import shown_url

OTLP_VARIABLE: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""OpenTelemetry's own variable with the URL of a collector."""
OTLP_DEFAULT: Final = "http://localhost:4318"
"""Where a collector listens unless it is told otherwise."""

_PORTS = {**PORTS, **GRPC_PORTS}


def add_stack_options(parser: argparse.ArgumentParser) -> None:
    """Add the options, except the addresses."""
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start where the runbook begins: KMS without keys, and policies that deny everyone",
    )
    parser.add_argument(
        "--seed",
        default=DEFAULT_SEED,
        metavar="TEXT",
        help="the text from which all keys and ids are derived (%(default)s)",
    )
    add_release(parser, "the dstack release of all parts")
    parser.add_argument(
        "--auth-contract",
        choices=CONTRACTS,
        metavar="|".join(CONTRACTS),
        help="the contract of the auth-simple webhooks (default: that of the release)",
    )
    parser.add_argument(
        "--auth-api-cache",
        action="store_true",
        help="let each KMS use a webhook's successful answer about itself for a second, as 0.6 does",
    )
    add_collateral_issued(parser)
    _add_vmm_options(parser)
    _add_gateway_options(parser)
    parser.add_argument("--grpc", action="store_true", help="let agents and KMS serve gRPC, too")
    parser.add_argument(
        "--port",
        action="append",
        default=[],
        type=_port,
        metavar="NAME=PORT",
        help="the port of one service (0: a free one); may be repeated; names and defaults: "
        + ", ".join(f"{name}={port}" for name, port in _PORTS.items()),
    )
    _add_folders(parser)
    parser.add_argument(
        "--webhook",
        action="append",
        default=[],
        type=_named,
        metavar="NAME=URL",
        help="let the KMS src or dst ask this webhook in place of the stack's own; may be repeated",
    )
    parser.add_argument(
        "--auth",
        action="append",
        default=[],
        type=_auth_kind,
        metavar="[NAME=]KIND",
        help="the webhook that the stack runs for the KMS src or dst, or for both: simple (auth-simple, the default) "
        "or eth (auth-eth-bun, which asks the contract below, or that of a chain of the stack's own); may be repeated",
    )
    add_stack_eth_options(parser)
    add_kms_options(parser)
    parser.add_argument("--journal", type=Path, metavar="FILE", help="append a record of each call, as JSON lines")
    parser.add_argument(
        "--otlp",
        nargs="?",
        const=os.environ.get(OTLP_VARIABLE) or OTLP_DEFAULT,
        metavar="URL",
        help="send each call as spans to this collector of OpenTelemetry, by OTLP over HTTP (without a URL: to that of "
        f"{OTLP_VARIABLE}, or {OTLP_DEFAULT})",
    )
    parser.add_argument(
        "--image-dir",
        type=Path,
        metavar="DIR",
        help="boot this OS image instead of a generated one (see `dstack-emu image build`)",
    )
    _add_app_options(parser)


def _add_vmm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vmm", action="store_true", help="run a VMM, too: it deploys machines, as `vmm-cli.py` asks")
    add_workload(parser)


def _add_gateway_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gateway",
        action="store_true",
        help="run a gateway, too: apps register at it, and its ingress leads to them by names below the base domain",
    )
    parser.add_argument(
        "--base-domain",
        default=BASE_DOMAIN,
        metavar="NAME",
        help="the domain of the names of apps behind the gateway (%(default)s, which browsers and curl resolve)",
    )
    parser.add_argument(
        "--app-host",
        metavar="HOST",
        help="where the ports of the stack's app are (default: 127.0.0.1, unless --listen is another address)",
    )


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state",
        type=Path,
        metavar="DIR",
        help="keep keys, sockets and policies in this folder, and resume from it (default: a temporary folder)",
    )
    parser.add_argument(
        "--policies",
        type=Path,
        metavar="DIR",
        help="keep auth-src.json and auth-dst.json in this folder (default: in the state folder)",
    )


def _add_app_options(parser: argparse.ArgumentParser) -> None:
    app = parser.add_argument_group("the app")
    app.add_argument(
        "--app-compose",
        type=Path,
        metavar="FILE",
        help="the app-compose.json of the app, whose bytes are its identity (default: a generated one)",
    )
    app.add_argument(
        "--env-file",
        type=Path,
        metavar="FILE",
        help="variables for the app, as lines NAME=VALUE; encrypted for it, and filtered by its allowed_envs",
    )
    app.add_argument(
        "--user-config",
        type=Path,
        metavar="FILE",
        help="the app's user_config, which may contain its launch token (default: none)",
    )


def add_kms_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a KMS that is another program."""
    parser.add_argument(
        "--kms",
        action="append",
        default=[],
        type=_named,
        metavar="NAME=COMMAND",
        help="run this command line as the KMS src or dst, with the path of its kms.toml in the place of {config}; or "
        "wait for one that you start yourself, with `external` or a URL in place of the command; may be repeated",
    )
    parser.add_argument(
        "--kms-wait",
        type=float,
        metavar="SECONDS",
        help="how long to wait for such a KMS (60; 600 if you start it yourself)",
    )


def stack_config(arguments: argparse.Namespace, *, free_ports: bool, host: str = "127.0.0.1") -> StackConfig:
    """Return the configuration that the options describe."""
    ports: Mapping[str, int] = dict.fromkeys(_PORTS, 0) if free_ports else _PORTS
    return StackConfig(
        seed=arguments.seed,
        release=arguments.release.name,
        auth_contract=arguments.auth_contract,
        fresh=arguments.fresh,
        host=host,
        ports={**ports, **dict(arguments.port)},
        state=arguments.state,
        policies=arguments.policies,
        image_dir=arguments.image_dir,
        grpc=arguments.grpc,
        vmm=arguments.vmm,
        vmm_workload=arguments.vmm_workload,
        vmm_script_image=arguments.vmm_script_image,
        gateway=arguments.gateway,
        base_domain=arguments.base_domain,
        app_host=arguments.app_host,
        auth_api_cache=arguments.auth_api_cache,
        collateral_issued=arguments.collateral_issued,
        journal=arguments.journal,
        otlp=arguments.otlp,
        control_token=os.environ.get(TOKEN_VARIABLE) or None,
        webhooks=dict(arguments.webhook),
        auth={name: kind for each in arguments.auth for name, kind in each.items()},
        eth_rpc_url=arguments.eth_rpc_url,
        kms_contract=arguments.kms_contract,
        eth_block_cache=arguments.eth_block_cache or 0.0,
        kms=dict(arguments.kms),
        kms_wait=arguments.kms_wait,
        app_compose=arguments.app_compose,
        env_file=arguments.env_file,
        user_config=arguments.user_config,
    )


def _named(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if name not in ("src", "dst") or not equals or not value:
        raise argparse.ArgumentTypeError(f"src=… or dst=… expected, got {shown_url(text)!r:.100}")
    return name, value


def _auth_kind(text: str) -> dict[str, str]:
    name, equals, kind = text.rpartition("=")
    if kind not in AUTH_KINDS or name not in ("src", "dst", *(() if equals else ("",))):
        kinds = " or ".join(AUTH_KINDS)
        raise argparse.ArgumentTypeError(f"{kinds}, or src=… or dst=… with one of them, expected, got {text!r:.60}")
    return {name: kind} if name else {"src": kind, "dst": kind}


def _port(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if name not in _PORTS or not (number.isascii() and number.isdigit()) or int(number) > 65535:
        raise argparse.ArgumentTypeError(
            f"NAME=PORT expected, with a name of {', '.join(_PORTS)} and a port of 0 to 65535, got {text!r}"
        )
    return name, int(number)
