"""The objects that a KMS uses: configuration, storage, its agent, the webhook, the verifier, clocks and randomness.

Both phases share one `KmsDependencies`. It is built from the configuration once; the code that built it closes it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from dstack_emu.attest.certificate import EvidenceForm
from dstack_emu.attest.release import DEFAULT, Release
from dstack_emu.kms_emu.agent_client import TIMEOUT as AGENT_TIMEOUT
from dstack_emu.kms_emu.agent_client import GuestAgentClient
from dstack_emu.kms_emu.auth_api import AuthApi, DevAuth, IdentityCheckedAuth, WebhookAuth
from dstack_emu.kms_emu.cert_dir import CertDir
from dstack_emu.kms_emu.config import Core, KmsConfig
from dstack_emu.kms_emu.errors import KmsConfigError, context
from dstack_emu.kms_emu.keys import Entropy
from dstack_emu.kms_emu.onboarding import Receiver
from dstack_emu.transport.client import MoreHeaders
from dstack_emu.transport.events import EventLog
from dstack_emu.transport.http import Middleware
from dstack_emu.transport.http_client import Route, direct
from dstack_emu.transport.image_store import ImageStore
from dstack_emu.transport.pccs_client import AttestationVerifier, Clock, PccsClient
from dstack_emu.transport.ratls import TIMEOUT as SOURCE_TIMEOUT
from dstack_emu.transport.trust_root import trust_anchor


@dataclass(frozen=True, slots=True)
class KmsInstruments:
    """Additions to a KMS that is observed or gets faults; a KMS that runs alone has none.

    `middlewares` wrap the applications of its listeners; `verifier` replaces the one with the configured PCCS and root;
    `headers` are added to requests to its agent, `to_source` to those to a source KMS. `timeout` is the time limit of
    each such request in seconds (None: each client's own). `now`, a clock in seconds with their fraction, limits how
    long answers of the webhook are kept. `route` says where its clients connect to, for a KMS in a network of its own.
    """

    middlewares: Sequence[Middleware] = ()
    verifier: AttestationVerifier | None = None
    headers: MoreHeaders | None = None
    to_source: MoreHeaders | None = None
    timeout: float | None = None
    now: Callable[[], float] = time.monotonic
    route: Route = direct


@dataclass(frozen=True, slots=True)
class KmsDependencies:
    """The parts that both phases share.

    `clock` gives the time at which evidence and collateral are verified; `issue_clock` gives the dates of certificates.
    `evidence_form` is the form of the evidence in the RPC certificate, `rpc_cert_names` its names beside the domain.
    Without `images` (`core.image.verify` switched
    off) the hash of an OS image is accepted as claimed. `release` is the dstack release of this KMS. A success of the
    webhook is reused for `auth_cache_seconds` by the clock `now`; 0 keeps none.
    """

    core: Core
    folder: CertDir
    agent: GuestAgentClient
    auth: AuthApi
    verifier: AttestationVerifier
    clock: Clock
    issue_clock: Clock
    entropy: Entropy
    receiver: Receiver
    log: EventLog
    evidence_form: EvidenceForm = "versioned"
    rpc_cert_names: Sequence[str] = ()
    images: ImageStore | None = None
    release: Release = DEFAULT
    auth_cache_seconds: int = 0
    now: Callable[[], float] = time.monotonic

    @classmethod
    def build(
        cls,
        config: KmsConfig,
        agent_address: str,
        *,
        entropy: Entropy,
        clock: Clock,
        issue_clock: Clock | None,
        auth: AuthApi | None,
        instruments: KmsInstruments,
        release: Release,
    ) -> Self:
        """Create the configured objects; `auth` and the verifier of `instruments` replace the configured ones.

        Raises `KmsConfigError` if the trust root cannot be used, or if a key enables what the release does not have.
        """
        core, timeout, headers = config.core, instruments.timeout, instruments.headers
        cached = config.emulator.auth_api_cache
        if cached and not release.auth_api_cache_seconds:
            raise KmsConfigError(
                f"emulator.auth_api_cache: false expected, since a KMS of dstack {release.name} keeps no answer of its "
                "webhook; got true"
            )
        with context("Failed to initialize KMS state"), context("failed to load attestation verifier"):
            anchor = trust_anchor(core.attestation, "core.")
        agent = GuestAgentClient(agent_address, timeout=timeout or AGENT_TIMEOUT, headers=headers)
        auth = auth or _auth_api(core, release, instruments.route)
        if release.identity_widths_are_checked:
            auth = IdentityCheckedAuth(auth)
        attestation = core.attestation
        pccs = PccsClient(
            core.pccs,
            ttl=attestation.collateral_ttl,
            revalidates_at_once=attestation.emulated_pccs,
            route=instruments.route,
        )
        verifier = instruments.verifier or AttestationVerifier(pccs, anchor, clock)
        return cls(
            core=core,
            folder=CertDir(core.cert_dir),
            agent=agent,
            auth=auth,
            verifier=verifier,
            clock=clock,
            issue_clock=issue_clock or clock,
            entropy=entropy,
            receiver=Receiver(
                agent,
                auth,
                verifier,
                entropy,
                timeout or SOURCE_TIMEOUT,
                instruments.to_source,
                release.substitutes_own_image_for_legacy_source_alone,
                instruments.route,
            ),
            log=EventLog("dstack_emu.kms_emu", **({"site": core.site_name} if core.site_name else {})),
            evidence_form=config.emulator.rpc_cert_evidence,
            rpc_cert_names=config.emulator.rpc_cert_names,
            images=_image_store(core, instruments.route, release) if core.image.verify else None,
            release=release,
            auth_cache_seconds=release.auth_api_cache_seconds if cached else 0,
            now=instruments.now,
        )

    async def close(self) -> None:
        """Close all clients; a client that is used again opens new connections."""
        await self.agent.close()
        await self.auth.close()
        await self.verifier.pccs.close()
        if self.images is not None:
            await self.images.close()


def _auth_api(core: Core, release: Release, route: Route) -> AuthApi:
    if core.auth_api.type == "dev":
        return DevAuth(core.auth_api.dev.gateway_app_id)
    webhook = core.auth_api.webhook
    return WebhookAuth(webhook.url, timeout=webhook.timeout, release=release, route=route)


def _image_store(core: Core, route: Route, release: Release) -> ImageStore:
    image, documents = core.image, release.measurement_documents
    return ImageStore(image.cache_dir, image.download_url, image.download_timeout, route=route, documents=documents)
