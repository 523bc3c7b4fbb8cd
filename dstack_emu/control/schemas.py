"""The schemas of the control API's request bodies."""

import base64
import datetime
import functools
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from dstack_emu.deployment.clock import LATEST
from dstack_emu.deployment.specs import Name
from dstack_emu.simulator.platform import PartStatus, TcbStatus
from dstack_emu.simulator.vendor_state import VALID_FROM, Dating, RecoveryPhase, Validity
from dstack_emu.transport.secrets import require_token
from dstack_emu.transport.validation import describe, suggestion

B = TypeVar("B", bound=BaseModel)

_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def moment(value: Any) -> Any:
    """Parse a time: Unix seconds, or ISO 8601 (in UTC if it has no offset; a date alone is 00:00).

    Raises `ValueError`.
    """
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
    """Parse a duration: seconds, or text such as 90s, 15m, 12h, 30d, 2w, -1h; raise `ValueError`."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([+-]?\d+(?:\.\d+)?)([smhdw]?)", value)
    if match is None:
        raise ValueError(f"seconds, or a number with s, m, h, d or w, expected, got {value!r:.60}")
    return float(match[1]) * _UNITS[match[2]]


def _bare_hex(value: Any) -> Any:
    return value.lower().removeprefix("0x") if isinstance(value, str) else value


Timestamp = Annotated[float, BeforeValidator(moment), Field(ge=0, le=LATEST, allow_inf_nan=False)]
TimeSpan = Annotated[float, BeforeValidator(duration), Field(ge=-LATEST, le=LATEST, allow_inf_nan=False)]
HexText = Annotated[
    str,
    BeforeValidator(_bare_hex),
    Field(json_schema_extra={"description": "hex, with or without 0x"}, pattern="^[0-9a-f]*$"),
]
"""Hex in lowercase, without 0x."""
Token = Annotated[str, AfterValidator(functools.partial(require_token, name="token"))]
Advisory = Annotated[str, Field(min_length=1, max_length=100)]


class ControlError(Exception):
    """The control API refused a call: the text says why, `status` is the HTTP status."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class RequestBody(BaseModel):
    """The body of a request; an unknown field is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class PolicyText(RequestBody):
    """The text of a policy that somebody edits."""

    text: str


class EvidenceInput(RequestBody):
    """What somebody has, in any form that `dstack-emu inspect` reads: as text, or its bytes in base64 (10 MiB)."""

    text: str | None = Field(None, repr=False)
    data: str | None = Field(None, repr=False, json_schema_extra={"contentEncoding": "base64"})

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.text is None) == (self.data is None):
            raise ValueError("one of text and data expected")
        return self

    @property
    def content(self) -> bytes:
        """The bytes that were given; raises `ControlError` if `data` is not base64."""
        if self.data is None:
            return (self.text or "").encode(errors="replace")  # JSON's escapes can spell half of a surrogate pair
        try:
            return base64.b64decode(self.data, validate=True)
        except ValueError as error:  # of other characters than ASCII it is no binascii.Error
            raise ControlError(f"data: base64 expected: {error}") from error


class EvidenceQuestion(EvidenceInput):
    """Evidence that is to be verified; `report_data` is required of it, padded with zeros to 64 bytes.

    With `strict` every TCB status but UpToDate fails.
    """

    report_data: HexText | None = None
    strict: bool = False


class AdmissionQuestion(EvidenceInput):
    """Evidence, a boot info or an app-compose about which each KMS is to decide, for an app or a KMS.

    `app_id` is that of an app-compose, `vm_config` the text that came beside evidence without one.
    """

    caller: Literal["app", "kms"] = "app"
    app_id: Annotated[HexText, Field(min_length=40, max_length=40)] | None = None
    vm_config: str | None = None


class PlatformChange(RequestBody):
    """A change of one platform; fields that are left out stay as they are."""

    tcb_status: TcbStatus | None = None
    advisory_ids: tuple[Advisory, ...] | None = None
    module_status: PartStatus | None = None
    module_advisory_ids: tuple[Advisory, ...] | None = None
    pck_revoked: bool | None = None
    other_root: bool | None = None
    recovery_status: TcbStatus | None = None
    recovery_advisory_ids: tuple[Advisory, ...] | None = None


class Dates(RequestBody):
    """The dates of issue and of expiry of a collateral document."""

    issued: Timestamp = VALID_FROM.timestamp()
    next_update: Timestamp

    def validity(self) -> Validity:
        """Return the dates as the vendor takes them."""
        return Validity(int(self.issued), int(self.next_update))


class VendorChange(RequestBody):
    """A change of the vendor's state, which applies to all platforms; fields that are left out stay as they are.

    A dating is `current`, `expired`, `not-yet-valid`, or a pair of dates. `collateral` sets the dating of all four
    documents, `collateral_until` their date of expiry.
    """

    qe_status: PartStatus | None = None
    qe_advisory_ids: tuple[Advisory, ...] | None = None
    pck_ca_revoked: bool | None = None
    tcb_info_dating: Dating | Dates | None = None
    qe_identity_dating: Dating | Dates | None = None
    pck_crl_dating: Dating | Dates | None = None
    root_ca_crl_dating: Dating | Dates | None = None
    tcb_recovery: RecoveryPhase | None = None
    recovery_qe_status: PartStatus | None = None
    recovery_qe_advisory_ids: tuple[Advisory, ...] | None = None
    collateral: Dating | Dates | None = None
    collateral_until: Timestamp | None = None


class ClockChange(RequestBody):
    """One change of the clock; `freeze` takes true, or the time at which it stops."""

    set: Timestamp | None = None
    advance: TimeSpan | None = None
    freeze: bool | Annotated[Timestamp, Tag("time")] | None = None
    resume: bool | None = None
    follow_the_wall: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("one of set, advance, freeze, resume and follow_the_wall expected")
        if any(getattr(self, name) is False for name in ("freeze", "resume", "follow_the_wall")):
            raise ValueError("true expected; the opposite of freeze is resume")
        return self


class SnapshotRequest(RequestBody):
    """The name of a snapshot; an existing one of that name is replaced."""

    name: Name = "snapshot"


class BootRequest(RequestBody):
    """The KMS from which a trust domain gets its keys; several are tried in order."""

    kms: (
        Annotated[Name, Tag("name")] | Annotated[tuple[Name, ...], Field(min_length=1, max_length=16), Tag("names")]
    ) = "src"


class TxtRecord(RequestBody):
    """A TXT record of a custom domain: `<app or instance id>:<port>`, or any other text."""

    value: Annotated[str, Field(min_length=1, max_length=255)]


class OnboardRequest(RequestBody):
    """The KMS that a KMS is onboarded from; with `source` null it is bootstrapped, with new keys.

    With a `source_token` the keys are requested from the source's admin listener. `onboard_token` replaces the KMS's
    own `core.onboard.auth_token`, which is sent by default.
    """

    source: Name | None = "src"
    source_token: Token = Field("", repr=False)
    onboard_token: Token | None = Field(None, repr=False)


class PolicyChange(RequestBody):
    """Whom a policy is to allow or deny: a trust domain of the stack (`guest`), an app or a KMS.

    A KMS is allowed by its measurement, an app by its id and compose hash, and either with its OS image, which is the
    stack's own if none is named. With `this_device_only` a trust domain is allowed on its own platform alone. An app is
    denied by its id.
    """

    guest: Name | None = None
    this_device_only: bool = False
    app_id: Annotated[HexText, Field(min_length=40, max_length=40)] | None = None
    compose_hash: Annotated[HexText, Field(min_length=64, max_length=64)] | None = None
    mr_aggregated: Annotated[HexText, Field(min_length=64, max_length=64)] | None = None
    os_image_hash: Annotated[HexText, Field(min_length=64, max_length=64)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(each is not None for each in (self.guest, self.app_id, self.mr_aggregated)) != 1:
            raise ValueError("one of guest, app_id and mr_aggregated expected")
        if self.compose_hash is not None and self.app_id is None:
            raise ValueError("compose_hash is an app's: app_id expected with it")
        if self.guest is None and self.this_device_only:
            raise ValueError("this_device_only is a trust domain's: guest expected with it")
        if self.guest is not None and self.os_image_hash is not None:
            raise ValueError("os_image_hash of a guest is its own: app_id or mr_aggregated expected with it")
        return self


def checked(model: type[B], fields: Mapping[str, Any]) -> B:
    """Validate the fields of a request; raise `ControlError`, which names each wrong one."""
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        raise ControlError(describe(error, model.model_fields)) from error


def unknown(what: str, name: str, known: Collection[str]) -> ControlError:
    """Make the refusal of a name that does not exist: it lists what there is, and names the nearest."""
    return ControlError(f"there is no {what} {name!r:.60}: {', '.join(known)}{suggestion(name, known)}", 404)
