"""The files of a gateway's TLS: its own certificate from its guest agent, static certificates, and the CA of domains.

Source: dstack `gateway/src/{main,main_service}.rs` at 312dc605.
"""

import ssl
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import urlsplit

from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.issuing import CertificateAuthority, load_authority
from dstack_emu.attest.kdf import load_p256_pem, pkcs8_pem
from dstack_emu.attest.release import Release
from dstack_emu.gateway.agent import TlsIdentity
from dstack_emu.gateway.certificates import make_authority
from dstack_emu.gateway.config import GatewayConfig, Tls
from dstack_emu.gateway.errors import GatewayConfigError
from dstack_emu.gateway.state import CertificateEntry
from dstack_emu.transport.files import beside, replace_file_durably, write_durably
from dstack_emu.transport.listen import ServerTlsContext

CA_CERT: Final = "gateway-ca.crt"
CA_KEY: Final = "gateway-ca.key"
"""The CA of wildcard certificates, in `core.sync.data_dir`."""
STATIC_SECONDS: Final = 14 * 86400
"""How long upstream takes a static certificate to be valid, whatever is in it."""
_MODE: Final = 0o600


def alt_names(rpc_domain: str, my_url: str) -> list[str]:
    """Return the names of the gateway's certificate: its RPC domain, and the host of its URL."""
    try:
        host = urlsplit(my_url).hostname
    except ValueError:
        host = None
    return [rpc_domain] if host in (None, rpc_domain) else [rpc_domain, str(host)]


def write_identity(tls: Tls, identity: TlsIdentity) -> None:
    """Write CA, chain and key, each with mode 0600; all are written beside their places before the first is replaced.

    Raises `GatewayConfigError`.
    """
    files = {
        tls.mutual.ca_certs: identity.chain[-1],
        tls.certs: "\n".join(identity.chain),
        tls.key: identity.key,
    }
    try:
        for path, text in files.items():
            write_durably(beside(path), text.encode(), _MODE)
        for path in files:
            beside(path).replace(path)
    except OSError as error:
        for path in files:
            beside(path).unlink(missing_ok=True)
        raise GatewayConfigError(f"tls: cannot write {error.filename}: {error.strerror}") from error


def tls_context(tls: Tls) -> ssl.SSLContext:
    """Make the settings of the RPC listener: TLS 1.2 and 1.3, and clients of the KMS's root.

    Raises `GatewayConfigError` if the files cannot be loaded.
    """
    context = ServerTlsContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.num_tickets = 0  # each holds the client's whole certificate, its evidence included
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(tls.certs, tls.key)
        context.load_verify_locations(tls.mutual.ca_certs)
    except (OSError, ssl.SSLError) as error:
        files = f"{tls.certs}, {tls.key} and {tls.mutual.ca_certs}"
        raise GatewayConfigError(
            f"tls: cannot load {files}: {error}; with core.rpc_domain the guest agent's certificate is written there"
        ) from error
    context.verify_mode = ssl.CERT_REQUIRED if tls.mutual.mandatory else ssl.CERT_OPTIONAL
    return context


def static_certificates(config: GatewayConfig, release: Release, now: int) -> Mapping[str, CertificateEntry]:
    """Return the certificate that `core.proxy` names, by its domain; raise `GatewayConfigError` if it is unusable."""
    proxy = config.core.proxy
    if not release.gateway_static_certificate:
        return {}
    if proxy.base_domain is None or proxy.cert_chain is None or proxy.cert_key is None:
        return {}
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(proxy.cert_chain, proxy.cert_key)
        chain, key = proxy.cert_chain.read_text(), proxy.cert_key.read_text()
    except (OSError, UnicodeDecodeError) as error:  # ssl's own error is an OSError
        raise GatewayConfigError(
            f"failed to load static proxy cert for {proxy.base_domain}: core.proxy.cert_chain {proxy.cert_chain} and "
            f"core.proxy.cert_key {proxy.cert_key}: {error}"
        ) from error
    entry = CertificateEntry(
        chain=chain, key=key, not_after=now + STATIC_SECONDS, issued_by=config.core.sync.node_id, issued_at=now
    )
    return {proxy.base_domain: entry}


def stored_authority(config: GatewayConfig, entropy: Callable[[int], bytes], now: int) -> CertificateAuthority:
    """Return the CA in the state folder, a new one if there is none; raise `GatewayConfigError`."""
    folder = config.core.sync.data_dir
    certificate, key = folder / CA_CERT, folder / CA_KEY
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not certificate.exists():
            made = make_authority(entropy, now)
            replace_file_durably(key, pkcs8_pem(made.key).encode(), _MODE)
            replace_file_durably(certificate, made.pem.encode(), 0o644)
        return load_authority(certificate.read_text(), load_p256_pem(key.read_text(), str(key)), str(certificate))
    except OSError as error:
        raise GatewayConfigError(f"core.sync.data_dir: {error.filename}: {error.strerror}") from error
    except (AttestError, UnicodeDecodeError) as error:
        raise GatewayConfigError(f"core.sync.data_dir: {error}") from error
