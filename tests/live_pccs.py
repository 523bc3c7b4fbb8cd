"""A PCCS of a seed in this process, whose emulated vendor changes its mind between two calls."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.pccs import pccs_app
from dstack_emu.simulator.platform import PlatformState
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.listen import bind_tcp, serve


@dataclass(frozen=True)
class LivePccs:
    """Where it listens, and the vendor behind it."""

    url: str
    intel: Intel

    @contextmanager
    def says(self, platform: str, state: PlatformState) -> Iterator[None]:
        """Say this of a platform while the block runs, and what was said before after it."""
        of_it = self.intel.platform(platform)
        before, of_it.state = of_it.state, state
        try:
            yield
        finally:
            of_it.state = before


@contextmanager
def live_pccs(seed: str) -> Iterator[LivePccs]:
    """Serve a seed's collateral from a thread until the block ends."""
    intel, sock = Intel(Seed.of(seed)), bind_tcp("127.0.0.1", 0)
    loop, stopped = asyncio.new_event_loop(), asyncio.Event()

    async def run() -> None:
        server = await serve(pccs_app(intel), sock)
        await stopped.wait()
        await server.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    url = "http://{}:{}".format(*sock.getsockname())  # bound and listening: who comes early waits
    thread.start()
    try:
        yield LivePccs(url, intel)
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join()
        loop.close()
