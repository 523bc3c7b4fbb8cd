"""Attestations, event logs and app info against real hardware's bytes and upstream's own answers."""

import pytest

from dstack_emu.attest.app_info import decode_app_info
from dstack_emu.attest.attestation import decode, from_quote_and_log
from dstack_emu.attest.errors import AttestError, FormatError
from dstack_emu.attest.eventlog import (
    BOOT_MR_DONE,
    RuntimeEvent,
    for_get_quote,
    log_from_json,
    log_to_json,
    replay_register,
    replay_runtime,
)
from dstack_emu.attest.quote import Quote
from tests.hardware import LITE_GET_QUOTE, VERSIONED, boot
from tests.recorded import external_path, golden


def test_hardware_attestation_decodes_to_its_last_byte_and_encodes_back() -> None:
    data = external_path(VERSIONED).read_bytes()
    attestation = decode(data)
    assert len(data) == 9504
    assert len(attestation.quote) == 5010
    assert [sum(e.imr == imr for e in attestation.event_log) for imr in range(4)] == [17, 5, 2, 9]
    assert attestation.encode() == data
    assert Quote.parse(attestation.quote).encode() == attestation.quote
    assert_refused_unless_whole(data)


def test_hardware_boot_decodes_to_its_last_byte_and_encodes_back_under_another_signature() -> None:
    data = boot(VERSIONED).attestation().encode()
    attestation = decode(data)
    assert [sum(e.imr == imr for e in attestation.event_log) for imr in range(4)] == [17, 5, 2, 9]
    assert attestation.encode() == data
    assert Quote.parse(attestation.quote).report == boot(VERSIONED).report
    assert_refused_unless_whole(data)


def assert_refused_unless_whole(data: bytes) -> None:
    """Assert that bytes of version 0 are refused if they are cut short, and if one is left over."""
    for cut in (1, 2, 700, 5000, len(data) - 1):
        with pytest.raises(FormatError, match="^Failed to decode legacy VersionedAttestation: "):
            decode(data[:cut])
    with pytest.raises(FormatError, match="^Trailing bytes after legacy VersionedAttestation: 1$"):
        decode(data + b"\0")


def test_hardware_log_replays_to_every_quoted_register() -> None:
    attestation = boot(VERSIONED).attestation()
    report = Quote.parse(attestation.quote).report
    assert [replay_register(attestation.event_log, imr) for imr in range(4)] == list(report.rtmrs)
    assert replay_runtime(attestation.runtime_events) == report.rt_mr3
    assert report.rt_mr3.hex().startswith("f28a1490ee924e93")


def test_hardware_mr_aggregated_counts_the_owner_fields_that_are_not_zero() -> None:
    attestation = boot(VERSIONED).attestation()
    assert any(Quote.parse(attestation.quote).report.mr_config_id)
    info = decode_app_info(attestation)
    assert info.mr_aggregated.hex() == "85334a62c97d0f8bf82d0245d31b539d17a2d7c258e2a13efc928aaea0e107cb"


def test_golden_attestations_decode_and_encode_to_the_same_bytes() -> None:
    for case in golden("attestations.json")["attestations"]:
        full = bytes.fromhex(case["full_bytes"])
        attestation = decode(full)
        assert attestation.encode() == full
        assert attestation.stripped().encode() == bytes.fromhex(case["stripped_bytes"])
        assert attestation.quote == bytes.fromhex(case["tdx_quote"])
        # (upstream keeps boot payloads in its simulator's answer: the log's own JSON form is what is compared)
        assert log_to_json(attestation.event_log) == case["event_log_string_of_getquote"]


def test_golden_app_info_is_equal_at_run_time_boot_time_and_with_another_vm_config() -> None:
    for case in golden("attestations.json")["attestations"]:
        attestation = decode(bytes.fromhex(case["full_bytes"]))
        override = case["app_info_runtime_with_vm_config_override"]
        for info, want in (
            (decode_app_info(attestation), case["app_info_runtime"]),
            (decode_app_info(attestation, boot_time=True), case["app_info_boottime"]),
            (decode_app_info(attestation, vm_config=override["vm_config"]), override["app_info"]),
        ):
            assert {key: getattr(info, key).hex() for key in want if key != "init_script_hashes"} == {
                key: value for key, value in want.items() if key != "init_script_hashes"
            }
        assert decode_app_info(attestation).encode().hex() == case["app_info_ext_msgpack"]


def test_golden_runtime_events_have_the_same_preimages_digests_and_registers() -> None:
    for case in golden("attestations.json")["runtime_events"]:
        events = [RuntimeEvent(e["event"], bytes.fromhex(e["payload"]), case["version"]) for e in case["events"]]
        assert [e.preimage().hex() for e in events] == [e["preimage"] for e in case["events"]]
        assert [e.digest().hex() for e in events] == [e["sha384"] for e in case["events"]]
        assert replay_runtime(events).hex() == case["rtmr3"]
        assert replay_runtime(events, BOOT_MR_DONE).hex() == case["rtmr3_boot_mr_done"]


def test_golden_undecodable_bytes_are_refused_with_the_same_outer_words() -> None:
    for case in golden("attestations.json")["decode_errors"]:
        if case["bytes"].startswith("<"):
            continue  # "<valid>+00": shown on the hardware's bytes below and above
        with pytest.raises(AttestError) as refusal:
            decode(bytes.fromhex(case["bytes"]))
        assert str(refusal.value).split(":")[0] == case["error"].split(":")[0]


def test_msgpack_attestation_with_a_byte_left_over_is_refused() -> None:
    data = bytes.fromhex(golden("attestations.json")["attestations"][0]["full_bytes"])
    assert data[0] != 0
    with pytest.raises(FormatError, match="^trailing bytes after attestation msgpack: 1$"):
        decode(data + b"\0")


def test_hardware_get_quote_log_replays_and_its_kept_payloads_are_ours() -> None:
    answer = boot(LITE_GET_QUOTE).get_quote()
    log = log_from_json(answer["event_log"])
    report = Quote.parse(bytes.fromhex(answer["quote"])).report
    assert len(log) == 29
    assert [replay_register(log, imr) for imr in range(4)] == list(report.rtmrs)
    attestation = from_quote_and_log(bytes.fromhex(answer["quote"]), answer["event_log"].encode())
    assert attestation.report_data == report.report_data
    assert for_get_quote(log) == log


def test_log_that_is_no_array_is_refused_by_name() -> None:
    with pytest.raises(FormatError, match="^event log: array expected, got dict$"):
        log_from_json("{}")
    with pytest.raises(FormatError, match="^event: imr: 32-bit number expected, got -1$"):
        log_from_json('[{"imr": -1}]')
