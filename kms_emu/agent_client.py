"""The KMS's own guest agent: who quotes for it, and what VM it runs in.

A KMS is an application in a trust domain like any other; DSTACK_AGENT_ADDRESS says where its agent listens
(`unix:/path` or `http://host:port`). There is no way around it: a KMS without an agent answers no trusted RPC.
"""

from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.attestation import Attestation, decode
from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.proto import dstack_guest_pb2 as pb
from dstack_emu.kms_emu.errors import NotAttestedError, UnavailableError
from dstack_emu.transport.client import MoreHeaders, PrpcClient, RpcError, TransportError

DEFAULT_ADDRESS = "unix:/var/run/dstack.sock"
TIMEOUT = 10.0


class GuestAgentClient:
    """A client of one guest agent. Close it."""

    def __init__(self, address: str, *, timeout: float = TIMEOUT, headers: MoreHeaders | None = None) -> None:
        self._client = PrpcClient(address, timeout=timeout, headers=headers)

    async def attest(self, report_data: bytes) -> bytes:
        """Quote report_data: a versioned attestation, as its bytes came. Raises `UnavailableError`."""
        try:
            answer = await self._client.call("Attest", pb.RawQuoteArgs(report_data=report_data), pb.AttestResponse)
        except (TransportError, RpcError, AttestError) as error:
            raise UnavailableError(str(error)) from error
        return answer.attestation

    async def evidence(self, report_data: bytes) -> Attestation:
        """Quote report_data and decode the answer."""
        data = await self.attest(report_data)
        try:
            return decode(data)
        except AttestError as error:
            raise NotAttestedError(f"Invalid attestation: {error}") from error

    async def vm_config(self) -> str:
        """Return the VM's configuration, as Info answers it."""
        try:
            return (await self._client.call("Info", Empty(), pb.AppInfo)).vm_config
        except (TransportError, RpcError, AttestError) as error:
            raise UnavailableError(str(error)) from error

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
