"""Keeps a guest registered at its gateway: at its boot as its release does it, and later by the clock.

Source: dstack `dstack-util/src/system_setup.rs` at 40eaf35e and 312dc605; of later registrations
`basefiles/wg-checker.sh` at 40eaf35e and `dstack-util/src/gateway_checker.rs` at 312dc605.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from dstack_emu.attest.release import Release
from dstack_emu.deployment.clock import StackClock
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.gateway_client import FIRST_RETRY, LAST_RETRY, REFRESH, GatewayClient
from dstack_emu.simulator.gateway_keys import Registration
from dstack_emu.transport.background import begin_in_background

FAILED: Final = "dstack-gateway registration failed, the app has no ingress route"
"""How the error of a boot begins that goes on without a gateway."""


class GatewayMembership:
    """The registration of one running guest at one of `urls()`: every 180 seconds of the clock, or, while it never was
    registered, after 30 to 120 seconds.

    `report` is given the error of each later attempt, and the word `registered` after one.
    """

    def __init__(self, urls: Callable[[], Sequence[str]], clock: StackClock, report: Callable[[str], None]) -> None:
        self._urls, self._clock, self._report = urls, clock, report
        self._client: GatewayClient | None = None
        self._task: asyncio.Task[None] | None = None

    async def join(self, client: GatewayClient, release: Release) -> str:
        """Register a guest that boots; return the error of a boot that goes on without a gateway, or an empty text.

        Raises `GuestError` if the guest is of a release that does not boot without one.
        """
        failed = ""
        try:
            await client.register(self._urls())
        except GuestError as error:
            if release.gateway_failure_ends_boot:
                client.forget()
                raise
            failed = f"{FAILED}: {error}"
        await self.restore(client)
        return failed

    def capture(self) -> Registration | None:
        """Return what the guest has of its gateways, None if it does not register."""
        return None if self._client is None else self._client.registration

    async def restore(self, client: GatewayClient | None) -> None:
        """Keep this guest registered from now on, or none."""
        await self._stop()
        self._client = client
        if client is not None:
            self._task = begin_in_background(self._register_again(client), "gateway registration")

    async def leave(self) -> None:
        """Register no more, and remove the files: they have private keys."""
        await self._stop()
        if self._client is not None:
            self._client.forget()
        self._client = None

    async def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._task = None

    async def _register_again(self, client: GatewayClient) -> None:
        retry, has_failed = FIRST_RETRY, False
        while True:
            is_registered = bool(client.registration.configuration)
            await self._clock.reached(self._clock.now() + (REFRESH if is_registered else retry))
            retry = FIRST_RETRY if is_registered else min(2 * retry, LAST_RETRY)
            try:
                await client.register(self._urls())
            except GuestError as error:
                has_failed = True
                self._report(str(error))
            else:
                if has_failed or not is_registered:
                    self._report("registered")
                has_failed = False
