"""The PCCS of the emulated platform: collateral over HTTP, in the shape of Intel's PCS v4.

It answers from the platforms' present state, with an ETag over the content, so a verifier can ask each time at little
cost. Older clients' `/sgx/` spellings and both spellings of the TCB chain header are served. Source: Intel PCS API v4.
"""

import hashlib
from urllib.parse import quote

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from attest.collateral import (
    PCK_CRL_ISSUER_HEADER,
    PCK_CRL_PATH,
    QE_IDENTITY_ISSUER_HEADER,
    QE_IDENTITY_PATH,
    ROOT_CA_CRL_PATH,
    TCB_INFO_ISSUER_HEADERS,
    TCB_INFO_PATH,
    Document,
)
from simulator.intel import Intel

SGX_TCB_INFO_PATH = TCB_INFO_PATH.replace("/tdx/", "/sgx/")
SGX_QE_IDENTITY_PATH = QE_IDENTITY_PATH.replace("/tdx/", "/sgx/")

_JSON, _DER, _TEXT, _PEM = "application/json", "application/pkix-crl", "text/plain", "application/x-pem-file"
_CERTIFICATE = "application/pkix-cert"


def pccs_app(intel: Intel) -> web.Application:
    """Make the HTTP application over one emulated vendor."""

    async def pck_crl(request: web.Request) -> web.Response:
        ca = request.query.get("ca", "")
        if ca != "platform":
            return _refuse(400, f"ca: `platform` expected, got {ca!r}")
        crl = intel.pck_crl
        if request.query.get("encoding", "pem") == "der":
            return _answer(request, crl, _DER, PCK_CRL_ISSUER_HEADER)
        pem = x509.load_der_x509_crl(crl.body).public_bytes(Encoding.PEM)
        return _answer(request, Document(pem, crl.issuer_chain), _PEM, PCK_CRL_ISSUER_HEADER)

    async def tcb_info(request: web.Request) -> web.Response:
        fmspc = request.query.get("fmspc", "")
        try:
            number = bytes.fromhex(fmspc)
        except ValueError:
            number = b""
        if not intel.knows_fmspc(number):
            return _refuse(404, f"no platform of this seed has the FMSPC {fmspc!r}: 12 hex digits of one expected")
        return _answer(request, intel.tcb_info(number), _JSON, *TCB_INFO_ISSUER_HEADERS)

    async def qe_identity(request: web.Request) -> web.Response:
        return _answer(request, intel.qe_identity, _JSON, QE_IDENTITY_ISSUER_HEADER)

    async def root_ca_crl(request: web.Request) -> web.Response:
        return _answer(request, Document(intel.root_ca_crl.hex().encode()), _TEXT)

    async def root_ca_pem(request: web.Request) -> web.Response:
        return _answer(request, Document(intel.root_pem.encode()), _PEM)

    async def root_ca_der(request: web.Request) -> web.Response:
        return _answer(request, Document(intel.root_der), _CERTIFICATE)

    async def health(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "service": "dstack-emu-pccs"})

    app = web.Application()
    for path, handler in (
        (PCK_CRL_PATH, pck_crl),
        (TCB_INFO_PATH, tcb_info),
        (SGX_TCB_INFO_PATH, tcb_info),
        (QE_IDENTITY_PATH, qe_identity),
        (SGX_QE_IDENTITY_PATH, qe_identity),
        (ROOT_CA_CRL_PATH, root_ca_crl),
        ("/root-ca.pem", root_ca_pem),
        ("/root-ca.der", root_ca_der),
        ("/health", health),
    ):
        app.router.add_get(path, handler)
    return app


def _answer(request: web.Request, document: Document, content_type: str, *chain_headers: str) -> web.Response:
    etag = f'"{hashlib.sha256(document.body).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    if request.headers.get("If-None-Match") == etag:
        return web.Response(status=304, headers=headers)
    for header in chain_headers:
        headers[header] = quote(document.issuer_chain, safe="")
    return web.Response(body=document.body, content_type=content_type, headers=headers)


def _refuse(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)
