"""Forms of evidence in which releases differ: events of version 2, a certificate's log, the msgpack layout."""

import json
from dataclasses import replace
from typing import Any

import msgpack
import pytest

from dstack_emu.attest.attestation import Attestation, decode
from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.eventlog import (
    ACPI_EVENT_TYPE,
    ACPI_PAYLOAD,
    RuntimeEvent,
    TdxEvent,
    log_from_json,
    log_to_json,
    replay_runtime,
    strip,
    validate_preimages,
)

ACPI = TdxEvent(0, ACPI_EVENT_TYPE, b"\xac" * 48, "acpi-loader", ACPI_PAYLOAD)
FIRMWARE = TdxEvent(0, 4, b"\xf0" * 48, "", b"\0\0\0\0")
KERNEL = TdxEvent(1, 0x80000003, b"\xf1" * 48, "", b"image")


def evidence(version: int) -> Attestation:
    events = (RuntimeEvent("system-preparing", b"", version), RuntimeEvent("app-id", b"\x11" * 20, version))
    log = (FIRMWARE, ACPI, KERNEL, *(TdxEvent.of(event) for event in events))
    return Attestation(b"\x04\0quote", log, events, bytes(range(64)), '{"vm":"config"}', wire=1)


@pytest.mark.parametrize(
    ("event", "payload", "digest"),
    [
        ("system-preparing", b"", "f9974020ef507068"),
        (
            "gpu-policy-hash",
            bytes.fromhex("44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"),
            "aa25b837d81098d5",
        ),
        ("key-provider", b'{"name":"none","id":""}', "7f788209b6106d43"),
        ("storage-fs", b"zfs", "ba51104636900268"),
    ],
)
def test_digest_of_version_1_is_that_of_real_hardware(event: str, payload: bytes, digest: str) -> None:
    assert RuntimeEvent(event, payload).digest().hex().startswith(digest)


def test_preimage_of_version_2_is_canonical_json() -> None:
    event = RuntimeEvent('a "b"\n', b"\x01\xff", 2)
    assert event.preimage() == rb'{"name":"a \"b\"\n","payload":"01ff","type":134217729}'


def test_line_of_version_2_tells_its_preimage_and_one_of_version_1_does_not() -> None:
    event = RuntimeEvent("app-id", b"\x11", 2)
    line = TdxEvent.of(event)
    assert (line.version, line.preimage, line.digest) == (2, event.preimage().hex(), event.digest())
    validate_preimages([line])
    assert TdxEvent.of(RuntimeEvent("app-id", b"\x11")).preimage is None


@pytest.mark.parametrize("version", [1, 2])
def test_log_survives_json(version: int) -> None:
    log = evidence(version).event_log
    assert log_from_json(log_to_json(log)) == log


@pytest.mark.parametrize("version", [0, 3])
def test_unknown_version_of_an_event_is_refused(version: int) -> None:
    line = TdxEvent.of(RuntimeEvent("app-id", b"", 2)).to_json() | {"version": version}
    with pytest.raises(FormatError, match=f"^unknown event log version: {version}$"):
        log_from_json(json.dumps([line]))
    document = msgpack.unpackb(evidence(2).encode())
    document["stack"]["data"]["runtime_events"][0]["version"] = version
    with pytest.raises(FormatError, match=f"unknown event log version: {version}$"):
        decode(msgpack.packb(document))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("keep_digests", [False, True])
def test_certificate_log_has_the_acpi_events_and_register_3(version: int, keep_digests: bool) -> None:
    whole = evidence(version)
    keeps = keep_digests or version == 2
    runtime = [replace(line, digest=line.digest if keeps else b"") for line in whole.event_log[3:]]
    assert whole.stripped(keep_digests=keep_digests) == replace(whole, event_log=(ACPI, *runtime))


def test_digests_of_version_2_are_kept_since_they_have_to_be() -> None:
    log = evidence(2).event_log
    for keep_digests in (False, True):
        validate_preimages(strip(log, keep_digests=keep_digests))
    with pytest.raises(VerificationError, match="^V2 runtime event 1 digest does not match its preimage$"):
        validate_preimages([replace(line, digest=b"") if line.is_runtime else line for line in strip(log)])


def test_kept_digests_do_not_change_what_is_replayed() -> None:
    whole = evidence(1)
    for keep_digests in (False, True):
        lines = [line for line in whole.stripped(keep_digests=keep_digests).event_log if line.imr == 3]
        assert replay_runtime(line.runtime() for line in lines) == replay_runtime(whole.runtime_events)


@pytest.mark.parametrize("version", [1, 2])
def test_msgpack_form_has_upstreams_layout(version: int) -> None:
    whole = evidence(version)
    line: dict[str, Any] = {
        "imr": 3,
        "event_type": 0x08000001,
        "digest": whole.event_log[3].digest,
        "event": "system-preparing",
        "event_payload": b"",
    }
    event: dict[str, Any] = {"event": "system-preparing", "payload": b""}
    if version == 2:
        line |= {"version": 2, "preimage": whole.event_log[3].preimage}
        event |= {"version": 2}
    document = msgpack.unpackb(whole.encode())
    log, events = document["platform"]["data"]["event_log"], document["stack"]["data"]["runtime_events"]
    assert (list(log[3].items()), list(events[0].items())) == (list(line.items()), list(event.items()))
    document["platform"]["data"]["event_log"], document["stack"]["data"]["runtime_events"] = len(log), len(events)
    assert json.dumps(document) == json.dumps(
        {
            "version": 1,
            "platform": {"kind": "tdx", "data": {"quote": list(whole.quote), "event_log": 5}},
            "stack": {
                "kind": "dstack",
                "data": {"report_data": list(range(64)), "runtime_events": 2, "config": '{"vm":"config"}'},
            },
        }
    )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("form", ["whole", "in a certificate"])
def test_msgpack_form_is_read_back(version: int, form: str) -> None:
    sent = evidence(version) if form == "whole" else evidence(version).stripped(keep_digests=True)
    assert decode(sent.encode()) == sent


def test_octets_are_read_as_bin_too() -> None:
    document = msgpack.unpackb(evidence(1).encode())
    for place, name in ((document["platform"]["data"], "quote"), (document["stack"]["data"], "report_data")):
        place[name] = bytes(place[name])
    assert decode(msgpack.packb(document)) == evidence(1)


@pytest.mark.parametrize("octet", [True, 256, -1, 1.0, "1", None])
def test_octets_of_another_type_are_refused(octet: Any) -> None:
    document = msgpack.unpackb(evidence(1).encode())
    document["stack"]["data"]["report_data"][7] = octet
    with pytest.raises(FormatError, match="^failed to decode attestation from msgpack: report_data: octets expected"):
        decode(msgpack.packb(document))


def test_scale_form_cannot_carry_version_2() -> None:
    with pytest.raises(FormatError, match="^attestation V0 cannot carry version 2 events$"):
        replace(evidence(2), wire=0).encode()
