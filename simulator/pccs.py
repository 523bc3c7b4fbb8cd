"""The PCCS of the emulated platform: collateral over HTTP, in the shape of Intel's PCS v4.

It answers from the platforms' present state, with an ETag over the content, so that a verifier can revalidate documents
at little cost. `REVALIDATION_PATH`, an addition of this emulator, revalidates all four documents of a platform for a
client that was told to use it; a middleware that changes a document must handle that path, too. The `/sgx/` paths of
older clients and both names of the TCB chain header are supported. TCB info and QE identity come from the set of the
TCB evaluation data number that `update` or `tcbEvaluationDataNumber` selects, the standard one without either. Source:
Intel PCS API v4.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import parse_qsl, quote

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from dstack_emu.attest.pcs import (
    EVALUATION_NUMBERS_ISSUER_HEADER,
    EVALUATION_NUMBERS_PATH,
    PCK_CRL_ISSUER_HEADER,
    PCK_CRL_PATH,
    QE_IDENTITY_ISSUER_HEADER,
    QE_IDENTITY_PATH,
    REVALIDATION_PATH,
    ROOT_CA_CRL_PATH,
    TCB_INFO_ISSUER_HEADERS,
    TCB_INFO_PATH,
    Document,
    combined_etag,
)
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.vendor_state import Evaluations
from dstack_emu.transport.http import Application, Handler, HeaderPairs, Request, Response

SGX_TCB_INFO_PATH = TCB_INFO_PATH.replace("/tdx/", "/sgx/")
SGX_QE_IDENTITY_PATH = QE_IDENTITY_PATH.replace("/tdx/", "/sgx/")

_JSON, _DER, _TEXT, _PEM = "application/json", "application/pkix-crl", "text/plain", "application/x-pem-file"
_CERTIFICATE = "application/pkix-cert"
_NO_CACHE: Final = ("Cache-Control", "no-cache")


def pccs_app(intel: Intel) -> Application:
    """Make the HTTP application of one emulated vendor."""

    async def pck_crl(request: Request) -> Response:
        query = _query(request)
        ca = query.get("ca", "")
        if ca != "platform":
            return _refuse(400, f"ca: `platform` expected, got {ca!r}")
        crl = intel.pck_crl
        if query.get("encoding", "pem") == "der":
            return _answer(request, crl, _DER, PCK_CRL_ISSUER_HEADER)
        pem = x509.load_der_x509_crl(crl.body).public_bytes(Encoding.PEM)
        return _answer(request, Document(pem, crl.issuer_chain), _PEM, PCK_CRL_ISSUER_HEADER)

    def for_platform(answer: Callable[[Request, bytes], Response]) -> Handler:
        """Make a handler that knows the platform's FMSPC, or answers 404."""

        async def handle(request: Request) -> Response:
            fmspc = _query(request).get("fmspc", "")
            try:
                number = bytes.fromhex(fmspc)
            except ValueError:
                number = b""
            if intel.knows_fmspc(number):
                return answer(request, number)
            return _refuse(404, f"no platform of this seed has the FMSPC {fmspc!r}: 12 hex digits of one expected")

        return handle

    def tcb_info(request: Request, number: bytes) -> Response:
        evaluation = _evaluation(_query(request), intel.state.evaluations)
        if isinstance(evaluation, Response):
            return evaluation
        return _answer(request, intel.tcb_info(number, evaluation), _JSON, *TCB_INFO_ISSUER_HEADERS)

    def revalidation(request: Request, number: bytes) -> Response:
        documents = (intel.pck_crl, intel.tcb_info(number), intel.qe_identity, root_ca_crl_document())
        etag = combined_etag([_etag(document) for document in documents])
        status = 304 if request.headers.get("If-None-Match") == etag else 204
        return Response(status, headers=(("ETag", etag), _NO_CACHE))

    def root_ca_crl_document() -> Document:
        return Document(intel.root_ca_crl.hex().encode())

    async def qe_identity(request: Request) -> Response:
        evaluation = _evaluation(_query(request), intel.state.evaluations)
        if isinstance(evaluation, Response):
            return evaluation
        return _answer(request, intel.qe_identity_in(evaluation), _JSON, QE_IDENTITY_ISSUER_HEADER)

    async def evaluation_numbers(request: Request) -> Response:
        return _answer(request, intel.evaluation_numbers, _JSON, EVALUATION_NUMBERS_ISSUER_HEADER)

    async def root_ca_crl(request: Request) -> Response:
        return _answer(request, root_ca_crl_document(), _TEXT)

    async def root_ca_pem(request: Request) -> Response:
        return _answer(request, Document(intel.root_pem.encode()), _PEM)

    async def root_ca_der(request: Request) -> Response:
        return _answer(request, Document(intel.root_der), _CERTIFICATE)

    async def health(request: Request) -> Response:
        return Response.of('{"status": "ok", "service": "dstack-emu-pccs"}', _JSON)

    app = Application()
    for path, handler in (
        (PCK_CRL_PATH, pck_crl),
        (TCB_INFO_PATH, for_platform(tcb_info)),
        (SGX_TCB_INFO_PATH, for_platform(tcb_info)),
        (QE_IDENTITY_PATH, qe_identity),
        (SGX_QE_IDENTITY_PATH, qe_identity),
        (EVALUATION_NUMBERS_PATH, evaluation_numbers),
        (ROOT_CA_CRL_PATH, root_ca_crl),
        (REVALIDATION_PATH, for_platform(revalidation)),
        ("/root-ca.pem", root_ca_pem),
        ("/root-ca.der", root_ca_der),
        ("/health", health),
    ):
        app.add("GET", path, handler)
    return app


def _query(request: Request) -> dict[str, str]:
    """Return the query's parameters; the first value counts if one is repeated."""
    return dict(reversed(parse_qsl(request.query, keep_blank_values=True)))


def _evaluation(query: Mapping[str, str], published: Evaluations) -> int | Response:
    """Return the number of the set that a request selects, or the refusal: 400, 404, or 410 for a withdrawn set."""
    update, number = query.get("update"), query.get("tcbEvaluationDataNumber")
    if update is not None and number is not None:
        return _refuse(400, "update and tcbEvaluationDataNumber exclude each other: one of them expected")
    if number is None:
        if update not in (None, "early", "standard"):
            return _refuse(400, f"update: `early` or `standard` expected, got {update!r:.60}")
        return published.early if update == "early" else published.standard
    if not (number.isascii() and number.isdecimal() and len(number) <= 9):
        return _refuse(400, f"tcbEvaluationDataNumber: a number expected, got {number!r:.60}")
    if int(number) in published.available:
        return int(number)
    known = ", ".join(map(str, published.available))
    if int(number) < min(published.available):
        return _refuse(410, f"the TCB evaluation data number {number} is no longer available; available: {known}")
    return _refuse(404, f"there is no TCB evaluation data number {number}; available: {known}")


def _answer(request: Request, document: Document, content_type: str, *chain_headers: str) -> Response:
    etag = _etag(document)
    headers: HeaderPairs = (("ETag", etag), _NO_CACHE)
    if request.headers.get("If-None-Match") == etag:
        return Response(304, headers=headers)
    chain = quote(document.issuer_chain, safe="") if chain_headers else ""
    headers += tuple((name, chain) for name in chain_headers)
    return Response(200, document.body, (("Content-Type", content_type), *headers))


def _etag(document: Document) -> str:
    return f'"{hashlib.sha256(document.issuer_chain.encode() + document.body).hexdigest()[:32]}"'


def _refuse(status: int, text: str) -> Response:
    return Response.of(json.dumps({"error": text}), _JSON, status)
