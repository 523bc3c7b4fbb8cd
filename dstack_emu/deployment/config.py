"""What a stack is made of: seed, addresses, folders.

Ports are those of `transport.ports` by default.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from dstack_emu.simulator.seed import DEFAULT_SEED
from dstack_emu.transport.ports import GRPC_PORTS as GRPC_PORTS
from dstack_emu.transport.ports import IMAGE_PORT as IMAGE_PORT
from dstack_emu.transport.ports import IMAGE_URL as IMAGE_URL
from dstack_emu.transport.ports import PORTS as PORTS

JOURNAL_SIZE: Final = 2000
"""Calls that the journal of a stack keeps in memory; older ones are dropped."""

DESCRIPTION_FILE: Final = "stack.json"
"""The stack's description, in its state folder."""


class StackError(Exception):
    """A stack that cannot be brought up; the text names the part and the next step."""


class PartEndedError(Exception):
    """A part that failed while the stack ran; the text names it. The others are stopped by then."""


@dataclass(frozen=True, slots=True)
class StackConfig:
    """Settings of one stack.

    `state` is the folder for keys, sockets and policies (None: a temporary one, gone afterwards); `policies` another
    place for the two policy files. With `fresh` it stops at the runbook's starting point. `host` is where it listens.
    `image_dir` is the OS image that everything boots, instead of the seed's. `journal` is a file that records of calls
    are appended to, `journal_size` how many stay in memory; `patience` how many seconds the services wait for one
    another (None: as long as upstream). With `grpc` agents and KMS serve gRPC, too; ports that are not given are those
    of PORTS and GRPC_PORTS.
    """

    seed: str = DEFAULT_SEED
    fresh: bool = False
    host: str = "127.0.0.1"
    ports: Mapping[str, int] = field(default_factory=lambda: PORTS)
    state: Path | None = None
    policies: Path | None = None
    grpc: bool = False
    image_dir: Path | None = None
    journal: Path | None = None
    journal_size: int = JOURNAL_SIZE
    patience: float | None = None

    @classmethod
    def on_free_ports(cls, **settings: object) -> Self:
        """The same with a free port for each service."""
        return cls(**settings, ports=dict.fromkeys([*PORTS, *GRPC_PORTS], 0))  # type: ignore[arg-type]  # fields by name
