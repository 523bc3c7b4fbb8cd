"""A guest that registers at a gateway of its deployment, as dstack-util does it after a boot, and again later.

It has a certificate issued by its KMS, calls RegisterCvm at the gateways in turn, and writes the answer as a WireGuard
configuration. There is no WireGuard tunnel: the configuration is a file that nothing reads. Source: dstack
`dstack-util/src/system_setup.rs` (`GatewayContext`, `AppIdValidator`) at 40eaf35e and 312dc605; `health_check` of a
registration is that of gateway_rpc.proto at 0182d857.
"""

import base64
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, x25519

from dstack_emu.attest.certificate import spki_der
from dstack_emu.attest.csr import CertificateConfig, SigningRequest
from dstack_emu.attest.errors import AttestError, VerificationError
from dstack_emu.attest.kdf import p256_from_uniform, pkcs8_pem
from dstack_emu.attest.proto import gateway_pb2 as pb
from dstack_emu.attest.report_data import ratls_report_data
from dstack_emu.simulator.app_keys import AppKeys, CertificateIssuer
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.gateway_keys import GatewayKeys, Registration
from dstack_emu.simulator.guest_files import write_private
from dstack_emu.simulator.seed import Entropy
from dstack_emu.simulator.trust_domain import TrustDomain
from dstack_emu.transport.client import MoreHeaders
from dstack_emu.transport.http_client import Route, direct
from dstack_emu.transport.ratls import TIMEOUT, AttestedServer, RaTlsClient, RaTlsError
from dstack_emu.transport.tls import Identity

WIREGUARD_FILE: Final = "dstack-wg0.conf"
"""The WireGuard configuration, in a real guest in /etc/wireguard."""
CACHE_FILE: Final = "gateway-cache.json"
"""Keys and certificates for gateways, in a real guest in /run/dstack."""

REFRESH: Final = 180.0
"""Seconds after which a guest registers again."""
FIRST_RETRY, LAST_RETRY = 30.0, 120.0
"""Seconds after which a guest without a configuration tries again, the first time and at most."""

SUBJECT: Final = "dstack-guest-agent"
CERTIFICATE_LIFE: Final = 10 * 24 * 3600
"""The validity of a certificate for gateways in seconds."""
RENEWAL_MARGIN: Final = 600
"""Seconds before its end at which such a certificate is replaced."""
ANY: Final = "any"
"""The gateway app id that allows every gateway: then no certificate is verified at all."""

_LISTEN_PORT: Final = 9182
_KEEPALIVE: Final = 25
_OLD_GATEWAY: Final = "no attestation provided"
"""What a gateway before 0.5.6 answers to a certificate without evidence."""


class GatewayClient:
    """Registers one guest that has its keys. `registration` is what it has got so far.

    `issuer` issues its certificates; `now` is the time in Unix seconds; its files are written into `folder`.
    `timeout` is that of a call in seconds; `headers` are added to each call, and `route` says where they go.
    """

    def __init__(
        self,
        domain: TrustDomain,
        keys: AppKeys,
        issuer: CertificateIssuer,
        entropy: Entropy,
        now: Callable[[], int],
        folder: Path,
        *,
        timeout: float = TIMEOUT,
        headers: MoreHeaders | None = None,
        route: Route = direct,
    ) -> None:
        self._domain, self._app_keys, self._issuer = domain, keys, issuer
        self._entropy, self._now, self._folder = entropy, now, folder
        self._connect = functools.partial(RaTlsClient, timeout=timeout, headers=headers, route=route)
        self.registration = Registration()

    async def register(self, urls: Sequence[str]) -> None:
        """Register at the first gateway (`https://host:port`) that accepts; raise `GuestError` with upstream's text.

        If all of them fail, the error is that of the first one.
        """
        if not self._app_keys.gateway_app_id:
            raise GuestError("Missing allowed dstack-gateway app id")
        before = self.registration
        keys = await self._usable_keys()
        if self._domain.release.keeps_gateway_keys_before_registration:
            self._keep(Registration(keys, before.configuration))
        if not urls:
            raise GuestError("Missing gateway urls")
        answer = await self._first_answer(urls, keys)
        if not answer.HasField("wg"):
            raise GuestError("Missing wg info")
        self._keep(Registration(keys, wireguard_configuration(keys.wg_sk, answer.wg)))

    def restore(self, registration: Registration) -> None:
        """Have what it had when `registration` was read, with its files."""
        self.forget()
        self._keep(registration)

    def forget(self) -> None:
        """Have nothing, and remove the files."""
        self.registration = Registration()
        for name in (WIREGUARD_FILE, CACHE_FILE):
            (self._folder / name).unlink(missing_ok=True)

    def _keep(self, registration: Registration) -> None:
        self.registration = registration
        if registration.keys is not None:
            write_private(self._folder / CACHE_FILE, registration.keys.to_json())
        if registration.configuration:
            write_private(self._folder / WIREGUARD_FILE, registration.configuration)

    # ---- keys and certificates

    async def _usable_keys(self) -> GatewayKeys:
        """Return the keys of before, or new certificates if those expire; the WireGuard key pair stays the same."""
        known, now = self.registration.keys, self._now()
        if known is not None and now + RENEWAL_MARGIN < known.cert_not_after:
            return known
        private, public = wireguard_key_pair(self._entropy) if known is None else (known.wg_sk, known.wg_pk)
        key, not_after = p256_from_uniform(self._entropy(48)), now + CERTIFICATE_LIFE
        return GatewayKeys(
            client_cert=await self._certificate(key, not_after, with_quote=False),
            client_cert_with_quote=await self._certificate(key, not_after, with_quote=True),
            client_key=pkcs8_pem(key),
            cert_not_after=not_after,
            wg_sk=private,
            wg_pk=public,
        )

    async def _certificate(self, key: ec.EllipticCurvePrivateKey, not_after: int, *, with_quote: bool) -> str:
        config = CertificateConfig(
            subject=SUBJECT,
            client_auth=True,
            with_attestation=with_quote,
            with_app_info=True,
            not_after=not_after,
        )
        spki = spki_der(key.public_key())
        request = SigningRequest.make(spki, config, self._domain.attest(ratls_report_data(spki)))
        with _refused_as(f"Failed to request cert{' with quote' if with_quote else ''}"):
            return "\n".join(await self._issuer.sign(request, request.sign(key)))

    # ---- the call

    async def _first_answer(self, urls: Sequence[str], keys: GatewayKeys) -> pb.RegisterCvmResponse:
        first: GuestError | None = None
        for url in urls:
            try:
                return await self._register_at(url, keys)
            except GuestError as error:
                first = first or error
        raise GuestError(f"Failed to register CVM, all dstack-gateway urls are down: {first}") from first

    async def _register_at(self, url: str, keys: GatewayKeys) -> pb.RegisterCvmResponse:
        try:
            return await self._call(url, keys, keys.client_cert)
        except GuestError as error:
            if _OLD_GATEWAY not in str(error):
                raise
        return await self._call(url, keys, keys.client_cert_with_quote)

    async def _call(self, url: str, keys: GatewayKeys, certificate: str) -> pb.RegisterCvmResponse:
        manifest = self._domain.manifest
        policy, requirements = manifest.port_policy, manifest.requirements
        request = pb.RegisterCvmRequest(
            client_public_key=keys.wg_pk,
            port_policy=pb.PortPolicy(
                ports=[pb.PortAttrs(port=each.port, pp=each.pp) for each in policy.ports],
                restrict_mode=policy.restrict_mode,
            ),
            health_check=requirements is not None and requirements.health_check,
        )
        allowed = self._app_keys.gateway_app_id
        is_verified = allowed != ANY
        with _refused_as("Failed to create RA client"):
            client = self._connect(
                f"{url.rstrip('/').removesuffix('/prpc')}/prpc",
                identity=Identity(certificate, keys.client_key),
                root_ca=self._app_keys.ca_cert if is_verified else None,
                check_peer=functools.partial(require_gateway, allowed) if is_verified else None,
            )
        with _refused_as("Failed to register CVM"):
            try:
                return await client.call("RegisterCvm", request, pb.RegisterCvmResponse)
            finally:
                await client.close()


def require_gateway(allowed: str, peer: AttestedServer) -> None:
    """Raise `VerificationError` if the app id in a server's certificate is not in the text of the allowed ones."""
    if peer.app_id is None:
        raise VerificationError("Missing app id")
    if peer.app_id.hex() not in allowed.lower():
        raise VerificationError(f"Invalid dstack-gateway app id: {peer.app_id.hex()}")


def wireguard_key_pair(entropy: Entropy) -> tuple[str, str]:
    """Make a WireGuard key pair: private and public key, 32 bytes each, in base64."""
    secret = bytearray(entropy(32))
    secret[0] &= 248  # the bits that `wg genkey` clears and sets, as X25519 does when it uses the key
    secret[31] = secret[31] & 127 | 64
    public = x25519.X25519PrivateKey.from_private_bytes(bytes(secret)).public_key().public_bytes_raw()
    return base64.b64encode(secret).decode(), base64.b64encode(public).decode()


def wireguard_configuration(private_key: str, answer: pb.WireGuardConfig) -> str:
    """Return the file dstack-wg0.conf: this guest, and the gateways sorted by their public keys."""
    own: Mapping[str, str | int] = {
        "PrivateKey": private_key,
        "ListenPort": _LISTEN_PORT,
        "Address": f"{answer.client_ip}/32",
    }
    servers = sorted(answer.servers, key=lambda server: server.pk)
    return "\n".join([_section("Interface", own), *(_section("Peer", _peer(server)) for server in servers)])


def _peer(server: pb.WireGuardPeer) -> Mapping[str, str | int]:
    return {
        "PublicKey": server.pk,
        "AllowedIPs": f"{server.ip.partition('/')[0]}/32",
        "Endpoint": server.endpoint,
        "PersistentKeepalive": _KEEPALIVE,
    }


def _section(name: str, values: Mapping[str, str | int]) -> str:
    return "".join([f"[{name}]\n", *(f"{key} = {value}\n" for key, value in values.items())])


@contextlib.contextmanager
def _refused_as(step: str) -> Iterator[None]:
    try:
        yield
    except (RaTlsError, AttestError, GuestError) as error:
        raise GuestError(f"{step}: {error}") from error
