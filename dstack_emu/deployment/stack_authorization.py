"""The authorization flow of a stack: its KMS are measured, allowed and given keys, and its apps are allowed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dstack_emu.attest.moment import iso
from dstack_emu.deployment import policy_files
from dstack_emu.deployment.authorization import Authorization, Measurements, tls_url
from dstack_emu.deployment.context import StackContext
from dstack_emu.deployment.description import measured_by
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.foreign_parts import what_to_allow, what_was_denied
from dstack_emu.deployment.guests import RunningGuest
from dstack_emu.deployment.own_app import DomainRules, RememberedApp
from dstack_emu.deployment.running_kms import PERMANENT, RunningKms
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.trust_domain import TrustDomain


@dataclass(frozen=True, slots=True)
class StackAuthorization:
    """The flow for the stack's own app, and its gateway if it has one; `before` is the app of an earlier run."""

    context: StackContext
    kms: Mapping[str, RunningKms]
    app: RunningGuest
    gateway: TrustDomain | None
    before: RememberedApp
    progress: Callable[[str], None]

    @property
    def _apps(self) -> DomainRules:
        """What the policies allow beside the KMS."""
        return DomainRules([self.app.domain, *([] if self.gateway is None else [self.gateway])])

    @property
    def _gateway_app_id(self) -> str:
        """What the policies say of the gateway."""
        return policy_files.ANY_GATEWAY if self.gateway is None else f"0x{self.gateway.app_id.hex()}"

    async def measure_fresh_kms(self) -> None:
        """Measure each KMS without keys, and report policies that were written for another stack."""
        for kms in self.kms.values():
            if await kms.current() == "onboard":
                kms.measured = await kms.onboarding.measure()
        await self._report_policies_of_other_stacks()

    async def give_keys(self) -> Mapping[str, Measurements]:
        """Measure, allow, bootstrap, onboard and finish each KMS without keys; return the measurements of these.

        Raises `StackError`.
        """
        source, target = (self.kms[name].onboarding for name in PERMANENT)
        policies = self.context.policies
        flow = Authorization(
            source,
            target,
            self._apps,
            list(policies.paths.values()),
            tls_url(source.url),
            self.progress,
            gateway_app_id=self._gateway_app_id,
            chain=self.context.chain,
        )
        known = {self.kms[name].spec.service: info for name, info in measured_by(self.kms).items()}
        if advice := what_to_allow(self.kms, self.app.agent):
            self.progress(advice)
        try:
            measured = await flow.carry_out(known)
        except StackError as error:
            raise StackError(f"{error}{self.advice}") from error
        for kms in self.kms.values():
            kms.measured = measured.get(kms.spec.service, kms.measured)
        return measured

    async def app_was_refused(self, error: GuestError, *, is_new: bool) -> None:
        """Raise `StackError` if the policies are of this run, else say what to do.

        A resumed stack keeps its policy, and runs all the same, so that the policy can be changed.
        """
        if is_new:
            raise StackError(f"app: {error}{self.advice}") from error
        self.progress(f"app: {error}")
        if early := self._early_clock:
            self.progress(f"the app has no keys, because {early}; everything else runs")
            return
        self.progress("the app has no keys, because the policy does not allow it; everything else runs")
        self.before.advise(self.app.domain, self.context.policies.paths.get("src"))
        await self._report_policies_of_other_stacks()

    async def _report_policies_of_other_stacks(self) -> None:
        apps = await self._apps.rule()
        measured = measured_by(self.kms).values()
        for text in policy_files.of_other_stacks(self.context.policies.paths.values(), measured, apps):
            self.progress(text)

    @property
    def advice(self) -> str:
        """What to do about a refusal, if the clock or a webhook of the user's own may have made it."""
        if early := self._early_clock:
            return f". The reason is that {early}"
        return what_was_denied(self.context.instrumentation.journal, self.kms, self.app.agent)

    @property
    def _early_clock(self) -> str:
        """Say that the clock is before the dates of evidence, as that of a machine that was set back; else empty."""
        now, issued = self.context.instrumentation.clock(), self.context.intel.state.issued
        if now >= issued:
            return ""
        return f"the clock of this machine is at {iso(now)}, before the vendor's documents, which are of {iso(issued)}"
