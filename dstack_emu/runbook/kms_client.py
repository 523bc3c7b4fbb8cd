"""Asking a KMS as an operator asks it: a method and JSON go in, a status and JSON come out.

`KmsClient` is the seam between the runbook and a transport. The one here is pRPC, in JSON over HTTP/1.1; the one for
gRPC is in `runbook.grpc_kms_client`. No certificate of a server is checked in either, as the runbook's own `curl -sk`
checks none: what a server proves is a step of its own.
"""

import json
from dataclasses import dataclass
from typing import Any, Final, Protocol

from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.errors import VerificationError
from dstack_emu.attest.proto import kms_pb2 as pb
from dstack_emu.runbook.target import TargetKms
from dstack_emu.transport.client import KEPT_IDLE, MAX_RESPONSE
from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError
from dstack_emu.transport.http_client import HttpClient
from dstack_emu.transport.pccs_client import AttestationVerifier
from dstack_emu.transport.ratls import AttestedServer, RaTlsClient, RaTlsError
from dstack_emu.transport.tls import Identity, client_context

TIMEOUT: Final = 60.0
"""Seconds for one call: a platform may take its time to quote."""


@dataclass(frozen=True, slots=True)
class KmsAnswer:
    """What came back: a status, and the body, parsed where it is JSON. Status 0: nothing came, the body says why.

    Of a call by gRPC `code` is the name of its status, and `status` what pRPC has in its place: 200 or 400.
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
        """The status in its transport's own terms."""
        return self.code or self.status

    @property
    def success(self) -> str:
        """What a success has as its status in that transport."""
        return "200" if self.code is None else "OK"

    @property
    def error(self) -> str:
        """The text of a refusal; empty for a success."""
        if self.ok:
            return ""
        text = self.body.get("error") if isinstance(self.body, dict) else None
        return text if isinstance(text, str) else str(self.body)

    def field(self, name: str) -> Any:
        """A field of a success, None where there is none."""
        return self.body.get(name) if self.ok and isinstance(self.body, dict) else None


class KmsClient(Protocol):
    """A transport. What it asks raises nothing, but for `peer`.

    With `finishes_by_page` the end of the onboard phase is a page, `/finish`, else the RPC Onboard.Finish.
    """

    finishes_by_page: bool

    def address(self, kms: TargetKms, method: str) -> str:
        """Where a method of a KMS is asked, for a person."""
        ...

    async def call(
        self, kms: TargetKms, method: str, arguments: dict[str, Any], identity: Identity | None = None
    ) -> KmsAnswer:
        """Call `Service.Method` of a KMS, with a client certificate if one is given."""
        ...

    async def peer(self, kms: TargetKms, verifier: AttestationVerifier | None) -> AttestedServer:
        """What a KMS that runs proves by its certificate; raise `AttestError` where that does not hold."""
        ...

    async def get(self, url: str) -> KmsAnswer:
        """GET a page: not every question is an RPC."""
        ...

    async def post(self, url: str, document: Any) -> KmsAnswer:
        """POST JSON: not every service has RPCs."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class PrpcKmsClient:
    """pRPC in JSON."""

    finishes_by_page = True

    def __init__(self) -> None:
        self._clients: dict[Identity | None, HttpClient] = {}

    def address(self, kms: TargetKms, method: str) -> str:
        """The URL of the phase that serves it."""
        return kms.onboard if method.startswith("Onboard.") else kms.runtime

    async def call(
        self, kms: TargetKms, method: str, arguments: dict[str, Any], identity: Identity | None = None
    ) -> KmsAnswer:
        """POST to `/prpc/Service.Method?json`."""
        url = f"{self.address(kms, method)}/prpc/{method}?json"
        return await self._ask("POST", url, json.dumps(arguments), identity)

    async def peer(self, kms: TargetKms, verifier: AttestationVerifier | None) -> AttestedServer:
        """Judge the certificate behind an answer of GetMeta."""
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
        return await self._ask("GET", url, None, None)

    async def post(self, url: str, document: Any) -> KmsAnswer:
        """POST JSON."""
        return await self._ask("POST", url, json.dumps(document), None)

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            await client.close()

    async def _ask(self, verb: str, url: str, body: str | None, identity: Identity | None) -> KmsAnswer:
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            answer = await self._client(identity).send(verb, url, None if body is None else body.encode(), headers)
        except (NoAnswerError, AnswerTooLongError) as error:
            return KmsAnswer(0, f"no answer: {error}")
        text = answer.body.decode(errors="replace")
        try:
            return KmsAnswer(answer.status, json.loads(text))
        except (ValueError, RecursionError):
            return KmsAnswer(answer.status, text)

    def _client(self, identity: Identity | None) -> HttpClient:
        """Return the client that shows this identity, if any; whoever answers is not verified here."""
        if identity not in self._clients:
            tls = client_context(identity)
            self._clients[identity] = HttpClient(timeout=TIMEOUT, max_answer=MAX_RESPONSE, kept_idle=KEPT_IDLE, tls=tls)
        return self._clients[identity]
