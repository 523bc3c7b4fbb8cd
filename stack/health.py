"""Asking a running stack whether it is ready, by the description in its state folder."""

import asyncio
import json
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import aiohttp

from stack.config import DESCRIPTION_FILE
from transport.client import describe_failure

TIMEOUT: Final = 5.0


async def check_health(state: Path) -> list[str]:
    """Ask each service of the stack; return what is wrong, one line a problem, nothing when all answer."""
    path = state / DESCRIPTION_FILE
    try:
        services: dict[str, str] = json.loads(path.read_text())["services"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"no stack is ready in {state}: {path} cannot be read ({error})"]
    return [problem for problem in (await ask_services(services)).values() if problem]


async def ask_services(services: Mapping[str, str]) -> dict[str, str]:
    """Ask services by name and URL; say of each what is wrong, in no words where it answers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the question is only whether it answers
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(ssl=context)) as session:
        answers = await asyncio.gather(*(_ask(session, name, url) for name, url in services.items()))
    return dict(zip(services, answers, strict=True))


async def _ask(session: aiohttp.ClientSession, name: str, url: str) -> str:
    try:
        async with session.get(url + ("/" if name.startswith("auth-") else "/health")) as response:
            return "" if response.status == 200 else f"{name} at {url} answered {response.status}"
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        return f"{name} at {url}: {describe_failure(error, TIMEOUT)}"
