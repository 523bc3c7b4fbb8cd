"""The files of the console over HTTP, beside the control API.

They say nothing of the stack, and so need no token: what the pages show, their script requests from the API, with the
token that a person has typed. Each file is read when it is requested, so a stack without a browser pays nothing.
"""

import re
from importlib import resources
from types import MappingProxyType
from typing import Final

from aiohttp import web

from dstack_emu.transport.html import STYLE_FILE, style_sheet

PREFIX: Final = "/console/"
"""The path of the console; its files are directly below, and so is the style of all pages."""

INDEX: Final = "index.html"

CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Only files of the console run, it connects to its own stack only, and no text can become markup."""

_HEADERS: Final = MappingProxyType(
    {
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
)
_TYPES: Final = MappingProxyType(
    {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
)
_NAME: Final = re.compile(r"[a-z_]+\.(html|css|js|svg)")


def is_public(path: str) -> bool:
    """Return whether a path is one of the console's, which need no token."""
    return path == "/" or path.startswith(PREFIX)


def add_pages(app: web.Application) -> None:
    """Serve the console in an application; `/` leads to it."""
    app.router.add_get("/", _lead)
    app.router.add_get(PREFIX, _file)
    app.router.add_get(PREFIX + "{name}", _file)


async def _lead(_request: web.Request) -> web.Response:
    return web.Response(status=302, headers={"Location": PREFIX.removeprefix("/")})


async def _file(request: web.Request) -> web.Response:
    name = request.match_info.get("name", INDEX)
    form = _NAME.fullmatch(name)
    source = resources.files(__package__).joinpath("static", name)
    if form is None or not (name == STYLE_FILE or source.is_file()):
        raise web.HTTPNotFound
    content = style_sheet().encode() if name == STYLE_FILE else source.read_bytes()
    return web.Response(body=content, content_type=_TYPES[form[1]], charset="utf-8", headers=_HEADERS)
