"""A KMS of release 0.6, for clients that share nothing with it; beside each difference what a KMS of 0.5 answers."""

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography import x509

from dstack_emu import Stack, StackConfig, StackError
from tests import foreign
from tests.commands import serving
from tests.foreign import Authority, Guest
from tests.running import RunningStack


@pytest.fixture(scope="module")
def stack(ready_stack: RunningStack) -> Iterator[RunningStack]:
    assert ready_stack.release.name == "0.6"
    services = dict(ready_stack.services)
    yield ready_stack
    ready_stack.services.clear()
    ready_stack.services.update(services)
    ready_stack.reset()


@pytest.fixture(scope="module")
def guest(stack: RunningStack) -> Guest:
    return Guest.of(stack.services["kms-src"], stack.services["app"])


def control(stack: RunningStack, path: str, body: dict[str, Any]) -> dict[str, Any]:
    return post(stack.services["control"] + path, body)


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        parsed: dict[str, Any] = json.load(answer)
        return parsed


# ---- client certificates


def test_certificate_of_any_issuer_gets_the_keys_that_the_temporary_ca_gets(stack: RunningStack, guest: Guest) -> None:
    key = foreign.new_key()
    evidence = foreign.attest(guest.agent, foreign.spki_of(key))
    keys = guest.get_app_key(Authority.invent("a stranger").issue(key, evidence)).value
    assert keys["k256_key"]
    assert keys == guest.get_app_key(guest.temp_ca.issue(key, evidence)).value


def test_certificate_without_evidence_ends_the_handshake(guest: Guest) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)) as refusal:
        guest.get_app_key(Authority.invent("a stranger").issue(foreign.new_key(), None))
    assert "HANDSHAKE_FAILURE" in str(refusal.value).upper()
    assert guest.get_app_key().status == 200


def test_evidence_of_another_key_is_refused_by_the_call(guest: Guest) -> None:
    evidence = foreign.attest(guest.agent, foreign.spki_of(foreign.new_key()))
    identity = Authority.invent("a stranger").issue(foreign.new_key(), evidence)
    assert guest.get_app_key(identity).error.startswith("invalid quote: ")
    assert guest.get_app_key().status == 200


def test_extension_that_is_no_octet_string_ends_the_handshake_if_it_is_the_evidence(guest: Guest) -> None:
    key = foreign.new_key()
    evidence = foreign.der_octet_string(foreign.attest(guest.agent, foreign.spki_of(key)))
    authority = Authority.invent("a stranger")
    with pytest.raises((ssl.SSLError, ConnectionError)) as refusal:
        guest.get_app_key(authority.issue_raw(key, {foreign.OID_ATTESTATION: evidence + b"\0"}))
    assert "HANDSHAKE_FAILURE" in str(refusal.value).upper()
    app_info = x509.ObjectIdentifier("1.3.6.1.4.1.62397.1.9")
    for value, said in (
        (b"{}", "Failed to get extension for [1, 3, 6, 1, 4, 1, 62397, 1, 9]: "),
        (foreign.der_octet_string(b"{}"), "Failed to decode app info as json: "),
    ):
        identity = authority.issue_raw(key, {foreign.OID_ATTESTATION: evidence, app_info: value})
        assert guest.get_app_key(identity).error.startswith(said)
    assert guest.get_app_key(authority.issue_raw(key, {foreign.OID_ATTESTATION: evidence})).status == 200


# ---- answers


def test_unknown_method_is_404_in_0_6_and_400_in_0_5(stack: RunningStack, ready_stack_0_5: RunningStack) -> None:
    refusal = {"error": "Service not found: Nothing"}
    assert stack.rpc("kms-src", "KMS.Nothing") == (404, refusal)
    assert ready_stack_0_5.rpc("kms-src", "KMS.Nothing") == (400, refusal)


def test_meta_says_whether_os_images_are_verified_in_0_6_alone(
    stack: RunningStack, ready_stack_0_5: RunningStack
) -> None:
    assert stack.rpc("kms-src", "KMS.GetMeta")[1]["os_image_verification"] is True
    assert "os_image_verification" not in ready_stack_0_5.rpc("kms-src", "KMS.GetMeta")[1]


@pytest.mark.parametrize(("release", "names"), [("0.5", {"tee_variant", "attestation_mode"}), ("0.6", {"tee_variant"})])
def test_measurements_name_the_variant_as_the_release_does(stack: RunningStack, release: str, names: set[str]) -> None:
    name = f"fresh-{release.replace('.', '-')}"
    answer = control(stack, "/kms", {"name": name, "webhook": "src", "release": release})
    stack.services[f"kms-{name}"] = answer["url"]
    status, info = stack.rpc(f"kms-{name}", "Onboard.GetAttestationInfo")
    assert status == 200
    assert {member for member in ("tee_variant", "attestation_mode") if info.get(member) == "dstack-tdx"} == names
    assert len(info) == 7 + len(names)


def test_header_tells_the_version(stack: RunningStack, ready_stack_0_5: RunningStack) -> None:
    for running, version in ((stack, "v0.6.0 "), (ready_stack_0_5, "v0.5.11 ")):
        with foreign.kms(running.services["kms-src"]) as connection:
            header = connection.header("/health", "X-App-Version")
        assert header is not None
        assert header.startswith(version)


# ---- mixed


def test_guest_of_0_5_gets_keys_of_a_kms_of_0_6(stack: RunningStack) -> None:
    url = stack.services["kms-src"]
    with serving("boot", "--kms", url, "--release", "0.5", "--image-version", "0.6.0") as guest:
        assert guest["app_id"] == stack.description["app"]["app_id"]
        assert guest["mr_aggregated"] != stack.description["kms"]["src"]["mr_aggregated"]


def test_guest_of_0_6_gets_keys_of_a_kms_of_0_5(ready_stack_0_5: RunningStack) -> None:
    url = ready_stack_0_5.services["kms-src"]
    with serving("boot", "--kms", url, "--release", "0.6", "--image-version", "0.5.11") as guest:
        assert guest["app_id"] == ready_stack_0_5.description["app"]["app_id"]
        assert len(foreign.ask_agent(guest["dstack_sock"], "v1/IssueCert", {"subject": "x"})["certificate_chain"]) == 3


@pytest.mark.parametrize("release", ["0.5", "0.6"])
def test_kms_of_either_release_takes_the_keys_of_one_of_0_5_over(ready_stack_0_5: RunningStack, release: str) -> None:
    stack, name = ready_stack_0_5, f"of-{release.replace('.', '-')}"
    control(stack, "/kms", {"name": name, "webhook": "src", "release": release, "image_version": "0.5.11"})
    control(stack, "/policies/src/allow", {"guest": f"kms-{name}"})
    assert control(stack, f"/kms/{name}/onboard", {"source": "src"})["phase"] == "runtime"
    stack.reset()


@pytest.mark.parametrize("release", ["0.5", "0.6"])
def test_kms_of_either_release_takes_the_keys_of_one_of_0_6_over(stack: RunningStack, release: str) -> None:
    name = f"of-{release.replace('.', '-')}"
    control(stack, "/kms", {"name": name, "webhook": "src", "release": release, "image_version": "0.6.0"})
    control(stack, "/policies/src/allow", {"guest": f"kms-{name}"})
    onboarded = control(stack, f"/kms/{name}/onboard", {"source": "src"})
    assert onboarded["phase"] == "runtime"
    stack.services[f"kms-{name}"] = onboarded["url"]
    ours, theirs = (stack.rpc(service, "KMS.GetMeta")[1]["k256_pubkey"] for service in (f"kms-{name}", "kms-src"))
    assert ours == theirs


@pytest.mark.parametrize(("release", "reason"), [(0.5, "not up to date"), ("0.6", "not allowed")])
def test_own_webhook_of_a_kms_has_the_contract_of_its_release(
    stack: RunningStack, release: object, reason: str
) -> None:
    name = f"own-{str(release).replace('.', '-')}"
    control(stack, "/kms", {"name": name, "webhook": "own", "release": release})
    with urllib.request.urlopen(f"{stack.services['control']}/stack", timeout=30) as answer:
        url = json.load(answer)["services"][f"auth-{name}"]
    measured = ("mrAggregated", "osImageHash", "appId", "composeHash", "instanceId", "deviceId")
    boot_info = {**dict.fromkeys(measured, "0xaa"), "tcbStatus": "OutOfDate"}
    assert post(f"{url}/bootAuth/kms", boot_info)["reason"] == f"TCB status is {reason}"


@pytest.mark.parametrize("path", ["/guests", "/kms"])
def test_unknown_release_is_refused_by_name(stack: RunningStack, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        control(stack, path, {"name": "odd", "release": "0.7"})
    words = "release: dstack release: 0.5 or 0.6 expected, got '0.7'"
    assert (refusal.value.code, json.load(refusal.value)) == (400, {"error": words})


async def test_stack_of_an_unknown_release_is_refused() -> None:
    with pytest.raises(StackError, match="dstack release: 0.5 or 0.6 expected, got '0.7'"):
        async with Stack(StackConfig.on_free_ports(release="0.7")):
            pass
