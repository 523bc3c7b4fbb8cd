"""The measured KMS: a process on its own core; the stack (agent, PCCS, webhook) and the client share the other core.

It is set up as by a user, with a kms.toml beside a stack. The stack's policy allows it, because its measurements are
those of kms-src.
"""

import asyncio
import json
import ssl
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from bench.load import Connection, connect_tls, connect_unix, post
from bench.processes import OTHER_CORE, SERVER_CORE, command, on_core, running, running_stack
from dstack_emu.attest.attestation import Attestation, decode
from dstack_emu.attest.issuing import load_authority
from dstack_emu.attest.kdf import load_p256_pem
from dstack_emu.attest.proto import dstack_guest_pb2, kms_pb2
from dstack_emu.attest.release import Release
from dstack_emu.transport.client import PrpcClient
from dstack_emu.transport.ratls import make_identity
from dstack_emu.transport.tls import Identity, client_context

TIMEOUT = 10.0
A = TypeVar("A", bound=Message)

_TOML = """
[rpc]
address = "127.0.0.1"
port = 0
[rpc.tls]
key = "{certs}/rpc.key"
certs = "{certs}/rpc.crt"
[rpc.tls.mutual]
ca_certs = "{certs}/tmp-ca.crt"
[core]
cert_dir = "{certs}"
[core.attestation]
insecure_allow_external_trust_anchors = true
emulated_pccs = true
[core.attestation.urls]
pccs = "{pccs}"
[core.attestation.root_ca]
tdx = "{root}"
[core.image]
verify = {verify}
[core.auth_api.webhook]
url = "{webhook}"
[core.onboard]
address = "127.0.0.1"
port = 0
"""


@dataclass(frozen=True, slots=True)
class MeasuredKms:
    """A KMS in its runtime phase: process, address, certificates, and its stack."""

    pid: int
    address: tuple[str, int]
    certs: Path
    stack: dict[str, Any]
    temp_ca: kms_pb2.GetTempCaCertResponse

    @property
    def root_der(self) -> bytes:
        """Return the root that this KMS trusts."""
        return ssl.PEM_cert_to_DER_cert(Path(self.stack["root_ca"]).read_text())

    def connect(self, context: ssl.SSLContext, method: str, body: bytes = b"", port: int | None = None) -> Connection:
        """Connect, to this KMS or to a server at another port, for calls of one method."""
        host, own_port = self.address
        return Connection(connect_tls((host, port or own_port), context), post(f"/prpc/KMS.{method}?json", body))

    def app_key_request(self) -> bytes:
        """Return the body of GetAppKey, as the stack's app sends it."""
        vm_config: str = json.loads(call(self.stack["app"]["dstack_sock"], "Info"))["vm_config"]
        return json.dumps({"api_version": 1, "vm_config": vm_config}).encode()

    def identities(self, count: int) -> list[Identity]:
        """Make certificates for the stack's app, each with its own key and evidence for that key."""
        temp_ca = load_authority(
            self.temp_ca.temp_ca_cert, load_p256_pem(self.temp_ca.temp_ca_key, "key"), "temporary CA"
        )

        async def make() -> list[Identity]:
            async with PrpcClient(self.stack["app"]["dstack_sock"], timeout=TIMEOUT) as agent:

                async def attester(report_data: bytes) -> Attestation:
                    question = dstack_guest_pb2.RawQuoteArgs(report_data=report_data)
                    return decode((await agent.call("Attest", question, dstack_guest_pb2.AttestResponse)).attestation)

                keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(count)]
                return [await make_identity(temp_ca, key, attester, int(time.time())) for key in keys]

        return asyncio.run(make())


SERVICES = (sys.executable, "-m", "bench.services")


@contextmanager
def measured_kms(release: Release, *, verify_images: bool = False) -> Iterator[MeasuredKms]:
    """Run a stack and a KMS, bootstrap it, and end its onboard phase; the block runs on the client's core.

    Webhook and PCCS are another process, with the stack's seed and policy.
    """
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        running_stack(OTHER_CORE, release) as (_, stack),
        running((*SERVICES, stack["seed"], stack["policies"]["src"]), OTHER_CORE) as (_, urls),
    ):
        certs, config = Path(folder, "certs"), Path(folder, "kms.toml")
        services = stack["services"] = stack["services"] | json.loads(urls)
        config.write_text(
            _TOML.format(
                certs=certs,
                pccs=services["pccs"],
                root=stack["root_ca"],
                webhook=services["auth-src"],
                verify=str(verify_images).lower(),
            )
        )
        kms = command("kms", release, "--config", str(config))
        environment = {"DSTACK_AGENT_ADDRESS": services["agent-src"]}
        with running(kms, SERVER_CORE, environment=environment) as (process, line), on_core(OTHER_CORE):
            url = urlsplit(json.loads(line)["url"])
            temp_ca = asyncio.run(_set_up(url.netloc))
            yield MeasuredKms(process.pid, (str(url.hostname), int(url.port or 0)), certs, stack, temp_ca)


async def _set_up(address: str) -> kms_pb2.GetTempCaCertResponse:
    async with PrpcClient(f"http://{address}/prpc", timeout=TIMEOUT) as client:
        await client.call("Onboard.Bootstrap", kms_pb2.BootstrapRequest(domain="localhost"), kms_pb2.BootstrapResponse)
        await client.call("Onboard.Finish", Empty(), Empty)
    async with PrpcClient(f"https://{address}/prpc", timeout=TIMEOUT, ssl=client_context()) as client:
        return await client.call("GetTempCaCert", Empty(), kms_pb2.GetTempCaCertResponse)


def call(socket_path: str, method: str, body: bytes = b"{}") -> bytes:
    """Call a guest agent once."""
    connection = Connection(connect_unix(socket_path), post(f"/{method}", body))
    try:
        return connection.call()
    finally:
        connection.close()
