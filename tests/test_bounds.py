"""The bounds of what a stranger may send: each is refused by name over a real listener, and what is at it is read.

What takes long at a bound is done in a thread: the event loop answers other calls meanwhile.
"""

import asyncio
import http.client
import json
import os
import ssl
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import grpc
import grpc.aio
import msgpack
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from dstack_emu.attest.app_compose import AppManifest
from dstack_emu.attest.attestation import decode
from dstack_emu.attest.csr import parse_request
from dstack_emu.attest.encrypted_env import parse_env
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.image import ImageMeasurement
from dstack_emu.attest.image.td_hob import TdHobWitness
from dstack_emu.attest.mr_config import MrConfigDocument
from dstack_emu.attest.pck import PckExtension
from dstack_emu.attest.proto import dstack_guest_pb2 as guest_pb2
from dstack_emu.attest.proto import kms_pb2
from dstack_emu.attest.proto.prpc_pb2 import PrpcError
from dstack_emu.attest.prpc import trim_prefix
from dstack_emu.attest.release import DEFAULT
from dstack_emu.attest.strict_json import StrictJson, TooManyValuesError, read_json, require_few_values
from dstack_emu.attest.vmconfig import VmConfig
from dstack_emu.auth.file_server import file_app
from dstack_emu.auth.mock import MockSettings
from dstack_emu.auth.server import mock_app, simple_app
from dstack_emu.kms_emu.config import KmsConfig
from dstack_emu.kms_emu.server import KmsServer
from dstack_emu.transport.grpc_server import GrpcPeer, GrpcService, Listener, serve_grpc
from dstack_emu.transport.http import Handler, Request, Response
from dstack_emu.transport.http.body import Body
from dstack_emu.transport.listen import bind_tcp
from dstack_emu.transport.service import Rpc, ServiceTable
from tests import foreign
from tests.foreign import Guest, ask_agent, new_key, spki_of
from tests.running import RunningStack, counted_turns
from tests.test_verifier import domain, serving_verifier
from tests.test_webhook_failures import copied_keys, kms_toml
from tests.toy import Toy, application, connect, raw, read_answer, served
from tests.toy import post as post_toy

MIB = 1024 * 1024


@pytest.fixture
def guest(ready_stack: RunningStack) -> Guest:
    """A guest with the app's agent, before the source KMS."""
    return Guest.of(ready_stack.services["kms-src"], ready_stack.description["app"]["dstack_sock"])


@pytest.fixture
def guest_0_5(ready_stack_0_5: RunningStack) -> Guest:
    """The same of release 0.5, whose handshake reads no evidence."""
    return Guest.of(ready_stack_0_5.services["kms-src"], ready_stack_0_5.description["app"]["dstack_sock"])


def compact(number: int) -> bytes:
    """SCALE's compact integer."""
    for size, mode, limit in ((1, 0, 1 << 6), (2, 1, 1 << 14), (4, 2, 1 << 30)):
        if number < limit:
            return (number << 2 | mode).to_bytes(size, "little")
    raise AssertionError(number)


def vec(data: bytes) -> bytes:
    """SCALE's vector of bytes."""
    return compact(len(data)) + data


def csr(
    key: ec.EllipticCurvePrivateKey, evidence: bytes, names: Sequence[str] = ("a.test",), version: int = 2
) -> bytes:
    """A signing request; `evidence` is an attestation, or quote and event log of version 1."""
    config = b"\0" + vec(b"a.test") + compact(len(names)) + b"".join(vec(name.encode()) for name in names) + b"\1\0\0"
    return vec(b"please sign cert:") + vec(spki_of(key)) + config + (b"\0\0\0" if version == 2 else b"") + evidence


def signed(key: ec.EllipticCurvePrivateKey, request: bytes, version: int = 2) -> dict[str, Any]:
    """The arguments of SignCert."""
    signature = key.sign(request, ec.ECDSA(hashes.SHA256()))
    return {"api_version": version, "csr": request, "signature": signature}


def sign_cert(guest: Guest, arguments: dict[str, Any]) -> str:
    """Call SignCert in JSON and in protobuf; return the error, which is the same, or nothing."""
    message = kms_pb2.SignCertRequest(**arguments).SerializeToString()
    in_json = {name: value.hex() if isinstance(value, bytes) else value for name, value in arguments.items()}
    answers = set()
    for query, body in (("?json", json.dumps(in_json).encode()), ("", message)):
        status, answer = post(guest.kms_url, f"/prpc/KMS.SignCert{query}", body)
        assert status in (200, 400)
        if status == 200:
            answers.add("")
        else:
            answers.add(json.loads(answer)["error"] if query else PrpcError.FromString(answer).message)
    (error,) = answers
    return str(error)


ANYONE = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Trusts every server; a default context would read the authorities of the system each time."""
ANYONE.check_hostname, ANYONE.verify_mode = False, ssl.CERT_NONE


def post(url: str, path: str, body: bytes | None, content_type: str = "application/json") -> tuple[int, bytes]:
    """POST bytes, or GET, over a connection of its own; return status and body."""
    scheme, address = urlsplit(url)[:2]
    if scheme == "https":
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(address, context=ANYONE, timeout=20)
    else:
        connection = http.client.HTTPConnection(address, timeout=20)
    try:
        headers = {} if path.endswith("SignCert") else {"Content-Type": content_type}
        connection.request("GET" if body is None else "POST", path, body, headers if body is not None else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


# ---- SignCert, which needs no evidence to reach the decoders


def test_names_of_a_signing_request_are_counted_before_they_are_read(guest: Guest) -> None:
    key = new_key()
    evidence = foreign.attest(guest.agent, spki_of(key))
    names = [f"n{number}.test" for number in range(1025)]
    error = "Failed to parse csr: subject_alt_names: at most 1024 expected, got 1025"
    assert sign_cert(guest, signed(key, csr(key, evidence, names))) == error
    announced = vec(b"please sign cert:") + vec(b"") + b"\0" + vec(b"") + compact(9_900_000)  # and none of them sent
    text = "Failed to parse csr: subject_alt_names: at most 1024 expected, got 9900000"
    assert sign_cert(guest, signed(key, announced)) == text
    assert sign_cert(guest, signed(key, csr(key, evidence, names[:1024]))) == ""


def test_names_of_a_signing_request_have_a_length(guest: Guest) -> None:
    key = new_key()
    evidence = foreign.attest(guest.agent, spki_of(key))
    error = "Failed to parse csr: names of a certificate: at most 262144 bytes expected, got 262145"
    assert sign_cert(guest, signed(key, csr(key, evidence, ["a" * (256 * 1024 - 5)]))) == error
    assert sign_cert(guest, signed(key, csr(key, evidence, ["a" * (256 * 1024 - 6)]))) == ""


def scale_evidence(events: int, runtime_events: int) -> bytes:
    """An attestation of version 0 of empty events."""
    lists = compact(events) + bytes(11) * events + compact(runtime_events) + bytes(2) * runtime_events
    return b"\0\0" + vec(b"quote") + lists + bytes(64) + b"\0"


@pytest.mark.parametrize("place", ["event_log", "runtime_events"])
def test_events_in_scale_are_counted_before_they_are_read(guest: Guest, place: str) -> None:
    key = new_key()
    for count in (4097, 4_900_000):
        evidence = scale_evidence(count, 0) if place == "event_log" else scale_evidence(0, count)
        evidence = evidence[: 100 if count > 4097 else None]  # announced, and not sent
        error = f"{place}: at most 4096 expected, got {count}"
        assert sign_cert(guest, signed(key, csr(key, evidence))).endswith(f"legacy VersionedAttestation: {error}")
    assert sign_cert(guest, signed(key, csr(key, scale_evidence(4096, 4096)))) == (
        "Quote verification failed: report data mismatch"
    )


def msgpack_evidence(quote: bytes = b"", **changed: Any) -> bytes:
    """An attestation of version 1; `quote` is encoded already, as an array of integers unless it is given."""
    evidence = {"quote": 0, "event_log": changed.get("event_log", [])}
    claims = {"report_data": bytes(64), "runtime_events": changed.get("runtime_events", []), "config": ""}
    document = {
        "version": 1,
        "platform": {"kind": "tdx", "data": evidence},
        "stack": {"kind": "dstack", "data": claims},
        **changed.get("more", {}),
    }
    head, tail = msgpack.packb(document).split(b"\xa5quote\x00")
    return bytes(head + b"\xa5quote" + (quote or msgpack.packb([1, 2, 3])) + tail)


def array(count: int, element: bytes = b"\0") -> bytes:
    """An array in msgpack of equal elements."""
    return b"\xdd" + count.to_bytes(4, "big") + element * count


EVENT = {"event": "", "payload": b""}
VALUES_BESIDE = 1 + 2 * 3 + 2 * 2 + 2 * 2 + 2 * 2 + 2 * 3
"""Values of `msgpack_evidence` without the elements of its quote."""
CONTAINERS_BESIDE = 5 + 3
"""Maps and arrays of it."""


def test_values_in_msgpack_are_counted_before_they_are_made(guest: Guest) -> None:
    key, most = new_key(), 1 << 18
    context = "Failed to parse csr: failed to decode attestation from msgpack: "
    at_the_bound = most - VALUES_BESIDE
    for element in (b"\0", b"\xa0"):
        evidence = msgpack_evidence(array(at_the_bound + 1, element))
        error = f"{context}at most {most} msgpack values expected, got more"
        assert sign_cert(guest, signed(key, csr(key, evidence))) == error
    evidence = msgpack_evidence(array(at_the_bound))
    assert sign_cert(guest, signed(key, csr(key, evidence))) == "Quote verification failed: report data mismatch"


def test_arrays_and_maps_in_msgpack_are_counted_before_they_are_made(guest: Guest) -> None:
    key, most = new_key(), 1 << 14
    context = "Failed to parse csr: failed to decode attestation from msgpack: "
    at_the_bound = most - CONTAINERS_BESIDE
    for element in (b"\x80", b"\x90", b"\xdc\0\0", b"\xdd\0\0\0\0", b"\xde\0\0", b"\xdf\0\0\0\0"):
        error = f"{context}at most {most} msgpack arrays and maps expected, got more"
        for count, said in ((at_the_bound + 1, error), (at_the_bound, f"{context}quote: octets expected, got list")):
            evidence = msgpack_evidence(array(count, element))
            assert sign_cert(guest, signed(key, csr(key, evidence))) == said
    nested = msgpack_evidence(array(128, array(128, b"\x90")))
    assert sign_cert(guest, signed(key, csr(key, nested))) == error
    texts = msgpack_evidence(array(1000, b"\xd9\x14" + b"\x90" * 20))  # in a text they are none
    assert sign_cert(guest, signed(key, csr(key, texts))) == f"{context}quote: octets expected, got list"


def test_members_and_events_in_msgpack_are_counted(guest: Guest) -> None:
    key = new_key()
    context = "Failed to parse csr: failed to decode attestation from msgpack: "
    mismatch = "Quote verification failed: report data mismatch"
    for members, error in (
        (62, f"{context}65 exceeds max_map_len(64)"),
        (61, mismatch),
    ):
        more = {f"unknown {number}": 0 for number in range(members)}
        assert sign_cert(guest, signed(key, csr(key, msgpack_evidence(more=more)))) == error
    twice = msgpack_evidence().replace(b"\xa4kind\xa3tdx", b"\xa4data\xa3tdx", 1)
    assert sign_cert(guest, signed(key, csr(key, twice))) == f"{context}duplicate field `data`"
    for count, error in (
        (4097, f"{context}runtime_events: at most 4096 expected, got 4097"),
        (4096, mismatch),
    ):
        evidence = msgpack_evidence(runtime_events=[EVENT] * count)
        assert sign_cert(guest, signed(key, csr(key, evidence))) == error


FORMATS = (
    *(bytes((first,)) for first in (0x00, 0x7F, 0x80, 0x90, 0xA0, 0xC0, 0xC2, 0xC3, 0xE0, 0xFF)),
    *(bytes((first,)) + b"a" * (first & 0x1F) for first in (0xA1, 0xBF)),
    *(head + b"aaaaa" for head in (b"\xc4\5", b"\xc5\0\5", b"\xc6\0\0\0\5", b"\xd9\5", b"\xda\0\5", b"\xdb\0\0\0\5")),
    *(head + b"taaaaa" for head in (b"\xc7\5", b"\xc8\0\5", b"\xc9\0\0\0\5")),
    *(bytes((0xD4 + power,)) + b"a" * (1 + (1 << power)) for power in range(5)),
    *(bytes((0xCA,)) + bytes(4), bytes((0xCB,)) + bytes(8)),
    *(bytes((first + power,)) + bytes(1 << power) for first in (0xCC, 0xD0) for power in range(4)),
    *(b"\xdc\0\0", b"\xdd\0\0\0\0", b"\xde\0\0", b"\xdf\0\0\0\0"),
)
"""A value of each format of msgpack, by its specification."""


def test_each_format_of_msgpack_is_one_value() -> None:
    for each in FORMATS:
        msgpack.unpackb(each, strict_map_key=False)
    scalars = [each for each in FORMATS if (each[0] not in range(0x80, 0xA0) and each[0] < 0xDC) or each[0] >= 0xE0]
    assert len(FORMATS) - len(scalars) == 6
    rounds, rest = divmod((1 << 18) - VALUES_BESIDE - len(FORMATS), len(scalars))
    at_the_bound = b"".join(FORMATS) + b"".join(scalars) * rounds + b"\0" * rest
    for more, error in (
        (0, "quote: octets expected, got list"),
        (1, "at most 262144 msgpack values expected, got more"),
    ):
        count = len(FORMATS) + rounds * len(scalars) + rest + more
        quote = b"\xdd" + count.to_bytes(4, "big") + at_the_bound + b"\0" * more
        with pytest.raises(FormatError, match=error):
            decode(msgpack_evidence(quote))


def test_quote_and_event_log_of_version_1_are_bounded(guest: Guest) -> None:
    key = new_key()
    event = {"imr": 0, "event_type": 0, "event": "", "event_payload": ""}
    context, log_error = "Failed to upgrade csr v1 to v2: ", "Failed to parse tdx_event_log: event log: "
    quote = bytes.fromhex(ask_agent(guest.agent, "GetQuote", {"report_data": "00" * 64})["quote"])
    for given, log, error in (
        (
            quote,
            json.dumps([event] * 4097),
            f"{log_error}at most 4096 expected, got 4097",
        ),
        (
            quote,
            f"[{'0,' * 99_999}0]",
            f"{log_error}JSON expected (at most 100000 JSON values expected, got more)",
        ),
        (quote.ljust(65537, b"\0"), "[]", "Invalid TDX quote: quote: at most 65536 bytes expected, got 65537"),
    ):
        request = csr(key, vec(given) + vec(log.encode()), version=1)
        assert sign_cert(guest, signed(key, request, 1)) == context + error
    bounded = vec(quote.ljust(65536, b"\0")) + vec(json.dumps([event] * 4096).encode())
    assert sign_cert(guest, signed(key, csr(key, bounded, version=1), 1)) == (
        "Quote verification failed: report data mismatch"
    )


# ---- Onboard


def test_url_and_token_of_a_source_are_bounded(fresh_stack: RunningStack) -> None:
    url = fresh_stack.services["kms-dst"]
    host = "a" * (8192 - len("http://"))
    for arguments, error in (
        ({"source_url": f"http://{host}a"}, "source_url must be at most 8192 characters, got 8193"),
        (
            {"source_url": "http://a", "source_token": "t" * 8193},
            "source_token must be at most 8192 characters, got 8193",
        ),
        ({"source_url": f"http://{host}"}, "no such host: no host name: "),
    ):
        body = json.dumps({"domain": "kms.test", **arguments}).encode()
        status, answer = post(url, "/prpc/Onboard.Onboard?json", body)
        assert (status, error in json.loads(answer)["error"]) == (400, True), answer


# ---- the encodings of every RPC

APP_ID = "11" * 20


def test_values_of_a_json_body_are_counted(guest: Guest) -> None:
    for body, error in (
        ("[" * 100_001, "at most 100000 JSON values expected, got more"),
        (f'{{"app_id":"{APP_ID}","x":[{"0," * 99_997}0]}}', "at most 100000 JSON values expected, got more"),
        (f'{{"app_id":"{APP_ID}","x":[{"0," * 99_996}0]}}', ""),
        (f'{{"app_id":"{APP_ID}","x":"{"[,{" * 100_000}"}}', ""),
        (f'{{"app_id":"{APP_ID}","x":"{chr(92)}"{",{" * 100_000}{chr(92) * 2}"}}', ""),
    ):
        status, answer = post(guest.kms_url, "/prpc/KMS.GetAppEnvEncryptPubKey?json", body.encode())
        assert (status, json.loads(answer).get("error", "")) == (400 if error else 200, error)


def test_fields_of_a_protobuf_body_are_counted(guest: Guest) -> None:
    known = kms_pb2.AppId(app_id=bytes.fromhex(APP_ID)).SerializeToString()
    error = "failed to decode Protobuf message: at most 10000 fields expected, got more"
    for more, said in (
        (b"\xf8\1\0" * 10_000, error),
        (b"\xfb\1\xfc\1" * 5_000, error),  # groups: a beginning and an end each
        (b"\xf8\1\0" * 9_999, ""),
        (b"\xfb\1\xfc\1" * 4_999, ""),
    ):
        path = "/prpc/KMS.GetAppEnvEncryptPubKey"
        status, answer = post(guest.kms_url, path, known + more, "application/octet-stream")
        assert status == (400 if said else 200)
        if said:
            assert PrpcError.FromString(answer).message == said


def test_parameters_of_a_query_are_counted(guest: Guest) -> None:
    path = f"/prpc/KMS.GetAppEnvEncryptPubKey?json&app_id={APP_ID}"
    error = "at most 1024 parameters expected in the query, got 1025"
    for more, said in ((1023, error), (1022, "")):
        query = "".join(f"&x{number}" for number in range(more))
        status, answer = post(guest.kms_url, path + query, None)
        assert (status, json.loads(answer).get("error", "")) == (400 if said else 200, said)
        body = json.dumps({"app_id": APP_ID}).encode()
        status, answer = post(guest.kms_url, f"{path}{query}", body)
        assert (status, json.loads(answer).get("error", "")) == (400 if said else 200, said)


def test_long_run_of_prefixes_is_removed_at_once(guest: Guest) -> None:
    body = json.dumps({"app_id": "0x" * 2 * MIB + APP_ID}).encode()
    assert post(guest.kms_url, "/prpc/KMS.GetAppEnvEncryptPubKey?json", body)[0] == 200
    for count in range(10):
        for name in ("", "0", "0a", "a0x"):
            assert trim_prefix("0x" * count + name, "0x") == name


def test_names_of_an_agents_certificate_are_counted(ready_stack: RunningStack) -> None:
    url = ready_stack.services["app"]
    names = [f"n{number}.test" for number in range(1025)]
    status, answer = post(url, "/GetTlsKey", json.dumps({"alt_names": names}).encode())
    error = "alternative names: at most 1024 expected, got 1025"
    assert (status, json.loads(answer)) == (400, {"error": error})
    assert post(url, "/GetTlsKey", json.dumps({"alt_names": names[:1024]}).encode())[0] == 200


def test_log_of_a_guest_has_no_more_events_than_a_verifier_reads() -> None:
    guest = domain()
    for _ in range(4096 - len(guest.event_log)):
        guest.measure("event", b"")
    with pytest.raises(FormatError, match="^event log: at most 4096 expected, got 4097$"):
        guest.measure("event", b"")
    assert decode(guest.attest(bytes(64)).encode()).event_log == guest.event_log


# ---- certificates


def certified(guest: Guest, extensions: int, *, attested: bool = True) -> foreign.Identity:
    """A client certificate with that many extensions; the last is the evidence."""
    key = new_key()
    values = {x509.ObjectIdentifier(f"1.2.3.{number}"): b"" for number in range(extensions - attested)}
    if attested:
        values[foreign.OID_ATTESTATION] = foreign.der_octet_string(foreign.attest(guest.agent, spki_of(key)))
    return guest.temp_ca.issue_raw(key, values)


def test_extensions_of_a_client_certificate_are_counted(guest: Guest, guest_0_5: Guest) -> None:
    error = "Failed to parse certificate: at most 64 extensions expected, got more"
    assert guest_0_5.get_app_key(certified(guest_0_5, 65)).error == error
    assert guest_0_5.get_app_key(certified(guest_0_5, 64)).status == 200
    with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"):
        guest.get_app_key(certified(guest, 65))
    assert guest.get_app_key(certified(guest, 64)).status == 200


def test_other_extensions_of_a_client_certificate_are_not_parsed(guest: Guest) -> None:
    key = new_key()
    names = b"\x82\0" * 30_000
    values = {
        x509.ObjectIdentifier("2.5.29.17"): b"\x30\x82" + len(names).to_bytes(2, "big") + names,
        foreign.OID_ATTESTATION: foreign.der_octet_string(foreign.attest(guest.agent, spki_of(key))),
    }
    assert guest.get_app_key(guest.temp_ca.issue_raw(key, values)).status == 200


def test_entries_of_a_pck_extension_are_counted() -> None:
    entry = bytes.fromhex("3007060328290a0200")
    entries = [entry[:4] + bytes((40, 41, number)) + b"\5\0" for number in range(65)]
    for count, error in (
        (65, "SGX extension: at most 64 entries expected"),
        (64, "SGX extension: 1.2.840.113741.1.13.1.2 "),
    ):
        content = b"".join(entries[:count])
        data = b"\x30\x82" + len(content).to_bytes(2, "big") + content
        with pytest.raises(FormatError, match=error):
            PckExtension.parse(data)


# ---- what verified evidence brings along


def test_vm_config_is_bounded(guest_0_5: Guest) -> None:
    context = "App not allowed: decode app info: Failed to decode os image hash: Failed to parse vm config: "
    identity = guest_0_5.identity_without_vm_config()
    for config, error in (
        (" " * (MIB + 1), "at most 1048576 characters expected, got 1048577"),
        (f'{{"x":[{"0," * 4095}0]}}', "at most 4096 JSON values expected, got more"),
    ):
        assert guest_0_5.get_app_key(identity, vm_config=config).error == context + error
    denied = "App not allowed: Boot denied: OS image is not allowed"
    for config in ("{}" + " " * (MIB - 2), f'{{"x":[{"0," * 4093}0]}}'):
        assert guest_0_5.get_app_key(identity, vm_config=config).error == denied


def test_measurement_document_is_bounded() -> None:
    for size, error in ((65537, "at most 65536 bytes expected, got 65537"), (65536, "failed to decode CBOR: ")):
        with pytest.raises(FormatError, match=error):
            ImageMeasurement.decode(b"\x80" * size)
    for count, error in (
        (2052, "at most 2051 numbers expected, got more"),
        (2051, "TD HOB witness has trailing bytes"),
    ):
        with pytest.raises(FormatError, match=error):
            TdHobWitness.parse(b"\x7f" * count)
    with pytest.raises(FormatError, match="at most 4096 JSON values expected, got more"):
        VmConfig.parse(f"[{'0,' * 4095}0]")


# ---- JSON


@pytest.mark.parametrize("read", [StrictJson().parse, read_json], ids=["strict", "lenient"])
def test_values_of_a_text_are_counted_outside_of_strings(read: Callable[..., Any]) -> None:
    for text, count in (
        ("1", 1),
        ("[1,2]", 3),
        ('{"a":1,"b":[2]}', 4),
        ('["[,{", "\\"[,{", "\\\\", "\\\\\\", ["]', 5),
        ('["\\u005b,\\\\\\"[",0]', 3),
    ):
        assert read(text, count) == json.loads(text)
        with pytest.raises(TooManyValuesError, match=f"^at most {count - 1} JSON values expected, got more$"):
            read(text, count - 1)
    with pytest.raises(TooManyValuesError):
        require_few_values('"",' * 1_000_000)


DOCUMENTS: dict[str, Callable[[str], object]] = {
    "app-compose": lambda text: AppManifest.parse(text, DEFAULT),
    "mr_config": MrConfigDocument.parse,
    "environment": lambda text: parse_env(text.encode(), ()),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_values_of_a_guests_documents_are_counted(name: str) -> None:
    for zeros, error in ((100_000, "at most 100000 JSON values expected"), (99_999, "object expected")):
        with pytest.raises(FormatError, match=error):
            DOCUMENTS[name](f"[{'0,' * (zeros - 1)}0]")


# ---- webhooks and verifier


WEBHOOKS: dict[str, Callable[[Path], Any]] = {
    "auth-simple": simple_app,
    "auth-mock": lambda _path: mock_app(MockSettings()),
    "dstack-auth": file_app,
}


@pytest.mark.parametrize("name", WEBHOOKS)
async def test_values_of_a_boot_info_are_counted(tmp_path: Path, name: str) -> None:
    info = dict.fromkeys(("mrAggregated", "osImageHash", "appId", "composeHash", "instanceId", "deviceId"), "0x00")
    beside = 1 + len(info) + 2
    (tmp_path / "config.json").write_text("{}")
    async with served(WEBHOOKS[name](tmp_path / "config.json")) as server:
        for advisories, status in ((1024 - beside + 1, 413), (1024 - beside, 200)):
            body = json.dumps({**info, "tcbStatus": "UpToDate", "advisoryIds": ["INTEL-SA-1"] * advisories}).encode()
            answer = await asyncio.to_thread(post, server.url, "/bootAuth/app", body)
            assert answer[0] == status
            if status == 413:
                assert answer[1] == b"Request body: at most 1024 JSON values expected, got more"


async def test_values_of_a_request_to_the_verifier_are_counted(tmp_path: Path) -> None:
    async with serving_verifier(tmp_path, "0.6") as service:
        answer = await service.post(f"[{'0,' * 99_999}0]".encode())
        assert answer == (413, "text/plain", "Request body: at most 100000 JSON values expected, got more")
        assert (await service.post(f"[{'0,' * 99_998}0]".encode()))[0] == 422
        for count, reason in (
            (4097, "Internal error: Failed to decode attestaion"),
            (4096, "Quote verification failed: failed to verify TDX quote: Failed to parse quote: "),
        ):
            found = await service.verify(attestation=scale_evidence(count, 0).hex())
            assert str(found["reason"]).startswith(reason)


# ---- bodies in pieces


def test_body_in_pieces_of_a_byte_takes_no_more_memory_than_its_bytes() -> None:
    body, size = Body(MIB), MIB // 16
    tracemalloc.start()
    try:
        for number in range(size // 2):
            body.add(number.to_bytes(2, "big"))
        body.end()
        assert len(body.take()) == size
        assert tracemalloc.get_traced_memory()[1] < 4 * size
    finally:
        tracemalloc.stop()


# ---- the event loop


LARGE = [
    ("?json", b'{"alt_names":[' + b'"",' * 99_000 + b'""]}'),
    ("?json", b'{"subject":"' + b"a" * (10 * MIB - 20) + b'"}'),
    ("?json", b"[" * 10 * MIB),
    ("", b"\x12\0" * 5 * MIB),
    ("", b"\xfb\1\xfc\1" * (10 * MIB // 4)),
]


@pytest.mark.parametrize(("query", "body"), LARGE, ids=["names", "a long name", "nested", "fields", "groups"])
async def test_other_calls_are_answered_while_a_large_body_is_decoded(query: str, body: bytes) -> None:
    app = application(Toy(), "guest")
    taken: list[int] = []

    async def count(request: Request, handler: Handler) -> Response:
        if request.path != "/GetTlsKey":
            return await handler(request)
        await request.read()
        await read.wait()
        before = turns[0]
        response = await handler(request)
        taken.append(turns[0] - before)
        return response

    read = asyncio.Event()
    app.middlewares.append(count)
    with counted_turns() as turns:
        async with served(app) as server:
            reader, writer = await connect(server)
            writer.write(raw("POST", f"/GetTlsKey{query}", body))
            await writer.drain()
            read.set()
            assert (await post_toy(server, "/Version")).status == 200
            assert (await read_answer(reader)).status in (200, 400)
            writer.close()
            assert taken[0] > 0
            read_small = await post_toy(server, f"/GetTlsKey{query}", body[:0])
            assert read_small.status == 200
            assert taken[1] == 0, "a small body needs no thread"


async def test_other_calls_are_answered_while_a_large_grpc_message_is_decoded() -> None:
    before, taken = [0], []

    async def begin(peer: GrpcPeer) -> None:
        before[0] = turns[0]

    async def attest(context: None, request: guest_pb2.GetAttestationForAppKeyRequest) -> guest_pb2.GetQuoteResponse:
        taken.append(turns[0] - before[0])
        return guest_pb2.GetQuoteResponse()

    request, answer = guest_pb2.GetAttestationForAppKeyRequest, guest_pb2.GetQuoteResponse
    rpc = Rpc("GetAttestationForAppKey", request, answer, attest)
    service = GrpcService("dstack_guest.Worker", ServiceTable("Worker.", {rpc.name: rpc}), begin)
    sock = bind_tcp("127.0.0.1", 0)
    port = sock.getsockname()[1]
    with counted_turns() as turns:
        server = await serve_grpc((service,), Listener(sock), statuses={})
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(f"/{service.name}/{rpc.name}")
            for body, is_large in ((b"\xf8\1\0" * 10_000 + b"\xfa\1\0", True), (b"\xf8\1\0" * 9_999, False)):
                if is_large:
                    with pytest.raises(grpc.aio.AioRpcError) as refusal:
                        await call(body)
                    assert refusal.value.details() == (
                        "failed to decode Protobuf message: at most 10000 fields expected, got more"
                    )
                await call(body[:3] + request(algorithm="a" * 40_000 * is_large).SerializeToString())
        await server.close()
    assert taken[0] > 0
    assert taken[1] == 0, "a small message needs no thread"


class LongestStep:
    """The most functions that one step of the event loop has called: a measure of its length without a clock."""

    def __init__(self) -> None:
        self.calls, self._count = 0, 0

    def __enter__(self) -> "LongestStep":
        sys.setprofile(self._count_call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _count_call(self, frame: FrameType, event: str, _argument: object) -> None:
        if event == "call":
            self._count = 0 if frame.f_code is asyncio.events.Handle._run.__code__ else self._count + 1
            self.calls = max(self.calls, self._count)


MOST_CALLS = 3000
"""A step of a KMS that answers a small request calls fewer functions; to decode an event alone takes ten."""


async def test_no_step_of_the_loop_is_long_while_a_kms_works_on_the_worst_requests(
    ready_stack: RunningStack, tmp_path: Path
) -> None:
    copied_keys(tmp_path, ready_stack)
    kms = KmsServer(
        KmsConfig.load(kms_toml(tmp_path, ready_stack, ready_stack.services["auth-src"])),
        ready_stack.services["agent-src"],
        entropy=os.urandom,
        clock=lambda: int(time.time()),
    )
    agent = ready_stack.description["app"]["dstack_sock"]
    key = new_key()
    evidence = await asyncio.to_thread(foreign.attest, agent, spki_of(key))
    names = [f"n{number}.test" for number in range(1024)]
    event = {"imr": 0, "event_type": 0, "event": "", "event_payload": ""}
    log = json.dumps([event] * 4096).encode()
    quote = bytes.fromhex((await asyncio.to_thread(ask_agent, agent, "GetQuote"))["quote"])
    requests = (
        signed(key, csr(key, scale_evidence(4096, 4096), names)),
        signed(key, csr(key, msgpack_evidence(runtime_events=[EVENT] * 4096), names)),
        signed(key, csr(key, vec(quote) + vec(log), names, version=1), 1),
        signed(key, csr(key, evidence, [f"{'a' * 200}{name}" for name in names])),
    )
    await kms.start()
    try:
        guest = await asyncio.to_thread(Guest.of, kms.url, agent)
        errors = []
        for arguments in requests:
            with LongestStep() as step:
                errors.append(await asyncio.to_thread(sign_cert, guest, arguments))
            assert step.calls < MOST_CALLS, (errors, step.calls)
        with LongestStep() as step:
            parse_request(requests[0]["csr"], 2)
        assert step.calls > 10 * MOST_CALLS, "what a step would have called"
    finally:
        await kms.stop()
    assert errors == [*["Quote verification failed: report data mismatch"] * 3, ""]
