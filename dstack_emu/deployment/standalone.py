"""How the standalone programs start and end: by being entered and left. A start that fails leaves nothing behind."""

from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self


class Standalone(ABC):
    """A program of parts. Entering it starts them, leaving it ends them, the last first."""

    def __init__(self) -> None:
        self._exit = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._exit.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit.aclose()

    @abstractmethod
    async def _start(self) -> None:
        """Start all parts, and put the end of each on the exit stack."""
