"""`dstack-emu setup`: run the authorization flow on two KMS and an app that run elsewhere."""

import argparse
import asyncio
import json
from pathlib import Path

from aiohttp import web

from dstack_emu.cli.commands.common import WARNING, listen_address, say, stop_on_signals
from dstack_emu.cli.commands.token_options import add_tokens, tokens
from dstack_emu.deployment import policy_files
from dstack_emu.deployment.authorization import Authorization, RemoteApp, remote_kms, tls_url
from dstack_emu.deployment.errors import StackError
from dstack_emu.transport.listen import bind_tcp, serve

DESCRIPTION = (
    "Measure two KMS without keys, allow them and the app in both policy files, bootstrap the source, onboard the "
    "destination, finish both, and wait until the app has its keys, as `dstack-emu up` does, but for services in "
    "processes or containers of their own. A KMS that has keys already and a policy that was edited stay as they are. "
    "" + WARNING
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--kms-src", required=True, metavar="URL", help="the KMS that generates the keys")
    parser.add_argument("--kms-dst", required=True, metavar="URL", help="the KMS that is onboarded from the source")
    parser.add_argument("--app", metavar="URL", help="the guest agent of an app to allow")
    parser.add_argument(
        "--policies", type=Path, required=True, metavar="DIR", help="the folder of auth-src.json and auth-dst.json"
    )
    parser.add_argument(
        "--source-url", metavar="URL", help="the URL of the source as the destination reaches it (default: --kms-src)"
    )
    add_tokens(parser)
    parser.add_argument("--fresh", action="store_true", help="only write policies that deny everyone")
    parser.add_argument(
        "--serve",
        type=listen_address,
        metavar="HOST:PORT",
        help="keep running, and answer /health with status 200 when everything is done",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON when done, no more on stdout")


def run(arguments: argparse.Namespace) -> int:
    """Set everything up; with --serve, keep running until a signal."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    policies = [arguments.policies / f"auth-{side}.json" for side in ("src", "dst")]
    try:
        policy_files.place(policies)
    except OSError as error:
        raise StackError(f"--policies: {arguments.policies} cannot be written: {error.strerror}") from error
    done = asyncio.Event()
    stop = stop_on_signals()
    server = None
    if arguments.serve is not None:
        host, port = arguments.serve
        server = await serve(_health_app(done), bind_tcp(host, port, setting="--serve HOST:PORT"))
    try:
        if not arguments.fresh:
            await _authorize(arguments, policies)
        done.set()
        if arguments.json:
            print(json.dumps({"fresh": arguments.fresh, "policies": [str(path) for path in policies]}), flush=True)
        else:
            say("fresh: both policies deny" if arguments.fresh else "ready")
        if server is not None:
            await stop.wait()
    finally:
        if server is not None:
            await server.close()
    return 0


async def _authorize(arguments: argparse.Namespace, policies: list[Path]) -> None:
    app = None if arguments.app is None else RemoteApp(arguments.app)
    onboard_token, source_token = tokens(arguments)
    flow = Authorization(
        source=remote_kms("kms-src", arguments.kms_src, _host(arguments.kms_src), onboard_token),
        target=remote_kms("kms-dst", arguments.kms_dst, _host(arguments.kms_dst), onboard_token),
        app=app,
        policies=policies,
        source_url=tls_url(arguments.source_url or arguments.kms_src),
        progress=say,
        source_token=source_token,
    )
    await flow.carry_out()
    if app is not None:
        # KMS with keys do not state their measurements, but the app does; otherwise setup would wait for nothing.
        if others := policy_files.of_other_stacks(policies, [], await app.rule()):
            raise StackError(others[0])
        say("waiting for the app's keys")
        await app.has_keys()


def _host(url: str) -> str:
    return url.partition("://")[2].partition("/")[0].rpartition(":")[0].strip("[]") or url


def _health_app(done: asyncio.Event) -> web.Application:
    async def health(request: web.Request) -> web.Response:
        if done.is_set():
            return web.json_response({"status": "ok", "service": "dstack-emu-setup"})
        return web.json_response({"status": "setting up", "service": "dstack-emu-setup"}, status=503)

    app = web.Application()
    app.router.add_get("/health", health)
    return app
