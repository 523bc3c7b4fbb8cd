"""A client's TLS settings: which certificate it shows, and what it checks of the server.

A server of dstack proves itself by the evidence in its certificate, or is pinned by the root of its KMS; no public
authority is ever trusted here.
"""

import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Identity:
    """A client certificate and its key, both PEM."""

    certificate: str
    key: str


def client_context(identity: Identity | None = None, root_ca: str | None = None) -> ssl.SSLContext:
    """Make a client's settings: show `identity`, if given; verify the server under `root_ca` (PEM).

    Without a root nothing of the server is verified: the caller reads the evidence in its certificate, or asks nothing
    that depends on who answers.
    """
    # Not ssl.create_default_context(): from Python 3.13 it asks for authority key identifiers, which dstack's
    # certificates, ours as upstream's, do not carry.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if root_ca is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    else:
        context.load_verify_locations(cadata=root_ca)
    if identity is not None:
        _load_identity(context, identity)
    return context


def _load_identity(context: ssl.SSLContext, identity: Identity) -> None:
    # OpenSSL reads a certificate chain from files alone; the folder is the process's own (mode 0700) and short-lived.
    with tempfile.TemporaryDirectory(prefix="dstack-emu-") as folder:
        certificate, key = Path(folder, "client.crt"), Path(folder, "client.key")
        certificate.write_text(identity.certificate)
        key.touch(mode=0o600)
        key.write_text(identity.key)
        context.load_cert_chain(certificate, key)
