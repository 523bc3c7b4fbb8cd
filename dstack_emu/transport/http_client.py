"""An HTTP client for short requests to one server or several: aiohttp's session, with bounds.

Connections are kept between requests. Every request has one deadline for all of it, and an answer's length is bounded.
Redirects are followed only if that is wanted; proxies, cookies and compression that nobody asked for are not used.

Not here: what an answer means.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import aiohttp

KEPT_IDLE: Final = 2.0
"""Seconds that a connection may be idle and be used again. Servers keep one for longer (Node for 5 s): a request that
meets the end of its connection is lost."""


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """What a server answered; header names are compared without regard to case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class AnswerTooLongError(Exception):
    """An answer with a longer body than is read; the text says which length that is."""


class HttpClient:
    """Sends requests. Close it; a later request opens new connections.

    `timeout` is for a whole request, in seconds; `max_answer` the longest body that is read, in bytes, uncompressed;
    `headers` go with every request; `kept_idle` is how many seconds a connection may be idle and be used again.
    """

    def __init__(
        self,
        *,
        timeout: float,
        max_answer: int,
        headers: Mapping[str, str] | None = None,
        kept_idle: float = KEPT_IDLE,
    ) -> None:
        self.timeout, self._max_answer, self._kept_idle = timeout, max_answer, kept_idle
        self._headers = dict(headers or {})
        self._session: aiohttp.ClientSession | None = None

    async def send(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        follow_redirects: bool = False,
    ) -> HttpAnswer:
        """Send a request and read the answer, whatever its status.

        Raises `aiohttp.ClientError`, `OSError` or `TimeoutError` if there is none (`describe_failure` has the words),
        and `AnswerTooLongError`. A GET that is lost with its connection is sent once more, a POST never.
        """
        session = self._session or self._open()
        async with session.request(
            method, url, data=body, headers=headers, allow_redirects=follow_redirects
        ) as response:
            return HttpAnswer(response.status, response.headers, await self._read(response))

    async def close(self) -> None:
        """Close the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=self._kept_idle),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            skip_auto_headers=("Content-Type", "Accept-Encoding"),
            timeout=aiohttp.ClientTimeout(total=self.timeout),
        )
        return self._session

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        pieces, size = [], 0
        async for piece in response.content.iter_any():
            size += len(piece)
            if size > self._max_answer:
                response.close()
                raise AnswerTooLongError(f"the answer is longer than {self._max_answer} bytes")
            pieces.append(piece)
        return b"".join(pieces)
