"""The webhook's side of the boot-info contract: a JSON body in, a `PolicyDecision` out.

Reads what a KMS sends and refuses what the originals refuse, with the same words: they validate with zod 3,
whose answer names every fault in schema order, not only the first. It does not check the values: hex stays
text, of whatever length and case, and keys it does not know (keyProviderInfo, attestationMode, 0.6.5's
launchTicketHash) are ignored.

Source: dstack next 312dc605, `kms/auth-simple/index.ts` and `kms/auth-mock/index.ts` (BootInfoSchema,
BootResponseSchema); zod 3.25.76 `v3/types.ts`, `v3/locales/en.ts`; what JSON means there is JavaScript's
`JSON.parse`.
"""

import heapq
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from dstack_emu.attest.strict_json import StrictJson, TooManyValuesError
from dstack_emu.auth.errors import BootInfoError, Issue, MalformedJsonError, OversizedJsonError


@dataclass(frozen=True, slots=True)
class ReceivedBootInfo:
    """What a KMS says about the machine that wants to boot: hex as sent; absent optional fields are empty."""

    mr_aggregated: str
    os_image_hash: str
    app_id: str
    compose_hash: str
    instance_id: str
    device_id: str
    tcb_status: str = ""
    advisory_ids: tuple[str, ...] = ()
    mr_system: str = ""


class Refusal(NamedTuple):
    """What a rule that refuses compared: one member of the boot info with one place of the file.

    `got` are the values of the boot info's member that are not admitted, as sent; `expected` are the values that are
    admitted, as the file's model has them, none if nothing is. `path` is the place in the file, with normalized app
    ids; it is empty if no file can admit the values.
    """

    rule: str
    reason: str
    member: str
    got: tuple[str, ...]
    expected: frozenset[str]
    path: tuple[str, ...]

    def __str__(self) -> str:
        """State what was sent and what is admitted: `mrAggregated is 0xab, the file admits none`."""
        got = ", ".join(each or "empty" for each in self.got)
        return f"{self.member} is {got}; the file admits {_some(self.expected)}"


_SHOWN: Final = 5
"""Admitted values that the text of a refusal names."""


def _some(values: frozenset[str]) -> str:
    more = [f"{len(values) - _SHOWN} more"] if len(values) > _SHOWN else []
    return ", ".join([*heapq.nsmallest(_SHOWN, values), *more]) or "none"


@dataclass(frozen=True, slots=True)
class PolicyDecision:
    """A webhook's answer, and why.

    `rule` names the rule that decided, `differs_from` the other contracts of `policy.evaluate` that would have
    decided otherwise, `config_error` what is wrong with a file because of which everything is denied, `refusal` what
    the rule compared, `state` which state of a chain decided, and `chain_error` why none did. They are for logs, tests
    and explanations and never go over the wire.
    """

    is_allowed: bool
    reason: str
    gateway_app_id: str
    rule: str
    differs_from: tuple[str, ...] = ()
    config_error: str = ""
    refusal: Refusal | None = None
    state: str = ""
    chain_error: str = ""


MAX_VALUES: Final = 1024
"""The maximum number of JSON values of a boot info; it has about ten, and one for each advisory, of which Intel names
fewer than a hundred for a platform.
"""


def parse_body(body: bytes, most: int | None = MAX_VALUES) -> object:
    """Parse a body as `JSON.parse` does a decoded one; numbers all become floats, as they do there.

    A byte order mark is dropped and undecodable bytes are replaced, as the Fetch standard decodes a body. NaN
    and Infinity are refused: they are Python's, not JSON. Raises `MalformedJsonError`, or `OversizedJsonError` if there
    are more than `most` values.
    """
    try:
        return _JSON.parse(body.decode("utf-8", "replace").removeprefix("\ufeff"), most)
    except TooManyValuesError as error:
        raise OversizedJsonError(str(error)) from error
    except ValueError as error:
        raise MalformedJsonError(f"body of {len(body)} bytes is not JSON: {error}") from error


def parse_boot_info(document: object, *, checks_tee_variant: bool = False) -> ReceivedBootInfo:
    """Read a parsed body as boot info; raise `BootInfoError` with every issue.

    `checks_tee_variant`: `teeVariant` must be a string if it is present, as in auth-simple since next.
    """
    if not isinstance(document, dict):
        raise BootInfoError([_invalid_type("object", document, [])])
    fields = _Fields(document)
    if checks_tee_variant:
        fields.optional("teeVariant")
    # Arguments are evaluated in this order, and this order is the order of the issues.
    boot_info = ReceivedBootInfo(
        mr_aggregated=fields.required("mrAggregated"),
        os_image_hash=fields.required("osImageHash"),
        app_id=fields.required("appId"),
        compose_hash=fields.required("composeHash"),
        instance_id=fields.required("instanceId"),
        device_id=fields.required("deviceId"),
        tcb_status=fields.optional("tcbStatus"),
        advisory_ids=fields.optional_list("advisoryIds"),
        mr_system=fields.optional("mrSystem"),
    )
    if fields.issues:
        raise BootInfoError(fields.issues)
    return boot_info


class _Fields:
    """Reads fields of one object and collects an issue for each that has the wrong type."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self.issues: list[Issue] = []

    def required(self, key: str) -> str:
        return self._text(self._document.get(key, _ABSENT), [key])

    def optional(self, key: str) -> str:
        return self._text(self._document.get(key, ""), [key])

    def optional_list(self, key: str) -> tuple[str, ...]:
        value = self._document.get(key, [])
        if not isinstance(value, list):
            self.issues.append(_invalid_type("array", value, [key]))
            return ()
        return tuple(self._text(item, [key, index]) for index, item in enumerate(value))

    def _text(self, value: object, path: list[str | int]) -> str:
        if isinstance(value, str):
            return value
        self.issues.append(_invalid_type("string", value, path))
        return ""


class _Absent:
    """The type that stands for an absent key, for which JSON has none."""


_ABSENT = _Absent()
_JAVASCRIPT_NAMES: dict[type, str] = {
    _Absent: "undefined",
    type(None): "null",
    bool: "boolean",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


def _invalid_type(expected: str, value: object, path: list[str | int]) -> Issue:
    received = _JAVASCRIPT_NAMES[type(value)]
    return {
        "code": "invalid_type",
        "expected": expected,
        "received": received,
        "path": path,
        "message": "Required" if received == "undefined" else f"Expected {expected}, received {received}",
    }


# JavaScript has one kind of number, and takes the last of two members of one name.
_JSON: Final = StrictJson(members=None, integer=float)
