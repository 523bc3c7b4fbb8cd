"""The event log of a trust domain and its replay into the four runtime measurement registers.

Boot events come from the firmware with their digests; runtime events are dstack's own and their digest follows from
name and payload. Source: dstack `cc-eventlog/src/{tdx,runtime_events}.rs` at 312dc605.
"""

import binascii
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from dstack_emu.attest.canonical_json import canonical_json
from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.strict_json import has_lone_surrogate, read_json

RUNTIME_EVENT_TYPE: Final = 0x08000001
ACPI_EVENT_TYPE: Final = 10
ACPI_PAYLOAD: Final = b"ACPI DATA"
RTMR_SIZE: Final = 48
EVENT_SIZE: Final = 256
"""Bytes of memory that an event takes, besides its name, payload and digest."""

MAX_EVENTS: Final = 4096
"""The maximum number of events in a log. A guest boots with fewer than a hundred; the others are its app's."""

SYSTEM_READY: Final = "system-ready"
BOOT_MR_DONE: Final = "boot-mr-done"
INIT_SCRIPT_HASH: Final = "init-script-hash"
SYSTEM_EVENTS: Final = frozenset(
    (
        *("system-preparing", "app-id", "compose-hash", INIT_SCRIPT_HASH, "gpu-policy-hash", "instance-id"),
        *(BOOT_MR_DONE, "mr-kms", "os-image-hash", "gpu-attestation", "key-provider", "storage-fs"),
        *("storage-encrypted", SYSTEM_READY),
    )
)
"""What a guest measures itself, in every release; all other names are an app's."""


@dataclass(frozen=True, slots=True)
class RuntimeEvent:
    """An event that dstack itself measures into RTMR3.

    Version 2 hashes a canonical JSON text instead of joined bytes.
    """

    event: str
    payload: bytes
    version: int = 1

    @property
    def size(self) -> int:
        """The approximate memory that it takes in bytes."""
        return EVENT_SIZE + 4 * len(self.event) + len(self.payload)

    def preimage(self) -> bytes:
        """Return the bytes whose SHA-384 is the event's digest."""
        if self.version == 1:
            return b":".join((RUNTIME_EVENT_TYPE.to_bytes(4, "little"), self.event.encode(), self.payload))
        return canonical_json({"name": self.event, "payload": self.payload.hex(), "type": RUNTIME_EVENT_TYPE})

    def digest(self) -> bytes:
        """Return the SHA-384 of the preimage, 48 bytes."""
        return hashlib.sha384(self.preimage()).digest()


@dataclass(frozen=True, slots=True)
class TdxEvent:
    """One line of the log: register (0 to 3), type, digest, name, payload.

    The digest is 48 bytes, or empty where it was stripped.
    """

    imr: int
    event_type: int
    digest: bytes
    event: str
    event_payload: bytes
    version: int = 1
    preimage: str | None = None

    @property
    def size(self) -> int:
        """The approximate memory that it takes in bytes."""
        texts = 4 * (len(self.event) + len(self.preimage or ""))
        return EVENT_SIZE + texts + len(self.digest) + len(self.event_payload)

    @classmethod
    def of(cls, event: RuntimeEvent) -> Self:
        """Make the log line of a runtime event; one of version 2 tells its preimage, without which it is refused."""
        preimage = event.preimage()
        digest = hashlib.sha384(preimage).digest()
        told = None if event.version == 1 else preimage.hex()
        return cls(3, RUNTIME_EVENT_TYPE, digest, event.event, event.payload, event.version, told)

    @property
    def is_runtime(self) -> bool:
        """Return whether dstack measured it (and its digest follows from name and payload)."""
        return self.event_type == RUNTIME_EVENT_TYPE

    @property
    def is_acpi_data(self) -> bool:
        """Return whether it is one of the three ACPI events a verifier needs to recompute RTMR0."""
        return self.imr == 0 and self.event_type == ACPI_EVENT_TYPE and self.event_payload == ACPI_PAYLOAD

    def runtime(self) -> RuntimeEvent:
        """Return the runtime event this line records."""
        return RuntimeEvent(self.event, self.event_payload, self.version)

    def measured(self) -> bytes:
        """Return the digest a replay folds: recomputed for runtime events, as recorded for the others."""
        return self.runtime().digest() if self.is_runtime else self.digest

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form of GetQuote's event log: digest and payload as lowercase hex."""
        out: dict[str, Any] = {
            "imr": self.imr,
            "event_type": self.event_type,
            "digest": self.digest.hex(),
            "event": self.event,
            "event_payload": self.event_payload.hex(),
        }
        if self.version != 1:
            out["version"] = self.version
        if self.preimage is not None:
            out["preimage"] = self.preimage
        return out

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read the JSON form; raise `FormatError` naming the key that is missing or mistyped."""
        if not isinstance(value, dict):
            raise FormatError(f"event: object expected, got {type(value).__name__}")
        return cls(
            imr=_integer(value, "imr"),
            event_type=_integer(value, "event_type"),
            digest=_hex(value, "digest", ""),
            event=_text(value, "event"),
            event_payload=_hex(value, "event_payload"),
            version=_version(value),
            preimage=None if value.get("preimage") is None else _text(value, "preimage"),
        )


def check_version(version: int) -> int:
    """Return the version of an event or of an app's log if it is known; raise `FormatError` with upstream's words."""
    if version not in (1, 2):
        raise FormatError(f"unknown event log version: {version}")
    return version


def replay(digests: Iterable[bytes]) -> bytes:
    """Fold digests into a register: SHA-384(register, digest) from 48 zero bytes."""
    register = bytes(RTMR_SIZE)
    for digest in digests:
        register = hashlib.sha384(register + digest).digest()
    return register


def replay_register(log: Iterable[TdxEvent], imr: int) -> bytes:
    """Replay one register of a full log."""
    return replay(event.measured() for event in log if event.imr == imr)


def replay_runtime(events: Iterable[RuntimeEvent], until: str | None = None) -> bytes:
    """Replay RTMR3 from runtime events, up to and including the first named `until` where one is given."""
    digests = []
    for event in events:
        digests.append(event.digest())
        if event.event == until:
            break
    return replay(digests)


def find_payload(events: Iterable[RuntimeEvent], name: str) -> bytes:
    """Return the payload of the first event of that name before `system-ready`, or nothing.

    What comes after `system-ready` is the application's and proves no identity.
    """
    for event in events:
        if event.event == SYSTEM_READY:
            break
        if event.event == name:
            return event.payload
    return b""


def require_unambiguous(events: Iterable[RuntimeEvent]) -> None:
    """Refuse a log in which a system event can be read in two ways; raise `VerificationError`.

    The digest of a version 1 event covers `type:name:payload`, so an event `app-id` whose payload begins with `x:` has
    the digest of one named `app-id:x`: a log could rename the true event, and show another `app-id` behind it. An app
    may therefore use any name but a system event's, followed by a colon. A system event occurs once in a log of either
    version, except for `init-script-hash`. The rule is this emulator's: upstream reads the first event of a name.
    """
    seen = set()
    for index, event in enumerate(events):
        name, colon, _ = event.event.partition(":")
        if name not in SYSTEM_EVENTS:
            continue
        if colon:
            if event.version == 1:
                raise VerificationError(
                    f"runtime event {index} is ambiguous: {event.event!r:.80} with this payload has the digest of "
                    f"{name!r} with another one. Use a name that does not begin with {name + ':'!r}"
                )
            continue
        if name in seen:
            raise VerificationError(f"runtime event {index} is ambiguous: {name!r} occurs twice, and once was expected")
        if name != INIT_SCRIPT_HASH:
            seen.add(name)


def strip(log: Sequence[TdxEvent], *, keep_digests: bool = False) -> tuple[TdxEvent, ...]:
    """Cut a log to what a certificate carries: the ACPI events whole, and every event of RTMR3.

    Boot events lose their payload, runtime events their digest unless it is kept, as 0.6 does. That of an event of
    version 2 is always kept: every verifier refuses one without.
    """
    return tuple(_stripped(event, keep_digests) for event in log if event.is_acpi_data or event.imr == 3)


def _stripped(event: TdxEvent, keep_digest: bool) -> TdxEvent:
    if event.is_acpi_data or (event.is_runtime and (keep_digest or event.version > 1)):
        return event
    return replace(event, digest=b"") if event.is_runtime else replace(event, event_payload=b"")


def for_get_quote(log: Sequence[TdxEvent]) -> tuple[TdxEvent, ...]:
    """Cut a log to what GetQuote answers: payloads of boot events emptied, except the ACPI ones."""
    return tuple(e if e.is_runtime or e.is_acpi_data else replace(e, event_payload=b"") for e in log)


def validate_preimages(log: Sequence[TdxEvent]) -> None:
    """Hold the preimage of every version 2 runtime event against its digest and its fields.

    Raises `VerificationError` with upstream's words; `attest.verify` adds the context.
    """
    for index, event in enumerate(log):
        if not event.is_runtime or event.version == 1:
            continue
        if event.preimage is None:
            raise VerificationError(f"V2 runtime event {index} is missing its digest preimage")
        try:
            preimage = binascii.unhexlify(event.preimage)
        except ValueError as error:
            raise VerificationError(f"V2 runtime event {index} has a malformed digest preimage") from error
        if hashlib.sha384(preimage).digest() != event.digest:
            raise VerificationError(f"V2 runtime event {index} digest does not match its preimage")
        if preimage != event.runtime().preimage():
            raise VerificationError(f"V2 runtime event {index} preimage is not the canonical event representation")


def log_to_json(log: Iterable[TdxEvent]) -> str:
    """Return the whole log as compact JSON text."""
    return json.dumps([event.to_json() for event in log], separators=(",", ":"), ensure_ascii=False)


def log_from_json(text: str | bytes) -> tuple[TdxEvent, ...]:
    """Read a log from JSON text; raise `FormatError` if it is none."""
    try:
        value = read_json(text)
    except ValueError as error:
        raise FormatError(f"event log: JSON expected ({error})") from error
    if not isinstance(value, list):
        raise FormatError(f"event log: array expected, got {type(value).__name__}")
    require_few_events(len(value), "event log")
    return tuple(TdxEvent.from_json(item) for item in value)


def require_few_events(count: int, what: str) -> None:
    """Raise `FormatError`, which names `what`, if a log has more than MAX_EVENTS events."""
    if count > MAX_EVENTS:
        raise FormatError(f"{what}: at most {MAX_EVENTS} expected, got {count}")


def _integer(value: dict[str, Any], key: str, default: int | None = None) -> int:
    number = value.get(key, default)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**32:
        raise FormatError(f"event: {key}: 32-bit number expected, got {number!r:.40}")
    return number


def _version(value: dict[str, Any]) -> int:
    return check_version(_integer(value, "version", 1))


def _text(value: dict[str, Any], key: str) -> str:
    text = value.get(key)
    # JSON's escapes can spell half of a surrogate pair, which no UTF-8 text, and so no digest, has.
    if not isinstance(text, str) or has_lone_surrogate(text):
        raise FormatError(f"event: {key}: text expected, got {text!r:.40}")
    return text


def _hex(value: dict[str, Any], key: str, default: str | None = None) -> bytes:
    text = value.get(key, default)
    try:
        return binascii.unhexlify(text)  # type: ignore[arg-type]  # a non-text is the TypeError below
    except (TypeError, ValueError) as error:
        raise FormatError(f"event: {key}: hex text expected, got {text!r:.40}") from error
