"""Fetching collateral from a PCCS, and verifying evidence with it.

Four requests for each verification, as the real KMS makes them, so a platform that is revoked at the PCCS is refused at
the very next call. An ETag makes the answer to an unchanged document short, and a PCCS of ours is asked after all four
at once, by the ETag of those that are held; whatever it answers but "not modified" leads to the four requests. Callers
that come while requests are under way share those that follow: nobody is verified by collateral that was requested
before the call. Nothing is trusted for having been cached: `attest.verify` checks signatures and dates, once a second
where neither the evidence nor a document changed. Source: `dcap-qvl` src/collateral.rs at 0.7.0; dstack
`dstack-attest/src/attestation.rs:181` at 312dc605.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dcap_qvl import QuoteCollateralV3

from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.cache import BoundedCache, Memo
from dstack_emu.attest.certificate import app_id_of, app_info_of, attestation_of, load_der, spki_of_der
from dstack_emu.attest.collateral import CollateralKey, CollateralKeys, assemble
from dstack_emu.attest.errors import AttestError, UnverifiableError, VerificationError
from dstack_emu.attest.pcs import (
    PCK_CRL_ISSUER_HEADER,
    QE_IDENTITY_ISSUER_HEADER,
    REVALIDATION_HEADER,
    TCB_INFO_ISSUER_HEADERS,
    Document,
    combined_etag,
)
from dstack_emu.attest.verify import TrustAnchor, VerifiedAttestation, require_bound_to_key, verify_attestation
from dstack_emu.transport.client import MoreHeaders, TransportError
from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError, NoAnswerInTimeError
from dstack_emu.transport.http_client import HttpAnswer, HttpClient

Clock = Callable[[], int]
"""Unix seconds, now."""

DEFAULT_TIMEOUT = 10.0
MAX_DOCUMENT = 1024 * 1024
SHOWN = 200
PATIENCE = 0.1
"""Seconds that callers wait for requests under way before they ask on their own."""
_ISSUER_HEADERS = (PCK_CRL_ISSUER_HEADER, *TCB_INFO_ISSUER_HEADERS, QE_IDENTITY_ISSUER_HEADER)


@dataclass(frozen=True, slots=True)
class _Held:
    """A document as it was last answered; `revalidation` is where the PCCS says it may be asked after all four."""

    document: Document
    etag: str
    revalidation: str
    at: float


@dataclass(frozen=True, slots=True)
class _Assembled:
    """Collateral made of four documents; `revalidation` is where to ask after them at once, if anywhere."""

    documents: tuple[Document, ...]
    collateral: QuoteCollateralV3
    revalidation: str
    etag: str
    """The four ETags as one."""


class PccsClient:
    """One PCCS, asked over kept-alive connections. Close it.

    `ttl` is how many seconds a document is used that came without an ETag; with 0 it is asked for each time. `headers`
    are added to each question for a document.
    """

    def __init__(
        self, base_url: str, *, timeout: float = DEFAULT_TIMEOUT, ttl: float = 0, headers: MoreHeaders | None = None
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._ttl = ttl
        self._more_headers = headers
        self._client = HttpClient(timeout=timeout, max_answer=MAX_DOCUMENT)
        self.keys = CollateralKeys()
        # Whoever calls names a platform: that must not fill memory.
        self._documents: BoundedCache[str, _Held] = BoundedCache(1024, 16 << 20)
        self._assembled: BoundedCache[CollateralKey, _Assembled] = BoundedCache(256, 16 << 20)
        self._coming: dict[CollateralKey, asyncio.Task[QuoteCollateralV3]] = {}
        self._under_way: dict[CollateralKey, asyncio.Task[QuoteCollateralV3]] = {}

    async def collateral(self, quote: bytes) -> QuoteCollateralV3:
        """Ask for what this quote needs.

        Raises `TransportError` naming the URL, or `FormatError` for an answer that is none.
        """
        return await self.collateral_of(self.keys.of_quote(quote))

    async def collateral_of(self, key: CollateralKey) -> QuoteCollateralV3:
        """Ask for what the quotes of a platform need; raise as `collateral` does."""
        question = self._coming.get(key)
        if question is None:
            question = self._coming[key] = asyncio.create_task(self._ask_in_turn(key, self._under_way.get(key)))
        return await asyncio.shield(question)  # which others may be waiting for

    async def _ask_in_turn(
        self, key: CollateralKey, before: "asyncio.Task[QuoteCollateralV3] | None"
    ) -> QuoteCollateralV3:
        if before is not None:
            await asyncio.wait((before,), timeout=PATIENCE)
        question = self._under_way[key] = self._coming.pop(key)  # who comes from here on is too late for this one
        try:
            return await self._ask(key)
        finally:
            if self._under_way.get(key) is question:
                del self._under_way[key]

    async def _ask(self, key: CollateralKey) -> QuoteCollateralV3:
        known = self._assembled.get(key)
        if known is not None and known.revalidation and await self._is_current(known):
            return known.collateral
        held = await self._fetch_all(key.requests())
        documents = tuple(h.document for h in held)
        collateral = known.collateral if known is not None and known.documents == documents else assemble(*documents)
        url, etag = self._revalidation(held)
        size = sum(len(document.body) for document in documents)
        self._assembled.put(key, _Assembled(documents, collateral, url, etag), size)
        return collateral

    def forget(self) -> None:
        """Forget every document: the next question for each is answered in full."""
        self._documents.clear()
        self._assembled.clear()

    def _revalidation(self, held: tuple[_Held, ...]) -> tuple[str, str]:
        """Where to ask after these documents at once, and by which ETag; nothing where a server did not say so itself.

        An address elsewhere was meant for another client, such as a proxy that gave its own answers before this one.
        """
        url = next((h.revalidation for h in held if h.revalidation), "")
        if not url.startswith(f"{self.base_url}/") or not all(h.etag for h in held):
            return "", ""
        return url, combined_etag([h.etag for h in held])

    async def _is_current(self, known: _Assembled) -> bool:
        try:
            answer = await self._client.send("GET", known.revalidation, headers={"If-None-Match": known.etag})
        except NoAnswerInTimeError as error:  # of a server that hangs enough was waited for
            raise TransportError(known.revalidation, str(error)) from error
        except (NoAnswerError, AnswerTooLongError):
            return False  # what is wrong shows when the documents are asked for
        return answer.status == 304

    async def close(self) -> None:
        """Close the connections, and give up what is under way."""
        questions = {*self._coming.values(), *self._under_way.values()}
        for question in questions:
            question.cancel()
        await asyncio.gather(*questions, return_exceptions=True)
        self._coming.clear()
        await self._client.close()

    async def _fetch_all(self, paths: Iterable[str]) -> tuple[_Held, ...]:
        """Fetch documents at once; raise the error of the first path that has one, whichever failed first."""
        fetched = await asyncio.gather(*map(self._fetch, paths), return_exceptions=True)
        for document in fetched:
            if isinstance(document, BaseException):
                raise document
        return tuple(document for document in fetched if isinstance(document, _Held))

    async def _fetch(self, path: str) -> _Held:
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
            raise TransportError(url, str(error)) from error
        etag, revalidation = answer.headers.get("ETag", ""), answer.headers.get(REVALIDATION_HEADER, "")
        if answer.status == 304 and held and held.etag:
            return self._hold(path, _Held(held.document, held.etag, revalidation, now))
        return self._hold(path, _Held(_document(url, answer), etag, revalidation, now))

    def _hold(self, path: str, held: _Held) -> _Held:
        if held.etag or self._ttl > 0:
            self._documents.put(path, held, len(held.document.body))
        return held


def _document(url: str, answer: HttpAnswer) -> Document:
    if answer.status != 200:
        said = answer.body[:SHOWN].decode(errors="replace")
        raise TransportError(url, f"PCCS status {answer.status}, 200 expected: {said}")
    chain = next((answer.headers[name] for name in _ISSUER_HEADERS if name in answer.headers), "")
    return Document(answer.body, chain)


@dataclass(frozen=True, slots=True)
class _Verdict:
    collateral: QuoteCollateralV3
    verified: VerifiedAttestation


CertificateEvidence = tuple[bytes, Attestation | None]
"""The public key of a certificate (SPKI DER), and the evidence that it carries, if any."""


def read_certificate(der: bytes) -> CertificateEvidence:
    """Read a client's certificate: what it says, not whether it holds.

    Raises `FormatError`, for extensions that are no evidence, too, and in upstream's order.
    """
    certificate = load_der(der)
    app_id_of(certificate)
    app_info_of(certificate)
    return spki_of_der(der), attestation_of(certificate)


def _size_of_certificate(der: bytes, evidence: CertificateEvidence) -> int:
    return len(der) + len(evidence[0]) + (0 if evidence[1] is None else evidence[1].size)


class AttestationVerifier:
    """Verifies evidence under one root, with collateral of one PCCS, at the time of one clock."""

    def __init__(self, pccs: PccsClient, anchor: TrustAnchor, clock: Clock) -> None:
        self.pccs, self.anchor, self.clock = pccs, anchor, clock
        self._second = 0
        self._certificates = Memo(read_certificate, _size_of_certificate, max_entries=256, max_bytes=8 << 20)
        self._verdicts: BoundedCache[bytes, _Verdict] = BoundedCache(256, 8 << 20)

    def forget(self) -> None:
        """Forget every document and every verdict."""
        self.pccs.forget()
        self._verdicts.clear()

    def read_certificate(self, der: bytes) -> "CertificateEvidence":
        """Read the certificate that a client shows in each handshake; raise `FormatError`."""
        return self._certificates(der)

    async def verify(self, attestation: Attestation) -> VerifiedAttestation:
        """Verify evidence.

        Raises `VerificationError`, its cause in upstream's words; a PCCS that is down, or answers no collateral, is a
        `UnverifiableError`.
        """
        try:
            key = self.pccs.keys.of_quote(attestation.quote)
        except AttestError as error:
            raise VerificationError(f"failed to verify TDX quote: {error}") from error
        try:
            collateral = await self.pccs.collateral_of(key)
            return self._verify_once(attestation, collateral)
        except VerificationError:
            # A document that was damaged on the way would be kept under the ETag of the good one.
            self.pccs.forget()
            raise
        except (TransportError, AttestError) as error:
            self.pccs.forget()
            raise UnverifiableError(f"failed to verify TDX quote: {error}") from error

    def _verify_once(self, attestation: Attestation, collateral: QuoteCollateralV3) -> VerifiedAttestation:
        """Verify, unless the very same evidence was, under the very same collateral, within this second."""
        now = self.clock()
        if now != self._second:
            self._second = now
            self._verdicts.clear()
        known = self._verdicts.get(attestation.quote)
        if known is not None and known.verified.attestation is attestation and known.collateral is collateral:
            return known.verified
        verified = verify_attestation(attestation, collateral, self.anchor, now)
        self._verdicts.put(attestation.quote, _Verdict(collateral, verified), verified.size)
        return verified

    async def verify_bound(self, attestation: Attestation, spki: bytes) -> VerifiedAttestation:
        """Verify evidence that must bind a TLS key (SPKI DER): the binding first, then the evidence, as upstream."""
        require_bound_to_key(attestation, spki)
        return await self.verify(attestation)
