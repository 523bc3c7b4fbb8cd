"""Calls of a KMS over its public interface: pRPC in JSON, over a connection of its own for each call."""

import json
from dataclasses import dataclass
from typing import Any, Final

from dstack_emu.transport.client import MAX_RESPONSE
from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError
from dstack_emu.transport.http_client import HttpClient
from dstack_emu.transport.tls import Identity, client_context

_SHOWN: Final = 300
_SECRETS: Final = frozenset(("k256_key", "disk_crypt_key", "env_crypt_key", "temp_ca_key", "keys"))
"""The members of answers that are secret keys."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: status, and body, parsed if it is JSON. Status 0 means that none came; the body says why."""

    status: int
    body: Any

    @property
    def is_success(self) -> bool:
        """Whether it is the answer of a call that was carried out."""
        return self.status == 200

    @property
    def refusal(self) -> str:
        """The text of a refusal."""
        text = self.body.get("error") if isinstance(self.body, dict) else self.body
        return text if isinstance(text, str) else json.dumps(self.body)

    @property
    def has_secret(self) -> bool:
        """Whether a private key is in the body, or a member that is a secret key."""
        is_named = isinstance(self.body, dict) and not _SECRETS.isdisjoint(self.body)
        return is_named or "PRIVATE KEY-----" in json.dumps(self.body)

    @property
    def shown(self) -> str:
        """Status and body for people, without keys."""
        if self.is_success:
            names = ", ".join(self.body) if isinstance(self.body, dict) else "no JSON object"
            return f"200 with {names or 'an empty object'}"
        text = "a body with a secret key" if self.has_secret else self.refusal
        text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
        return text if self.status == 0 else f"{self.status}: {text}"


async def call(
    url: str, method: str, arguments: dict[str, Any] | None = None, identity: Identity | None = None, *, patience: float
) -> Answer:
    """POST `Service.Method`, with a client certificate if one is given; wait at most `patience` seconds.

    The server's certificate is not verified: a case of its own does that.
    """
    return await request(
        "POST", f"{url}/prpc/{method}?json", json.dumps(arguments or {}).encode(), identity, patience=patience
    )


async def request(
    verb: str, url: str, body: bytes | None = None, identity: Identity | None = None, *, patience: float
) -> Answer:
    """Send one request; return its answer, which has status 0 if none came."""
    tls = client_context(identity) if url.startswith("https:") else None
    client = HttpClient(timeout=patience, max_answer=MAX_RESPONSE, tls=tls)
    headers = {} if body is None else {"Content-Type": "application/json"}
    try:
        answer = await client.send(verb, url, body, headers)
    except (NoAnswerError, AnswerTooLongError) as error:
        return Answer(0, f"no answer: {error}")
    finally:
        await client.close()
    text = answer.body.decode(errors="replace")
    try:
        return Answer(answer.status, json.loads(text))
    except (ValueError, RecursionError):
        return Answer(answer.status, text)


async def server_certificate(url: str, *, patience: float) -> bytes:
    """Return the certificate (DER) that a server shows; it is empty if it shows none, or does not answer."""
    client = HttpClient(timeout=patience, max_answer=MAX_RESPONSE, tls=client_context())
    try:
        return (await client.send("GET", f"{url}/health")).certificate or b""
    except (NoAnswerError, AnswerTooLongError):
        return b""
    finally:
        await client.close()
