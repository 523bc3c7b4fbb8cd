"""Keeps a guest registered at its gateway: at its boot as its release does it, and later by the clock.

Source: dstack `dstack-util/src/system_setup.rs` at 40eaf35e and 312dc605; of later registrations
`basefiles/wg-checker.sh` at 40eaf35e and `dstack-util/src/gateway_checker.rs` at 312dc605.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from dstack_emu.attest.release import Release
from dstack_emu.deployment.clock import StackClock
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.gateway_client import FIRST_RETRY, LAST_RETRY, REFRESH, GatewayClient

FAILED: Final = "dstack-gateway registration failed, the app has no ingress route"
"""How the error of a boot begins that goes on without a gateway."""


async def register_at_boot(client: GatewayClient, urls: Sequence[str], release: Release) -> str:
    """Register a guest that boots; return the error of a boot that goes on without a gateway, or an empty text.

    Raises `GuestError` if the guest is of a release that does not boot without one.
    """
    try:
        await client.register(urls)
    except GuestError as error:
        if release.gateway_failure_ends_boot:
            raise
        return f"{FAILED}: {error}"
    return ""


@contextlib.asynccontextmanager
async def kept_registered(
    client: GatewayClient, urls: Sequence[str], clock: StackClock, report: Callable[[str], None]
) -> AsyncIterator[None]:
    """Register the guest again every 180 seconds; while it never was, after 30 to 120 seconds.

    `report` is given each error, and the word that it is registered after one.
    """
    task = asyncio.create_task(_register_again_and_again(client, urls, clock, report), name="gateway registration")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _register_again_and_again(
    client: GatewayClient, urls: Sequence[str], clock: StackClock, report: Callable[[str], None]
) -> None:
    retry, has_failed = FIRST_RETRY, False
    while True:
        is_registered = bool(client.registration.configuration)
        await clock.reached(clock.now() + (REFRESH if is_registered else retry))
        retry = FIRST_RETRY if is_registered else min(2 * retry, LAST_RETRY)
        try:
            await client.register(urls)
        except GuestError as error:
            has_failed = True
            report(str(error))
        else:
            if has_failed or not is_registered:
                report("registered")
            has_failed = False
