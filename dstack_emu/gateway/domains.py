"""Domains and DNS credentials: what an operator may configure. No DNS provider is ever asked.

Source: dstack `gateway/src/admin_service.rs` and `gateway/src/kv/mod.rs` at 312dc605 and 40eaf35e.
"""

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from dstack_emu.attest.proto import gateway_pb2 as pb
from dstack_emu.attest.release import Release
from dstack_emu.gateway.errors import GatewayError
from dstack_emu.gateway.state import CredentialEntry, DomainEntry, Records

PROVIDER: Final = "cloudflare"
TXT_TTL: Final = 60
MAX_WAIT: Final = 300
"""Seconds of a credential that names none."""
_SHOWN: Final = 4
"""Characters of a token that are shown at either end."""
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def normalized_domain(text: str, release: Release) -> str:
    """Return a domain as it is stored; raise `GatewayError` for what is no DNS name, in the releases that check."""
    if not release.gateway_normalizes_domains:
        return text.removeprefix("*.")
    domain = text.strip().rstrip(".").removeprefix("*.").lower()
    if not domain or len(domain) > 253 or not domain.isascii():
        raise GatewayError("domain must be a non-empty ASCII DNS name of at most 253 bytes")
    if not all(_LABEL.fullmatch(label) for label in domain.split(".")):
        raise GatewayError("domain contains an invalid DNS label")
    return domain


def sought_domain(text: str, release: Release) -> str:
    """Return the name under which a domain is looked up; 0.5.11 takes it as it is."""
    return normalized_domain(text, release) if release.gateway_normalizes_domains else text


def domain_entry(request: pb.ZtDomainConfig, records: Records, release: Release) -> tuple[str, DomainEntry]:
    """Return the domain of a request and its configuration; raise `GatewayError`."""
    credential = request.dns_cred_id or None
    if credential is not None and credential not in records.credentials:
        raise GatewayError("specified dns credential not found")
    domain = normalized_domain(request.domain, release)
    if request.port == 0 and release.gateway_normalizes_domains:
        raise GatewayError("port must be between 1 and 65535")
    if request.port > 65535:
        raise GatewayError("port out of range: out of range integral type conversion attempted")
    node = request.node if request.HasField("node") else None
    return domain, DomainEntry(credential=credential, port=request.port, node=node, priority=request.priority)


def best_domain(domains: Mapping[str, DomainEntry], node: int) -> tuple[str, int]:
    """Return the domain of highest priority and its port; a global one before one of this node, then the last name."""
    mine = [(name, entry) for name, entry in domains.items() if entry.node in (None, node)]
    if not mine:
        return "", 0
    name, entry = max(mine, key=lambda pair: (pair[1].priority, pair[1].node is None, pair[0]))
    return name, entry.port


def credential_of(domain: DomainEntry, records: Records) -> CredentialEntry:
    """Return the DNS credential of a domain; raise `GatewayError` if there is none."""
    if domain.credential is not None:
        if domain.credential not in records.credentials:
            raise GatewayError("specified DNS credential not found")
        return records.credentials[domain.credential]
    default = records.credentials.get(records.default_credential or "")
    if default is None:
        raise GatewayError("no default DNS credential configured")
    return default


def new_credential(request: pb.CreateDnsCredentialRequest, now: int, release: Release) -> CredentialEntry:
    """Return the credential of a request; raise `GatewayError`."""
    if request.provider_type != PROVIDER:
        raise GatewayError(f"unsupported provider type: {request.provider_type}")
    ttl = request.dns_txt_ttl if request.HasField("dns_txt_ttl") else TXT_TTL
    wait = request.max_dns_wait if request.HasField("max_dns_wait") else MAX_WAIT
    if release.gateway_checks_dns_times:
        for name, value in (("dns_txt_ttl", ttl), ("max_dns_wait", wait)):
            if value == 0:
                raise GatewayError(f"{name} must be greater than zero")
    return CredentialEntry(
        name=request.name,
        api_token=request.cf_api_token,
        api_url=request.cf_api_url if request.HasField("cf_api_url") else None,
        txt_ttl=ttl,
        max_wait=wait,
        created_at=now,
        updated_at=now,
    )


def credential_info(credential_id: str, entry: CredentialEntry) -> pb.DnsCredentialInfo:
    """Describe a credential, whose token is redacted."""
    return pb.DnsCredentialInfo(
        id=credential_id,
        name=entry.name,
        provider_type=PROVIDER,
        cf_api_token=redacted(entry.api_token),
        cf_api_url=entry.api_url or "",
        dns_txt_ttl=entry.txt_ttl,
        max_dns_wait=entry.max_wait,
        created_at=entry.created_at,
        updated_at=entry.updated_at,
    )


def redacted(token: str) -> str:
    """Return a token of which at most its first and last four characters can be read."""
    if len(token.encode()) <= 2 * _SHOWN:
        return "*" * len(token.encode())
    return f"{token[:_SHOWN]}...{token[-_SHOWN:]}"


def require_peer_url(url: str) -> None:
    """Refuse what is no URL of another gateway; raise `GatewayError`."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise GatewayError(f"invalid peer URL: {error}") from error
    if not parts.scheme:
        raise GatewayError("invalid peer URL: relative URL without a base")
    if parts.scheme not in ("http", "https"):
        raise GatewayError("peer URL scheme must be http or https")
    if not host:
        raise GatewayError("peer URL must include a host")
    if parts.username or parts.password is not None:
        raise GatewayError("peer URL must not contain credentials")
