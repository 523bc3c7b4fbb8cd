"""The guest agent against upstream's own answers on the same key file, and as a command of its own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from dstack_emu.attest.eventlog import log_from_json, replay_register
from dstack_emu.attest.quote import Quote
from dstack_emu.attest.release import RELEASES, Release
from tests.commands import ask, serving, usage_error
from tests.hardware import APP_KEYS, LITE_GET_QUOTE, boot
from tests.recorded import external_path, golden


@pytest.fixture(scope="module", params=list(RELEASES))
def release(request: pytest.FixtureRequest) -> Release:
    """Each release."""
    return RELEASES[request.param]


@pytest.fixture(scope="module")
def agent(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """An agent of each release with the key file that upstream's answers were recorded on: 0.6 changed one of them."""
    keys = tmp_path_factory.mktemp("keys") / "appkeys.json"
    keys.write_text(json.dumps(golden("guest-agent-keys.json")["appkeys"]))
    with serving("agent", "--release", release.name, "--keys", str(keys)) as description:
        yield description


def _dstack(agent: dict[str, Any], method: str, body: Any) -> tuple[int, Any]:
    return ask(agent["dstack_sock"], f"/{method}", body)


def _tappd(agent: dict[str, Any], method: str, body: Any) -> tuple[int, Any]:
    return ask(agent["tappd_sock"], f"/prpc/Tappd.{method}", body)


def _report_data(quote_hex: str) -> str:
    return Quote.parse(bytes.fromhex(quote_hex)).report.report_data.hex()


def test_golden_keys_and_their_chains_are_equal(agent: dict[str, Any]) -> None:
    cases = golden("guest-agent-keys.json")["get_key"]
    assert len(cases) == 20
    for case in cases:
        request = {name: case[name] for name in ("path", "purpose", "algorithm")}
        if case.get("error"):
            assert _dstack(agent, "GetKey", request) == (400, {"error": case["error"]})
        else:
            answer = {"key": case["key"], "signature_chain": case["signature_chain"]}
            assert _dstack(agent, "GetKey", request) == (200, answer)


def test_golden_signatures_are_equal_and_wrong_requests_are_refused_in_the_same_words(agent: dict[str, Any]) -> None:
    for case in golden("guest-agent-keys.json")["sign"]:
        status, answer = _dstack(agent, "Sign", {"algorithm": case["algorithm"], "data": case["data"]})
        if case.get("error"):
            assert (status, answer) == (400, {"error": case["error"]})
        else:
            assert (status, answer) == (200, {k: case[k] for k in ("signature", "signature_chain", "public_key")})


def test_name_that_no_certificate_can_have_is_refused_by_the_app_s_own_ca() -> None:
    with serving("agent") as own:
        names = {"subject": "bücher", "alt_names": ["bücher.example"]}
        status, answer = _dstack(own, "GetTlsKey", names)
        context = "Failed to sign the CSR: Failed to sign certificate: Failed to sign certificate: "
        assert (status, answer["error"].startswith(context + "Invalid IA5String")) == (400, True), answer
        status, answer = _dstack(own, "GetTlsKey", names | {"alt_names": ["xn--bcher-kva.example"]})
        leaf = x509.load_pem_x509_certificate(answer["certificate_chain"][0].encode())
        assert (status, leaf.subject.rfc4514_string()) == (200, "CN=bücher")


def test_golden_verifications_answer_the_same(agent: dict[str, Any]) -> None:
    for case in golden("guest-agent-keys.json")["verify"]:
        status = 400 if "error" in case["response"] else 200
        assert _dstack(agent, "Verify", case["request"]) == (status, case["response"])


def test_golden_tappd_keys_are_equal(agent: dict[str, Any]) -> None:
    vectors = golden("guest-agent-keys.json")
    for case in vectors["tappd_derive_key_p256_deterministic"]:
        status, answer = _tappd(agent, "DeriveKey", {"path": case["path"], "subject": "x"})
        assert (status, answer["key"]) == (200, case["key_pem"])
    for case in vectors["tappd_derive_k256"]:
        request = {name: case[name] for name in ("path", "purpose", "algorithm")}
        answer = {name: case[name] for name in ("k256_key", "k256_signature_chain")}
        assert _tappd(agent, "DeriveK256Key", request) == (200, answer)


def test_golden_tdx_quotes_carry_the_same_report_data(agent: dict[str, Any]) -> None:
    for case in golden("guest-agent-keys.json")["tdx_quote_report_data"]:
        is_raw = case["name"].startswith("rawquote")
        status, answer = _tappd(agent, "RawQuote" if is_raw else "TdxQuote", case["request"])
        if case.get("error"):
            assert (status, answer) == (400, {"error": case["error"]})
            continue
        assert _report_data(answer["quote"]) == case["report_data_in_quote"]
        assert (answer["hash_algorithm"], answer["prefix"]) == (case["hash_algorithm"], case["prefix"])


def test_golden_quotes_and_app_key_attestations_carry_the_same_report_data(
    agent: dict[str, Any], release: Release
) -> None:
    """In 0.6 the key of prehashed signatures is that of `secp256k1`: `app_key_report_data` in
    guest-agent/src/rpc_service.rs at 0fcd31cd.
    """
    vectors = golden("guest-agent-keys.json")
    for case in vectors["get_quote_report_data"]:
        is_get = case["request"].startswith("/")
        path, body = (case["request"], None) if is_get else ("/GetQuote", json.loads(case["request"]))
        status, answer = ask(agent["dstack_sock"], path, body)
        assert status == 200
        assert _report_data(answer["quote"]) == case["report_data_in_quote"]
        assert answer["report_data"] == case["report_data_field"]
    attestations = {case["request"]["algorithm"]: case for case in vectors["attestation_for_app_key"]}
    assert attestations["secp256k1_prehashed"]["error"]
    for algorithm, recorded in attestations.items():
        is_changed = algorithm == "secp256k1_prehashed" and release.name == "0.6"
        case = attestations["secp256k1"] | {"request": recorded["request"]} if is_changed else recorded
        status, answer = ask(agent["dstack_url"], "/prpc/Worker.GetAttestationForAppKey", case["request"])
        if case["error"]:
            assert (status, answer) == (400, {"error": case["error"]})
        else:
            assert _report_data(answer["quote"]) == case["report_data_in_quote"]


def test_key_file_of_upstreams_simulator_loads() -> None:
    with serving("agent", "--keys", str(external_path(APP_KEYS))) as agent:
        status, answer = _dstack(agent, "GetKey", {"path": "a"})
        assert status == 200
        assert answer["signature_chain"][1] == json.loads(external_path(APP_KEYS).read_text())["k256_signature"]
        status, answer = _dstack(agent, "GetTlsKey", {"subject": "x", "usage_ra_tls": True})
        assert (status, len(answer["certificate_chain"])) == (200, 2)


def test_one_port_serves_every_service(release: Release, agent: dict[str, Any]) -> None:
    url = agent["dstack_url"]
    assert agent["tappd_url"] == url
    for path in ("/Info", "/prpc/Info", "/prpc/Tappd.Info", "/prpc/Worker.Info"):
        status, info = ask(url, path, {})
        assert (status, info["app_id"]) == (200, agent["app_id"])
    assert ask(url, "/prpc/TdxQuote", {}) == ask(url, "/prpc/Tappd.TdxQuote", {})
    unknown = {"error": "Service not found: GetKey"}
    assert ask(url, "/prpc/Worker.GetKey", {}) == (release.unknown_method_status, unknown)


def test_info_says_what_the_command_printed(agent: dict[str, Any]) -> None:
    _, info = _dstack(agent, "Info", {})
    names = ("app_id", "instance_id", "device_id", "mr_aggregated", "os_image_hash", "compose_hash")
    assert {name: info[name] for name in names} == {name: agent[name] for name in names}
    tcb_info = json.loads(info["tcb_info"])
    assert {tcb_info[name] for name in ("device_id", "compose_hash")} == {agent["device_id"], agent["compose_hash"]}
    log = log_from_json(json.dumps(tcb_info["event_log"]))
    assert [replay_register(log, imr).hex() for imr in range(4)] == [tcb_info[f"rtmr{imr}"] for imr in range(4)]


def test_emitted_event_extends_rtmr3_and_mr_aggregated_in_0_5() -> None:
    with serving("agent", "--release", "0.5") as agent:
        _, before = _dstack(agent, "GetQuote", {})
        assert _dstack(agent, "EmitEvent", {"event": "mine", "payload": "0102"}) == (200, None)
        _, after = _dstack(agent, "GetQuote", {})
        old, new = (Quote.parse(bytes.fromhex(answer["quote"])).report for answer in (before, after))
        assert old.rtmrs[:3] == new.rtmrs[:3]
        assert old.rt_mr3 != new.rt_mr3 == replay_register(log_from_json(after["event_log"]), 3)
        assert _dstack(agent, "Info", {})[1]["mr_aggregated"] != agent["mr_aggregated"]


SIMULATOR = "Service not found: EmitEvent"
REMOVED = "EmitEvent was removed in dstack 0.6.0; runtime RTMR3 events are system-owned and cannot be extended by apps"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--release", "0.5", "--upstream-compat"), SIMULATOR),
        (("--release", "0.6"), REMOVED),
        (("--release", "0.6", "--upstream-compat"), REMOVED),
    ],
)
def test_emit_event_is_refused_with_upstream_compat_and_in_0_6(arguments: tuple[str, ...], text: str) -> None:
    with serving("agent", *arguments) as agent:
        assert _dstack(agent, "EmitEvent", {"event": "mine", "payload": ""}) == (400, {"error": text})
        _, quote = _dstack(agent, "GetQuote", {})
        assert "mine" not in quote["event_log"]
        assert _dstack(agent, "Info", {})[1]["mr_aggregated"] == agent["mr_aggregated"]


def test_app_compose_and_sys_config_load_as_they_are(tmp_path: Path) -> None:
    hardware = boot(LITE_GET_QUOTE)
    sys_config, compose = tmp_path / "sys-config.json", tmp_path / "app-compose.json"
    sys_config.write_text(json.dumps({"vm_config": hardware.vm_config, "kms_urls": [], "pccs_url": None}))
    compose.write_text('{"manifest_version": 2, "name": "mine", "runner": "docker-compose"}')
    with serving("agent", "--sys-config", str(sys_config), "--app-compose", str(compose)) as agent:
        _, info = _dstack(agent, "Info", {})
        assert (info["app_name"], info["vm_config"]) == ("mine", hardware.vm_config)
        assert info["os_image_hash"] == json.loads(hardware.vm_config)["os_image_hash"]
        # Its measurement document is that of real hardware, so MRTD, RTMR1 and RTMR2 are the hardware's.
        _, quote = _dstack(agent, "GetQuote", {})
        ours, real = Quote.parse(bytes.fromhex(quote["quote"])).report, hardware.report
        assert (ours.mr_td, ours.rt_mr1, ours.rt_mr2) == (real.mr_td, real.rt_mr1, real.rt_mr2)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--memory", "1G"), "TDX lite attestation without image download requires memory_size == 2147483648"),
        (("--app-compose", "/nonexistent"), "app-compose /nonexistent: No such file or directory"),
        (("--app-compose", __file__), "app-compose: Extra data"),
        (("--keys", __file__), "test_guest_agent.py: JSON expected"),
        (("--sys-config", "/nonexistent"), "file /nonexistent: No such file or directory"),
        (("--dstack-sock", __file__), "a file that is not a socket is there (set by --dstack-sock)"),
        (("--dstack-sock", "/tmp/" + "x" * 120), "the path is too long for a socket"),
        (("--app-id", "00"), "--app-id: 20 bytes expected, got 1"),
        (("--mr-config-id", "00"), "mr_config_id: 48 bytes expected, got 1"),
        (("--tcb-status", "Fine"), "TCB status of the platform: one of UpToDate, "),
        (("--module-status", "SWHardeningNeeded"), "TCB status of the TDX module: one of UpToDate, OutOfDate, Revoked"),
        (("--td15",), "--td15 needs --quote-version 5, got 4"),
    ],
)
def test_agent_with_bad_input_ends_with_one_line(arguments: tuple[str, ...], reason: str) -> None:
    assert reason in usage_error("agent", *arguments)


def test_port_that_is_taken_is_named_with_its_option(agent: dict[str, Any]) -> None:
    address = agent["dstack_url"].removeprefix("http://")
    text = usage_error("agent", "--listen", address)
    assert text == f"cannot listen on {address}: the address is in use (set by --listen HOST:PORT)"
