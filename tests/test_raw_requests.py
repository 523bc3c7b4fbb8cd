"""Requests of upstream's Rust SDK to every listener that speaks dstack's protocols; and attempts to smuggle."""

import http.client
import socket
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.raw_requests import SDK_FORMS, SMUGGLED
from tests.running import RunningStack
from tests.tls import client as trusting_anybody

TIMEOUT = 20.0


@dataclass(frozen=True)
class Place:
    """A listener of a stack: where it is, and a request that succeeds there."""

    listener: str
    path: str
    body: bytes = b"{}"


READY = [
    Place("dstack_sock", "/GetKey", b'{"path":"a","purpose":"","algorithm":"secp256k1"}'),
    Place("dstack_sock", "/Info"),
    Place("tappd_sock", "/prpc/Tappd.DeriveKey", b'{"path":"a","subject":"a"}'),
    Place("tappd_sock", "/prpc/Tappd.Info"),
    Place("app", "/GetKey", b'{"path":"a","purpose":"","algorithm":"secp256k1"}'),
    Place("app", "/prpc/Tappd.RawQuote", b'{"report_data":"%s"}' % (b"00" * 64)),
    Place("app", "/prpc/Worker.Info"),
    Place("agent-src", "/Info"),
    Place("kms-src", "/prpc/KMS.GetMeta"),
    Place("kms-src", "/prpc/GetTempCaCert?json"),
    Place("verifier", "/verify"),
]
ROCKET = (
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "SAMEORIGIN"),
    ("permissions-policy", "interest-cohort=()"),
)
"""As recorded in wire.json (http-edge, `pipelined`)."""
FRESH = [Place("kms-src", "/prpc/Onboard.GetAttestationInfo"), Place("agent-src", "/Info"), Place("app", "/Info")]


def _named(place: Place) -> str:
    return f"{place.listener}{place.path}"


def _connect(stack: RunningStack, listener: str) -> socket.socket:
    if listener.endswith("_sock"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(TIMEOUT)
        sock.connect(stack.description["app"][listener])
        return sock
    url = urlsplit(stack.services[listener])
    sock = socket.create_connection((str(url.hostname), int(url.port or 0)), TIMEOUT)
    if url.scheme == "http":
        return sock
    wrapped: ssl.SSLSocket = trusting_anybody().wrap_socket(sock)
    return wrapped


def _answer(sock: socket.socket) -> tuple[int, str | None, bytes]:
    response = http.client.HTTPResponse(sock)
    response.begin()
    return response.status, response.getheader("content-type"), response.read()


def _check_rocket_headers(stack: RunningStack, listener: str) -> None:
    """Request a page that is there and one that is not: Rocket marks both."""
    for path in ("/health", "/nowhere"):
        with _connect(stack, listener) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            response = http.client.HTTPResponse(sock)
            response.begin()
            for name, value in ROCKET:
                assert response.headers.get_all(name) == [value]


def test_request_that_is_none_is_refused_before_rocket_sees_it(ready_stack: RunningStack) -> None:
    for listener in sorted({place.listener for place in READY}):
        with _connect(ready_stack, listener) as sock:
            sock.sendall(b"GET /health HTTP/3.7\r\nHost: x\r\n\r\n")
            response = http.client.HTTPResponse(sock)
            response.begin()
            assert response.status == 400
            assert not {name for name, _ in ROCKET} & {name.lower() for name in response.headers}


@pytest.mark.parametrize("listener", sorted({place.listener for place in READY}))
def test_answers_of_a_ready_stack_have_the_headers_of_rocket(ready_stack: RunningStack, listener: str) -> None:
    _check_rocket_headers(ready_stack, listener)


@pytest.mark.parametrize("listener", sorted({place.listener for place in FRESH}))
def test_answers_of_a_fresh_stack_have_the_headers_of_rocket(fresh_stack: RunningStack, listener: str) -> None:
    _check_rocket_headers(fresh_stack, listener)


@pytest.mark.parametrize("service", ["auth-src", "pccs"])
def test_programs_that_are_no_rocket_do_not_have_them(ready_stack: RunningStack, service: str) -> None:
    parts = urlsplit(ready_stack.services[service])
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=TIMEOUT)
    connection.request("GET", "/health")
    response = connection.getresponse()
    assert response.read()
    connection.close()
    assert not {name for name, _ in ROCKET} & {name.lower() for name in response.headers}


def _check_sdk_forms(stack: RunningStack, place: Place, form: str) -> None:
    request = SDK_FORMS[form](place.path, place.body)
    with _connect(stack, place.listener) as sock:
        for _ in range(2):  # the connection is kept
            sock.sendall(request)
            status, content_type, body = _answer(sock)
            assert (status, content_type) == (200, "application/json")
            assert body.startswith(b"{")


def _check_smuggled(stack: RunningStack, place: Place, form: str) -> None:
    with _connect(stack, place.listener) as sock:
        sock.sendall(SMUGGLED[form](place.path, place.body))
        assert _answer(sock)[0] == 400
        assert sock.recv(1) == b""


@pytest.mark.parametrize("form", SDK_FORMS)
@pytest.mark.parametrize("place", READY, ids=_named)
def test_request_of_the_rust_sdk_is_answered(ready_stack: RunningStack, place: Place, form: str) -> None:
    _check_sdk_forms(ready_stack, place, form)


@pytest.mark.parametrize("form", SMUGGLED)
@pytest.mark.parametrize("place", READY, ids=_named)
def test_request_that_could_be_read_in_two_ways_is_refused(ready_stack: RunningStack, place: Place, form: str) -> None:
    _check_smuggled(ready_stack, place, form)


@pytest.mark.parametrize("place", FRESH, ids=_named)
def test_requests_before_there_are_keys_are_answered_and_refused_alike(fresh_stack: RunningStack, place: Place) -> None:
    for form in SDK_FORMS:
        _check_sdk_forms(fresh_stack, place, form)
    for form in SMUGGLED:
        _check_smuggled(fresh_stack, place, form)


def test_type_that_is_given_twice_counts_by_its_first(ready_stack: RunningStack) -> None:
    answers: dict[str, Any] = {}
    for first, second in (("application/json", "text/plain"), ("text/plain", "application/json")):
        with _connect(ready_stack, "dstack_sock") as sock:
            lines = ("POST /Version HTTP/1.1", f"Content-Type: {first}", f"Content-Type: {second}", "", "")
            sock.sendall("\r\n".join((*lines[:-2], "Content-Length: 0", "", "")).encode())
            answers[first] = _answer(sock)[1]
    assert answers == {"application/json": "application/json", "text/plain": "application/octet-stream"}
