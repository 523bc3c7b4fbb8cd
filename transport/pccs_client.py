"""Fetching collateral from a PCCS, and judging evidence with it.

Four requests for each verification, as the real KMS makes them, so a platform that is revoked at the PCCS is refused at
the very next call; an ETag makes the answer to an unchanged document short. Callers that come while requests are under
way share the four that follow: nobody is judged by collateral that was asked for before he came. Nothing is trusted for
having been cached: `attest.verify` checks signatures and dates, once a second where neither the evidence nor a document
changed. Source: `dcap-qvl` src/collateral.rs at 0.7.0; dstack `dstack-attest/src/attestation.rs:181` at 312dc605.
"""

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from dcap_qvl import QuoteCollateralV3

from attest.attestation import Attestation
from attest.collateral import (
    PCK_CRL_ISSUER_HEADER,
    QE_IDENTITY_ISSUER_HEADER,
    TCB_INFO_ISSUER_HEADERS,
    CollateralKey,
    Document,
    assemble,
)
from attest.errors import AttestError, VerificationError
from attest.verify import TrustAnchor, VerifiedAttestation, require_bound_to_key, verify_attestation
from transport.client import MoreHeaders, TransportError, describe_failure

Clock = Callable[[], int]
"""Unix seconds, now."""

DEFAULT_TIMEOUT = 10.0
MAX_DOCUMENT = 1024 * 1024
SHOWN = 200
REMEMBERED = 1024
PATIENCE = 0.1
"""Seconds that callers wait for requests under way before they ask on their own."""
_ISSUER_HEADERS = (PCK_CRL_ISSUER_HEADER, *TCB_INFO_ISSUER_HEADERS, QE_IDENTITY_ISSUER_HEADER)


@dataclass(frozen=True, slots=True)
class _Cached:
    etag: str
    document: Document


class PccsClient:
    """One PCCS, asked over kept-alive connections. Close it."""

    def __init__(
        self, base_url: str, *, timeout: float = DEFAULT_TIMEOUT, headers: MoreHeaders | None = None
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._seconds = timeout
        self._more_headers = headers
        self._session: aiohttp.ClientSession | None = None
        self._documents: dict[str, _Cached] = {}
        self._assembled: dict[CollateralKey, tuple[tuple[Document, ...], QuoteCollateralV3]] = {}
        self._coming: dict[CollateralKey, asyncio.Task[QuoteCollateralV3]] = {}
        self._under_way: dict[CollateralKey, asyncio.Task[QuoteCollateralV3]] = {}

    async def collateral(self, quote: bytes) -> QuoteCollateralV3:
        """Ask for what this quote needs.

        Raises `TransportError` naming the URL, or `FormatError` for an answer that is none.
        """
        key = _key_of_quote(quote)
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
        documents = tuple(await asyncio.gather(*(self._fetch(path) for path in key.requests())))
        known = self._assembled.get(key)
        if known is not None and all(a is b for a, b in zip(known[0], documents, strict=True)):
            return known[1]
        collateral = assemble(*documents)
        self._assembled[key] = (documents, collateral)
        return collateral

    def forget(self) -> None:
        """Forget every document: the next question for each is answered in full."""
        self._documents.clear()
        self._assembled.clear()

    async def close(self) -> None:
        """Close the connections, and give up what is under way."""
        questions = {*self._coming.values(), *self._under_way.values()}
        for question in questions:
            question.cancel()
        await asyncio.gather(*questions, return_exceptions=True)
        self._coming.clear()
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _fetch(self, path: str) -> Document:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=self._seconds), cookie_jar=aiohttp.DummyCookieJar()
            )
        url = self.base_url + path
        cached = self._documents.get(path)
        headers = {"If-None-Match": cached.etag} if cached else {}
        if self._more_headers is not None:
            headers |= self._more_headers()
        try:
            async with self._session.get(url, headers=headers) as response:
                if response.status == 304 and cached:
                    return cached.document
                body = b""
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > MAX_DOCUMENT:
                        raise TransportError(url, f"the answer is longer than {MAX_DOCUMENT} bytes")
                if response.status != 200:
                    said = body[:SHOWN].decode(errors="replace")
                    raise TransportError(url, f"PCCS status {response.status}, 200 expected: {said}")
                chain = next((response.headers[h] for h in _ISSUER_HEADERS if h in response.headers), "")
                document = Document(body, chain)
                if etag := response.headers.get("ETag"):
                    if len(self._documents) >= REMEMBERED:  # whoever calls names a platform: that must not fill memory
                        self.forget()
                    self._documents[path] = _Cached(etag, document)
                return document
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise TransportError(url, describe_failure(error, self._seconds)) from error


@functools.lru_cache(maxsize=256)
def _key_of_quote(quote: bytes) -> CollateralKey:
    return CollateralKey.of_quote(quote)


@dataclass(frozen=True, slots=True)
class _Judged:
    collateral: QuoteCollateralV3
    verified: VerifiedAttestation


class AttestationVerifier:
    """Judges evidence under one root, with collateral of one PCCS, at the time of one clock."""

    def __init__(self, pccs: PccsClient, anchor: TrustAnchor, clock: Clock) -> None:
        self.pccs, self.anchor, self.clock = pccs, anchor, clock
        self._second = 0
        self._judged: dict[bytes, _Judged] = {}

    def forget(self) -> None:
        """Forget every document and every verdict."""
        self.pccs.forget()
        self._second, self._judged = 0, {}

    async def verify(self, attestation: Attestation) -> VerifiedAttestation:
        """Verify evidence.

        Raises `VerificationError`, its cause in upstream's words; a PCCS that is down is one.
        """
        try:
            collateral = await self.pccs.collateral(attestation.quote)
            return self._judge(attestation, collateral)
        except VerificationError:
            # A document that was damaged on the way would be kept under the ETag of the good one.
            self.pccs.forget()
            raise
        except (TransportError, AttestError) as error:
            self.pccs.forget()
            raise VerificationError(f"failed to verify TDX quote: {error}") from error

    def _judge(self, attestation: Attestation, collateral: QuoteCollateralV3) -> VerifiedAttestation:
        """Verify, unless the very same evidence was, under the very same collateral, within this second."""
        now = self.clock()
        if now != self._second:
            self._second, self._judged = now, {}
        known = self._judged.get(attestation.quote)
        if known is not None and known.verified.attestation is attestation and known.collateral is collateral:
            return known.verified
        verified = verify_attestation(attestation, collateral, self.anchor, now)
        self._judged[attestation.quote] = _Judged(collateral, verified)
        return verified

    async def verify_bound(self, attestation: Attestation, spki: bytes) -> VerifiedAttestation:
        """Verify evidence that must bind a TLS key (SPKI DER): the binding first, then the evidence, as upstream."""
        require_bound_to_key(attestation, spki)
        return await self.verify(attestation)
