"""A webhook and a PCCS in one process, without a stack, for the measured KMS.

`python -m bench.services SEED POLICY` serves auth-simple over the policy file and the PCCS of that seed, and prints
their URLs as JSON. In a stack the journal records both, and would slow the KMS down.
"""

import asyncio
import json
import signal
import sys

from dstack_emu.auth.server import simple_app
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.pccs import pccs_app
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.listen import AnyApplication, bind_tcp, serve


async def _serve(seed: str, policy: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    apps: dict[str, AnyApplication] = {"auth-src": simple_app(policy), "pccs": pccs_app(Intel(Seed.of(seed)))}
    servers = {name: await serve(app, bind_tcp("127.0.0.1", 0)) for name, app in apps.items()}
    print(json.dumps({name: server.url for name, server in servers.items()}), flush=True)
    await stop.wait()
    for server in servers.values():
        await server.close()


if __name__ == "__main__":
    asyncio.run(_serve(*sys.argv[1:]))
