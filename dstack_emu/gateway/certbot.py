"""The certificates of domains and the ACME account, as state: a CA of this emulator signs, and nobody is asked.

Each key is quoted by the gateway's agent, and so is the account. Source: dstack `gateway/src/distributed_certbot.rs` at
312dc605.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from dstack_emu.attest.issuing import CertificateAuthority
from dstack_emu.attest.release import Release
from dstack_emu.attest.report_data import report_data
from dstack_emu.gateway.agent import GuestAgent
from dstack_emu.gateway.certificates import LoadedCertificates, issue_wildcard
from dstack_emu.gateway.domains import credential_of
from dstack_emu.gateway.errors import GatewayError
from dstack_emu.gateway.state import AccountEntry, AttestationEntry, Records
from dstack_emu.transport.background import begin_in_background
from dstack_emu.transport.events import EventLog

DIRECTORY: Final = "https://acme-v02.api.letsencrypt.org/directory"
"""The ACME directory of an empty `acme_url`."""
CERTIFICATE_TAG: Final = "zt-cert"
ACCOUNT_TAG: Final = "acme-account"
_DISABLED_INTERVAL: Final = 60
"""Seconds until it looks again whether renewal was switched on."""
_IN_PROGRESS: Final = "ACME credential rotation or CAA reconciliation is already in progress"


@dataclass(frozen=True, slots=True)
class CertbotContext:
    """What a certbot works with; `changed` stores the records, or raises `GatewayError` and undoes what has changed."""

    records: Records
    loaded: LoadedCertificates
    release: Release
    agent: GuestAgent
    authority: CertificateAuthority
    clock: Callable[[], int]
    entropy: Callable[[int], bytes]
    node_id: int
    changed: Callable[[], None]
    log: EventLog


class Certbot:
    """Issues and renews certificates, one at a time for each domain. Close it."""

    def __init__(self, context: CertbotContext) -> None:
        self._context, self._records = context, context.records
        self._locked: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._caa = asyncio.Lock()

    # ---- certificates

    async def renew(self, domain: str, *, force: bool) -> bool:
        """Renew a certificate if it is due or forced; return whether that was done.

        It is not if another renewal of the domain is under way. Raises `GatewayError`.
        """
        entry = self._records.domains.get(domain)
        if entry is None:
            raise GatewayError("ZT-Domain config not found")
        if domain in self._locked or not (force or self._is_due(domain)):
            return False
        self._locked.add(domain)
        try:
            credential_of(entry, self._records)
            await self._account()
            await self._issue(domain)
        finally:
            self._locked.discard(domain)
        return True

    def _is_due(self, domain: str) -> bool:
        certificate = self._records.certificates.get(domain)
        if certificate is None:
            return True
        return certificate.not_after - self._context.clock() < self._records.certbot.renew_before_expiration

    async def _issue(self, domain: str) -> None:
        context = self._context
        now = context.clock()
        issued = issue_wildcard(context.authority, domain, context.entropy, now=now, node=context.node_id)
        quoted = await self._quotes(CERTIFICATE_TAG, issued.public_key)
        self._records.certificates[domain] = issued.entry
        if quoted is not None:
            attestation = AttestationEntry(
                public_key=issued.public_key.hex(),
                quote=quoted[0],
                attestation=quoted[1],
                generated_by=context.node_id,
                generated_at=now,
            )
            self._records.attestations[domain] = (attestation, *self._records.attestations.get(domain, ()))
        context.changed()
        context.loaded.load(domain, issued.entry)
        context.log.info("certificate issued", domain=domain, not_after=issued.entry.not_after)

    async def _quotes(self, tag: str, content: bytes) -> tuple[str, str] | None:
        """Return the quotes of a key or account; None if the agent gives none, which ends nothing."""
        try:
            return await self._context.agent.quotes(report_data(tag, content))
        except GatewayError as error:
            self._context.log.warning("not quoted", what=tag, reason=error)
            return None

    async def renew_all(self) -> None:
        """Renew what is due; a domain that fails is logged, and stops no other."""
        for domain in list(self._records.domains):
            await self._try_renew(domain)

    async def _try_renew(self, domain: str) -> None:
        try:
            await self.renew(domain, force=False)
        except GatewayError as error:
            self._context.log.warning("certificate not issued", domain=domain, reason=error)

    def release(self, domain: str) -> None:
        """Let another renewal of a domain begin."""
        self._locked.discard(domain)

    # ---- the ACME account

    async def _account(self) -> AccountEntry:
        """Return the account of the configured directory, a new one if there is none; raise `GatewayError`."""
        account, directory = self._records.account, self._directory
        if account is not None and account.directory == directory:
            return account
        if account is not None and self._context.release.gateway_manages_acme_account:
            raise GatewayError(
                "stored ACME credentials are for a different ACME directory; call RotateAcmeCredentials to switch "
                "directories"
            )
        return await self._new_account()

    @property
    def _directory(self) -> str:
        return self._records.certbot.acme_url or DIRECTORY

    async def _new_account(self) -> AccountEntry:
        records = self._records
        records.accounts_made += 1
        uri = f"https://acme.invalid/acct/{records.accounts_made}"
        records.account = AccountEntry(uri=uri, directory=self._directory)
        self._context.changed()
        quoted = await self._quotes(ACCOUNT_TAG, uri.encode())
        if quoted is not None and records.account.uri == uri:
            records.account = records.account.model_copy(update={"quote": quoted[0], "attestation": quoted[1]})
            self._context.changed()
        return records.account

    async def rotate(self) -> tuple[str, int]:
        """Replace the account; return its URI, and the number of domains. Raises `GatewayError`."""
        if self._caa.locked():
            raise GatewayError(_IN_PROGRESS)
        async with self._caa:
            domains = list(self._records.domains.values())
            for domain in domains:
                credential_of(domain, self._records)
            if not domains:
                raise GatewayError("no ZT-Domain configured for ACME credential rotation")
            account = await self._new_account()
            return account.uri, len(domains)

    async def set_caa(self) -> None:
        """Do what writing CAA records needs, for each domain; raise `GatewayError`, which names those that failed."""
        if not self._context.release.gateway_manages_acme_account:
            raise GatewayError("set_caa is not implemented for multi-domain certificates yet")
        if self._caa.locked():
            raise GatewayError(_IN_PROGRESS)
        async with self._caa:
            failed = [domain for domain in list(self._records.domains) if not await self._has_account(domain)]
        if failed:
            raise GatewayError(
                f"failed to set CAA records for {len(failed)}/{len(self._records.domains)} domains: "
                f"{', '.join(failed)}; they may retain guard CAA records that block issuance until a rerun succeeds"
            )

    async def _has_account(self, domain: str) -> bool:
        try:
            credential_of(self._records.domains[domain], self._records)
            await self._account()
        except GatewayError as error:
            self._context.log.warning("CAA records not set", domain=domain, reason=error)
            return False
        return True

    # ---- in the background

    def start(self) -> None:
        """Begin to renew what is due, now and at each interval."""
        self._begin(self._renew_for_ever())

    def begin(self, domain: str) -> None:
        """Begin to get the certificate of a new domain."""
        self._begin(self._try_renew(domain))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = begin_in_background(work, "certificates of a gateway")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _renew_for_ever(self) -> None:
        while True:
            await self.renew_all()
            await asyncio.sleep(self._records.certbot.renew_interval or _DISABLED_INTERVAL)

    def abandon(self) -> None:
        """End what runs in the background, and forget which domains it renews."""
        for task in self._tasks:
            task.cancel()
        self._locked.clear()

    async def close(self) -> None:
        """End what runs in the background."""
        running = tuple(self._tasks)
        self.abandon()
        await asyncio.gather(*running, return_exceptions=True)
