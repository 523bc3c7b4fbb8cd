"""Checks the health of a running stack by a request to each service in its description."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dstack_emu.deployment.config import DESCRIPTION_FILE
from dstack_emu.deployment.gateway_names import ADMIN, INGRESS
from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError
from dstack_emu.transport.http_client import HttpClient
from dstack_emu.transport.tls import client_context
from dstack_emu.transport.urls import shown_url

TIMEOUT: Final = 5.0
MAX_PAGE: Final = 1024 * 1024
"""The maximum length of a page in bytes."""


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
    # Certificates are not verified: only the status matters here.
    client = HttpClient(timeout=TIMEOUT, max_answer=MAX_PAGE, tls=client_context())
    try:
        answers = await asyncio.gather(*(_check(client, name, url) for name, url in services.items()))
    finally:
        await client.close()
    return dict(zip(services, answers, strict=True))


async def check_grpc(targets: Mapping[str, str]) -> dict[str, str]:
    """Check gRPC listeners by name and target (grpc.health.v1); return the problem of each, empty if it serves.

    The second port of a KMS is only checked when the KMS uses TLS; before that, nothing is served there.
    """
    if not targets:
        return {}
    from dstack_emu.deployment.grpc_health import check_listener  # grpcio costs time and memory

    answers = await asyncio.gather(*(check_listener(name, targets, TIMEOUT) for name in targets))
    return {name: answer for name, answer in zip(targets, answers, strict=True) if answer is not None}


async def _check(client: HttpClient, name: str, url: str) -> str:
    if name == INGRESS:
        return await _check_ingress(url)
    problem = await _check_at(client, name, url)
    if problem and name.startswith("kms-"):  # its phase, and so the scheme, may have changed
        scheme, _, rest = url.partition("://")
        other = "https" if scheme == "http" else "http"
        return await _check_at(client, name, f"{other}://{rest}") and problem
    return problem


async def _check_ingress(address: str) -> str:
    """Check that connections are accepted: what it answers belongs to the apps behind it."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(TIMEOUT):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, ValueError) as error:
        return f"{INGRESS} at {address}: {error}"
    writer.close()
    return ""


async def _check_at(client: HttpClient, name: str, url: str) -> str:
    try:
        page = url + ("/" if name.startswith("auth-") else "/health")
        answer = await client.send("GET", page, follow_redirects=True)
    except (NoAnswerError, AnswerTooLongError) as error:
        return f"{name} at {shown_url(url)}: {error}"
    if answer.status == 401 and name.startswith(("kms-", ADMIN)):  # one that wants a token of every caller
        return ""
    if name == ADMIN and answer.status == 404:  # it has no page for this, and answers
        return ""
    return "" if answer.status == 200 else f"{name} at {shown_url(url)} answered {answer.status}"
