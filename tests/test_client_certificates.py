"""Client certificates whose extensions are not what they should be: what a KMS says on every RPC, and accepts."""

from typing import Any

import msgpack
import pytest
from cryptography import x509

from tests import foreign
from tests.foreign import Guest
from tests.running import RunningStack

PREFIX = "1.3.6.1.4.1.62397.1"
APP_ID, APP_INFO = (x509.ObjectIdentifier(f"{PREFIX}.{number}") for number in (3, 9))
INFO = (b"\x11" * 20, b"\x22" * 32, b"\x33" * 20, b"\x44" * 32, b"\x55" * 32, b"\x66" * 32, b"\x77" * 32, b"{}")
NAMES = (
    *("app_id", "compose_hash", "instance_id", "device_id", "mr_system", "mr_aggregated", "os_image_hash"),
    "key_provider_info",
)
RPCS: dict[str, dict[str, Any]] = {
    "GetMeta": {},
    "GetTempCaCert": {},
    "GetAppKey": {"api_version": 1},
    "GetKmsKey": {},
    "GetAppEnvEncryptPubKey": {"app_id": "11" * 20},
    "SignCert": {},
    "Nothing": {},
}


@pytest.fixture
def guest(ready_stack_0_5: RunningStack) -> Guest:
    """A guest with the app's agent, before the source KMS of release 0.5, where calls are refused."""
    return Guest.of(ready_stack_0_5.services["kms-src"], ready_stack_0_5.description["app"]["dstack_sock"])


def msgpack_evidence(guest: Guest, spki: bytes) -> dict[str, Any]:
    """Have the agent quote the binding of a key, and return the attestation in msgpack, unpacked."""
    answer = foreign.ask_agent(guest.agent, "GetQuote", {"report_data": foreign.binding_of(spki).hex()})
    document: dict[str, Any] = msgpack.unpackb(bytes.fromhex(answer["attestation"]))
    return document


def refusals(guest: Guest, identity: foreign.Identity) -> set[str]:
    """Call every RPC over one connection; return what it said, which is one text if it was the same each time."""
    with foreign.kms(guest.kms_url, identity=identity, root_ca=guest.root_ca) as connection:
        texts = {connection.call(name, **arguments).error for name, arguments in RPCS.items()}
        assert connection.get("/health").status == 200
    return texts


@pytest.mark.parametrize("number", [1, 2, 3, 8, 9])
def test_extension_that_is_no_octet_string_is_refused_on_every_rpc(guest: Guest, number: int) -> None:
    key, oid = foreign.new_key(), x509.ObjectIdentifier(f"{PREFIX}.{number}")
    # Whoever reads .2 has read .1 before.
    others = {foreign.OID_QUOTE: foreign.der_octet_string(b"quote")} if number == 2 else {}
    value = b"content"
    for encoded in (
        b"\x0c" + bytes([len(value)]) + value,  # UTF8String
        b"\x04\x81" + bytes([len(value)]) + value,  # not the shortest length, so no DER
        foreign.der_octet_string(value) + b"\0",
        foreign.der_octet_string(value)[:-1],
        b"",
    ):
        (text,) = refusals(guest, guest.temp_ca.issue_raw(key, {**others, oid: encoded}))
        assert text.startswith(f"Failed to get extension for [1, 3, 6, 1, 4, 1, 62397, 1, {number}]: "), text
    assert guest.get_app_key().status == 200


@pytest.mark.parametrize(
    "info",
    [
        b"",
        b"{}",
        msgpack.packb(7),
        msgpack.packb(INFO[:7]),
        msgpack.packb((*INFO, [], 0)),
        msgpack.packb((*INFO[:4], b"\x55" * 31, *INFO[5:])),
        msgpack.packb((*INFO, [b"\x88" * 32] * 6)),
        msgpack.packb((*INFO, [b"\x88" * 31])),
        msgpack.packb((1, *INFO[1:])),
        msgpack.packb(dict(zip(NAMES[:7], INFO[:7], strict=True))),
    ],
)
def test_app_info_that_cannot_be_read_is_refused_on_every_rpc(guest: Guest, info: bytes) -> None:
    key = foreign.new_key()
    evidence = foreign.attest(guest.agent, foreign.spki_of(key))
    for values in ({}, {foreign.OID_ATTESTATION: evidence}, {foreign.OID_ATTESTATION: b"nonsense"}):
        (text,) = refusals(guest, guest.temp_ca.issue_with(key, {**values, APP_INFO: info}))
        assert text.startswith("Failed to decode app info as json: "), text
    readable = {foreign.OID_ATTESTATION: evidence, APP_INFO: msgpack.packb(INFO)}
    assert guest.get_app_key(guest.temp_ca.issue_with(key, readable)).status == 200


@pytest.mark.parametrize(
    "info",
    [
        msgpack.packb(INFO),
        msgpack.packb((*INFO, None)),
        msgpack.packb((*INFO, [b"\x88" * 32] * 5)),
        msgpack.packb((*INFO, [])) + b"more",
        msgpack.packb((*(list(field) for field in INFO), [list(b"\x88" * 32)])),
        msgpack.packb((*INFO, []), use_bin_type=False),
        msgpack.packb(dict(zip(NAMES, INFO, strict=True))),
        msgpack.packb({"init_script_hashes": [], "new": 1, **dict(zip(NAMES, INFO, strict=True))}),
    ],
)
def test_app_info_in_any_form_that_upstream_reads_is_no_obstacle(guest: Guest, info: bytes) -> None:
    key = foreign.new_key()
    evidence = foreign.attest(guest.agent, foreign.spki_of(key))
    values = {APP_ID: b"\x11" * 20, APP_INFO: info, foreign.OID_ATTESTATION: evidence}
    # It is the issuer's claim: whose keys these are follows from the evidence.
    answer = guest.get_app_key(guest.temp_ca.issue_with(key, values))
    assert answer.value["k256_key"] == guest.get_app_key().value["k256_key"]


# ---- evidence in msgpack


@pytest.mark.parametrize("size", [0, 63, 65])
def test_report_data_of_another_size_is_refused_where_it_is_compared(guest: Guest, size: int) -> None:
    key = foreign.new_key()
    document = msgpack_evidence(guest, foreign.spki_of(key))
    assert guest.get_app_key(guest.temp_ca.issue(key, msgpack.packb(document))).status == 200
    claims = document["stack"]["data"]
    claims["report_data"] = (claims["report_data"] + [0])[:size]
    identity = guest.temp_ca.issue(key, msgpack.packb(document))
    assert refusals(guest, identity) == {"invalid quote: stack.report_data must be 64 bytes"}


def test_bytes_of_events_may_be_sent_as_str(guest: Guest) -> None:
    key = foreign.new_key()
    document = msgpack_evidence(guest, foreign.spki_of(key))
    packed = msgpack.packb(document, use_bin_type=False)
    assert msgpack.packb(document["stack"]["data"]["runtime_events"][1]["payload"], use_bin_type=False) in packed
    answer = guest.get_app_key(guest.temp_ca.issue(key, packed))
    assert answer.value["k256_key"] == guest.get_app_key().value["k256_key"]


def test_text_of_an_event_has_to_be_utf_8(guest: Guest) -> None:
    key = foreign.new_key()
    document = msgpack_evidence(guest, foreign.spki_of(key))
    assert guest.get_app_key(guest.temp_ca.issue(key, msgpack.packb(document, use_bin_type=False))).status == 200
    document["stack"]["data"]["runtime_events"][0]["event"] = b"\xff\xfe"
    identity = guest.temp_ca.issue(key, msgpack.packb(document, use_bin_type=False))
    (text,) = refusals(guest, identity)
    context = "Failed to decode attestation from cert extension: failed to decode attestation from msgpack: "
    assert text.startswith(context)


def test_quote_as_str_is_refused(guest: Guest) -> None:
    key = foreign.new_key()
    document = msgpack_evidence(guest, foreign.spki_of(key))
    data = document["platform"]["data"]
    data["quote"] = bytes(data["quote"])
    assert guest.get_app_key(guest.temp_ca.issue(key, msgpack.packb(document))).status == 200
    identity = guest.temp_ca.issue(key, msgpack.packb(document, use_bin_type=False))
    (text,) = refusals(guest, identity)
    assert "failed to decode attestation from msgpack: " in text


def test_member_that_is_named_twice_is_refused(guest: Guest) -> None:
    key = foreign.new_key()
    packed = msgpack.packb(msgpack_evidence(guest, foreign.spki_of(key)))
    assert packed[0] == 0x83, "a map of three members"
    for name, value, accepted in (("version", 1, False), ("stack", {}, False), ("unknown", 1, True)):
        more = b"\x84" + packed[1:] + msgpack.packb(name) + msgpack.packb(value)
        identity = guest.temp_ca.issue(key, more)
        if accepted:
            assert guest.get_app_key(identity).status == 200
        else:
            (text,) = refusals(guest, identity)
            assert text.endswith(f"failed to decode attestation from msgpack: duplicate field `{name}`")


@pytest.mark.parametrize("tee_type", [0, 0x80, 0x82, 0x81000000])
def test_quote_of_another_tee_is_refused(guest: Guest, tee_type: int) -> None:
    key = foreign.new_key()
    document = msgpack_evidence(guest, foreign.spki_of(key))
    assert guest.get_app_key(guest.temp_ca.issue(key, msgpack.packb(document))).status == 200
    quote = document["platform"]["data"]["quote"]
    assert bytes(quote[4:8]) == (0x81).to_bytes(4, "little"), "TDX"
    quote[4:8] = tee_type.to_bytes(4, "little")
    (text,) = refusals(guest, guest.temp_ca.issue(key, msgpack.packb(document)))
    assert text.startswith("invalid quote: failed to verify TDX quote: "), text


@pytest.mark.parametrize("spoilt", [" " + "11" * 20, "11 " + "11" * 19, "11" * 20 + "\n"])
def test_hex_with_blanks_is_refused(guest: Guest, spoilt: str) -> None:
    with foreign.kms(guest.kms_url, root_ca=guest.root_ca) as connection:
        assert connection.call("GetAppEnvEncryptPubKey", app_id=spoilt).status == 400
        assert connection.call("GetAppEnvEncryptPubKey", app_id="11" * 20).status == 200
