"""The VM config in a request to a KMS, and the app info in a certificate: what each release believes of whom.

Beside 0.6, whose KMS refuses a config that is not the evidence's and certifies what it verified, stands 0.5, whose KMS
takes a request's config in place of the evidence's and certifies what the evidence says of itself.
"""

import hashlib
import json
from typing import Any

import msgpack
import pytest
from cryptography import x509

from tests import foreign
from tests.foreign import Answer, Guest
from tests.running import RunningStack
from tests.test_sign_cert import head, sign_cert, signed, vec, version_1

OID_APP_INFO = x509.ObjectIdentifier("1.3.6.1.4.1.62397.1.9")
REFUSAL = "vm_config of the request does not match the one in the attestation"


@pytest.fixture(scope="module")
def stack(each_ready_stack: RunningStack) -> RunningStack:
    return each_ready_stack


@pytest.fixture(scope="module")
def release(stack: RunningStack) -> str:
    return stack.release.name


@pytest.fixture
def guest(stack: RunningStack) -> Guest:
    return Guest.of(stack.services["kms-src"], stack.services["app"])


@pytest.fixture
def vm_config(stack: RunningStack) -> str:
    return str(foreign.ask_agent(stack.services["app"], "Info")["vm_config"])


def requests_about_apps(stack: RunningStack) -> int:
    """How often the source KMS asked its webhook about apps, so far."""
    status, body = stack.curl(f"{stack.services['control']}/journal/count?service=auth-src&call=/bootAuth/app")
    assert status == 200, body
    return int(json.loads(body)["calls"])


def get_app_key(guest: Guest, vm_config: str) -> Answer:
    with foreign.kms(guest.kms_url, identity=guest.identity(), root_ca=guest.root_ca) as connection:
        return connection.call("GetAppKey", api_version=1, vm_config=vm_config)


# ---- GetAppKey and GetKmsKey


def test_config_of_the_evidence_gets_the_keys(guest: Guest, vm_config: str) -> None:
    keys = get_app_key(guest, "").value
    assert get_app_key(guest, vm_config).value == keys


def test_config_inside_a_larger_one_names_no_image(
    stack: RunningStack, release: str, guest: Guest, vm_config: str
) -> None:
    larger = json.dumps({"vm_config": vm_config})
    denied = "App not allowed: Boot denied: OS image is not allowed"
    assert get_app_key(guest, larger).error == (f"App not allowed: {REFUSAL}" if release == "0.6" else denied)
    key = foreign.new_key()
    bare = without_config(foreign.attest(guest.agent, foreign.spki_of(key)), vm_config)
    nested = guest.temp_ca.issue(key, bare[: -len(vec(b""))] + vec(larger.encode()))
    assert guest.get_app_key(nested).error == denied
    with stack.policy_changed("src", lambda policy: policy["osImages"].append("0x")):
        text = guest.get_app_key(nested).error
    assert text.startswith("App not allowed: Failed to verify os image hash: ")
    identity = guest.temp_ca.issue(key, bare)
    assert guest.get_app_key(identity, vm_config=larger).error == denied
    assert guest.get_app_key(identity, vm_config=vm_config).status == 200


UNREADABLE = ("{", "[]", '{"cpu_count": -1}', '{"os_image_hash": "0x00"}', '{"os_image_hash": 7}')


@pytest.mark.parametrize("config", UNREADABLE)
@pytest.mark.parametrize("place", ["request", "evidence"])
def test_config_that_cannot_be_read_is_refused_by_each_rpc_with_its_text(
    stack: RunningStack, guest: Guest, vm_config: str, place: str, config: str
) -> None:
    key = foreign.new_key()
    bare = without_config(foreign.attest(guest.agent, foreign.spki_of(key)), vm_config)
    evidence = bare if place == "request" else bare[: -len(vec(b""))] + vec(config.encode())
    requested = config if place == "request" else ""
    text = "decode app info: Failed to decode os image hash: Failed to parse vm config: "
    before = requests_about_apps(stack)
    with foreign.kms(guest.kms_url, identity=guest.temp_ca.issue(key, evidence), root_ca=guest.root_ca) as connection:
        said = connection.call("GetAppKey", api_version=1, vm_config=requested).error
        assert said.startswith(f"App not allowed: {text}")
        assert connection.call("GetKmsKey", vm_config=requested).error.startswith(text)
    request = request_of_version_2(key, evidence, vm_config=requested)
    assert sign_cert(guest, request).error.startswith(text)
    assert requests_about_apps(stack) == before
    assert sign_cert(guest, request_of_version_2(key, bare, vm_config=vm_config)).status == 200


def test_config_of_evidence_that_cannot_be_read_is_overridden_in_0_5(
    release: str, guest: Guest, vm_config: str
) -> None:
    key = foreign.new_key()
    bare = without_config(foreign.attest(guest.agent, foreign.spki_of(key)), vm_config)
    evidence = bare[: -len(vec(b""))] + vec(b"{")
    answer = sign_cert(guest, request_of_version_2(key, evidence, vm_config=vm_config))
    with_app_info = sign_cert(guest, request_of_version_2(key, evidence, app_info=True, vm_config=vm_config))
    if release == "0.6":
        assert (answer.error, with_app_info.error) == (REFUSAL, REFUSAL)
    else:
        assert answer.status == 200
        text = "Failed to sign certificate: decode app info: Failed to decode os image hash: "
        assert with_app_info.error.startswith(text)


@pytest.mark.parametrize("change", [lambda text: "{}", lambda text: text.replace('"cpu_count":2', '"cpu_count":3')])
def test_other_config_is_refused_in_0_6_and_counts_in_0_5(
    stack: RunningStack, release: str, guest: Guest, vm_config: str, change: Any
) -> None:
    before = requests_about_apps(stack)
    answer = get_app_key(guest, change(vm_config))
    asked = requests_about_apps(stack) - before
    if release == "0.6":
        assert (answer.error, asked) == (f"App not allowed: {REFUSAL}", 0)
    else:
        assert (REFUSAL in str(answer.body), asked) == (False, 1)
    assert get_app_key(guest, vm_config).status == 200


def test_config_with_other_spaces_is_another_one_in_0_6_alone(release: str, guest: Guest, vm_config: str) -> None:
    answer = get_app_key(guest, json.dumps(json.loads(vm_config), indent=1))
    assert (answer.status, REFUSAL in str(answer.body)) == ((400, True) if release == "0.6" else (200, False))


def test_kms_with_another_config_is_refused_in_0_6(stack: RunningStack, release: str) -> None:
    receiver = Guest.of(stack.services["kms-src"], f"{stack.description['state']}/kms-dst/dstack.sock")
    with foreign.kms(receiver.kms_url, identity=receiver.identity(), root_ca=receiver.root_ca) as connection:
        assert connection.call("GetKmsKey").status == 200
        refusal = connection.call("GetKmsKey", vm_config="{}").error
    assert refusal == (REFUSAL if release == "0.6" else "Boot denied: OS image is not allowed")


# ---- SignCert


def request_of_version_2(key: Any, evidence: bytes, *, app_info: bool = False, **more: Any) -> dict[str, Any]:
    return signed(key, head(key) + bytes([app_info]) + b"\0\0" + evidence, 2, **more)


def without_config(attestation: bytes, vm_config: str) -> bytes:
    """The same evidence without its config, which no quote covers."""
    assert attestation.endswith(vec(vm_config.encode())), "the config ends a SCALE attestation"
    return attestation[: -len(vec(vm_config.encode()))] + vec(b"")


def app_info_of(answer: Answer) -> list[Any]:
    """The nine members of the extension, of a leaf."""
    leaf = x509.load_pem_x509_certificate(answer.value["certificate_chain"][0].encode())
    value = leaf.extensions.get_extension_for_oid(OID_APP_INFO).value
    assert isinstance(value, x509.UnrecognizedExtension)
    unpacker = msgpack.Unpacker()
    unpacker.feed(value.value[2:] if value.value[1] < 0x80 else value.value[2 + (value.value[1] & 0x7F) :])
    members: list[Any] = unpacker.unpack()
    return members


def test_request_with_another_config_than_its_evidence_gets_no_certificate_in_0_6(
    release: str, guest: Guest, vm_config: str
) -> None:
    key = foreign.new_key()
    evidence = foreign.attest(guest.agent, foreign.spki_of(key))
    assert sign_cert(guest, request_of_version_2(key, evidence, vm_config=vm_config)).status == 200
    refusal = sign_cert(guest, request_of_version_2(key, evidence, vm_config="{}")).error
    assert refusal == (REFUSAL if release == "0.6" else "Boot denied: OS image is not allowed")


def test_config_counts_where_the_evidence_has_none(guest: Guest, vm_config: str) -> None:
    key = foreign.new_key()
    assert sign_cert(guest, signed(key, version_1(guest, key), 1, vm_config=vm_config)).status == 200
    bare = without_config(foreign.attest(guest.agent, foreign.spki_of(key)), vm_config)
    assert sign_cert(guest, request_of_version_2(key, bare, vm_config=vm_config)).status == 200
    assert sign_cert(guest, request_of_version_2(key, bare)).error == "Boot denied: OS image is not allowed"


def test_app_info_has_the_device_that_was_verified_in_0_6(
    stack: RunningStack, release: str, guest: Guest, vm_config: str
) -> None:
    key = foreign.new_key()
    evidence = foreign.attest(guest.agent, foreign.spki_of(key))
    members = app_info_of(sign_cert(guest, request_of_version_2(key, evidence, app_info=True)))
    info = foreign.ask_agent(stack.services["app"], "Info")
    nobody = hashlib.sha256(b"").hexdigest()
    assert info["device_id"] != nobody
    assert members[3].hex() == (info["device_id"] if release == "0.6" else nobody)
    names = ("app_id", "compose_hash", "instance_id", None, None, "mr_aggregated", "os_image_hash")
    got = {name: member.hex() for name, member in zip(names, members, strict=False) if name is not None}
    assert got == {name: info[name] for name in got}
    assert json.loads(members[7])["name"] == "kms"


def test_app_info_has_the_image_that_was_authorized_in_0_6(release: str, guest: Guest, vm_config: str) -> None:
    key = foreign.new_key()
    bare = without_config(foreign.attest(guest.agent, foreign.spki_of(key)), vm_config)
    members = app_info_of(sign_cert(guest, request_of_version_2(key, bare, app_info=True, vm_config=vm_config)))
    assert members[6].hex() == (json.loads(vm_config)["os_image_hash"] if release == "0.6" else "")


def test_signing_is_refused_in_the_order_of_the_checks(stack: RunningStack, guest: Guest) -> None:
    key, other = foreign.new_key(), foreign.new_key()
    evidence = foreign.attest(guest.agent, foreign.spki_of(other))
    wrong = request_of_version_2(key, evidence) | {"api_version": 3, "csr": "00", "signature": "00"}
    with stack.policy_changed("src", lambda policy: policy["kms"].update(mrAggregated=[])):
        assert sign_cert(guest, wrong).error.startswith("KMS self authorization failed: ")
    assert sign_cert(guest, wrong).error == "Unsupported API version: 3"
    assert sign_cert(guest, wrong | {"api_version": 2}).error.startswith("Failed to parse csr: ")
    wrong = request_of_version_2(key, evidence) | {"signature": "00"}
    assert sign_cert(guest, wrong).error == "Failed to verify csr signature: Invalid signature"
    with stack.policy_changed("src", lambda policy: policy.update(apps={})):
        refusal = sign_cert(guest, request_of_version_2(key, evidence)).error
        assert refusal == "Quote verification failed: report data mismatch"
        evidence = foreign.attest(guest.agent, foreign.spki_of(key))
        date_that_cannot_be = b"\1" + b"\xff" * 8
        csr = head(key) + b"\0\0" + date_that_cannot_be + evidence
        assert sign_cert(guest, signed(key, csr, 2)).error.startswith("Boot denied: ")
    assert sign_cert(guest, signed(key, csr, 2)).error.startswith("Failed to sign certificate: ")
    assert sign_cert(guest, request_of_version_2(key, evidence)).status == 200
