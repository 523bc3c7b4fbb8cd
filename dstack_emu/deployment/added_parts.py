"""The trust domains and KMS that were added to a stack while it ran, in its state folder, so that they come back.

A record has what a part was made from, and the KMS from which a trust domain has keys; the keys themselves are fetched
again. The keys and the policy of a KMS have files of their own. What else changes in a running stack (its clock, its
platforms, faults, runtime events) is in snapshots and `ctl save`, and not here.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Self

from pydantic import Field, ValidationError

from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.guests import RunningGuest
from dstack_emu.deployment.running_kms import PERMANENT, RunningKms
from dstack_emu.deployment.specs import GuestSpec, KmsSpec
from dstack_emu.deployment.state import StateModel
from dstack_emu.transport.files import replace_file_durably
from dstack_emu.transport.validation import describe

FILE: Final = "added.json"
"""The name of the record in the state folder. It may contain settings that are secrets, so its mode is 0600."""


class AddedGuest(StateModel):
    """A trust domain, and the KMS from which it has keys: empty if it has none."""

    spec: GuestSpec
    kms: str = ""


class AddedKms(StateModel):
    """A KMS, and its answer to GetAttestationInfo in the onboard phase."""

    spec: KmsSpec
    measured: dict[str, Any] | None = None


class AddedParts(StateModel):
    """All of them, in the order in which they were added."""

    kms: tuple[AddedKms, ...] = Field(default=())
    guests: tuple[AddedGuest, ...] = Field(default=())

    @classmethod
    def of(cls, kms: Iterable[RunningKms], guests: Iterable[RunningGuest], own: Sequence[str]) -> Self:
        """Return those of a running stack, without the parts of every stack and the trust domains named `own`."""
        return cls(
            kms=tuple(AddedKms(spec=each.spec, measured=each.measured) for each in kms if each.name not in PERMANENT),
            guests=tuple(
                AddedGuest(spec=each.spec, kms=each.source)
                for each in guests
                if each.name not in own and not each.name.startswith("kms-")  # those belong to a KMS
            ),
        )

    @classmethod
    def read(cls, state: Path) -> Self:
        """Read the record of a state folder, empty if there is none; raise `StackError` if it cannot be read."""
        path = state / FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return cls()
        except ValidationError as error:
            raise StackError(f"{path}: {describe(error)}: {how_to_leave_out(path)}") from error
        except OSError as error:
            raise StackError(f"{path} cannot be read: {error.strerror}") from error

    def write(self, state: Path) -> None:
        """Write the record of a state folder, unless nothing was added."""
        path = state / FILE
        if self.kms or self.guests or path.exists():
            replace_file_durably(path, self.model_dump_json(indent=1).encode(), 0o600)


def how_to_leave_out(path: Path) -> str:
    """Say how a stack starts without the parts of a record."""
    return f"delete {path} to start without the trust domains and KMS that were added"
