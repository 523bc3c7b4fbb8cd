"""What surrounds the KMS that is checked: an emulated stack, the trust domain it runs in, and the callers.

The stack has the PCCS, whose vendor a case can change, a source KMS and a receiver of our own, and the agents. The KMS
that is checked has a trust domain of its own, with keys of a local key provider, as in production.
"""

import base64
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

from dstack_emu.attest.app_info import AppInfo, BootInfo, decode_app_info
from dstack_emu.attest.issuing import CertificateAuthority
from dstack_emu.attest.release import Release
from dstack_emu.deployment import policy_files
from dstack_emu.deployment.authorization import Progress
from dstack_emu.deployment.clock import wall_clock
from dstack_emu.deployment.config import StackConfig
from dstack_emu.deployment.deployment import Deployment
from dstack_emu.deployment.guest_config import instance_seed, local_key_provider
from dstack_emu.deployment.guests import RunningGuest, start_guest
from dstack_emu.deployment.specs import GuestSpec
from dstack_emu.deployment.trust_domains import boot_domain
from dstack_emu.kms_check.evidence import Issuer
from dstack_emu.kms_check.webhook import Webhook
from dstack_emu.observability.fault_rules import FaultRule
from dstack_emu.simulator.app_keys import OwnKeys
from dstack_emu.simulator.image import GIB, ImageParts, OsImage
from dstack_emu.simulator.intel import IntelState
from dstack_emu.simulator.platform import PlatformState
from dstack_emu.simulator.trust_domain import AppCompose, TrustDomain
from dstack_emu.simulator.vendor_state import VALID_FROM, VALID_UNTIL, Validity, VendorState
from dstack_emu.transport.pccs_client import AttestationVerifier
from dstack_emu.transport.tls import Identity

CHECKED: Final = "kms-checked"
"""The name of the trust domain of the KMS that is checked."""
AGENT: Final = "agent-checked"
"""The service of its guest agent."""


@dataclass(frozen=True, slots=True)
class Apps:
    """The apps that call: one that is allowed, another instance of it, another app that is allowed, one that is not."""

    app: TrustDomain
    twin: TrustDomain
    other: TrustDomain
    unknown: TrustDomain


class Target(Protocol):
    """The KMS that is checked, as cases see it: its URL in each phase, and the root keys that it has stored."""

    url: str
    plain_url: str

    def stored_keys(self) -> list[str]:
        """Return the names of the root keys in its folder."""
        ...


class World:
    """The surroundings of the KMS, and the KMS itself once it is started (`kms`).

    `verifier` verifies evidence under the stack's root. `issuer`, `app_identity` and `kms_identity` are there once it
    has keys: the client certificates of honest callers.
    """

    kms: Target
    issuer: Issuer
    app_identity: Identity
    kms_identity: Identity

    def __init__(
        self,
        deployment: Deployment,
        webhook: Webhook,
        guest: RunningGuest,
        release: Release,
        *,
        patience: float,
        self_check_cache: float,
    ) -> None:
        self.deployment, self.webhook, self.guest, self.release = deployment, webhook, guest, release
        self.patience, self.self_check_cache = patience, self_check_cache
        self.long_patience = max(patience, 30.0)
        context = deployment.context
        self.apps = Apps(
            app=deployment.app.domain,
            twin=boot_domain(context, GuestSpec(name="app", instance="another instance", platform="host of app")),
            other=boot_domain(context, GuestSpec(name="other-app", platform="host of app")),
            unknown=boot_domain(context, GuestSpec(name="unknown-app", platform="host of app")),
        )
        self.verifier: AttestationVerifier = context.verifier("check-kms")
        self._issues = 0
        self._vendor: IntelState = context.intel.capture()
        self._base = self._base_policy()
        self.reset()

    # ---- identities

    @property
    def source(self) -> TrustDomain:
        """The trust domain of our source KMS."""
        return self.deployment.kms["src"].guest.domain

    @property
    def receiver(self) -> TrustDomain:
        """The trust domain of our receiver of keys."""
        return self.deployment.kms["dst"].guest.domain

    def _base_policy(self) -> dict[str, Any]:
        kms = [info_of(domain) for domain in (self.guest.domain, self.source, self.receiver)]
        apps = [self.apps.app, self.apps.other]
        rules = [policy_files.AppRule(app.app_id.hex(), app.compose_hash.hex()) for app in apps]
        image = self.deployment.context.image.os_image_hash.hex()
        return policy_files.allow([image], [info.mr_aggregated.hex() for info in kms], rules)

    def boot_info(self, domain: TrustDomain, status: str = "UpToDate", advisory_ids: tuple[str, ...] = ()) -> Any:
        """Return the request about a domain that a KMS must send its webhook, without the members with the variant."""
        info = BootInfo.about(info_of(domain), status, advisory_ids)
        return json.loads(info.to_json(variant_members=()))

    def enter_runtime(self, authority: CertificateAuthority) -> None:
        """Make the certificates of honest callers under the temporary CA of the KMS, which has keys now."""
        self.issuer = Issuer(authority, wall_clock())
        self.app_identity = self.issuer.honest(self.apps.app)
        self.kms_identity = self.issuer.honest(self.receiver)

    # ---- what a case changes

    def reset(self) -> None:
        """Undo what a case has changed."""
        self.webhook.policy = json.loads(json.dumps(self._base))
        self.webhook.asked.clear()
        self.deployment.context.instrumentation.faults.clear()
        self.deployment.context.intel.restore(self._vendor)
        for path in self.deployment.policies.values():
            policy_files.write(path, self._base)

    @contextmanager
    def fault(self, service: str, kind: str, **options: Any) -> Iterator[None]:
        """Let the calls of a service fail while the block runs."""
        faults = self.deployment.context.instrumentation.faults
        rule = faults.add(FaultRule.model_validate({"service": service, "kind": kind, **options}))
        try:
            yield
        finally:
            faults.lift(rule.id)

    @contextmanager
    def platform(self, name: str, **state: Any) -> Iterator[None]:
        """Let the vendor say so of a platform while the block runs."""
        platform = self.deployment.context.intel.platform(f"host of {name}")
        before, platform.state = platform.state, PlatformState(**state)
        try:
            yield
        finally:
            platform.state = before

    @contextmanager
    def vendor(self, **state: Any) -> Iterator[None]:
        """Let the vendor say so of all platforms while the block runs."""
        intel = self.deployment.context.intel
        before, intel.state = intel.state, VendorState(**state)
        try:
            yield
        finally:
            intel.state = before

    def reissued(self) -> AbstractContextManager[None]:
        """Let the vendor publish all documents anew while the block runs: no cache of a verifier has them."""
        self._issues += 1
        issued = int(VALID_FROM.timestamp()) + self._issues
        validity = Validity(issued, int(VALID_UNTIL.timestamp()))
        return self.vendor(
            tcb_info_dating=validity,
            qe_identity_dating=validity,
            pck_crl_dating=validity,
            root_ca_crl_dating=validity,
        )

    @contextmanager
    def policy_of(self, name: str, **members: Any) -> Iterator[None]:
        """Let the webhook of one of our KMS decide by a policy with other members while the block runs."""
        path = self.deployment.policies[name]
        policy_files.write(path, {**self._base, **members})
        try:
            yield
        finally:
            policy_files.write(path, self._base)

    # ---- domains that are not what they should be

    @property
    def image(self) -> OsImage:
        """The image that every trust domain boots, and that is allowed."""
        return self.deployment.context.image

    def compose(self, name: str) -> AppCompose:
        """Return the app-compose of an app."""
        return AppCompose.named(name)

    def impostor(self, name: str = "app", *, memory_size: int = 2 * GIB, **parts: Any) -> TrustDomain:
        """Boot an app, or a KMS, from another image, with the VM config of the one that is allowed."""
        context, own = self.deployment.context, self.image
        image = OsImage.from_seed(context.seed.derive, own.name, own.version, ImageParts(**parts)) if parts else own
        domain = TrustDomain(
            context.intel.platform(f"host of {name}"),
            image,
            self.compose(name),
            instance_seed=instance_seed(context.seed, name),
            vm_config=image.vm_config(memory_size=memory_size),
            claimed_config=own.vm_config().to_json(),
            release=self.release,
        )
        domain.boot()
        return domain

    def complete(self, domain: TrustDomain, name: str) -> None:
        """Complete the boot of a KMS, with keys of its local key provider."""
        domain.complete(local_key_provider(self.deployment.context.seed, name))

    def changed_kms(self) -> TrustDomain:
        """Boot our receiver with one more event."""
        domain = boot_domain(self.deployment.context, GuestSpec(name="kms-dst"))
        self.complete(domain, "kms-dst")
        domain.measure("one-more", b"event")
        return domain

    def claim(self, **members: Any) -> str:
        """Return the VM config of the app with other members; None removes one."""
        document = {**json.loads(self.apps.app.vm_config_json), **members}
        return json.dumps({name: value for name, value in document.items() if value is not None})

    def claim_document(self, name: str, more: bytes) -> str:
        """Return the VM config of the app with bytes added to one of its measurement documents."""
        document = json.loads(self.apps.app.vm_config_json)["tdx_measurement"]
        content = base64.b64decode(document[name]) + more
        return self.claim(tdx_measurement={**document, name: base64.b64encode(content).decode()})


def info_of(domain: TrustDomain) -> AppInfo:
    """Return what a domain measures, with the device it runs on."""
    return decode_app_info(domain.attest(bytes(64)), device_id=domain.platform.device_id)


@asynccontextmanager
async def surroundings(
    release: Release, progress: Progress, *, patience: float, self_check_cache: float
) -> AsyncIterator[World]:
    """Run everything except the KMS until the block ends; raise `StackError` if it does not start."""
    config = StackConfig.on_free_ports(release=release.name, fresh=True)
    webhook = Webhook(release)
    await webhook.start()
    try:
        async with Deployment(config, progress) as deployment:
            guest = await _start_guest(deployment)
            try:
                world = World(deployment, webhook, guest, release, patience=patience, self_check_cache=self_check_cache)
                try:
                    await deployment.kms["src"].onboarding.bootstrap()
                    yield world
                finally:
                    await world.verifier.pccs.close()
            finally:
                await guest.close()
    finally:
        await webhook.close()


async def _start_guest(deployment: Deployment) -> RunningGuest:
    """Start the trust domain of the KMS, with keys of a local key provider."""
    context = deployment.context
    seed = context.seed.child("kms checked")
    guest = await start_guest(context, GuestSpec(name=CHECKED), AGENT, seed)
    provider = local_key_provider(context.seed, CHECKED)
    guest.domain.complete(provider)
    own = OwnKeys.from_seed(guest.domain, seed.derive("sealing key", 32), provider, context.instrumentation.clock.issue)
    await guest.agent.provide(own.keys, own.issuer)
    return guest
