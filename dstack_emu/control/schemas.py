"""The bodies of the control API's requests: the schema of each, validated here and nowhere else."""

import datetime
import re
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dstack_emu.deployment.clock import LATEST
from dstack_emu.deployment.specs import Name
from dstack_emu.simulator.intel import VALID_FROM, Dating, Validity
from dstack_emu.simulator.platform import TcbStatus

_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def moment(value: Any) -> Any:
    """Parse a moment: Unix seconds, or ISO 8601 (a date alone is its midnight, without an offset it is UTC)."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        pass
    try:
        read = datetime.datetime.fromisoformat(value)
    except ValueError as error:
        expected = "Unix seconds or ISO 8601, such as 2026-06-01T12:00:00Z, expected"
        raise ValueError(f"{expected}, got {value!r:.60}") from error
    return (read if read.tzinfo else read.replace(tzinfo=datetime.UTC)).timestamp()


def duration(value: Any) -> Any:
    """Parse a duration: seconds, or text such as 90s, 15m, 12h, 30d, 2w, with a minus to go back."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([+-]?\d+(?:\.\d+)?)([smhdw]?)", value)
    if match is None:
        raise ValueError(f"seconds, or a number with s, m, h, d or w, expected, got {value!r:.60}")
    return float(match[1]) * _UNITS[match[2]]


Moment = Annotated[float, BeforeValidator(moment), Field(ge=0, le=LATEST, allow_inf_nan=False)]
Duration = Annotated[float, BeforeValidator(duration), Field(ge=-LATEST, le=LATEST, allow_inf_nan=False)]
Advisory = Annotated[str, Field(min_length=1, max_length=100)]


class ControlError(Exception):
    """A refusal of the control API; the text says why, `status` is HTTP's."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class Request(BaseModel):
    """A body; a field that is not declared is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class PlatformChange(Request):
    """A change of one platform; fields that are left out stay as they are."""

    tcb_status: TcbStatus | None = None
    advisory_ids: tuple[Advisory, ...] | None = None
    module_status: TcbStatus | None = None
    module_advisory_ids: tuple[Advisory, ...] | None = None
    pck_revoked: bool | None = None
    other_root: bool | None = None


class Dates(Request):
    """When a collateral document was issued and when it expires."""

    issued: Moment = VALID_FROM.timestamp()
    next_update: Moment

    def validity(self) -> Validity:
        """Return the dates as the vendor takes them."""
        return Validity(int(self.issued), int(self.next_update))


class VendorChange(Request):
    """A change of what the vendor says for all platforms; fields that are left out stay as they are.

    A dating is `current`, `expired`, `not-yet-valid`, or dates. `collateral_until` dates all four documents to expire
    then, `collateral` gives all four the same dating.
    """

    qe_status: TcbStatus | None = None
    qe_advisory_ids: tuple[Advisory, ...] | None = None
    pck_ca_revoked: bool | None = None
    tcb_info_dating: Dating | Dates | None = None
    qe_identity_dating: Dating | Dates | None = None
    pck_crl_dating: Dating | Dates | None = None
    root_ca_crl_dating: Dating | Dates | None = None
    collateral: Dating | Dates | None = None
    collateral_until: Moment | None = None


class ClockChange(Request):
    """One change of the clock; `freeze` takes true, or the moment to freeze it at."""

    set: Moment | None = None
    advance: Duration | None = None
    freeze: bool | Moment | None = None
    resume: bool | None = None
    follow_the_wall: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("one of set, advance, freeze, resume and follow_the_wall expected")
        if any(getattr(self, name) is False for name in ("freeze", "resume", "follow_the_wall")):
            raise ValueError("true expected; the opposite of freeze is resume")
        return self


class SnapshotRequest(Request):
    """The name of a snapshot; one of that name is replaced."""

    name: Name = "snapshot"


class BootRequest(Request):
    """The KMS from which a trust domain gets its keys."""

    kms: Name = "src"


class OnboardRequest(Request):
    """The KMS whose keys a KMS takes over; with `source` null it makes new ones."""

    source: Name | None = "src"


class PolicyChange(Request):
    """The trust domain that a policy is to allow or deny, by name.

    A KMS is allowed by its measurement, an app by its id and compose hash, and either with its OS image. With
    `this_device_only` it is allowed on its own platform alone.
    """

    guest: Name
    this_device_only: bool = False
