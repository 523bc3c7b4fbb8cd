"""A stack in the test's own process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from dstack_emu import Stack, StackConfig

PATIENCE = 2.0
"""Seconds that the services of such a stack wait for one another."""


@asynccontextmanager
async def own_stack(**settings: Any) -> AsyncIterator[Stack]:
    """Run a stack on free ports."""
    async with Stack(StackConfig.on_free_ports(**settings)) as stack:
        yield stack
