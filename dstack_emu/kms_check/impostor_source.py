"""An impostor of a source of root keys: a TLS server with any certificate and any answer."""

import ssl
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.certificate import USAGE_KMS_RPC, pem
from dstack_emu.attest.issuing import CertificateRequest
from dstack_emu.attest.kdf import pkcs8_pem
from dstack_emu.kms_check.evidence import Key, stranger
from dstack_emu.transport.http import Application, Request, Response
from dstack_emu.transport.listen import bind_tcp, serve


@asynccontextmanager
async def impostor_source(key: Key, attestation: Attestation | None, body: bytes, now: int) -> AsyncIterator[str]:
    """Serve TLS with a certificate that has this evidence, or none; yield the URL. Every call is answered by `body`."""
    request = CertificateRequest(
        public_key=key.public_key(),
        subject="check-kms.example.test",
        alt_names=("127.0.0.1",),
        server_auth=True,
        usage=USAGE_KMS_RPC,
        attestation=attestation,
        keeps_log_digests=True,
    )
    certificate = pem(stranger("Dstack KMS CA", now).issue(request, now))

    async def answer(_request: Request) -> Response:
        return Response.of(body, "application/json")

    app = Application()
    app.add_finder(lambda _request: answer)
    server = await serve(app, bind_tcp("127.0.0.1", 0), _context(certificate, pkcs8_pem(key)))
    try:
        yield server.url
    finally:
        await server.close()


def _context(certificate: str, key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory(prefix="dstack-emu-") as folder:  # OpenSSL reads a chain only from files
        certificate_file, key_file = Path(folder, "server.crt"), Path(folder, "server.key")
        certificate_file.write_text(certificate)
        key_file.touch(mode=0o600)
        key_file.write_text(key)
        context.load_cert_chain(certificate_file, key_file)
    return context
