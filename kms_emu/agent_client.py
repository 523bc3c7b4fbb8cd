"""The client of the KMS's own guest agent, which quotes for the KMS and describes its VM.

A KMS is an application in a trust domain like any other; DSTACK_AGENT_ADDRESS is the address of its agent (`unix:/path`
or `http://host:port`). A KMS without an agent refuses every trusted RPC.
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
        """Request a quote over report_data; return the versioned attestation unparsed. Raises `UnavailableError`."""
        try:
            answer = await self._client.call("Attest", pb.RawQuoteArgs(report_data=report_data), pb.AttestResponse)
        except (TransportError, RpcError, AttestError) as error:
            raise UnavailableError(str(error)) from error
        return answer.attestation

    async def evidence(self, report_data: bytes) -> Attestation:
        """Request a quote over report_data; return the decoded attestation.

        Raises `UnavailableError`, or `NotAttestedError` if the answer is not an attestation.
        """
        data = await self.attest(report_data)
        try:
            return decode(data)
        except AttestError as error:
            raise NotAttestedError(f"Invalid attestation: {error}") from error

    async def vm_config(self) -> str:
        """Return the text of the VM's configuration from Info's answer; raise `UnavailableError`."""
        try:
            return (await self._client.call("Info", Empty(), pb.AppInfo)).vm_config
        except (TransportError, RpcError, AttestError) as error:
            raise UnavailableError(str(error)) from error

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
