"""The trust domains and KMS that were added to a stack while it ran, in its state folder, so that they come back.

Each has a file of its own, so that a change costs the same however many there are. It has what the part was made from,
and the KMS from which a trust domain has keys; the keys themselves are fetched again. The keys and the policy of a KMS
have files of their own. What else changes in a running stack (its clock, its platforms, faults, runtime events) is in
snapshots and `ctl save`, and not here.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from pydantic import ValidationError

from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.gateway_names import GATEWAY
from dstack_emu.deployment.guests import RunningGuest
from dstack_emu.deployment.own_app import NAME as OWN_APP
from dstack_emu.deployment.running_kms import PERMANENT, RunningKms
from dstack_emu.deployment.specs import GuestSpec, KmsSpec
from dstack_emu.deployment.state import StateModel
from dstack_emu.simulator.errors import GuestError
from dstack_emu.transport.files import replace_file_durably, sync_folder
from dstack_emu.transport.validation import describe

FOLDER: Final = "added"
"""The name of the folder in the state folder. Its files may contain secrets, so their mode is 0600."""

_KMS: Final = "kms-"
"""The beginning of the name of a KMS's part; no trust domain that is added has such a name."""

_OWN: Final = (OWN_APP, GATEWAY)
"""The trust domains that a stack starts by itself, apart from those of its KMS."""


class AddedGuest(StateModel):
    """A trust domain, and the KMS from which it has keys: empty if it has none."""

    spec: GuestSpec
    kms: str = ""


class AddedKms(StateModel):
    """A KMS, and its answer to GetAttestationInfo in the onboard phase."""

    spec: KmsSpec
    measured: dict[str, Any] | None = None


P = TypeVar("P", AddedGuest, AddedKms)


@dataclass(frozen=True, slots=True)
class Added(Generic[P]):
    """A part that an earlier run has left, and its file."""

    part: P
    path: Path


class AddedParts:
    """The files of the parts that were added, in a state folder: `NUMBER-NAME.json`, numbered as they were added."""

    def __init__(self, state: Path) -> None:
        self._folder = state / FOLDER
        self._paths = {path.stem.partition("-")[2]: path for path in sorted(self._folder.glob("[0-9]*-*.json"))}
        self._next = 1 + max((int(path.name.partition("-")[0]) for path in self._paths.values()), default=0)

    def kms(self) -> list[Added[AddedKms]]:
        """Read the KMS, in the order in which they were added; raise `StackError` if one cannot be read."""
        return [Added(_read(AddedKms, path), path) for name, path in self._paths.items() if name.startswith(_KMS)]

    def guests(self) -> list[Added[AddedGuest]]:
        """Read the trust domains, likewise."""
        return [Added(_read(AddedGuest, path), path) for name, path in self._paths.items() if not name.startswith(_KMS)]

    def put_kms(self, kms: RunningKms) -> None:
        """Write a KMS as it is now, unless it is one of every stack."""
        if kms.name not in PERMANENT:
            self._put(f"{_KMS}{kms.name}", AddedKms(spec=kms.spec, measured=kms.measured))

    def put_guest(self, guest: RunningGuest) -> None:
        """Write a trust domain as it is now, unless it is one of every stack, or belongs to a KMS."""
        if not guest.name.startswith(_KMS) and guest.name not in _OWN:
            self._put(guest.name, AddedGuest(spec=guest.spec, kms=guest.source))

    def drop(self, name: str) -> None:
        """Delete the file of a part that was removed."""
        if (path := self._paths.pop(name, None)) is not None:
            path.unlink(missing_ok=True)
            sync_folder(self._folder)

    def replace(self, kms: Iterable[RunningKms], guests: Iterable[RunningGuest]) -> None:
        """Write all parts as they are now, and delete the files of others."""
        kms, guests = list(kms), list(guests)
        for name in self._paths.keys() - {f"{_KMS}{each.name}" for each in kms} - {each.name for each in guests}:
            self.drop(name)
        for each in kms:
            self.put_kms(each)
        for guest in guests:
            self.put_guest(guest)

    def _put(self, name: str, part: StateModel) -> None:
        path = self._paths.get(name)
        if path is None:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            path = self._paths[name] = self._folder / f"{self._next:06}-{name}.json"
            self._next += 1
        content = part.model_dump_json(indent=1).encode()
        if not path.exists() or path.read_bytes() != content:
            replace_file_durably(path, content, 0o600)


def _read(kind: type[P], path: Path) -> P:
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise StackError(f"{path}: {describe(error)}: {_how_to_leave_out(path)}") from error
    except OSError as error:
        raise StackError(f"{path} cannot be read: {error.strerror}") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file of a part that does not start in the block."""
    try:
        yield
    except (GuestError, StackError) as error:
        raise StackError(f"{error}: {_how_to_leave_out(path)}") from error


def _how_to_leave_out(path: Path) -> str:
    return f"delete {path} to start without this part"
