"""A client of a KMS over gRPC: it takes and returns the same JSON as the client over pRPC, with gRPC's statuses.

Onboard is called without TLS, KMS with TLS; calls with a client certificate go to the port that demands one. Pages of
other services are requested over HTTP.

Import this module only for `--transport grpc`: grpcio costs time and memory.
"""

import contextlib
import json
from typing import Any, Final

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import Default as default_pool
from google.protobuf.message_factory import GetMessageClass

from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.proto import kms_pb2
from dstack_emu.attest.prpc import decode_json, encode_json
from dstack_emu.runbook.kms_client import TIMEOUT, KmsAnswer, PrpcKmsClient
from dstack_emu.runbook.target import TargetKms
from dstack_emu.transport.errors import TransportError
from dstack_emu.transport.grpc_client import StatusError, call, certificate_of, running
from dstack_emu.transport.pccs_client import AttestationVerifier
from dstack_emu.transport.ratls import AttestedServer, peer_of
from dstack_emu.transport.tls import Identity

PACKAGE: Final = kms_pb2.DESCRIPTOR.package


class GrpcKmsClient:
    """Calls by gRPC."""

    finishes_by_page = False

    def __init__(self, onboard_token: str = "") -> None:
        self._pages = PrpcKmsClient(onboard_token)
        self._of_onboarding = (("x-onboard-token", onboard_token),) if onboard_token else ()
        self._exit = contextlib.ExitStack()
        self._exit.enter_context(running())

    def address(self, kms: TargetKms, method: str) -> str:
        """Return the port for clients without a certificate."""
        return kms.grpc

    async def call(
        self,
        kms: TargetKms,
        method: str,
        arguments: dict[str, Any],
        identity: Identity | None = None,
        *,
        seconds: float = TIMEOUT,
    ) -> KmsAnswer:
        """Call `kms.Service/Method` at the port that serves it."""
        descriptor: MethodDescriptor = default_pool().FindMethodByName(f"{PACKAGE}.{method}")
        request = decode_json(GetMessageClass(descriptor.input_type), json.dumps(arguments).encode())
        try:
            answer = await call(
                kms.grpc if identity is None else kms.grpc_mtls,
                f"{PACKAGE}.{method.replace('.', '/')}",
                request,
                GetMessageClass(descriptor.output_type),
                seconds=seconds,
                secure=not method.startswith("Onboard."),
                identity=identity,
                metadata=self._of_onboarding if method.startswith("Onboard.") else (),
            )
        except StatusError as error:
            return KmsAnswer(400, {"error": str(error)}, error.code)
        except TransportError as error:
            return KmsAnswer(0, f"no answer: {error.cause}", "")
        return KmsAnswer(200, json.loads(encode_json(answer)), "OK")

    async def verify_server(self, kms: TargetKms, verifier: AttestationVerifier | None) -> AttestedServer:
        """Verify the certificate that the gRPC port shows."""
        try:
            return await peer_of(await certificate_of(kms.grpc, seconds=TIMEOUT), verifier)
        except (TransportError, FormatError) as error:
            raise VerificationError(str(error)) from error

    async def get(self, url: str) -> KmsAnswer:
        """GET a page."""
        return await self._pages.get(url)

    async def finish_page(self, kms: TargetKms) -> KmsAnswer:
        """GET the page that ends the onboard phase."""
        return await self._pages.finish_page(kms)

    async def post(self, url: str, document: Any) -> KmsAnswer:
        """POST JSON."""
        return await self._pages.post(url, document)

    async def close(self) -> None:
        """Close the HTTP connections and stop grpcio; a gRPC connection ends with its call."""
        await self._pages.close()
        self._exit.close()
