"""dstack's versioned attestation: the evidence of a trust domain in one byte string.

There are two wire forms: V0 is SCALE (real hardware), V1 is msgpack (agents of the simulators, and all evidence with
version 2 events or a pod payload). Source: dstack `dstack-attest/src/{attestation,v1}.rs` at 312dc605. TDX only:
another platform's evidence is a `FormatError` here. Decoding proves nothing; `attest.verify` does.
"""

from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Self

import msgpack

from dstack_emu.attest import scale
from dstack_emu.attest.cache import Latest
from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.eventlog import (
    MAX_EVENTS,
    RuntimeEvent,
    TdxEvent,
    check_version,
    log_from_json,
    require_few_events,
    strip,
)
from dstack_emu.attest.msgpack_struct import (
    mapping,
    member,
    octets,
    octets_or_text,
    optional_text,
    sequence,
    text,
    unpack,
    unsigned,
)
from dstack_emu.attest.quote import Quote
from dstack_emu.attest.scale import Decoder

MAX_ATTESTATION_SIZE: Final = 10 * 1024 * 1024
REPORT_DATA_SIZE: Final = 64
_unsigned_64: Final = unsigned(64)
_PACKED_OCTETS: Final[tuple[bytes, ...]] = tuple(msgpack.packb(octet) for octet in range(256))


@dataclass(frozen=True, slots=True)
class Attestation:
    """Evidence: a quote, the log behind its registers, and the configuration the VM was started with.

    `report_data` has 64 bytes in V0. V1 can carry any number of them: `require_report_data` refuses others where the
    evidence is verified, as upstream does.
    `report_data_payload` is set for the kind `dstack-pod` alone, whose report_data is the `app-data` hash of that text.
    `wire` is the form it came in, or goes out in: 0 (SCALE) or 1 (msgpack).
    """

    quote: bytes
    event_log: tuple[TdxEvent, ...]
    runtime_events: tuple[RuntimeEvent, ...]
    report_data: bytes
    config: str
    report_data_payload: str | None = None
    wire: Literal[0, 1] = 0

    @property
    def size(self) -> int:
        """The approximate memory that it takes in bytes, for the limit of a cache."""
        events: tuple[TdxEvent | RuntimeEvent, ...] = (*self.event_log, *self.runtime_events)
        texts = (self.config, self.report_data_payload or "")
        # A character takes up to four bytes.
        return len(self.quote) + len(self.report_data) + 4 * sum(map(len, texts)) + sum(event.size for event in events)

    def require_report_data(self) -> bytes:
        """Return report_data if it has 64 bytes; raise `VerificationError` with upstream's words."""
        if len(self.report_data) != REPORT_DATA_SIZE:
            raise VerificationError(f"stack.report_data must be {REPORT_DATA_SIZE} bytes")
        return self.report_data

    def encode(self) -> bytes:
        """Encode in its wire form; raise `FormatError` for pod payloads and version 2 events in V0."""
        return V1Encoder().encode(self) if self.wire == 1 else self._encode_v0()

    def stripped(self, *, keep_digests: bool = False) -> Self:
        """Return the form for certificates, with a reduced event log.

        With `keep_digests` its runtime events keep their digests, which can be computed from their content.
        """
        return replace(self, event_log=strip(self.event_log, keep_digests=keep_digests))

    def as_v1(self) -> Self:
        """Return the same evidence in the msgpack form."""
        return replace(self, wire=1)

    def _encode_v0(self) -> bytes:
        if self.report_data_payload is not None:
            raise FormatError("attestation V0 cannot carry a pod's report_data_payload")
        if any(event.version != 1 for event in self.runtime_events):
            raise FormatError("attestation V0 cannot carry version 2 events")
        parts = [b"\x00\x00", scale.vec(self.quote), scale.compact(len(self.event_log))]
        for event in self.event_log:
            parts += (
                event.imr.to_bytes(4, "little"),
                event.event_type.to_bytes(4, "little"),
                scale.vec(event.digest),
                scale.text(event.event),
                scale.vec(event.event_payload),
            )
        parts.append(scale.compact(len(self.runtime_events)))
        for runtime in self.runtime_events:
            parts += scale.text(runtime.event), scale.vec(runtime.payload)
        parts += self.report_data, scale.text(self.config)
        return b"".join(parts)


def decode(data: bytes) -> Attestation:
    """Decode either wire form, with no bytes left over; raise `FormatError`, with upstream's text if it has one."""
    if len(data) > MAX_ATTESTATION_SIZE:
        raise FormatError(f"attestation bytes too large: {len(data)} > {MAX_ATTESTATION_SIZE}")
    if not data:
        raise FormatError("Empty attestation bytes")
    first = data[0]
    if first == 0:
        return _decode_v0(data)
    if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
        return _decode_v1(data)
    raise FormatError("Unknown attestation wire format")


def from_quote_and_log(quote: bytes, event_log_json: bytes) -> Attestation:
    """Make evidence from a quote and its JSON event log (legacy certificates, CSR version 1), without a config."""
    try:
        log = log_from_json(event_log_json)
    except FormatError as error:
        raise FormatError(f"Failed to parse tdx_event_log: {error}") from error
    try:
        report = Quote.parse(quote).report
    except FormatError as error:
        raise FormatError(f"Invalid TDX quote: {error}") from error
    events = tuple(event.runtime() for event in log if event.is_runtime)
    return Attestation(quote, log, events, report.report_data, "")


def _decode_v0(data: bytes) -> Attestation:
    try:
        decoder = Decoder(data)
        decoder.take(1, "version")
        kind = decoder.take(1, "platform")[0]
        if kind != 0:
            raise FormatError(f"platform: 0 (TDX) expected, got {kind}")
        quote = decoder.vec("quote")
        event_log = decoder.many(lambda: _read_event(decoder), "event_log", MAX_EVENTS)
        runtime_events = decoder.many(lambda: _read_runtime_event(decoder), "runtime_events", MAX_EVENTS)
        report_data = decoder.take(REPORT_DATA_SIZE, "report_data")
        attestation = Attestation(quote, event_log, runtime_events, report_data, config=decoder.text("config"))
    except FormatError as error:
        raise FormatError(f"Failed to decode legacy VersionedAttestation: {error}") from error
    if rest := decoder.rest():
        raise FormatError(f"Trailing bytes after legacy VersionedAttestation: {len(rest)}")
    return attestation


def _read_runtime_event(decoder: Decoder) -> RuntimeEvent:
    return RuntimeEvent(decoder.text("event"), decoder.vec("payload"))


def _read_event(decoder: Decoder) -> TdxEvent:
    return TdxEvent(
        imr=decoder.u32("imr"),
        event_type=decoder.u32("event_type"),
        digest=decoder.vec("digest"),
        event=decoder.text("event"),
        event_payload=decoder.vec("event_payload"),
    )


def _decode_v1(data: bytes) -> Attestation:
    try:
        document, rest = unpack(data)
        attestation = _from_document(document)
    except FormatError as error:
        raise FormatError(f"failed to decode attestation from msgpack: {error}") from error
    if rest:
        raise FormatError(f"trailing bytes after attestation msgpack: {rest}")
    if document["version"] != 1:
        raise FormatError(f"unsupported attestation version: expected 1, got {document['version']}")
    return attestation


def _from_document(document: Any) -> Attestation:
    member(document, "version", unsigned(64))
    platform, stack = member(document, "platform", mapping), member(document, "stack", mapping)
    kind = member(platform, "kind", text)
    if kind != "tdx":
        raise FormatError(f"platform kind `tdx` expected, got `{kind:.40}`")
    evidence = member(platform, "data", mapping)
    stack_kind, claims = member(stack, "kind", text), member(stack, "data", mapping)
    if stack_kind not in ("dstack", "dstack-pod"):
        raise FormatError(f"stack kind `dstack` or `dstack-pod` expected, got `{stack_kind:.40}`")
    return Attestation(
        quote=member(evidence, "quote", octets),
        event_log=tuple(_event_from_msgpack(item) for item in _events(evidence, "event_log")),
        runtime_events=tuple(
            RuntimeEvent(
                member(item, "event", text),
                member(item, "payload", octets_or_text),
                member(item, "version", _event_version, 1),
            )
            for item in _events(claims, "runtime_events")
        ),
        report_data=member(claims, "report_data", octets),
        config=member(claims, "config", text),
        report_data_payload=member(claims, "report_data_payload", text) if stack_kind == "dstack-pod" else None,
        wire=1,
    )


def _events(container: Any, name: str) -> list[Any]:
    events = member(container, name, sequence)
    require_few_events(len(events), name)
    return events


class V1Encoder:
    """Encodes evidence in the msgpack form.

    A guest agent keeps one encoder: most of a quote and all of the log are equal to those of the previous quote, and
    are encoded only once.
    """

    def __init__(self) -> None:
        self._pack_quote_start, self._pack_quote_end = Latest(_pack_octets), Latest(_pack_octets)
        self._pack_event_log, self._pack_runtime_events = Latest(_pack_event_log), Latest(_pack_runtime_events)
        self._pack_config = Latest(_pack)

    def encode(self, attestation: Attestation) -> bytes:
        """Encode evidence of either wire form."""
        payload = attestation.report_data_payload
        parts = [
            *(_V1_START, _array_header(len(attestation.quote)), self._pack_quote(attestation.quote)),
            *(_V1_EVENT_LOG, self._pack_event_log(attestation.event_log)),
            _V1_STACK if payload is None else _V1_POD_STACK,
            *(_array_header(len(attestation.report_data)), _pack_octets(attestation.report_data)),
            *(_V1_RUNTIME_EVENTS, self._pack_runtime_events(attestation.runtime_events)),
            *(_V1_CONFIG, self._pack_config(attestation.config)),
        ]
        if payload is not None:
            parts += _V1_PAYLOAD, _pack(payload)
        return b"".join(parts)

    def _pack_quote(self, quote: bytes) -> bytes:
        """Encode a quote; quotes of one trust domain differ only in the middle."""
        start, middle, end = quote[:_FIRST_FIELDS], quote[_FIRST_FIELDS:_SIGNED], quote[_SIGNED:]
        return self._pack_quote_start(start) + _pack_octets(middle) + self._pack_quote_end(end)


def _pack(value: str | int) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


def _map_header(size: int) -> bytes:
    header: bytes = msgpack.Packer().pack_map_header(size)
    return header


def _array_header(size: int) -> bytes:
    header: bytes = msgpack.Packer().pack_array_header(size)
    return header


def _pack_octets(data: bytes) -> bytes:
    """Encode the elements of an array of integers, which is upstream's form of a Vec<u8>."""
    return b"".join([_PACKED_OCTETS[octet] for octet in data])


# The bytes between the variable parts are constant: headers of maps, and their keys.
_V1_START: Final = (
    _map_header(3)
    + (_pack("version") + _pack(1) + _pack("platform") + _map_header(2))
    + (_pack("kind") + _pack("tdx") + _pack("data") + _map_header(2) + _pack("quote"))
)
_V1_EVENT_LOG: Final = _pack("event_log")


def _stack_start(kind: str, members: int) -> bytes:
    outer = _pack("stack") + _map_header(2) + _pack("kind") + _pack(kind) + _pack("data")
    return outer + _map_header(members) + _pack("report_data")


_V1_STACK: Final = _stack_start("dstack", 3)
_V1_POD_STACK: Final = _stack_start("dstack-pod", 4)
_V1_RUNTIME_EVENTS: Final = _pack("runtime_events")
_V1_CONFIG: Final = _pack("config")
_V1_PAYLOAD: Final = _pack("report_data_payload")

_FIRST_FIELDS: Final = 568
"""The offset of report_data in a quote, after its header and most of its report."""
_SIGNED: Final = 768
"""The offset from which all quotes of a platform are equal; the signature of the report is before it."""


def _pack_event_log(log: tuple[TdxEvent, ...]) -> bytes:
    packed: bytes = msgpack.packb([_event_to_msgpack(event) for event in log])
    return packed


def _pack_runtime_events(events: tuple[RuntimeEvent, ...]) -> bytes:
    packed: bytes = msgpack.packb([_versioned({"event": e.event, "payload": e.payload}, e.version) for e in events])
    return packed


def _event_to_msgpack(event: TdxEvent) -> dict[str, Any]:
    out: dict[str, Any] = {
        "imr": event.imr,
        "event_type": event.event_type,
        "digest": event.digest,
        "event": event.event,
        "event_payload": event.event_payload,
    }
    out = _versioned(out, event.version)
    if event.preimage is not None:
        out["preimage"] = event.preimage
    return out


def _versioned(out: dict[str, Any], version: int) -> dict[str, Any]:
    if version != 1:
        out["version"] = version
    return out


def _event_from_msgpack(item: Any) -> TdxEvent:
    return TdxEvent(
        imr=member(item, "imr", unsigned(32)),
        event_type=member(item, "event_type", unsigned(32)),
        digest=member(item, "digest", octets_or_text, b""),
        event=member(item, "event", text),
        event_payload=member(item, "event_payload", octets_or_text),
        version=member(item, "version", _event_version, 1),
        preimage=member(item, "preimage", optional_text, None),
    )


def _event_version(value: Any) -> int:
    return check_version(_unsigned_64(value))
