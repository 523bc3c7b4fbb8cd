"""Answers that consist of a status, as upstream's web server (Rocket) gives them."""

import json
from http import HTTPStatus
from typing import Final

from dstack_emu.transport.http.message import Request, Response
from dstack_emu.transport.status import reason_phrase, status_line

MAX_CHOICES: Final = 64
"""The number of choices of an Accept header that are read; further ones are ignored."""

_JSON: Final = "application/json"


def status_page(status: HTTPStatus, request: Request) -> Response:
    """Return the answer for a status: a page, or JSON if the header Accept prefers it."""
    reason = reason_phrase(status)
    if _prefers_json(request.headers.get("Accept", "")):
        error = {"code": status.value, "reason": reason, "description": status.description}
        return Response.of(json.dumps({"error": error}, indent=2).encode(), _JSON, status)
    title = status_line(status)
    page = f"<!DOCTYPE html>\n<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>\n"
    return Response.of(page, "text/html", status)


def _prefers_json(accept: str) -> bool:
    """Return whether JSON is the first choice of an Accept header: by q, then without wildcards, then by position."""
    best, best_rank = "", (0.0, 0)
    for choice in accept.split(",", MAX_CHOICES)[:MAX_CHOICES]:
        kind, *parameters = (part.strip().lower() for part in choice.split(";"))
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        try:
            rank = (float(quality), -kind.count("*"))
        except ValueError:
            continue
        if rank > best_rank:
            best, best_rank = kind, rank
    return best == _JSON
