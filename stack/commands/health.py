"""`dstack-emu health`: is a running stack, or one service of it, ready?"""

import argparse
import asyncio
import http.client
import ssl
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from stack.commands.common import UsageError, say

HELP = "ask whether a stack, or one service, is ready"

DESCRIPTION = (
    "Ask every service of the stack in a state folder, or those that are named; exit 0 when all answer, 1 with the "
    "reason otherwise. A container's health check asks one service by its URL."
)

TIMEOUT: Final = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--state", type=Path, metavar="DIR", help="the folder given to `up --state`")
    parser.add_argument(
        "--url", action="append", default=[], metavar="URL", help="a URL that has to answer with status 200"
    )
    parser.add_argument(
        "--kms", action="append", default=[], metavar="HOST:PORT", help="a KMS that has to answer, in whichever phase"
    )


def run(arguments: argparse.Namespace) -> int:
    """Ask, and say what is wrong."""
    if arguments.state is None and not arguments.url and not arguments.kms:
        raise UsageError("nothing to ask: give --state DIR, --url URL or --kms HOST:PORT")
    problems = [problem for url in arguments.url if (problem := ask(url))]
    for address in arguments.kms:
        if ask(f"http://{address}/health") and (problem := ask(f"https://{address}/health")):
            problems.append(problem)
    if arguments.state is not None:
        from stack.health import check_health  # with it comes the whole stack, which one URL does not need

        problems += asyncio.run(check_health(arguments.state))
    for problem in problems:
        say(problem)
    if not problems:
        print("ready")
    return 1 if problems else 0


def ask(url: str) -> str:
    """GET a URL, believing any certificate; return what is wrong, nothing when it answers with 200."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"http(s) URL expected, got {url!r}")
    connection: http.client.HTTPConnection
    try:
        if parts.scheme == "https":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=TIMEOUT, context=context)
        else:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT)
        try:
            connection.request("GET", parts.path or "/")
            status = connection.getresponse().status
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"{url}: {error or type(error).__name__}"
    return "" if status == 200 else f"{url} answered {status}, 200 expected"
