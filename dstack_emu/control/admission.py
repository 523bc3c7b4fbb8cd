"""What each KMS of a stack would decide about evidence, a boot info or an app-compose, as `dstack-emu why` explains it.

If a policy file of the stack decides, the file explains it. A webhook of somebody's own, and one that asks a contract,
is asked, as a KMS asks it.
"""

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from pydantic.alias_generators import to_snake

from dstack_emu.attest.app_info import APP_ID_SIZE, BootInfo
from dstack_emu.attest.errors import AttestError, FormatError
from dstack_emu.attest.release import Release
from dstack_emu.auth.errors import AuthError
from dstack_emu.control.denial import located
from dstack_emu.control.schemas import AdmissionQuestion, ControlError
from dstack_emu.deployment.deployment import Deployment
from dstack_emu.deployment.running_kms import RunningKms
from dstack_emu.inspection.checks import Collect, Evidence, Expectations, verify_evidence
from dstack_emu.inspection.documents import app_compose_hash
from dstack_emu.inspection.policy_file import PolicyFile
from dstack_emu.inspection.why import BootRequest, Examination, Explained, UnusableError, ask, examine, explain
from dstack_emu.inspection.why_report import Decider, Report, Verification
from dstack_emu.kms_emu.errors import UnavailableError
from dstack_emu.observability.spans import headers_of
from dstack_emu.transport.aside import run_aside
from dstack_emu.transport.errors import TransportError
from dstack_emu.transport.urls import shown_url

_APP: Final = "app"
"""The trust domain on whose platform an app-compose is supposed to boot."""
_CLAIM: Final = "boot info"
_SUPPOSED: Final = (
    f"app-compose, as if it booted on the platform of {_APP} with the stack's OS image; what it would measure, and its "
    "instance, are not known: mrAggregated is zero"
)


@dataclass(frozen=True, slots=True)
class _Examined:
    """Evidence that is to be decided about, and with what it is verified."""

    what: str
    evidence: Evidence
    expected: Expectations
    collect: Collect
    source: str


class Admission:
    """One question to all KMS of a deployment."""

    def __init__(self, deployment: Deployment, question: AdmissionQuestion) -> None:
        self._deployment, self._question = deployment, question
        self._what = _CLAIM
        self._request: BootRequest | None = None
        self._examined: _Examined | None = None

    async def is_claim(self) -> bool:
        """Return whether a boot info or an app-compose was given, which are not verified; raise `ControlError`."""
        given = self._question.content
        try:
            self._request = await run_aside(len(given), lambda: BootRequest.find(given))
        except FormatError as error:
            raise ControlError(str(error)) from error
        if self._request is None and (digest := await run_aside(len(given), lambda: app_compose_hash(given))):
            self._what, self._request = _SUPPOSED, self._supposed(digest)
        if self._request is None and self._question.app_id is not None:
            raise ControlError("app_id is that of an app-compose; the id is in evidence and boot infos")
        return self._request is not None

    def examine(self, what: str, evidence: Evidence, expected: Expectations, collect: Collect, source: str) -> None:
        """Take evidence, what it is verified with, and the source of its collateral."""
        self._examined = _Examined(what, evidence, expected, collect, source)

    async def decide(self) -> dict[str, Any]:
        """Return what was asked about, and the explanation of each KMS by its name."""
        kms = self._deployment.kms
        found = [await self._of(running) for running in kms.values()]
        what = self._examined.what if self._examined else self._what
        return {"what": what, "as": self._question.caller, "kms": dict(zip(kms, found, strict=True))}

    async def _of(self, kms: RunningKms) -> dict[str, Any]:
        release = self._deployment.context.release_of(kms.spec.release)
        try:
            examination = await self._examination(release)
            if self._asks_webhook(kms):
                return await self._by_webhook(kms, release, examination)
            return await asyncio.to_thread(partial(self._by_policy, kms, release, examination))
        except (UnusableError, AuthError) as error:
            return {"verdict": None, "problem": str(error)}
        except UnavailableError as error:
            return {"verdict": None, "problem": f"no decision, which a KMS takes for a refusal: {error}"}

    async def _examination(self, release: Release) -> Examination:
        if self._request is not None:
            return Examination((), self._request)
        assert self._examined is not None  # noqa: S101 - `is_claim` was false, and `examine` was called
        return await asyncio.to_thread(_examination, self._examined, release, self._question.vm_config)

    def _by_policy(self, kms: RunningKms, release: Release, examination: Examination) -> dict[str, Any]:
        owner = self._decides(kms)
        contract = self._deployment.context.contract_of(self._deployment.kms[owner].spec.release)
        policy = PolicyFile.read(str(self._deployment.policies[owner]), contract)
        request = examination.request
        explained = explain(policy, request, self._question.caller) if request else None
        report = self._report(release, examination, Decider.of(policy), explained, policy.warnings)
        change = explained.change if explained else None
        text = policy.content.decode("utf-8", "replace")
        document = report.document()
        if change is not None:
            document["refusals"] = [located(refusal, text) for refusal in change.refusals]
        if change is not None and change.patch:
            document["change"] |= {"before": policy.document, "after": change.document}
        return {"problem": None, "policy_of": owner, **document}

    async def _by_webhook(self, kms: RunningKms, release: Release, examination: Examination) -> dict[str, Any]:
        url, is_own = self._webhook_of(kms)
        explained: Explained | None = None
        if examination.request is not None:
            request = BootRequest.of(examination.request.boot_info, release)  # as the KMS sends it
            examination = Examination(examination.checks, request)
            headers = headers_of("control") if is_own else None
            explained = await ask(url, request, self._question.caller, release=release, headers=headers)
        report = self._report(release, examination, Decider("webhook", shown_url(url)), explained)
        return {"problem": None, **report.document(), **self._by_contracts(kms, report)}

    def _by_contracts(self, kms: RunningKms, report: Report) -> dict[str, Any]:
        """Return what the contracts on the stack's own chain lack, if they denied."""
        chain, request = self._deployment.context.chain_of(self._decides(kms)), report.examination.request
        if chain is None or request is None or report.verdict != "denied":
            return {}
        from dstack_emu.control.chain_denial import explain_on_chain  # few stacks have a chain

        asked = {to_snake(name): value for name, value in request.document.items()}
        found = explain_on_chain(chain, {"about": self._question.caller, "asked": asked})
        return {name: found[name] for name in ("refusals", "change", "no_change_because") if name in found}

    def _report(
        self,
        release: Release,
        examination: Examination,
        decider: Decider,
        explained: Explained | None,
        warnings: tuple[str, ...] = (),
    ) -> Report:
        used, verification = self._examined, None
        if used is not None:
            verification = Verification(used.expected.root, used.expected.now, used.source)
        what = used.what if used else self._what
        return Report(
            what, self._question.caller, release.name, verification, examination, decider, explained, warnings
        )

    # ---- who decides

    def _decides(self, kms: RunningKms) -> str:
        """Return the name of the KMS whose webhook decides."""
        return kms.name if kms.spec.webhook == "own" else kms.spec.webhook

    def _asks_webhook(self, kms: RunningKms) -> bool:
        """Return whether something else than a policy file of the stack decides."""
        return kms.spec.asks_foreign_webhook or self._deployment.context.config.asks_chain(self._decides(kms))

    def _webhook_of(self, kms: RunningKms) -> tuple[str, bool]:
        """Return the URL of its webhook, and whether that is the stack's own."""
        if kms.spec.asks_foreign_webhook:
            return kms.spec.webhook, kms.spec.webhook.rstrip("/") in self._deployment.context.urls.values()
        return self._deployment.context.urls[f"auth-{self._decides(kms)}"], True

    def _supposed(self, compose_hash: bytes) -> BootRequest:
        """Make the boot info of an app with this app-compose."""
        guest = self._deployment.guests[_APP]
        info, state = guest.agent.app_info(), guest.domain.platform.state
        app_id = self._question.app_id
        boot_info = BootInfo(
            mr_aggregated=bytes(32),
            os_image_hash=info.os_image_hash,
            mr_system=bytes(32),
            app_id=compose_hash[:APP_ID_SIZE] if app_id is None else bytes.fromhex(app_id),
            compose_hash=compose_hash,
            instance_id=b"",
            device_id=info.device_id,
            key_provider_info=b"",
            tcb_status=state.tcb_status,
            advisory_ids=tuple(state.advisory_ids),
        )
        return BootRequest.of(boot_info, self._deployment.context.release_of(None))


def _examination(used: _Examined, release: Release, vm_config: str | None) -> Examination:
    """Verify evidence as a KMS does; without collateral a KMS refuses it. Raises `UnusableError`."""
    try:
        return examine(used.evidence, used.collect, used.expected, release, vm_config=vm_config)
    except (TransportError, AttestError) as error:
        checks = verify_evidence(used.evidence, used.collect, used.expected)
        return Examination(checks, None, f"no collateral: {error}")
