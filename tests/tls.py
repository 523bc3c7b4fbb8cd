"""TLS settings of test clients and servers, made by the standard library alone."""

import contextlib
import ssl
import tempfile
from pathlib import Path


def client(root_ca: str | None = None) -> ssl.SSLContext:
    """Make the settings of a client that verifies the server under `root_ca` (PEM), or talks to any server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if root_ca is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    else:
        context.load_verify_locations(cadata=root_ca)
    return context


def server(certificate: str, key: str, *, client_ca: str | None = None) -> ssl.SSLContext:
    """Make the settings of a server with this certificate; it demands a client's under `client_ca`, if given (PEM)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load(context, certificate, key)
    if client_ca is not None:
        context.load_verify_locations(cadata=client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def load(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """Give settings a certificate to show (PEM); OpenSSL reads it from files alone."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "both.pem")
        file.write_text(key + certificate)
        context.load_cert_chain(file)


def client_hello(name: str | None, alpn: tuple[str, ...] = ()) -> bytes:
    """Return what OpenSSL sends first."""
    context = client()
    if alpn:
        context.set_alpn_protocols(list(alpn))
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    return outgoing.read()
