"""The HTTP/1.1 server of dstack's protocols: a connection core without I/O, an asyncio protocol, and applications.

docs/decisions/http.md explains why it exists, and what it accepts that aiohttp's server refuses.
"""

from dstack_emu.transport.http.application import Application, Handler, Middleware
from dstack_emu.transport.http.body import BodyBrokenError, BodyError, BodyTooLargeError
from dstack_emu.transport.http.headers import ROCKET_HEADERS, Headers
from dstack_emu.transport.http.message import HeaderPairs, Request, Response
from dstack_emu.transport.http.pages import status_page

__all__ = [
    "ROCKET_HEADERS",
    "Application",
    "BodyBrokenError",
    "BodyError",
    "BodyTooLargeError",
    "Handler",
    "HeaderPairs",
    "Headers",
    "Middleware",
    "Request",
    "Response",
    "status_page",
]
