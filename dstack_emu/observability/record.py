"""A call of the journal as a record, which is JSON: what `ctl journal` prints, and what is said of it elsewhere.

A record contains no secrets: of an answer it has the status, the text of a refusal and a webhook's decision; of keys
only their names and who received them.
"""

import datetime
import json
from collections.abc import Iterator
from typing import Any, Final

from dstack_emu.observability.spans import GIVEN_UP, CallSpan, Span, VerificationSpan

RELEASED: Final = {
    "GetAppKey": ("disk_crypt_key", "env_crypt_key", "k256_key"),
    "GetKmsKey": ("temp_ca_key", "ca_key", "k256_key"),
    "GetTempCaCert": ("temp_ca_key",),
    "SignCert": ("certificate_chain",),
}
"""The secret fields in a KMS's answers, by RPC."""

_RECEIVER: Final = ("app_id", "instance_id", "mr_aggregated")
"""The fields of a request that say who receives a release."""

Record = dict[str, Any]
Published = CallSpan | Record
"""What a listener gets: a call from outside that has ended, or the record of a revert."""


def recorded_name(call: str) -> str:
    """Return the name under which a call is recorded: of an RPC its method, without its service."""
    return call if call.startswith("/") else call.rpartition(".")[2]


def flattened(record: Record) -> Iterator[Record]:
    """Yield a record and everything inside it."""
    yield record
    for inner in record.get("inner", ()):
        yield from flattened(inner)


def record_of(span: Span) -> Record:
    """Return a span as a record, a copy; its id is its number after the parent's id, such as 3.1.2."""
    record: Record = _copied(_shared_record(span, ""))
    return record


def json_of(published: Published) -> str:
    """Return a call, or a record, as JSON on one line."""
    record = published if isinstance(published, dict) else _shared_record(published, "")
    return json.dumps(record, separators=(",", ":"))


def _shared_record(span: Span, parent_id: str) -> Record:
    """Return a span as a record that shares its values with the span: it must not be changed."""
    span_id = f"{parent_id}.{span.number}" if parent_id else str(span.number)
    record = fields_of(span, span_id)
    if span.inner:
        record["inner"] = [_shared_record(inner, span_id) for inner in inner_of(span)]
    return record


def _copied(value: Any) -> Any:
    """Copy a value of JSON. `copy.deepcopy` also looks for circles, and takes several times as long."""
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


def inner_of(span: Span) -> list[Span]:
    """Return the spans of a span's requests in their order; of a request that was sent twice, only the last."""
    by_number = {inner.number: inner for inner in span.inner}
    return [by_number[number] for number in sorted(by_number)]


def fields_of(span: Span, span_id: str) -> Record:
    """Return a span as a record without the records inside it; it shares its values with the span."""
    if isinstance(span, VerificationSpan):
        record: Record = {"id": span_id, **span.annotations}
    else:
        status, error, ended = span.outcome or GIVEN_UP
        record = {
            "id": span_id,
            "time": _moment(span.time),
            "service": span.service,
            "call": span.call,
            "caller": span.caller,
            "status": status,
            "outcome": outcome_of(status, span.annotations),
            "ms": None if ended is None else round(1000 * (ended - span.time)),
        }
        if error:
            record["error"] = error
        record |= span.annotations
        is_made_up = span.annotations.get("fault", {}).get("kind") == "status"  # the KMS was not asked
        if status == 200 and span.call in RELEASED and span.service.startswith("kms") and not is_made_up:
            record["released"] = {"fields": list(RELEASED[span.call]), "to": _receiver(span)}
    return record


def outcome_of(status: int | None, annotations: dict[str, Any]) -> str:
    """Return the outcome of a call: `ok`, `denied`, `refused` or `unanswered`."""
    if status is None:
        return "unanswered"
    if status >= 400:
        return "refused"
    decision, verdict = annotations.get("decision"), annotations.get("verdict")
    denied = decision is not None and decision["allowed"] is not True
    return "denied" if denied or (verdict is not None and not verdict["is_valid"]) else "ok"


def _receiver(call: CallSpan) -> dict[str, str] | None:
    """Return the app or KMS that the last decision before a release was about; None if no decision names one."""
    if call.call == "GetTempCaCert":
        return None  # every caller gets it: the decision was about the KMS itself
    annotations = [span.annotations for span in call.inner if isinstance(span, CallSpan)]
    decisions = [found["decision"] for found in annotations if "decision" in found]
    request = decisions[-1].get("asked") if decisions else None
    return None if request is None else {key: request.get(key, "") for key in _RECEIVER}


def _moment(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
