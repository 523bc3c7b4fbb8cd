"""The gateway's client of its guest agent: its certificate, its app id, and quotes of its keys.

A gateway is an application in a trust domain like any other; DSTACK_AGENT_ADDRESS is the address of its agent
(`unix:/path` or `http://host:port`). Source: dstack `gateway/src/{main,distributed_certbot}.rs` at 312dc605.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.proto import dstack_guest_pb2 as pb
from dstack_emu.attest.prpc import encode_json
from dstack_emu.gateway.errors import GatewayError
from dstack_emu.transport.client import MoreHeaders, PrpcClient, RpcError, TransportError

DEFAULT_ADDRESS: Final = "unix:/var/run/dstack.sock"
SUBJECT: Final = "dstack-gateway"
TIMEOUT: Final = 10.0

A = TypeVar("A", bound=Message)


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """The certificate chain of the RPC listener (PEM, leaf first; the last one is the CA of clients), and its key."""

    chain: tuple[str, ...]
    key: str = field(repr=False)


class GuestAgent:
    """A client of one guest agent, for one gateway. Close it."""

    def __init__(self, address: str, *, timeout: float = TIMEOUT, headers: MoreHeaders | None = None) -> None:
        self._client = PrpcClient(address, timeout=timeout, headers=headers)

    async def tls_identity(self, alt_names: Sequence[str]) -> TlsIdentity:
        """Request a certificate with evidence and app info; raise `GatewayError`."""
        request = pb.GetTlsKeyArgs(
            subject=SUBJECT,
            alt_names=alt_names,
            usage_ra_tls=True,
            usage_server_auth=True,
            usage_client_auth=True,
            with_app_info=True,
        )
        answer = await self._call("GetTlsKey", request, pb.GetTlsKeyResponse)
        if not answer.certificate_chain:
            raise GatewayError("Empty certificate chain")
        return TlsIdentity(tuple(answer.certificate_chain), answer.key)

    async def app_id(self) -> bytes:
        """Request the app id of this gateway; raise `GatewayError`."""
        return (await self.info()).app_id

    async def info(self) -> pb.AppInfo:
        """Request what the agent tells about this gateway; raise `GatewayError`."""
        return await self._call("Info", Empty(), pb.AppInfo)

    async def quotes(self, report_data: bytes) -> tuple[str, str]:
        """Request evidence in both forms; return the answers of GetQuote and Attest in JSON. Raises `GatewayError`."""
        request = pb.RawQuoteArgs(report_data=report_data)
        quote = await self._call("GetQuote", request, pb.GetQuoteResponse)
        attestation = await self._call("Attest", request, pb.AttestResponse)
        return encode_json(quote).decode(), encode_json(attestation).decode()

    async def _call(self, method: str, request: Message, answer: type[A]) -> A:
        try:
            return await self._client.call(method, request, answer)
        except (TransportError, RpcError, AttestError) as error:
            raise GatewayError(f"guest agent, {method}: {error}") from error

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
