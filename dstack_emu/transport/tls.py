"""TLS settings of clients: the client certificate, and how the server is verified.

A server of dstack is verified by the evidence in its certificate, or by the root certificate of its KMS. No public
authority is trusted here.
"""

import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dstack_emu.attest.errors import FormatError


@dataclass(frozen=True, slots=True)
class Identity:
    """A client certificate and its key, both in PEM."""

    certificate: str
    key: str


def client_context(identity: Identity | None = None, root_ca: str | None = None) -> ssl.SSLContext:
    """Make the settings of a client that shows `identity`, if given, and verifies the server under `root_ca` (PEM).

    Without `root_ca`, the server is not verified: the caller must verify the evidence in its certificate, unless it
    does not matter which server answers. Raises `FormatError` if `identity` is no certificate with its key.
    """
    # Not ssl.create_default_context(): from Python 3.13 on it requires authority key identifiers, which
    # dstack's certificates, upstream's and ours, do not have.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if root_ca is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    else:
        context.load_verify_locations(cadata=root_ca)
    if identity is not None:
        _load_identity(context, identity)
    return context


def _load_identity(context: ssl.SSLContext, identity: Identity) -> None:
    # OpenSSL reads a certificate chain only from files; the folder has mode 0700 and is deleted at once.
    with tempfile.TemporaryDirectory(prefix="dstack-emu-") as folder:
        certificate, key = Path(folder, "client.crt"), Path(folder, "client.key")
        certificate.write_text(identity.certificate)
        key.touch(mode=0o600)
        key.write_text(identity.key)
        try:
            context.load_cert_chain(certificate, key)
        except ssl.SSLError as error:
            raise FormatError("Failed to parse identity: a certificate chain in PEM and its key expected") from error
