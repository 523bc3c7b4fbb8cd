"""Clients of a KMS for the runbook: they take a method and JSON, and return a status and JSON.

`KmsClient` is the interface between the runbook and a transport. The client here uses pRPC, in JSON over HTTP/1.1; the
one for gRPC is in `runbook.grpc_kms_client`. Like the runbook's `curl -sk`, neither verifies a server's certificate:
a separate step verifies the evidence in it.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Protocol

from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.errors import VerificationError
from dstack_emu.attest.proto import kms_pb2 as pb
from dstack_emu.attest.strict_json import read_json
from dstack_emu.runbook.target import TargetKms
from dstack_emu.transport.client import MAX_RESPONSE
from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError
from dstack_emu.transport.http_client import HttpClient
from dstack_emu.transport.pccs_client import AttestationVerifier
from dstack_emu.transport.ratls import AttestedServer, RaTlsClient, RaTlsError
from dstack_emu.transport.tls import Identity, client_context

_NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})
TIMEOUT: Final = 60.0
"""The default timeout of a call in seconds: a platform may take long to quote."""


@dataclass(frozen=True, slots=True)
class KmsAnswer:
    """An answer: its status, and its body, parsed if it is JSON. Status 0 means that no answer came; the body says why.

    For a call by gRPC, `code` is the name of its status and `status` its counterpart in pRPC: 200 or 400.
    """

    status: int
    body: Any
    code: str | None = None

    @property
    def ok(self) -> bool:
        """Whether it is a success."""
        return self.status == 200

    @property
    def shown(self) -> int | str:
        """The status as its transport names it."""
        return self.code or self.status

    @property
    def success(self) -> str:
        """The status of a success in that transport."""
        return "200" if self.code is None else "OK"

    @property
    def error(self) -> str:
        """The text of a refusal; empty for a success."""
        if self.ok:
            return ""
        text = self.body.get("error") if isinstance(self.body, dict) else None
        return text if isinstance(text, str) else str(self.body)

    def field(self, name: str) -> Any:
        """Return a field of a success, None if there is none."""
        return self.body.get(name) if self.ok and isinstance(self.body, dict) else None


class KmsClient(Protocol):
    """A transport. Its methods raise nothing, except `verify_server`: a failure is an answer with status 0.

    If `finishes_by_page` is true, the page `/finish` ends the onboard phase, otherwise the RPC Onboard.Finish. The
    token of the onboard phase is sent to methods of Onboard and to that page, and to nobody else.
    """

    finishes_by_page: bool

    def address(self, kms: TargetKms, method: str) -> str:
        """Return the address of a method of a KMS, for messages."""
        ...

    async def call(
        self,
        kms: TargetKms,
        method: str,
        arguments: dict[str, Any],
        identity: Identity | None = None,
        *,
        seconds: float = TIMEOUT,
    ) -> KmsAnswer:
        """Call `Service.Method` of a KMS, with a client certificate if one is given; wait at most `seconds`."""
        ...

    async def verify_server(self, kms: TargetKms, verifier: AttestationVerifier | None) -> AttestedServer:
        """Verify the evidence in a running KMS's certificate; raise `AttestError` if it does not hold."""
        ...

    async def get(self, url: str) -> KmsAnswer:
        """GET a page of a service."""
        ...

    async def finish_page(self, kms: TargetKms) -> KmsAnswer:
        """GET the page that ends the onboard phase."""
        ...

    async def post(self, url: str, document: Any) -> KmsAnswer:
        """POST JSON to a service that has no RPCs."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class PrpcKmsClient:
    """pRPC in JSON."""

    finishes_by_page = True

    def __init__(self, onboard_token: str = "") -> None:
        self._clients: dict[Identity | None, HttpClient] = {}
        self._of_onboarding = {"Authorization": f"Bearer {onboard_token}"} if onboard_token else {}

    def address(self, kms: TargetKms, method: str) -> str:
        """Return the URL of the phase that serves the method."""
        return kms.onboard if method.startswith("Onboard.") else kms.runtime

    async def call(
        self,
        kms: TargetKms,
        method: str,
        arguments: dict[str, Any],
        identity: Identity | None = None,
        *,
        seconds: float = TIMEOUT,
    ) -> KmsAnswer:
        """POST to `/prpc/Service.Method?json`."""
        url = f"{self.address(kms, method)}/prpc/{method}?json"
        headers = self._of_onboarding if method.startswith("Onboard.") else {}
        return await self._request("POST", url, json.dumps(arguments), identity, seconds, headers)

    async def verify_server(self, kms: TargetKms, verifier: AttestationVerifier | None) -> AttestedServer:
        """Verify the certificate of the connection that answers GetMeta."""
        seen: list[AttestedServer] = []
        try:
            client = RaTlsClient(f"{kms.runtime}/prpc", verifier=verifier, check_peer=seen.append)
            try:
                await client.call("KMS.GetMeta", Empty(), pb.GetMetaResponse)
            finally:
                await client.close()
        except RaTlsError as error:
            raise VerificationError(str(error)) from error
        return seen[0]

    async def get(self, url: str) -> KmsAnswer:
        """GET a page."""
        return await self._request("GET", url, None)

    async def finish_page(self, kms: TargetKms) -> KmsAnswer:
        """GET the page that ends the onboard phase."""
        return await self._request("GET", f"{kms.onboard}/finish", None, headers=self._of_onboarding)

    async def post(self, url: str, document: Any) -> KmsAnswer:
        """POST JSON."""
        return await self._request("POST", url, json.dumps(document))

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            await client.close()

    async def _request(
        self,
        verb: str,
        url: str,
        body: str | None,
        identity: Identity | None = None,
        seconds: float = TIMEOUT,
        headers: Mapping[str, str] = _NO_HEADERS,
    ) -> KmsAnswer:
        headers = dict(headers) if body is None else {"Content-Type": "application/json", **headers}
        try:
            async with asyncio.timeout(seconds):
                answer = await self._client(identity).send(verb, url, None if body is None else body.encode(), headers)
        except (NoAnswerError, AnswerTooLongError) as error:
            return KmsAnswer(0, f"no answer: {error}")
        except TimeoutError:
            return KmsAnswer(0, f"no answer within {seconds:g} s")
        text = answer.body.decode(errors="replace")
        try:
            return KmsAnswer(answer.status, read_json(text))
        except ValueError:
            return KmsAnswer(answer.status, text)

    def _client(self, identity: Identity | None) -> HttpClient:
        """Return the HTTP client with this client certificate; it does not verify servers."""
        if identity not in self._clients:
            tls = client_context(identity)
            self._clients[identity] = HttpClient(timeout=TIMEOUT, max_answer=MAX_RESPONSE, tls=tls)
        return self._clients[identity]
