"""A guest that shares nothing with the emulator: what anyone could write after reading the protocol.

It knows HTTP, TLS, X.509 and SHA-512 by the standard library and `cryptography`, and imports nothing of the package
under test, so a mistake that both sides of the emulator make alike is no agreement here.
"""

import datetime
import hashlib
import http.client
import json
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from tests import tls

OID_ATTESTATION = x509.ObjectIdentifier("1.3.6.1.4.1.62397.1.8")
OID_QUOTE = x509.ObjectIdentifier("1.3.6.1.4.1.62397.1.1")
OID_EVENT_LOG = x509.ObjectIdentifier("1.3.6.1.4.1.62397.1.2")
TIMEOUT = 20


@dataclass(frozen=True)
class Answer:
    """Status and body (parsed where it is JSON) of one call."""

    status: int
    body: Any

    @property
    def error(self) -> str:
        """The text of a refusal, which pRPC always sends as a 400 with one key."""
        assert self.status == 400, self
        assert list(self.body) == ["error"], self
        return str(self.body["error"])

    @property
    def value(self) -> dict[str, Any]:
        """The body of a success."""
        assert self.status == 200, self
        assert isinstance(self.body, dict), self
        return self.body


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self._path)


def ask(connection: http.client.HTTPConnection, path: str, body: dict[str, Any] | None = None) -> Answer:
    """POST JSON (GET where there is no body) and read the answer."""
    if body is None:
        connection.request("GET", path)
    else:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    raw = response.read()
    is_json = (response.getheader("Content-Type") or "").startswith("application/json")
    return Answer(response.status, json.loads(raw) if is_json else raw.decode())


def ask_agent(address: str, method: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Call one method of a guest agent, by the path of its socket or by its URL."""
    parts = urlsplit(address)
    tcp = http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT)
    connection = tcp if parts.scheme else _UnixConnection(address)
    try:
        return ask(connection, f"/{method}", body or {}).value
    finally:
        connection.close()


def attest(agent: str, spki: bytes) -> bytes:
    """Have an agent quote the binding of a TLS key (SPKI DER): a versioned attestation."""
    return bytes.fromhex(ask_agent(agent, "Attest", {"report_data": binding_of(spki).hex()})["attestation"])


def binding_of(spki: bytes) -> bytes:
    """The report_data that binds a TLS key (SPKI DER), 64 bytes."""
    return hashlib.sha512(b"ratls-cert:" + spki).digest()


def quote_of(attestation: bytes) -> tuple[int, bytes]:
    """Offset and bytes of the quote in a SCALE attestation: 0x00, variant 0 (TDX), a vector with a compact length."""
    assert attestation[:2] == b"\0\0", "not the form that hardware sends"
    length = int.from_bytes(attestation[2:4], "little")
    assert length & 3 == 1, "a quote is between 64 and 16383 bytes long: a compact length of two bytes"
    return 4, attestation[4 : 4 + (length >> 2)]


@dataclass(frozen=True)
class Identity:
    """A client certificate with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Authority:
    """A CA that one holds the key of."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def invent(cls, common_name: str) -> Self:
        """Make a CA that nobody knows, under any name."""
        key = new_key()
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        builder = _certificate(name, name, key).add_extension(constraints, critical=True)
        return cls(builder.sign(key, hashes.SHA256()), key)

    def issue(self, key: ec.EllipticCurvePrivateKey, attestation: bytes | None) -> Identity:
        """Make a client certificate, with an attestation inside unless that is None."""
        return self.issue_with(key, {} if attestation is None else {OID_ATTESTATION: attestation})

    def issue_with(self, key: ec.EllipticCurvePrivateKey, values: dict[x509.ObjectIdentifier, bytes]) -> Identity:
        """Make a client certificate with any of dstack's extensions, each value in an OCTET STRING as they have it."""
        return self.issue_raw(key, {oid: der_octet_string(value) for oid, value in values.items()})

    def issue_raw(self, key: ec.EllipticCurvePrivateKey, values: dict[x509.ObjectIdentifier, bytes]) -> Identity:
        """Make a client certificate with any extensions, each value as it is given."""
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "foreign client")])
        builder = _certificate(subject, self.certificate.subject, key)
        for oid, value in values.items():
            extension = x509.UnrecognizedExtension(oid, value)
            builder = builder.add_extension(extension, critical=False)
        return Identity(builder.sign(self.key, hashes.SHA256()), key)


def new_key() -> ec.EllipticCurvePrivateKey:
    """Make a P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def spki_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Public key as SubjectPublicKeyInfo DER."""
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def der_octet_string(data: bytes) -> bytes:
    """Encode an OCTET STRING, the value inside dstack's certificate extensions."""
    if len(data) < 0x80:
        return b"\x04" + bytes([len(data)]) + data
    size = struct.pack(">I", len(data)).lstrip(b"\0")
    return b"\x04" + bytes([0x80 | len(size)]) + size + data


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
    )


class KmsConnection:
    """One kept-alive connection to a KMS: service KMS over TLS, or Onboard over plain HTTP while it has no keys."""

    def __init__(self, url: str, *, identity: Identity | None = None, root_ca: str | None = None) -> None:
        scheme, address = urlsplit(url)[:2]
        self._service = "KMS" if scheme == "https" else "Onboard"
        self._http = (
            http.client.HTTPSConnection(address, context=tls_context(identity, root_ca), timeout=TIMEOUT)
            if scheme == "https"
            else http.client.HTTPConnection(address, timeout=TIMEOUT)
        )

    def call(self, method: str, **arguments: Any) -> Answer:
        """POST one RPC in JSON."""
        return ask(self._http, f"/prpc/{self._service}.{method}?json", arguments)

    def get(self, path: str) -> Answer:
        """GET a page."""
        return ask(self._http, path)

    def header(self, path: str, name: str) -> str | None:
        """GET a page and return one header of the answer."""
        self._http.request("GET", path)
        answer = self._http.getresponse()
        answer.read()
        return answer.getheader(name)

    @property
    def socket(self) -> object:
        """The socket it goes over, which shows whether two calls shared a connection."""
        return self._http.sock

    def close(self) -> None:
        """Hang up."""
        self._http.close()


@contextmanager
def kms(url: str, *, identity: Identity | None = None, root_ca: str | None = None) -> Iterator[KmsConnection]:
    """Connect to a KMS, with its root pinned where one is given."""
    connection = KmsConnection(url, identity=identity, root_ca=root_ca)
    try:
        yield connection
    finally:
        connection.close()


def tls_context(identity: Identity | None, root_ca: str | None) -> ssl.SSLContext:
    """Client settings: verify under one root, or not at all; show a certificate, or none."""
    context = tls.client(root_ca)
    if identity is not None:
        key = identity.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        tls.load(context, identity.certificate.public_bytes(Encoding.PEM).decode(), key.decode())
    return context


def signing_request(key: ec.EllipticCurvePrivateKey, attestation: bytes, subject: str) -> dict[str, Any]:
    """Arguments of SignCert for a server certificate: the request in SCALE (version 2), signed by the key it names."""
    nothing, no, yes = b"\0", b"\0", b"\1"
    config = nothing + _scale(subject.encode()) + _compact(1) + _scale(subject.encode())
    config += yes + no + yes + no + nothing + nothing  # server, client, attestation, app info; not before, not after
    csr = _scale(b"please sign cert:") + _scale(spki_of(key)) + config + attestation
    signature = key.sign(csr, ec.ECDSA(hashes.SHA256()))
    return {"api_version": 2, "csr": csr.hex(), "signature": signature.hex()}


def _scale(data: bytes) -> bytes:
    return _compact(len(data)) + data


def _compact(number: int) -> bytes:
    return bytes([number << 2]) if number < 64 else (number << 2 | 1).to_bytes(2, "little")


@dataclass(frozen=True)
class Guest:
    """A guest that wants keys of a KMS: where both answer, and the CA under which the KMS wants certificates."""

    kms_url: str
    agent: str
    temp_ca: Authority
    root_ca: str

    @classmethod
    def of(cls, kms_url: str, agent: str) -> Self:
        """Ask the KMS for its temporary CA, trusting whoever answers, as a guest's first step is."""
        with kms(kms_url) as connection:
            answer = connection.call("GetTempCaCert").value
        certificate = x509.load_pem_x509_certificate(answer["temp_ca_cert"].encode())
        key = load_pem_private_key(answer["temp_ca_key"].encode(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return cls(kms_url, agent, Authority(certificate, key), answer["ca_cert"])

    def at(self, kms_url: str) -> "Guest":
        """The same guest before another KMS with the same keys."""
        return replace(self, kms_url=kms_url)

    def identity(self) -> Identity:
        """A new key, attested, with a certificate."""
        key = new_key()
        return self.temp_ca.issue(key, attest(self.agent, spki_of(key)))

    def identity_without_vm_config(self) -> Identity:
        """A new key, attested as old releases did: quote and event log, so a request's vm_config is the only one."""
        key = new_key()
        answer = ask_agent(self.agent, "GetQuote", {"report_data": binding_of(spki_of(key)).hex()})
        values = {OID_QUOTE: bytes.fromhex(answer["quote"]), OID_EVENT_LOG: answer["event_log"].encode()}
        return self.temp_ca.issue_with(key, values)

    def get_app_key(self, identity: Identity | None = None, **arguments: Any) -> Answer:
        """GetAppKey over a connection of its own, with the KMS's root pinned; a fresh identity unless one is given."""
        with kms(self.kms_url, identity=identity or self.identity(), root_ca=self.root_ca) as connection:
            return connection.call("GetAppKey", **{"api_version": 1, **arguments})
