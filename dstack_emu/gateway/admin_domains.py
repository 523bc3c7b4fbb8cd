"""The RPCs of an operator about DNS credentials, domains, their certificates, and the ACME account.

Source: dstack `gateway/src/admin_service.rs` at 312dc605 and 40eaf35e.
"""

from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.proto import gateway_pb2 as pb
from dstack_emu.gateway.domains import credential_info, domain_entry, new_credential, sought_domain
from dstack_emu.gateway.errors import GatewayError
from dstack_emu.gateway.gateway import Gateway
from dstack_emu.gateway.state import AttestationEntry, CredentialEntry, DomainEntry

_ID_SUFFIX = 4
"""Random bytes at the end of a credential's id; milliseconds are before them."""


class DomainService:
    """Credentials, domains and certificates."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway, self._records, self._release = gateway, gateway.records, gateway.release

    # ---- DNS credentials

    async def list_dns_credentials(self) -> pb.ListDnsCredentialsResponse:
        """List all credentials."""
        return pb.ListDnsCredentialsResponse(
            credentials=[credential_info(id_, each) for id_, each in sorted(self._records.credentials.items())],
            default_id=self._records.default_credential,
        )

    async def get_dns_credential(self, request: pb.GetDnsCredentialRequest) -> pb.DnsCredentialInfo:
        """Show one credential."""
        return credential_info(request.id, self._credential(request.id))

    def _credential(self, credential_id: str) -> CredentialEntry:
        found = self._records.credentials.get(credential_id)
        if found is None:
            raise GatewayError("dns credential not found")
        return found

    async def create_dns_credential(self, request: pb.CreateDnsCredentialRequest) -> pb.DnsCredentialInfo:
        """Make a credential, and the default one if that is asked for."""
        context = self._gateway.context
        entry = new_credential(request, context.clock(), self._release)
        credential_id = f"{context.clock() * 1000:x}{context.entropy(_ID_SUFFIX).hex()}"
        self._gateway.change("credentials", credential_id, entry)
        if request.set_as_default:
            self._gateway.set("default_credential", credential_id)
        return credential_info(credential_id, entry)

    async def update_dns_credential(self, request: pb.UpdateDnsCredentialRequest) -> pb.DnsCredentialInfo:
        """Change what the request names."""
        entry = self._credential(request.id)
        given = {"name": "name", "cf_api_token": "api_token", "cf_api_url": "api_url"}
        update = {ours: getattr(request, theirs) for theirs, ours in given.items() if request.HasField(theirs)}
        changed = entry.model_copy(update={**update, "updated_at": self._gateway.context.clock()})
        self._gateway.change("credentials", request.id, changed)
        return credential_info(request.id, changed)

    async def delete_dns_credential(self, request: pb.DeleteDnsCredentialRequest) -> Empty:
        """Delete a credential that nothing uses; an unknown one is no error, as upstream."""
        if request.id == self._records.default_credential:
            raise GatewayError("cannot delete the default DNS credential; set a different default first")
        for domain, each in sorted(self._records.domains.items()):
            if each.credential == request.id:
                raise GatewayError(f"cannot delete DNS credential: domain {domain} uses it")
        self._gateway.change("credentials", request.id, None)
        return Empty()

    async def get_default_dns_credential(self) -> pb.GetDefaultDnsCredentialResponse:
        """Show the default credential."""
        id_ = self._records.default_credential or ""
        entry = self._records.credentials.get(id_)
        info = None if entry is None else credential_info(id_, entry)
        return pb.GetDefaultDnsCredentialResponse(default_id=id_, credential=info)

    async def set_default_dns_credential(self, request: pb.SetDefaultDnsCredentialRequest) -> Empty:
        """Make a credential the one of domains that name none."""
        self._credential(request.id)
        self._gateway.set("default_credential", request.id)
        return Empty()

    # ---- domains

    async def list_zt_domains(self) -> pb.ListZtDomainsResponse:
        """List all domains."""
        return pb.ListZtDomainsResponse(
            domains=[self._info(domain, each) for domain, each in sorted(self._records.domains.items())]
        )

    async def get_zt_domain(self, request: pb.GetZtDomainRequest) -> pb.ZtDomainInfo:
        """Show one domain."""
        domain = sought_domain(request.domain, self._release)
        return self._info(domain, self._domain(domain))

    async def add_zt_domain(self, request: pb.ZtDomainConfig) -> pb.ZtDomainInfo:
        """Add a domain, and begin to get its certificate."""
        if not self._release.gateway_normalizes_domains:
            self._require_new(request.domain)
        domain, entry = domain_entry(request, self._records, self._release)
        if self._release.gateway_normalizes_domains:
            self._require_new(domain)
        self._gateway.change("domains", domain, entry)
        self._gateway.certbot.begin(domain)
        return self._info(domain, entry)

    def _require_new(self, domain: str) -> None:
        if domain in self._records.domains:
            raise GatewayError(f"ZT-Domain config already exists: {domain}")

    async def update_zt_domain(self, request: pb.ZtDomainConfig) -> pb.ZtDomainInfo:
        """Replace the configuration of a domain."""
        if not self._release.gateway_normalizes_domains:
            self._domain(request.domain)
        domain, entry = domain_entry(request, self._records, self._release)
        if self._release.gateway_normalizes_domains:
            self._domain(domain)
        self._gateway.change("domains", domain, entry)
        return self._info(domain, entry)

    async def delete_zt_domain(self, request: pb.DeleteZtDomainRequest) -> Empty:
        """Delete the configuration of a domain; its certificate and its attestations stay."""
        domain = sought_domain(request.domain, self._release)
        self._domain(domain)
        self._gateway.change("domains", domain, None)
        return Empty()

    def _domain(self, domain: str) -> DomainEntry:
        found = self._records.domains.get(domain)
        if found is None:
            raise GatewayError("ZT-Domain config not found")
        return found

    def _info(self, domain: str, entry: DomainEntry) -> pb.ZtDomainInfo:
        certificate = self._records.certificates.get(domain)
        status = pb.ZtDomainCertStatus(loaded_in_memory=self._gateway.certificates.get(domain) is not None)
        if certificate is not None:
            status.has_cert, status.not_after = True, certificate.not_after
            status.issued_by, status.issued_at = certificate.issued_by, certificate.issued_at
        config = pb.ZtDomainConfig(
            domain=domain,
            dns_cred_id=entry.credential,
            port=entry.port,
            node=entry.node,
            priority=entry.priority,
        )
        return pb.ZtDomainInfo(config=config, cert_status=status)

    # ---- certificates

    async def renew_zt_domain_cert(self, request: pb.RenewZtDomainCertRequest) -> pb.RenewZtDomainCertResponse:
        """Renew the certificate of a domain, which is named as it is stored."""
        try:
            renewed = await self._gateway.certbot.renew(request.domain, force=request.force)
        except GatewayError as error:
            raise GatewayError(f"certificate renewal failed: {error}") from error
        certificate = self._records.certificates.get(request.domain) if renewed else None
        return pb.RenewZtDomainCertResponse(
            renewed=renewed, not_after=0 if certificate is None else certificate.not_after
        )

    async def renew_cert(self) -> pb.RenewCertResponse:
        """Renew what is due."""
        await self._gateway.certbot.renew_all()
        return pb.RenewCertResponse(renewed=True)

    async def reload_cert(self) -> Empty:
        """Load the stored certificates again."""
        self._gateway.certificates.load_all(self._records.certificates)
        return Empty()

    async def set_caa(self) -> Empty:
        """Do what writing the CAA records of every domain needs."""
        await self._gateway.certbot.set_caa()
        return Empty()

    async def force_release_cert_lock(self, request: pb.ForceReleaseCertLockRequest) -> Empty:
        """Let another renewal of a domain begin."""
        self._gateway.certbot.release(request.domain)
        return Empty()

    async def list_cert_attestations(self, request: pb.ListCertAttestationsRequest) -> pb.ListCertAttestationsResponse:
        """List the quoted keys of a domain's certificates, the newest first."""
        found = [_attestation(each) for each in self._records.attestations.get(request.domain, ())]
        return pb.ListCertAttestationsResponse(
            latest=found[0] if found else None, history=found[: request.limit] if request.limit else found
        )

    # ---- ACME

    async def get_certbot_config(self) -> pb.CertbotConfigResponse:
        """Show when certificates are renewed."""
        certbot = self._records.certbot
        return pb.CertbotConfigResponse(
            renew_interval_secs=certbot.renew_interval,
            renew_before_expiration_secs=certbot.renew_before_expiration,
            renew_timeout_secs=certbot.renew_timeout,
            acme_url=certbot.acme_url,
        )

    async def set_certbot_config(self, request: pb.SetCertbotConfigRequest) -> Empty:
        """Change what the request names."""
        given = {
            "renew_interval_secs": "renew_interval",
            "renew_before_expiration_secs": "renew_before_expiration",
            "renew_timeout_secs": "renew_timeout",
            "acme_url": "acme_url",
        }
        update = {ours: getattr(request, theirs) for theirs, ours in given.items() if request.HasField(theirs)}
        self._gateway.set("certbot", self._records.certbot.model_copy(update=update))
        return Empty()

    async def rotate_acme_credentials(self) -> pb.RotateAcmeCredentialsResponse:
        """Replace the ACME account."""
        uri, domains = await self._gateway.certbot.rotate()
        return pb.RotateAcmeCredentialsResponse(account_uri=uri, domains_updated=domains)


def _attestation(entry: AttestationEntry) -> pb.CertAttestationInfo:
    return pb.CertAttestationInfo(
        public_key=bytes.fromhex(entry.public_key),
        quote=entry.quote,
        generated_by=entry.generated_by,
        generated_at=entry.generated_at,
    )
