"""The machines of a VMM as data, which can be saved and restored. Bytes are base64 in JSON."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from dstack_emu.vmm.manifest import Manifest

MachineId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class _State(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, ser_json_bytes="base64", val_json_bytes="base64", defer_build=True
    )


class MachineState(_State):
    """One machine: its manifest, the contents of its files by their names, whether it is to run, and whether it did.

    Logs and events are not part of it.
    """

    manifest: Manifest
    files: dict[str, bytes]
    is_started: bool
    is_alive: bool


class FleetState(_State):
    """All machines, by id. `drawn` is for the caller: how many random bytes the VMM has used."""

    machines: dict[MachineId, MachineState] = {}
    drawn: Annotated[int, Field(ge=0)] = 0
