"""What the emulated Intel publishes for all platforms: statuses, the dates of its documents, and a TCB recovery.

Intel publishes TCB info and QE identity as sets with a number, the TCB evaluation data number. In a TCB recovery a new
set comes out: at first only who requests `update=early` gets it, later everybody, and at last the set before it is
withdrawn. Sources: Intel PCS API v4; Intel's pages about TCB recovery.
"""

import datetime
from dataclasses import dataclass
from typing import Final, Literal, get_args

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.moment import iso
from dstack_emu.simulator.platform import FIRST_EVALUATION, PART_STATUSES, PartStatus, require_status

VALID_FROM: Final = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
VALID_UNTIL: Final = datetime.datetime(2099, 12, 31, tzinfo=datetime.UTC)

NEXT_EVALUATION: Final = FIRST_EVALUATION + 1
"""The TCB evaluation data number of the set that a TCB recovery brings."""

RECOVERY_DATE: Final = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
"""The date of the TCB recovery, which is the same in every phase."""

COLLATERAL_LIFETIME: Final = datetime.timedelta(days=30)
"""The time between issueDate and nextUpdate of Intel's own documents."""

Dating = Literal["current", "expired", "not-yet-valid"]
"""Whether a collateral document is valid, has expired, or is not valid yet."""

RecoveryPhase = Literal["none", "early", "standard", "complete"]
"""How far a TCB recovery is: not begun; the new set on request; the new set for all; the old set withdrawn."""


@dataclass(frozen=True, slots=True)
class Validity:
    """The dates of a collateral document, issueDate and nextUpdate, in Unix seconds."""

    issued: int
    next_update: int

    def __post_init__(self) -> None:
        earliest, latest = (int(moment.timestamp()) for moment in (VALID_FROM, VALID_UNTIL))
        if not earliest <= self.issued < self.next_update <= latest:
            raise FormatError(
                f"collateral dates: issued before next_update, both from {iso(VALID_FROM)} to {iso(VALID_UNTIL)}, "
                f"expected, got {_shown(self.issued)} and {_shown(self.next_update)}"
            )

    @classmethod
    def issued_on(cls, issued: int) -> "Validity":
        """Return the dates of Intel's documents that were issued at that time (Unix seconds)."""
        return cls(issued, issued + int(COLLATERAL_LIFETIME.total_seconds()))


DATES: Final[dict[Dating, tuple[datetime.datetime, datetime.datetime]]] = {
    "current": (VALID_FROM, VALID_UNTIL),
    "expired": (VALID_FROM, datetime.datetime(2024, 2, 1, tzinfo=datetime.UTC)),
    "not-yet-valid": (datetime.datetime(2099, 1, 1, tzinfo=datetime.UTC), VALID_UNTIL),
}
"""issueDate and nextUpdate of each dating."""


def moments(dating: Dating | Validity) -> tuple[datetime.datetime, datetime.datetime]:
    """Return issueDate and nextUpdate."""
    if isinstance(dating, Validity):
        issued, next_update = (
            datetime.datetime.fromtimestamp(seconds, datetime.UTC) for seconds in (dating.issued, dating.next_update)
        )
        return issued, next_update
    return DATES[dating]


def _shown(seconds: int) -> str:
    try:
        return iso(seconds)
    except (ValueError, OverflowError, OSError):  # a year that no date can have
        return str(seconds)


def validity_of_issue(text: str, now: float) -> Validity:
    """Return the dates of Intel's documents that were issued on a date: ISO 8601, or `today` (00:00 UTC).

    `now` is the time in Unix seconds, for `today`. Raises `FormatError`.
    """
    if text == "today":
        return Validity.issued_on(int(now) // 86_400 * 86_400)
    try:
        read = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise FormatError(
            f"collateral-issued: a date such as 2026-06-01, or `today`, expected, got {text!r:.60}"
        ) from error
    return Validity.issued_on(int((read if read.tzinfo else read.replace(tzinfo=datetime.UTC)).timestamp()))


@dataclass(frozen=True, slots=True)
class Evaluations:
    """The TCB evaluation data numbers that are published.

    `available` has the newest first; `early` and `standard` are those that a request for that update gets.
    """

    available: tuple[int, ...]
    early: int
    standard: int


_EVALUATIONS: Final[dict[RecoveryPhase, Evaluations]] = {
    "none": Evaluations((FIRST_EVALUATION,), FIRST_EVALUATION, FIRST_EVALUATION),
    "early": Evaluations((NEXT_EVALUATION, FIRST_EVALUATION), NEXT_EVALUATION, FIRST_EVALUATION),
    "standard": Evaluations((NEXT_EVALUATION, FIRST_EVALUATION), NEXT_EVALUATION, NEXT_EVALUATION),
    "complete": Evaluations((NEXT_EVALUATION,), NEXT_EVALUATION, NEXT_EVALUATION),
}


def recovery_date(evaluation: int) -> datetime.datetime:
    """Return the date of the TCB recovery that brought a set."""
    return VALID_FROM if evaluation <= FIRST_EVALUATION else RECOVERY_DATE


@dataclass(frozen=True, slots=True)
class VendorState:
    """What the vendor publishes for all platforms: on quoting enclave and PCK CA, and the dates of its documents.

    `recovery_qe_status` and its advisories are those of the quoting enclave in the set of a TCB recovery; None: the
    same as before it.
    """

    qe_status: PartStatus = "UpToDate"
    qe_advisory_ids: tuple[str, ...] = ()
    pck_ca_revoked: bool = False
    tcb_info_dating: Dating | Validity = "current"
    qe_identity_dating: Dating | Validity = "current"
    pck_crl_dating: Dating | Validity = "current"
    root_ca_crl_dating: Dating | Validity = "current"
    tcb_recovery: RecoveryPhase = "none"
    recovery_qe_status: PartStatus | None = None
    recovery_qe_advisory_ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_status(self.qe_status, PART_STATUSES, "the quoting enclave")
        if self.recovery_qe_status is not None:
            require_status(self.recovery_qe_status, PART_STATUSES, "the quoting enclave in the TCB recovery")
        if self.tcb_recovery not in _EVALUATIONS:
            raise FormatError(f"tcb_recovery: one of {', '.join(_EVALUATIONS)} expected, got {self.tcb_recovery!r}")
        datings = (self.tcb_info_dating, self.qe_identity_dating, self.pck_crl_dating, self.root_ca_crl_dating)
        if wrong := [d for d in datings if not isinstance(d, Validity) and d not in get_args(Dating)]:
            raise FormatError(f"collateral dating: one of {', '.join(get_args(Dating))} expected, got {wrong[0]!r}")

    @property
    def issued(self) -> float:
        """The time at which the last of the documents was issued, in Unix seconds; before it they refuse everything."""
        datings = (self.tcb_info_dating, self.qe_identity_dating, self.pck_crl_dating, self.root_ca_crl_dating)
        return max(moments(dating)[0].timestamp() for dating in datings)

    @classmethod
    def dated(cls, dating: Dating | Validity) -> "VendorState":
        """Return the state in which only the dates of all four documents differ from the default."""
        return cls(tcb_info_dating=dating, qe_identity_dating=dating, pck_crl_dating=dating, root_ca_crl_dating=dating)

    @property
    def evaluations(self) -> Evaluations:
        """The sets that are published."""
        return _EVALUATIONS[self.tcb_recovery]

    def qe_status_in(self, evaluation: int) -> tuple[PartStatus, tuple[str, ...]]:
        """Return status and advisories of the quoting enclave in a set."""
        if evaluation <= FIRST_EVALUATION or self.recovery_qe_status is None:
            return self.qe_status, self.qe_advisory_ids
        return self.recovery_qe_status, self.recovery_qe_advisory_ids
