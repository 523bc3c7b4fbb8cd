"""The PCCS of the emulated platform: collateral over HTTP, in the shape of Intel's PCS v4.

It answers from the platforms' present state, with an ETag over the content, so that a verifier can revalidate documents
at little cost. The header `REVALIDATION_HEADER`, an addition of this emulator, names one URL that revalidates all four
documents of a platform; a middleware that changes a document must handle that URL, too. The `/sgx/` paths of older
clients and both names of the TCB chain header are supported. Source: Intel PCS API v4.
"""

import functools
import hashlib
import json
from urllib.parse import quote

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from dstack_emu.attest.pcs import (
    PCK_CRL_ISSUER_HEADER,
    PCK_CRL_PATH,
    QE_IDENTITY_ISSUER_HEADER,
    QE_IDENTITY_PATH,
    REVALIDATION_HEADER,
    ROOT_CA_CRL_PATH,
    TCB_INFO_ISSUER_HEADERS,
    TCB_INFO_PATH,
    Document,
    combined_etag,
)
from dstack_emu.simulator.intel import Intel

SGX_TCB_INFO_PATH = TCB_INFO_PATH.replace("/tdx/", "/sgx/")
SGX_QE_IDENTITY_PATH = QE_IDENTITY_PATH.replace("/tdx/", "/sgx/")
REVALIDATION_PATH = "/collateral/revalidation"

_JSON, _DER, _TEXT, _PEM = "application/json", "application/pkix-crl", "text/plain", "application/x-pem-file"
_CERTIFICATE = "application/pkix-cert"


def pccs_app(intel: Intel) -> web.Application:
    """Make the HTTP application of one emulated vendor."""

    async def pck_crl(request: web.Request) -> web.Response:
        ca = request.query.get("ca", "")
        if ca != "platform":
            return _refuse(400, f"ca: `platform` expected, got {ca!r}")
        crl = intel.pck_crl
        if request.query.get("encoding", "pem") == "der":
            return _answer(request, crl, _DER, PCK_CRL_ISSUER_HEADER)
        pem = x509.load_der_x509_crl(crl.body).public_bytes(Encoding.PEM)
        return _answer(request, Document(pem, crl.issuer_chain), _PEM, PCK_CRL_ISSUER_HEADER)

    def fmspc_of(request: web.Request) -> bytes:
        fmspc = request.query.get("fmspc", "")
        try:
            number = bytes.fromhex(fmspc)
        except ValueError:
            number = b""
        if not intel.knows_fmspc(number):
            text = f"no platform of this seed has the FMSPC {fmspc!r}: 12 hex digits of one expected"
            raise web.HTTPNotFound(text=json.dumps({"error": text}), content_type=_JSON)
        return number

    async def tcb_info(request: web.Request) -> web.Response:
        number = fmspc_of(request)
        response = _answer(request, intel.tcb_info(number), _JSON, *TCB_INFO_ISSUER_HEADERS)
        if _is_direct(request):
            url = f"{request.scheme}://{request.host}{REVALIDATION_PATH}?ca=platform&fmspc={number.hex()}"
            response.headers[REVALIDATION_HEADER] = url
        return response

    async def revalidation(request: web.Request) -> web.Response:
        documents = (intel.pck_crl, intel.tcb_info(fmspc_of(request)), intel.qe_identity, root_ca_crl_document())
        etag = combined_etag([_etag(document) for document in documents])
        status = 304 if request.headers.get("If-None-Match") == etag else 204
        return web.Response(status=status, headers={"ETag": etag, "Cache-Control": "no-cache"})

    def root_ca_crl_document() -> Document:
        return Document(intel.root_ca_crl.hex().encode())

    async def qe_identity(request: web.Request) -> web.Response:
        return _answer(request, intel.qe_identity, _JSON, QE_IDENTITY_ISSUER_HEADER)

    async def root_ca_crl(request: web.Request) -> web.Response:
        return _answer(request, root_ca_crl_document(), _TEXT)

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
        (REVALIDATION_PATH, revalidation),
        ("/root-ca.pem", root_ca_pem),
        ("/root-ca.der", root_ca_der),
        ("/health", health),
    ):
        app.router.add_get(path, handler)
    return app


def _answer(request: web.Request, document: Document, content_type: str, *chain_headers: str) -> web.Response:
    etag = _etag(document)
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    if request.headers.get("If-None-Match") == etag:
        return web.Response(status=304, headers=headers)
    for header in chain_headers:
        headers[header] = quote(document.issuer_chain, safe="")
    return web.Response(body=document.body, content_type=content_type, headers=headers)


@functools.lru_cache(maxsize=64)
def _etag(document: Document) -> str:
    return f'"{hashlib.sha256(document.issuer_chain.encode() + document.body).hexdigest()[:32]}"'


def _is_direct(request: web.Request) -> bool:
    """Return whether the client addressed this port; a client behind a proxy must use the proxy for every URL."""
    name = None if request.transport is None else request.transport.get_extra_info("sockname")
    try:
        return isinstance(name, tuple) and request.url.port == name[1]
    except ValueError:  # an invalid Host
        return False


def _refuse(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)
