"""The guest agent's RPCs: what a trust domain offers to its application.

One method for each RPC, over plain values and messages. Every call gets new evidence. Source: dstack
`guest-agent/src/rpc_service.rs` at 312dc605; EmitEvent as in 0.5.x at 40eaf35e.
"""

import base64
import json
from dataclasses import dataclass
from typing import Final

from coincurve import PrivateKey
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.app_info import AppInfo, decode_app_info
from dstack_emu.attest.attestation import V1Encoder
from dstack_emu.attest.cache import Latest
from dstack_emu.attest.certificate import spki_der
from dstack_emu.attest.csr import CertificateConfig, SigningRequest, require_validity_order
from dstack_emu.attest.errors import AttestError, FormatError
from dstack_emu.attest.eventlog import TdxEvent, for_get_quote, log_to_json
from dstack_emu.attest.kdf import derive_key, derive_p256, pkcs8_pem
from dstack_emu.attest.proto import dstack_guest_pb2 as pb
from dstack_emu.attest.proto import dstack_guest_v1_pb2 as v1
from dstack_emu.attest.report_data import APP_DATA, DEFAULT_HASH, pad_report_data, ratls_report_data, report_data
from dstack_emu.attest.signature import k256_key, sign_recoverable
from dstack_emu.simulator import app_signature
from dstack_emu.simulator.app_keys import AppKeys, CertificateIssuer
from dstack_emu.simulator.app_signature import PREHASHED, known_algorithm
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.seed import Entropy
from dstack_emu.simulator.trust_domain import TrustDomain
from dstack_emu.transport.aside import run_aside

EMIT_EVENT_REMOVED: Final = (
    "EmitEvent was removed in dstack 0.6.0; runtime RTMR3 events are system-owned and cannot be extended by apps"
)
SIGNING_PATH, SIGNING_PURPOSE = "vms", "signing"


@dataclass(frozen=True, slots=True)
class ProvidedKeys:
    """The keys of an agent, the issuer of its certificates, and the certificate (PEM) that Info returns."""

    keys: AppKeys
    issuer: CertificateIssuer
    demo_certificate: str


class GuestAgent:
    """The agent of one trust domain.

    Before `provide` the domain waits for its keys: the agent returns evidence, and refuses RPCs that need a key.
    """

    def __init__(self, domain: TrustDomain, entropy: Entropy, *, allow_emit_event: bool = True) -> None:
        self.domain, self._entropy = domain, entropy
        self._allow_emit_event = allow_emit_event
        self._provided: ProvidedKeys | None = None
        self._encoder, self._shown_log = V1Encoder(), Latest(_shown_log)

    @property
    def has_keys(self) -> bool:
        """Return whether it has keys."""
        return self._provided is not None

    @property
    def keys(self) -> AppKeys:
        """Return its keys; raise `GuestError` if it has none."""
        return self._require_provided().keys

    @property
    def _demo_certificate(self) -> str:
        return "" if self._provided is None else self._provided.demo_certificate

    async def provide(self, keys: AppKeys, issuer: CertificateIssuer) -> None:
        """Accept keys, and request the certificate that Info returns, as upstream's agent does at its start.

        If that is refused, the agent has what it had before: upstream's does not start then.
        """
        before, self._provided = self._provided, ProvidedKeys(keys, issuer, self._demo_certificate)
        key = derive_p256(self._entropy(32), [])
        config = CertificateConfig(subject="demo-cert", client_auth=True, with_attestation=True)
        try:
            certificate = "\n".join(await self.issue(key, config))
        except BaseException:
            self._provided = before
            raise
        self._provided = ProvidedKeys(keys, issuer, certificate)

    def capture(self) -> ProvidedKeys | None:
        """Return its keys with issuer and certificate, None if it has none."""
        return self._provided

    def restore(self, state: ProvidedKeys | None) -> None:
        """Restore captured keys."""
        self._provided = state

    # ---- evidence

    async def get_quote(self, request: pb.RawQuoteArgs) -> pb.GetQuoteResponse:
        """Quote up to 64 bytes of report_data."""
        return self._quote(pad_report_data(request.report_data))

    async def attest(self, request: pb.RawQuoteArgs) -> pb.AttestResponse:
        """Return evidence over up to 64 bytes of report_data, in the form of hardware (V0)."""
        return pb.AttestResponse(attestation=self.domain.attest(pad_report_data(request.report_data)).encode())

    async def emit_event(self, request: pb.EmitEventArgs) -> Empty:
        """Extend RTMR3 with an event of the application, as hardware does; next's simulator has no such method."""
        if self.domain.release.emit_event_removed:
            raise GuestError(EMIT_EVENT_REMOVED)
        if not self._allow_emit_event:
            raise GuestError("Service not found: EmitEvent")
        self.domain.measure(request.event, request.payload)
        return Empty()

    async def tdx_quote(self, request: pb.TdxQuoteArgs) -> pb.TdxQuoteResponse:
        """Quote a hash of the given content under a prefix."""
        algorithm = request.hash_algorithm or DEFAULT_HASH
        tag = request.prefix or APP_DATA
        content = request.report_data
        data = await run_aside(len(content), lambda: report_data(tag, content, algorithm))
        answer = self._quote(data)
        return pb.TdxQuoteResponse(
            quote=answer.quote,
            event_log=answer.event_log,
            hash_algorithm=algorithm,
            prefix="" if algorithm == "raw" else tag,
        )

    async def raw_quote(self, request: pb.RawQuoteArgs) -> pb.TdxQuoteResponse:
        """Quote exactly 64 bytes."""
        return await self.tdx_quote(pb.TdxQuoteArgs(report_data=request.report_data, hash_algorithm="raw"))

    async def get_attestation_for_app_key(self, request: pb.GetAttestationForAppKeyRequest) -> pb.GetQuoteResponse:
        """Quote the public key of `sign`, as a `dip1::` text."""
        algorithm = request.algorithm
        if algorithm == PREHASHED and self.domain.release.attests_key_of_prehashed:
            algorithm = "secp256k1"
        _, public_key = self._signing_key(known_algorithm(algorithm, ("secp256k1", "ed25519")))
        kind = "ed25519-pk" if len(public_key) == 32 else "secp256k1c-pk"
        text = f"dip1::{kind}:{base64.urlsafe_b64encode(public_key).decode().rstrip('=')}"
        return self._quote(pad_report_data(text.encode()))

    def _quote(self, data: bytes) -> pb.GetQuoteResponse:
        evidence = self.domain.attest(data)
        return pb.GetQuoteResponse(
            quote=evidence.quote,
            event_log=self._shown_log(evidence.event_log),
            report_data=data,
            vm_config=evidence.config,
            attestation=self._encoder.encode(evidence) if self.domain.release.get_quote_has_attestation else b"",
        )

    # ---- keys and certificates

    async def get_key(self, request: pb.GetKeyArgs) -> pb.GetKeyResponse:
        """Derive the application's key at a path, with the signature chain that proves its origin."""
        return await run_aside(len(request.path) + len(request.purpose), lambda: self._key(request))

    def _key(self, request: pb.GetKeyArgs) -> pb.GetKeyResponse:
        algorithm = known_algorithm(request.algorithm or "secp256k1", ("secp256k1", "ed25519"))
        key, public_key = self._derive(request.path, algorithm)
        message = f"{request.purpose}:{public_key.hex()}".encode()
        signature = sign_recoverable(_parse_k256(self.keys.k256_key, "app k256 key"), message)
        return pb.GetKeyResponse(key=key, signature_chain=[signature, self.keys.k256_signature])

    async def derive_k256_key(self, request: pb.GetKeyArgs) -> pb.DeriveK256KeyResponse:
        """Do the same as `get_key`, under Tappd's name."""
        answer = await self.get_key(request)
        return pb.DeriveK256KeyResponse(k256_key=answer.key, k256_signature_chain=answer.signature_chain)

    async def get_tls_key(self, request: pb.GetTlsKeyArgs) -> pb.GetTlsKeyResponse:
        """Make a new P-256 key, and request a certificate for it."""
        config = certificate_config(request)
        return await self._key_and_chain(derive_p256(self._entropy(32), []), config)

    async def derive_tls_key(self, request: pb.DeriveKeyArgs) -> pb.GetTlsKeyResponse:
        """Derive a P-256 key from a path, or make a random one, with a certificate: DeriveKey of Tappd."""
        material = self._entropy(32) if request.random_seed else self.keys.k256_key
        config = CertificateConfig(
            subject=request.subject,
            alt_names=tuple(request.alt_names),
            server_auth=request.usage_server_auth,
            client_auth=request.usage_client_auth,
            with_attestation=request.usage_ra_tls,
        )
        return await self._key_and_chain(derive_p256(material, [request.path.encode()]), config)

    async def _key_and_chain(self, key: ec.EllipticCurvePrivateKey, config: CertificateConfig) -> pb.GetTlsKeyResponse:
        return pb.GetTlsKeyResponse(key=pkcs8_pem(key), certificate_chain=await self.issue(key, config))

    def random(self, size: int) -> bytes:
        """Return random bytes of the agent's own source."""
        return self._entropy(size)

    async def issue(
        self, key: ec.EllipticCurvePrivateKey, config: CertificateConfig, *, as_v1: bool = False
    ) -> list[str]:
        """Have a certificate issued for a key, and return its chain in PEM, the leaf first.

        With `as_v1` the evidence that goes with the request has the form V1, whatever the hardware's is. Raises
        `GuestError` or `AttestError` if there are no keys yet, or with the words of the issuer.
        """
        spki = spki_der(key.public_key())
        evidence = self.domain.attest(ratls_report_data(spki))
        request = SigningRequest.make(spki, config, evidence.as_v1() if as_v1 else evidence)
        try:
            return await self._require_provided().issuer.sign(request, request.sign(key))
        except (AttestError, GuestError) as error:
            raise type(error)(f"Failed to sign the CSR: {error}") from error

    def _require_provided(self) -> ProvidedKeys:
        if self._provided is None:
            raise GuestError("this trust domain has no keys yet: it gets them from a KMS that its policy allows")
        return self._provided

    def _derive(self, path: str, algorithm: str) -> tuple[bytes, bytes]:
        """Return the key at a path and its public key.

        The key has 32 bytes for each algorithm; the public key has 33 bytes (compressed), or 32 for ed25519.
        """
        key = derive_key(self.keys.k256_key, [path.encode()])
        if algorithm == "ed25519":
            return key, ed25519.Ed25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw()
        return key, _parse_k256(key, "k256 key").public_key.format()

    # ---- signatures

    async def sign(self, request: pb.SignRequest) -> pb.SignResponse:
        """Sign with the key at the path `vms`; the chain leads to the KMS root key."""
        algorithm = known_algorithm(request.algorithm, ("secp256k1", "ed25519", PREHASHED))
        if algorithm == PREHASHED and len(request.data) != 32:
            raise FormatError(f"Pre-hashed signing requires a 32-byte digest, but received {len(request.data)} bytes")
        kind = "ed25519" if algorithm == "ed25519" else "secp256k1"
        key, public_key = self._signing_key(kind)
        signature = await run_aside(len(request.data), lambda: app_signature.sign(algorithm, key, request.data))
        chain = await self.get_key(pb.GetKeyArgs(path=SIGNING_PATH, purpose=SIGNING_PURPOSE, algorithm=kind))
        return pb.SignResponse(
            signature=signature, signature_chain=[signature, *chain.signature_chain], public_key=public_key
        )

    async def verify(self, request: pb.VerifyRequest) -> pb.VerifyResponse:
        """Verify a signature; an invalid one is a result, bytes that are not a key or a signature are an error."""
        algorithm = known_algorithm(request.algorithm, ("secp256k1", "ed25519", PREHASHED))
        size = len(request.data) + len(request.public_key) + len(request.signature)
        return pb.VerifyResponse(valid=await run_aside(size, lambda: app_signature.verify(algorithm, request)))

    def _signing_key(self, algorithm: str) -> tuple[bytes, bytes]:
        return self._derive(SIGNING_PATH, algorithm)

    # ---- identity

    async def info(self) -> pb.AppInfo:
        """Return the identity and the measurements of the domain.

        `device_id` is the true one, which upstream's agent does not know.
        """
        return self._info(hide_tcb_info=False)

    async def public_info(self) -> pb.AppInfo:
        """Return the public part: without tcb_info and vm_config, unless the app-compose makes them public."""
        return self._info(hide_tcb_info=not self.domain.manifest.public_tcbinfo)

    async def gpu_info(self) -> pb.GpuInfoResponse:
        """Return the GPU evidence of the boot: empty, since an emulated domain has no GPU."""
        return pb.GpuInfoResponse()

    async def version(self) -> pb.WorkerVersion:
        """Return the release of dstack that is emulated."""
        return pb.WorkerVersion(version=self.domain.release.version, rev=self.domain.release.revision)

    def app_info(self) -> AppInfo:
        """Return the present identity and measurements of the domain, with the true device id."""
        return decode_app_info(self.domain.attest(bytes(64)), device_id=self.domain.platform.device_id)

    def _info(self, *, hide_tcb_info: bool) -> pb.AppInfo:
        domain, info = self.domain, self.app_info()
        report = domain.report(bytes(64))
        tcb_info = {
            "mrtd": report.mr_td.hex(),
            **{f"rtmr{i}": register.hex() for i, register in enumerate(report.rtmrs)},
            "mr_aggregated": info.mr_aggregated.hex(),
            "os_image_hash": info.os_image_hash.hex(),
            "compose_hash": info.compose_hash.hex(),
            "device_id": info.device_id.hex(),
            "event_log": [event.to_json() for event in for_get_quote(domain.event_log)],
            "app_compose": domain.manifest.text,
        }
        return pb.AppInfo(
            app_id=info.app_id,
            instance_id=info.instance_id,
            app_cert=self._demo_certificate,
            tcb_info="" if hide_tcb_info else json.dumps(tcb_info, indent=2, ensure_ascii=False),
            app_name=domain.manifest.name,
            device_id=info.device_id,
            mr_aggregated=info.mr_aggregated,
            os_image_hash=info.os_image_hash,
            key_provider_info=info.key_provider_info.decode(errors="replace"),
            compose_hash=info.compose_hash,
            vm_config="" if hide_tcb_info else domain.vm_config_json,
        )


def certificate_config(request: pb.GetTlsKeyArgs | v1.IssueCertRequest) -> CertificateConfig:
    """Return the certificate that an app requests; raise `FormatError` if it would end before it begins."""
    not_before = request.not_before if request.HasField("not_before") else None
    not_after = request.not_after if request.HasField("not_after") else None
    require_validity_order(not_before, not_after)
    return CertificateConfig(
        subject=request.subject,
        alt_names=tuple(request.alt_names),
        server_auth=request.usage_server_auth,
        client_auth=request.usage_client_auth,
        with_attestation=request.usage_ra_tls,
        with_app_info=request.with_app_info,
        not_before=not_before,
        not_after=not_after,
    )


def _shown_log(log: tuple[TdxEvent, ...]) -> str:
    """Return a log in the form of GetQuote: the text is the same until another event is measured."""
    return log_to_json(for_get_quote(log))


def _parse_k256(secret: bytes, what: str) -> PrivateKey:
    """Load a secp256k1 key; raise `FormatError`, in upstream's words, if it is no scalar."""
    try:
        return k256_key(secret)
    except FormatError as error:
        raise FormatError(f"Failed to parse {what}: signature error") from error
