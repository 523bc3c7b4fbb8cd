"""Fetches collateral from a PCCS, and verifies evidence with it.

Each verification makes four requests, as the real KMS does, so a platform that is revoked at the PCCS is refused at the
next call. With ETags, the answer for an unchanged document is short. A PCCS of this emulator can confirm all four
documents in one request, by their combined ETag; after any answer but "not modified", the four requests are made. Only
the client's owner can say that its PCCS is such a one: no answer of a server can.

Calls that come while requests are in progress share the requests that follow: no call is verified with collateral that
was requested before it came. Cached documents are not trusted: `attest.verify` verifies signatures and dates, but at
most once a second if neither the evidence nor a document has changed. Source: `dcap-qvl` src/collateral.rs at 0.7.0;
dstack `dstack-attest/src/attestation.rs:181` at 312dc605.
"""

import asyncio
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dcap_qvl import QuoteCollateralV3

from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.cache import BoundedCache, Memo
from dstack_emu.attest.certificate import app_id_of, app_info_of, attestation_of, load_der, spki_of_der
from dstack_emu.attest.collateral import CollateralKey, CollateralKeys, assemble
from dstack_emu.attest.errors import AttestError, FormatError, UnverifiableError, VerificationError
from dstack_emu.attest.pcs import (
    DOCUMENT_KINDS,
    REVALIDATION_PATH,
    Document,
    DocumentKind,
    combined_etag,
)
from dstack_emu.attest.verify import TrustAnchor, VerifiedAttestation, require_bound_to_key, verify_attestation
from dstack_emu.transport.aside import LARGE_EVIDENCE, run_aside
from dstack_emu.transport.client import MoreHeaders, TransportError
from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError, NoAnswerInTimeError
from dstack_emu.transport.http_client import HttpAnswer, HttpClient, Route, direct
from dstack_emu.transport.urls import shown_url

Clock = Callable[[], int]
"""Returns the time in Unix seconds."""

DEFAULT_TIMEOUT = 10.0
MAX_DOCUMENT = 1024 * 1024
"""Characters of an error page in a message."""
PATIENCE = 0.1
"""Seconds for which a call waits for requests in progress before it makes its own."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A document from its last answer."""

    document: Document
    etag: str
    at: float


@dataclass(frozen=True, slots=True)
class _Assembled:
    """Collateral of four documents; `etag` is their combined one, empty if they cannot be confirmed at once."""

    documents: tuple[Document, ...]
    collateral: QuoteCollateralV3
    etag: str


class PccsClient:
    """A client of one PCCS. Close it.

    `ttl` is the time in seconds for which a document without an ETag is used; with 0 it is requested each time.
    `headers` are added to each request for a document. `revalidates_at_once` says that the PCCS is one of this
    emulator, and that nothing before it changes a document.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        ttl: float = 0,
        headers: MoreHeaders | None = None,
        revalidates_at_once: bool = False,
        route: Route = direct,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._ttl, self._revalidates_at_once = ttl, revalidates_at_once
        self._more_headers = headers
        self._client = HttpClient(timeout=timeout, max_answer=MAX_DOCUMENT, route=route)
        self.keys = CollateralKeys()
        # Callers choose the platform, so the caches need a limit.
        self._documents: BoundedCache[str, _Held] = BoundedCache(1024, 16 << 20)
        self._assembled: BoundedCache[CollateralKey, _Assembled] = BoundedCache(256, 16 << 20)
        self._coming: dict[CollateralKey, asyncio.Task[QuoteCollateralV3]] = {}
        self._under_way: dict[CollateralKey, asyncio.Task[QuoteCollateralV3]] = {}

    async def collateral(self, quote: bytes) -> QuoteCollateralV3:
        """Fetch the collateral for a quote.

        Raises `TransportError`, which names the URL, or `FormatError` if an answer is not a document.
        """
        return await self.collateral_of(self.keys.of_quote(quote))

    async def collateral_of(self, key: CollateralKey) -> QuoteCollateralV3:
        """Fetch the collateral for the quotes of a platform; raise the errors of `collateral`."""
        task = self._coming.get(key)
        if task is None:
            task = self._coming[key] = asyncio.create_task(self._fetch_in_turn(key, self._under_way.get(key)))
        return await asyncio.shield(task)  # other calls may be waiting for it

    async def _fetch_in_turn(
        self, key: CollateralKey, before: "asyncio.Task[QuoteCollateralV3] | None"
    ) -> QuoteCollateralV3:
        if before is not None:
            await asyncio.wait((before,), timeout=PATIENCE)
        task = self._under_way[key] = self._coming.pop(key)  # calls from here on do not share these requests
        try:
            return await self._fetch_collateral(key)
        finally:
            if self._under_way.get(key) is task:
                del self._under_way[key]

    async def _fetch_collateral(self, key: CollateralKey) -> QuoteCollateralV3:
        known = self._assembled.get(key)
        if known is not None and known.etag and await self._is_current(key, known.etag):
            return known.collateral
        held = await self._fetch_all(zip(key.requests(), DOCUMENT_KINDS, strict=True))
        documents = tuple(h.document for h in held)
        size = sum(len(document.body) for document in documents)
        if known is not None and known.documents == documents:
            collateral = known.collateral
        else:
            collateral = await run_aside(size, functools.partial(assemble, *documents), LARGE_EVIDENCE)
        self._assembled.put(key, _Assembled(documents, collateral, self._combined_etag(held)), size)
        return collateral

    def forget(self) -> None:
        """Forget every document, so that the next request for each is answered in full."""
        self._documents.clear()
        self._assembled.clear()

    def _combined_etag(self, held: tuple[_Held, ...]) -> str:
        if not self._revalidates_at_once or not all(h.etag for h in held):
            return ""
        return combined_etag([h.etag for h in held])

    async def _is_current(self, key: CollateralKey, etag: str) -> bool:
        url = f"{self.base_url}{REVALIDATION_PATH}?ca={key.ca}&fmspc={key.fmspc}"
        try:
            answer = await self._client.send("GET", url, headers={"If-None-Match": etag})
        except NoAnswerInTimeError as error:  # the server hangs: waiting for four more requests would not help
            raise TransportError(url, str(error)) from error
        except (NoAnswerError, AnswerTooLongError):
            return False  # the requests for the documents will report the error
        return answer.status == 304

    async def close(self) -> None:
        """Close the connections, and cancel requests in progress."""
        tasks = {*self._coming.values(), *self._under_way.values()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._coming.clear()
        await self._client.close()

    async def _fetch_all(self, requests: Iterable[tuple[str, DocumentKind]]) -> tuple[_Held, ...]:
        """Fetch documents simultaneously; if some fail, raise the error of the first of these paths."""
        fetched = await asyncio.gather(*(self._fetch(*request) for request in requests), return_exceptions=True)
        for document in fetched:
            if isinstance(document, BaseException):
                raise document
        return tuple(document for document in fetched if isinstance(document, _Held))

    async def _fetch(self, path: str, kind: DocumentKind) -> _Held:
        url, now = self.base_url + path, asyncio.get_running_loop().time()
        held = self._documents.get(path)
        if held and not held.etag and now < held.at + self._ttl:
            return held
        headers = {"If-None-Match": held.etag} if held and held.etag else {}
        if self._more_headers is not None:
            headers |= self._more_headers()
        try:
            answer = await self._client.send("GET", url, headers=headers, follow_redirects=True)
        except (NoAnswerError, AnswerTooLongError) as error:
            raise _not_fetched(TransportError(url, str(error)), kind) from error
        if answer.status == 304 and held and held.etag:
            return self._hold(path, _Held(held.document, held.etag, now))
        if not 200 <= answer.status < 300:
            failure = FormatError(f"Failed to fetch {shown_url(url)}: HTTP {answer.status}")
            raise _not_fetched(failure, kind)
        return self._hold(path, _Held(_document(answer, kind), answer.headers.get("ETag", ""), now))

    def _hold(self, path: str, held: _Held) -> _Held:
        if held.etag or self._ttl > 0:
            self._documents.put(path, held, len(held.document.body))
        return held


def _document(answer: HttpAnswer, kind: DocumentKind) -> Document:
    chain = next((answer.headers[name] for name in kind.issuer_headers if name in answer.headers), None)
    if chain is None and kind.issuer_headers:
        raise FormatError(f"Missing {kind.issuer_headers[-1]}")
    if kind.text:
        try:
            answer.body.decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{kind.text} response body is not valid UTF-8: {error}") from error
    return Document(answer.body, chain or "")


def _not_fetched(error: Exception, kind: DocumentKind) -> Exception:
    """Return the error for a document that did not come.

    For want of the root's CRL `dcap-qvl` goes to the address in the root certificate, and an emulated root has none.
    """
    if kind.issuer_headers:
        return error
    return FormatError(f"Could not find CRL distribution point in root certificate ({error})")


@dataclass(frozen=True, slots=True)
class _Verdict:
    collateral: QuoteCollateralV3
    verified: VerifiedAttestation


CertificateEvidence = tuple[bytes, Attestation | None]
"""The public key of a certificate (SPKI DER), and the evidence in it, None if there is none."""


def read_certificate(der: bytes) -> CertificateEvidence:
    """Parse a client's certificate without verifying it.

    Raises `FormatError` for any of dstack's extensions, in upstream's order.
    """
    certificate = load_der(der)
    app_id_of(certificate)
    app_info_of(certificate)
    return spki_of_der(der), attestation_of(certificate)


def _size_of_certificate(der: bytes, evidence: CertificateEvidence) -> int:
    return len(der) + len(evidence[0]) + (0 if evidence[1] is None else evidence[1].size)


class AttestationVerifier:
    """Verifies evidence under a root certificate, with the collateral of a PCCS, at the time of a clock."""

    def __init__(self, pccs: PccsClient, anchor: TrustAnchor, clock: Clock) -> None:
        self.pccs, self.anchor, self.clock = pccs, anchor, clock
        self._second, self._verdicts_end = 0, 0.0
        self._certificates = Memo(read_certificate, _size_of_certificate, max_entries=256, max_bytes=8 << 20)
        self._verdicts: BoundedCache[bytes, _Verdict] = BoundedCache(256, 8 << 20)

    def forget(self) -> None:
        """Forget every document and every verdict."""
        self.pccs.forget()
        self._verdicts.clear()

    def read_certificate(self, der: bytes) -> "CertificateEvidence":
        """Parse the certificate that a client shows in each handshake, with a cache; raise `FormatError`."""
        return self._certificates(der)

    async def verify(self, attestation: Attestation) -> VerifiedAttestation:
        """Verify evidence.

        Raises `VerificationError` with upstream's text, or `UnverifiableError` if the PCCS does not answer, or not with
        collateral.
        """
        try:
            key = self.pccs.keys.of_quote(attestation.quote)
        except AttestError as error:
            raise VerificationError(f"failed to verify TDX quote: {error}") from error
        try:
            collateral = await self.pccs.collateral_of(key)
            return await self._verify_once(attestation, collateral)
        except VerificationError:
            # Otherwise a document that was damaged on its way would stay in the cache under the right ETag.
            self.pccs.forget()
            raise
        except (TransportError, AttestError) as error:
            self.pccs.forget()
            raise UnverifiableError(f"failed to verify TDX quote: {error}") from error

    async def _verify_once(self, attestation: Attestation, collateral: QuoteCollateralV3) -> VerifiedAttestation:
        """Verify, unless the same evidence was verified with the same collateral within this second.

        A verdict also ends after a second of real time: the clock may stand still.
        """
        now, real_time = self.clock(), asyncio.get_running_loop().time()
        if now != self._second or real_time >= self._verdicts_end:
            self._second, self._verdicts_end = now, real_time + 1
            self._verdicts.clear()
        known = self._verdicts.get(attestation.quote)
        if known is not None and known.verified.attestation is attestation and known.collateral is collateral:
            return known.verified
        verify = functools.partial(verify_attestation, attestation, collateral, self.anchor, now)
        verified = await run_aside(attestation.size, verify, LARGE_EVIDENCE)
        if now == self._second:  # it may have taken longer
            self._verdicts.put(attestation.quote, _Verdict(collateral, verified), verified.size)
        return verified

    async def verify_bound(self, attestation: Attestation, spki: bytes) -> VerifiedAttestation:
        """Verify that evidence binds a TLS key (SPKI DER), and then the evidence, in the order of upstream."""
        require_bound_to_key(attestation, spki)
        return await self.verify(attestation)
