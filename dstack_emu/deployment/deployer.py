"""The deployer of the stack's own app: it encrypts the app's environment.

It does what dstack's `vmm-cli.py deploy` does (dstack `vmm/src/vmm-cli.py` at 312dc605): it encrypts every variable of
the file, also those that the app-compose does not allow, which the guest drops.
"""

import hashlib
from dataclasses import dataclass

from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.encrypted_env import SEALING_SIZE, plain_env, seal
from dstack_emu.attest.errors import AttestError, VerificationError
from dstack_emu.attest.proto import kms_pb2 as pb
from dstack_emu.attest.signature import env_key_message, recover
from dstack_emu.deployment.authorization import TIMEOUT
from dstack_emu.deployment.context import StackContext
from dstack_emu.deployment.running_kms import RunningKms
from dstack_emu.kms_emu.cert_dir import ROOT_CA_CERT
from dstack_emu.simulator.errors import GuestError
from dstack_emu.transport.client import PrpcClient, RpcError, TransportError
from dstack_emu.transport.tls import client_context


@dataclass(frozen=True, slots=True)
class Deployer:
    """Encrypts the environment of the stack's own app."""

    context: StackContext

    async def encrypt(self, app_id: bytes, kms: RunningKms) -> bytes:
        """Encrypt the variables for an app, by the key that the KMS names and signs with its k256 root key.

        The random bytes are derived from the seed and the variables. Raises `GuestError` if the KMS refuses, or if the
        signature is not that of its root key.
        """
        text = plain_env(self.context.app.variables)
        seed = self.context.seed.child("deployer of the app")
        try:
            public_key = await self._env_key(app_id, kms)
            return seal(text, public_key, seed.derive(f"environment {hashlib.sha256(text).hexdigest()}", SEALING_SIZE))
        except (AttestError, TransportError, RpcError, OSError) as error:
            reason = error.text if isinstance(error, RpcError) else error
            raise GuestError(
                f"its environment cannot be encrypted: {kms.spec.service}: GetAppEnvEncryptPubKey: {reason}"
            ) from error

    async def _env_key(self, app_id: bytes, kms: RunningKms) -> bytes:
        tls = client_context(root_ca=(kms.cert_dir / ROOT_CA_CERT).read_text())
        timeout = self.context.instrumentation.patience or TIMEOUT
        headers = self.context.headers_to_kms("stack", kms.name)
        async with PrpcClient(kms.url, timeout=timeout, ssl=tls, headers=headers) as client:
            meta = await client.call("prpc/KMS.GetMeta", Empty(), pb.GetMetaResponse)
            answer = await client.call("prpc/KMS.GetAppEnvEncryptPubKey", pb.AppId(app_id=app_id), pb.PublicKeyResponse)
        if answer.signature_v1:
            message, signature = env_key_message(app_id, answer.public_key, answer.timestamp), answer.signature_v1
        else:
            message, signature = env_key_message(app_id, answer.public_key), answer.signature
        signer = recover(signature, message)
        if signer != meta.k256_pubkey:
            raise VerificationError(
                f"signature of the KMS's k256 root key {meta.k256_pubkey.hex()} expected, got that of {signer.hex()}"
            )
        return answer.public_key
