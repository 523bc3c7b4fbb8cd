"""The pRPC codec against recorded bodies of the real programs, protobuf's own parser, and arbitrary input."""

import json
import string
from typing import Any

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.proto import dstack_guest_pb2 as guest
from dstack_emu.attest.proto import dstack_guest_v1_pb2 as guest_v1
from dstack_emu.attest.proto import kms_pb2 as kms
from dstack_emu.attest.proto.prpc_pb2 import PrpcError
from dstack_emu.attest.prpc import (
    decode_binary,
    decode_json,
    decode_query,
    encode_binary,
    encode_json,
    error_body,
    trim_prefix,
    wants_json,
)
from tests.recorded import golden

ANSWERS: dict[str, type[Message]] = {
    "Onboard.Bootstrap": kms.BootstrapResponse,
    "Onboard.Onboard": kms.OnboardResponse,
    "Onboard.GetAttestationInfo": kms.AttestationInfoResponse,
    "KMS.GetAppKey": kms.AppKeyResponse,
    "KMS.GetAppEnvEncryptPubKey": kms.PublicKeyResponse,
    "KMS.GetMeta": kms.GetMetaResponse,
    "KMS.GetTempCaCert": kms.GetTempCaCertResponse,
    "KMS.SignCert": kms.SignCertResponse,
    "Finish": Empty,
    "ClearImageCache": Empty,
    "GetTlsKey": guest.GetTlsKeyResponse,
    "DeriveKey": guest.GetTlsKeyResponse,
    "GetKey": guest.GetKeyResponse,
    "DeriveK256Key": guest.DeriveK256KeyResponse,
    "Attest": guest.AttestResponse,
    "GpuInfo": guest.GpuInfoResponse,
    "Sign": guest.SignResponse,
    "Verify": guest.VerifyResponse,
    "Info": guest.AppInfo,
    "TdxQuote": guest.TdxQuoteResponse,
    "RawQuote": guest.TdxQuoteResponse,
}
FULL_GUEST = guest.GetQuoteResponse(quote=b"\x01", event_log="[]", report_data=b"", vm_config="{}")


def answer_type(path: str) -> type[Message] | None:
    name = path.partition("?")[0].rpartition("/")[2]
    return next((kind for ending, kind in ANSWERS.items() if name == ending or name.endswith("." + ending)), None)


def recorded_answers() -> list[tuple[str, type[Message], str]]:
    """Every JSON answer of the KMS and the agent that was recorded whole, with its message type."""
    found = []
    for row in golden("wire.json"):
        answer = row.get("response") or {}
        body = answer.get("body", "")
        is_json = answer.get("headers", {}).get("content-type") == "application/json"
        if row["component"] not in ("kms", "agent") or answer.get("status") != 200 or not is_json:
            continue
        if row.get("socket") == "guest.sock":  # the host's API, which is not ours
            continue
        kind = answer_type(row["request"]["path"])
        if kind is not None and len(body) == answer.get("body_len", len(body)) and not body.startswith("<"):
            found.append((row["name"], kind, body))
    return found


# ---- JSON, written ---------------------------------------------------------------------------------------


def test_encode_json_reproduces_every_recorded_answer() -> None:
    rows = recorded_answers()
    assert {kind for _, kind, _ in rows} >= {
        Empty,
        kms.AppKeyResponse,
        kms.BootstrapResponse,
        kms.PublicKeyResponse,
        kms.SignCertResponse,
        guest.AppInfo,
        guest.GetKeyResponse,
    }
    for name, kind, body in rows:
        assert encode_json(decode_json(kind, body.encode())).decode() == body, name


def test_encode_json_writes_every_field_of_a_default_message() -> None:
    assert encode_json(kms.GetMetaResponse()) == (
        b'{"ca_cert":"","allow_any_upgrade":false,"k256_pubkey":"","bootstrap_info":null,"is_dev":false,'
        b'"gateway_app_id":null,"kms_contract_address":null,"chain_id":null,"app_auth_implementation":null}'
    )


def test_encode_json_tells_a_set_optional_field_from_an_absent_one() -> None:
    meta = kms.GetMetaResponse(chain_id=0, gateway_app_id="", bootstrap_info=kms.BootstrapResponse())
    plain = json.loads(encode_json(meta))
    assert (plain["chain_id"], plain["gateway_app_id"], plain["app_auth_implementation"]) == (0, "", None)
    assert plain["bootstrap_info"] == {"ca_pubkey": "", "k256_pubkey": "", "attestation": ""}


def test_encode_json_writes_64_bit_integers_as_plain_numbers() -> None:
    answer = kms.PublicKeyResponse(timestamp=2**64 - 1)
    assert b'"timestamp":18446744073709551615' in encode_json(answer)


def test_encode_json_escapes_everything_beyond_ascii() -> None:
    encoded = encode_json(guest.AppInfo(app_name='é"\\\n\u2028😀'))
    assert encoded.isascii()
    assert json.loads(encoded)["app_name"] == 'é"\\\n\u2028😀'


def test_encode_json_of_empty_is_null() -> None:
    assert encode_json(Empty()) == b"null"


def test_encode_json_writes_a_renamed_field_under_both_names_if_that_is_wanted() -> None:
    answer = kms.AttestationInfoResponse(tee_variant="dstack-tdx")
    plain, both = json.loads(encode_json(answer)), json.loads(encode_json(answer, old_spellings=True))
    assert both == plain | {"attestation_mode": "dstack-tdx"}
    assert [name for name in both if name not in plain] == ["attestation_mode"]
    assert plain["tee_variant"] == "dstack-tdx"


def test_encode_json_leaves_out_the_attestation_of_a_quote_where_it_is_empty() -> None:
    assert list(json.loads(encode_json(FULL_GUEST))) == ["quote", "event_log", "report_data", "vm_config"]
    with_attestation = guest.GetQuoteResponse(attestation=b"\x81")
    assert json.loads(encode_json(with_attestation))["attestation"] == "81"
    assert json.loads(encode_json(guest.AttestResponse())) == {"attestation": ""}


# ---- JSON, read ------------------------------------------------------------------------------------------

GOOD_TLS_KEY = {
    "subject": "s",
    "alt_names": ["a", "b"],
    "usage_ra_tls": True,
    "not_before": 1,
    "with_app_info": False,
}


def read_tls_key(**changes: object) -> guest.GetTlsKeyArgs:
    return decode_json(guest.GetTlsKeyArgs, json.dumps(GOOD_TLS_KEY | changes).encode())


def test_decode_json_reads_every_kind_of_field() -> None:
    expected = guest.GetTlsKeyArgs(subject="s", alt_names=["a", "b"], usage_ra_tls=True, not_before=1)
    assert read_tls_key() == expected


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"subject": None}, "invalid type: null, expected a string for field `subject`"),
        ({"subject": 1}, "invalid type: integer `1`, expected a string for field `subject`"),
        ({"subject": {}}, "invalid type: a map, expected a string for field `subject`"),
        ({"subject": "\ud800"}, "lone surrogate in field `subject`"),
        ({"alt_names": "x"}, "invalid type: a string, expected a sequence for field `alt_names`"),
        ({"alt_names": None}, "invalid type: null, expected a sequence for field `alt_names`"),
        ({"alt_names": ["x", 1]}, "invalid type: integer `1`, expected a string for field `alt_names`"),
        ({"usage_ra_tls": 1}, "invalid type: integer `1`, expected a boolean for field `usage_ra_tls`"),
        ({"usage_ra_tls": "true"}, "invalid type: a string, expected a boolean for field `usage_ra_tls`"),
        ({"not_before": True}, "invalid type: a boolean, expected u64 for field `not_before`"),
        ({"not_before": 1.0}, "invalid type: a floating point number, expected u64 for field `not_before`"),
        ({"not_before": "1"}, "invalid type: a string, expected u64 for field `not_before`"),
        ({"not_before": -1}, "invalid value: integer `-1`, expected u64 for field `not_before`"),
        (
            {"not_before": 2**64},
            "invalid value: integer `18446744073709551616`, expected u64 for field `not_before`",
        ),
    ],
)
def test_decode_json_refuses_one_mistyped_field(changes: dict[str, object], text: str) -> None:
    with pytest.raises(FormatError) as caught:
        read_tls_key(**changes)
    assert str(caught.value) == text


@pytest.mark.parametrize("value", [None, 0, 2**64 - 1])
def test_decode_json_reads_an_optional_field(value: int | None) -> None:
    message = read_tls_key(not_before=value)
    assert (message.not_before if message.HasField("not_before") else None) == value


def test_decode_json_holds_u32_to_its_range() -> None:
    assert decode_json(kms.GetAppKeyRequest, b'{"api_version":4294967295}').api_version == 2**32 - 1
    with pytest.raises(FormatError, match="invalid value: integer `4294967296`, expected u32"):
        decode_json(kms.GetAppKeyRequest, b'{"api_version":4294967296}')
    with pytest.raises(FormatError, match="invalid type: a floating point number, expected u32"):
        decode_json(kms.GetAppKeyRequest, b'{"api_version":-0}')


@pytest.mark.parametrize("text", ["0a0B", "0x0a0b", "0x0x0A0B"])
def test_decode_json_reads_hex_in_either_case_and_after_0x(text: str) -> None:
    assert decode_json(kms.AppId, json.dumps({"app_id": text}).encode()).app_id == b"\x0a\x0b"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("abc", "Odd number of digits in field `app_id`: 3"),
        ("zz", "Invalid character 'z' at position 0 of field `app_id`"),
        ("ab c", "Invalid character ' ' at position 2 of field `app_id`"),
        ("0X0a", "Invalid character 'X' at position 1 of field `app_id`"),
        ("0aé0", r"Invalid character '\xe9' at position 2 of field `app_id`"),
    ],
)
def test_decode_json_refuses_hex_that_is_none(text: str, error: str) -> None:
    with pytest.raises(FormatError) as caught:
        decode_json(kms.AppId, json.dumps({"app_id": text}).encode())
    assert str(caught.value) == error


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"null", "invalid type: null, expected message BootstrapRequest"),
        (b"1", "invalid type: integer `1`, expected message BootstrapRequest"),
        (b'"a"', "invalid type: a string, expected message BootstrapRequest"),
        (b'["a","b"]', "trailing characters: 2 elements, but BootstrapRequest has 1 fields"),
        (b'{"domain":"a","domain":"a"}', "duplicate field `domain`"),
        (b'{"domain":"a"} x', "trailing characters at line 1 column 16"),
        (b'{"domain":"\xff"}', "invalid unicode code point at byte 11"),
        (b'\xef\xbb\xbf{"domain":"a"}', "invalid JSON: Expecting value at line 1 column 1"),
        (b'{"domain":"a\n"}', "invalid JSON: Invalid control character at at line 1 column 13"),
        (b'{"other":NaN}', "invalid JSON: NaN is not a value"),
        (b'{"other":-Infinity}', "invalid JSON: -Infinity is not a value"),
        (b'{"domain":', "invalid JSON: Expecting value at line 1 column 11"),
        (b" ", "invalid JSON: Expecting value at line 1 column 2"),
        (b'{"other":' + b"[" * 50_000, "recursion limit exceeded: the JSON is nested too deeply"),
    ],
)
def test_decode_json_refuses_a_body_that_is_no_message(body: bytes, error: str) -> None:
    with pytest.raises(FormatError) as caught:
        decode_json(kms.BootstrapRequest, body)
    assert str(caught.value) == error


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b' { "unknown" : {"a":[null]}, "unknown":2 }\r\n', b'{"n":' + b"9" * 5000 + b"}"],
)
def test_decode_json_keeps_the_defaults_where_nothing_known_is_given(body: bytes) -> None:
    assert decode_json(kms.BootstrapRequest, body) == kms.BootstrapRequest()


def test_decode_json_reads_an_array_by_position_and_may_stop_early() -> None:
    message = decode_json(guest.GetTlsKeyArgs, b'["s",["a"],true]')
    assert message == guest.GetTlsKeyArgs(subject="s", alt_names=["a"], usage_ra_tls=True)


@pytest.mark.parametrize("body", [b"{bad", b"\xff", b"[1]", b'{"a":1}'])
def test_no_decoder_looks_at_the_body_of_empty(body: bytes) -> None:
    assert decode_json(Empty, body) == decode_binary(Empty, body) == decode_query(Empty, "a=1&a=2") == Empty()


@pytest.mark.parametrize(
    "body",
    [
        b'{"attestation_mode":"x"}',
        b'{"tee_variant":"x"}',
        b'{"attestation_mode":"old","tee_variant":"x"}',
        b'{"tee_variant":"x","attestation_mode":"old"}',
    ],
)
def test_decode_json_reads_a_renamed_field_under_either_name(body: bytes) -> None:
    assert decode_json(kms.AttestationInfoResponse, body).tee_variant == "x"


def test_decode_json_reads_messages_within_messages() -> None:
    answer = kms.KmsKeyResponse(temp_ca_key="t", keys=[kms.KmsKeys(ca_key="c", k256_key=b"\x01")])
    assert decode_json(kms.KmsKeyResponse, encode_json(answer)) == answer
    assert decode_json(kms.KmsKeyResponse, b'{"keys":[["c"]]}').keys[0].ca_key == "c"
    with pytest.raises(FormatError, match="invalid type: null, expected message KmsKeys"):
        decode_json(kms.KmsKeyResponse, b'{"keys":[null]}')


def test_errors_never_quote_a_string() -> None:
    with pytest.raises(FormatError) as caught:
        read_tls_key(usage_ra_tls="5f-secret-5f")
    assert "secret" not in str(caught.value)


# ---- Query string ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", {}),
        ("json&subject=s", {"subject": "s"}),
        ("subject=a%20b+c%C3%A9%zz", {"subject": "a b cé%zz"}),
        ("sub%6Aect=s&&other", {"subject": "s"}),
        ("alt_names[0]=a&alt_names[1]=b", {"alt_names": ["a", "b"]}),
        ("alt_names[7]=b&alt_names[2]=a", {"alt_names": ["a", "b"]}),
        ("alt_names[]=a&alt_names[]=b", {"alt_names": ["a", "b"]}),
        ("alt_names%5B0%5D=a", {}),  # only brackets that are not encoded make a list
        ("usage_ra_tls=true&usage_server_auth=false", {"usage_ra_tls": True}),
        ("not_before=18446744073709551615&not_after=", {"not_before": 2**64 - 1}),
        ("not_before=%2B5", {"not_before": 5}),
        ("subject", {"subject": ""}),
        ("other[a][b]=1&other[0]=2", {}),
    ],
)
def test_decode_query_reads(query: str, expected: dict[str, Any]) -> None:
    assert decode_query(guest.GetTlsKeyArgs, query) == guest.GetTlsKeyArgs(**expected)


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("subject=a&subject=b", 'Multiple values for one key: "subject"'),
        ("alt_names[1]=a&alt_names[1]=b", 'Multiple values for one key: "alt_names[1]"'),
        ("alt_names=a", "invalid type: a string, expected a sequence for field `alt_names`"),
        ("alt_names=a&alt_names[0]=b", "invalid type: a sequence for field `alt_names`"),
        ("subject[0]=a", "invalid type: a sequence for field `subject`"),
        ("subject[a]=a", "unexpected index in the query for field `subject`"),
        ("alt_names[1234567]=a", "unexpected index in the query for field `alt_names`"),
        ("usage_ra_tls=1", "field `usage_ra_tls` is neither `true` nor `false`"),
        ("not_before=1.0", "invalid digit in field `not_before`, expected u64"),
        ("not_before=-1", "invalid digit in field `not_before`, expected u64"),
        (
            "not_before=18446744073709551616",
            "invalid value: integer `18446744073709551616`, expected u64 for field `not_before`",
        ),
        ("subject=%ff", "the query is not valid UTF-8"),
    ],
)
def test_decode_query_refuses(query: str, error: str) -> None:
    with pytest.raises(FormatError) as caught:
        decode_query(guest.GetTlsKeyArgs, query)
    assert str(caught.value) == error


def test_decode_query_reads_hex_and_either_spelling() -> None:
    assert decode_query(kms.AppId, "app_id=0x0A").app_id == b"\x0a"
    assert decode_query(kms.AttestationInfoResponse, "attestation_mode=x").tee_variant == "x"
    with pytest.raises(FormatError, match="Invalid character 'z' at position 0"):
        decode_query(kms.AppId, "app_id=zz")


# ---- Protobuf --------------------------------------------------------------------------------------------


def test_decode_binary_refuses_in_the_recorded_words() -> None:
    types = {
        "Bootstrap": kms.BootstrapRequest,
        "GetAppEnvEncryptPubKey": kms.AppId,
        "GetKey": guest.GetKeyArgs,
    }
    seen = 0
    for row in golden("wire.json"):
        wanted = (row.get("response") or {}).get("body", "")
        if "failed to decode Protobuf" not in wanted or row["component"] not in ("kms", "agent"):
            continue
        kind = types[row["request"]["path"].partition("?")[0].rpartition("/")[2].rpartition(".")[2]]
        body = row["request"].get("body", "").encode().decode("unicode_escape").encode("latin-1")
        with pytest.raises(FormatError) as caught:
            decode_binary(kind, body)
        assert str(caught.value) == wanted[wanted.index("failed") :], row["name"]
        seen += 1
    assert seen >= 9


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"\x0e\x01", "invalid wire type value: 6"),
        (b"\xf8\xff\xff\xff\xff\x01\x01", "invalid key value: 68719476728"),
        (b"\x0a\x05ab", "BootstrapRequest.domain: buffer underflow"),
        (b"\x0a", "BootstrapRequest.domain: invalid varint"),
        (b"\x10" + b"\xff" * 9 + b"\x02", "invalid varint"),
        (b"\x11\x00", "buffer underflow"),
        (b"\x14", "unexpected end group tag"),
        (b"\x13\x1c", "unexpected end group tag"),
        (b"\x13", "invalid varint"),
        (b"\x13" * 101, "recursion limit reached"),
    ],
)
def test_decode_binary_refuses(body: bytes, error: str) -> None:
    with pytest.raises(FormatError) as caught:
        decode_binary(kms.BootstrapRequest, body)
    assert str(caught.value) == f"failed to decode Protobuf message: {error}"


@pytest.mark.parametrize(
    "unknown", [b"\x10\x01", b"\x11" + bytes(8), b"\x12\x00", b"\x15" + bytes(4), b"\x13\x08\x01\x14"]
)
def test_decode_binary_steps_over_unknown_fields(unknown: bytes) -> None:
    assert decode_binary(kms.BootstrapRequest, unknown + b"\x0a\x01a").domain == "a"


def test_decode_binary_names_the_field_within_a_message() -> None:
    answer = kms.GetMetaResponse(bootstrap_info=kms.BootstrapResponse(ca_pubkey=b"\x01"))
    body = encode_binary(answer)
    assert decode_binary(kms.GetMetaResponse, body) == answer
    with pytest.raises(FormatError, match=r": BootstrapResponse\.ca_pubkey: invalid wire type: Varint"):
        decode_binary(kms.GetMetaResponse, body.replace(b"\x0a\x01\x01", b"\x08\x01\x01"))


def test_encode_binary_of_empty_is_no_bytes() -> None:
    assert encode_binary(Empty()) == b""


# ---- Which encoding, prefixes, errors --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "query", "content_type", "expected"),
    [
        ("POST", "", None, False),
        ("POST", "", "application/octet-stream", False),
        ("POST", "", "text/plain", False),
        ("POST", "", "application/json", True),
        ("POST", "", "Application/JSON; charset=utf-8", True),
        ("POST", "", "application/problem+json", False),
        ("POST", "json", None, True),
        ("POST", "json=", None, True),
        ("POST", "json=true", None, True),
        ("POST", "json=1", None, True),
        ("POST", "a=b&json&c", None, True),
        ("POST", "%6Ason=%31", None, True),
        ("POST", "json=0", None, False),
        ("POST", "json=True", None, False),
        ("POST", "json=yes", None, False),
        ("POST", "jsonp", None, False),
        ("POST", "json=false&json", None, False),
        ("POST", "json&json=false", None, True),
        ("POST", "json=false", "application/json", True),
        ("GET", "", None, True),
        ("GET", "json=false", None, True),
    ],
)
def test_wants_json(method: str, query: str, content_type: str | None, expected: bool) -> None:
    assert wants_json(method, query, content_type) is expected


@pytest.mark.parametrize(
    ("name", "prefix", "expected"),
    [
        ("KMS.GetMeta", "KMS.", "GetMeta"),
        ("GetMeta", "KMS.", "GetMeta"),
        ("KMS.KMS.GetMeta", "KMS.", "GetMeta"),
        ("KMS.", "KMS.", ""),
        ("KMSGetMeta", "KMS.", "KMSGetMeta"),
        ("KMS.GetMeta", "", "KMS.GetMeta"),
    ],
)
def test_trim_prefix(name: str, prefix: str, expected: str) -> None:
    assert trim_prefix(name, prefix) == expected


def test_error_body_in_json_is_indented_ascii() -> None:
    assert error_body('a "b" é', True) == b'{\n  "error": "a \\"b\\" \\u00e9"\n}'


def test_error_body_in_protobuf_is_message_1() -> None:
    assert error_body("é" * 100, False) == b"\x0a\xc8\x01" + "é".encode() * 100
    assert PrpcError.FromString(error_body("a", False)).message == "a"


@pytest.mark.parametrize("as_json", [True, False])
def test_error_body_survives_a_lone_surrogate(as_json: bool) -> None:
    assert b"name ?" in error_body("name \udcff", as_json)


# ---- Arbitrary input -------------------------------------------------------------------------------------

TYPES: list[type[Message]] = [
    kms.BootstrapRequest,
    kms.SignCertRequest,
    kms.GetMetaResponse,
    kms.KmsKeyResponse,
    guest.GetTlsKeyArgs,
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("0xab") | st.just("00")
NAMES = st.sampled_from([name for kind in TYPES for name in kind.DESCRIPTOR.fields_by_name]) | st.text(max_size=3)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(TYPES), st.binary(max_size=60))
def test_decoders_raise_nothing_but_format_errors_on_bytes(kind: type[Message], body: bytes) -> None:
    for decode in (decode_json, decode_binary):
        try:
            message = decode(kind, body)
        except FormatError:
            continue
        assert isinstance(message, kind)


@given(st.sampled_from(TYPES), VALUES)
def test_decode_json_raises_nothing_but_format_errors_on_json(kind: type[Message], value: object) -> None:
    try:
        message = decode_json(kind, json.dumps(value).encode())
    except FormatError:
        return
    assert decode_json(kind, encode_json(message)) == message


@given(st.sampled_from(TYPES), st.lists(st.tuples(NAMES, st.sampled_from(["", "[]", "[0]", "[a]"]), st.text())))
def test_decode_query_raises_nothing_but_format_errors(kind: type[Message], pairs: list[tuple[str, str, str]]) -> None:
    try:
        message = decode_query(kind, "&".join(f"{name}{index}={value}" for name, index, value in pairs))
    except FormatError:
        return
    assert isinstance(message, kind)


def messages(kind: type[Message]) -> st.SearchStrategy[Message]:
    """Any message of a type, every field of every type of the .proto files in play."""
    of_type: dict[int, st.SearchStrategy[Any]] = {
        kms.AppId.DESCRIPTOR.fields[0].type: st.binary(max_size=8),
        kms.BootstrapRequest.DESCRIPTOR.fields[0].type: st.text(max_size=8),
        guest.VerifyResponse.DESCRIPTOR.fields[0].type: st.booleans(),
        kms.GetAppKeyRequest.DESCRIPTOR.fields[0].type: st.integers(0, 2**32 - 1),
        kms.PublicKeyResponse.DESCRIPTOR.fields_by_name["timestamp"].type: st.integers(0, 2**64 - 1),
    }
    nested = {"bootstrap_info": kms.BootstrapResponse, "keys": kms.KmsKeys}
    fields = {}
    for field in kind.DESCRIPTOR.fields:
        one = messages(nested[field.name]) if field.name in nested else of_type[field.type]
        fields[field.name] = st.lists(one, max_size=3) if field.is_repeated else one
    return st.fixed_dictionaries({}, optional=fields).map(lambda given: kind(**given))


@given(st.sampled_from(TYPES).flatmap(messages))
def test_every_message_survives_both_encodings(message: Message) -> None:
    kind = type(message)
    assert decode_json(kind, encode_json(message)) == message
    assert decode_binary(kind, encode_binary(message)) == message
    assert encode_json(message).isascii()


@given(st.text(string.printable))
def test_error_body_in_json_parses_back(text: str) -> None:
    assert json.loads(error_body(text, True)) == {"error": text}


# ---- Fields that not every release has


@pytest.mark.parametrize(
    ("message", "has_it"),
    [
        (kms.GetMetaResponse(), False),
        (kms.GetMetaResponse(os_image_verification=False), True),
        (kms.GetMetaResponse(os_image_verification=True), True),
    ],
)
def test_get_meta_has_os_image_verification_once_it_is_set(message: kms.GetMetaResponse, has_it: bool) -> None:
    document = json.loads(encode_json(message))
    assert ("os_image_verification" in document) is has_it
    assert document.get("os_image_verification", False) == message.os_image_verification


def test_guest_api_v1_speaks_all_encodings() -> None:
    bundle = guest_v1.GpuEvidenceBundle(vendor="nvidia", format="json-v1", evidence=b"\x01\xff")
    answer = guest_v1.AttestResponse(attestation=b"\x83", boottime_gpu_evidence=[bundle])
    assert encode_json(answer) == (
        b'{"attestation":"83","boottime_gpu_evidence":[{"vendor":"nvidia","format":"json-v1","evidence":"01ff"}]}'
    )
    assert encode_json(guest_v1.InfoResponse()) == (
        b'{"app_id":"","app_name":"","compose_hash":"","app_compose":"","instance_id":"","device_id":"",'
        b'"os_image_hash":"","mr_aggregated":"","vm_config":"","key_provider_info":"","cloud_vendor":"",'
        b'"cloud_product":""}'
    )
    asked = guest_v1.GetKeyRequest(domain="a/b", algorithm="ed25519")
    assert decode_json(guest_v1.GetKeyRequest, b'{"domain":"a/b","algorithm":"ed25519","more":1}') == asked
    assert decode_query(guest_v1.GetKeyRequest, "domain=a%2Fb&algorithm=ed25519") == asked
    assert decode_binary(guest_v1.GetKeyRequest, b"\x0a\x03a/b\x12\x07ed25519") == asked
    assert decode_json(guest_v1.InfoRequest, b"{}") == guest_v1.InfoRequest()
