"""Health of a running stack: a request to each of its services, by the description in its state folder."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import aiohttp

from dstack_emu.deployment.config import DESCRIPTION_FILE
from dstack_emu.transport.client import describe_failure
from dstack_emu.transport.tls import client_context

TIMEOUT: Final = 5.0


async def check_health(state: Path) -> list[str]:
    """Check every service of a stack by its state folder; return one line for each problem, none if all answer."""
    path = state / DESCRIPTION_FILE
    try:
        description = json.loads(path.read_text())
        services: dict[str, str] = description["services"]
        targets: dict[str, str] = description.get("grpc", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"no stack is ready in {state}: {path} cannot be read ({error})"]
    found = await check_services(services) | await check_grpc(targets)
    return [problem for problem in found.values() if problem]


async def check_services(services: Mapping[str, str]) -> dict[str, str]:
    """Check services by name and URL; return the problem of each, empty if it answers."""
    context = client_context()  # nothing is verified: only whether it answers is of interest
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(ssl=context)) as session:
        answers = await asyncio.gather(*(_check(session, name, url) for name, url in services.items()))
    return dict(zip(services, answers, strict=True))


async def check_grpc(targets: Mapping[str, str]) -> dict[str, str]:
    """Check gRPC listeners by name and target (grpc.health.v1); return the problem of each, empty if it serves.

    The second port of a KMS is in the answer once there is TLS; before that, nothing is served there.
    """
    if not targets:
        return {}
    from dstack_emu.deployment.grpc_health import check_listener  # grpcio costs time and memory

    answers = await asyncio.gather(*(check_listener(name, targets, TIMEOUT) for name in targets))
    return {name: answer for name, answer in zip(targets, answers, strict=True) if answer is not None}


async def _check(session: aiohttp.ClientSession, name: str, url: str) -> str:
    problem = await _check_at(session, name, url)
    if problem and name.startswith("kms-"):  # whose phase, and with it the scheme, may be another one by now
        scheme, _, rest = url.partition("://")
        other = "https" if scheme == "http" else "http"
        return await _check_at(session, name, f"{other}://{rest}") and problem
    return problem


async def _check_at(session: aiohttp.ClientSession, name: str, url: str) -> str:
    try:
        async with session.get(url + ("/" if name.startswith("auth-") else "/health")) as response:
            return "" if response.status == 200 else f"{name} at {url} answered {response.status}"
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        return f"{name} at {url}: {describe_failure(error, TIMEOUT)}"
