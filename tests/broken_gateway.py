"""The emulator's gateway with a fault in what it stores, which the variable `DEFECT` names.

Each defect is a patch of this process alone. `none` is the gateway as it is. The arguments are those of `dstack-emu`:
`python -m tests.broken_gateway gateway -c gateway.toml`.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import IO

from dstack_emu.cli.main import main as dstack_emu
from dstack_emu.gateway.state import GatewayState
from dstack_emu.gateway.store import Store

_load, _save = Store.load, Store.save


def leaves_a_part_in_its_buffer() -> None:
    open_files: list[IO[str]] = []

    def save(self: Store, state: GatewayState) -> None:
        open_files.append(self.path.open("w"))
        open_files[-1].write(state.model_dump_json())

    Store.save = save  # type: ignore[method-assign]


def stores_two_calls_later() -> None:
    states: list[GatewayState] = []

    def save(self: Store, state: GatewayState) -> None:
        states.append(state)
        if len(states) > 2:  # one would be what is stored of a call that is cut off before its answer
            _save(self, states.pop(0))

    Store.save = save  # type: ignore[method-assign]


def forgets_what_is_later_than_its_clock() -> None:
    def load(self: Store) -> GatewayState:
        found, now = _load(self), time.time()
        kept = {name: each for name, each in found.instances.items() if each.registered_at <= now}
        return found.model_copy(update={"instances": kept})

    Store.load = load  # type: ignore[method-assign]


DEFECTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "leaves_a_part_in_its_buffer": leaves_a_part_in_its_buffer,
    "stores_two_calls_later": stores_two_calls_later,
    "forgets_what_is_later_than_its_clock": forgets_what_is_later_than_its_clock,
}


def main(arguments: list[str]) -> None:
    """Plant the fault, and run the command."""
    DEFECTS[os.environ["DEFECT"]]()
    dstack_emu(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
