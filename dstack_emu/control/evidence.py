"""The calls of the control API about evidence that somebody has: what it is, whether it verifies, who would admit it.

They do what `dstack-emu inspect`, `verify` and `why` do, with the stack's PCCS, root and clock. Nothing that is given
is kept, and no key is shown. The modules of inspection are imported when they are needed: a stack without these calls
starts sooner.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from dstack_emu.attest.errors import AttestError, FormatError
from dstack_emu.attest.report_data import pad_report_data
from dstack_emu.control.certificates import certificate_pem
from dstack_emu.control.explanations import ExplanationControl
from dstack_emu.control.kms import CERTIFICATES
from dstack_emu.control.schemas import AdmissionQuestion, ControlError, EvidenceInput, EvidenceQuestion, checked
from dstack_emu.observability.spans import OUTSIDE, entered, headers_of
from dstack_emu.transport.aside import run_aside
from dstack_emu.transport.errors import TransportError
from dstack_emu.transport.pccs_client import DEFAULT_TIMEOUT, PccsClient

if TYPE_CHECKING:
    from dstack_emu.inspection.checks import Collect, Evidence, Expectations
    from dstack_emu.inspection.finding import Finding

CALLER: Final = "control"
"""Who asks the PCCS and the stack's webhooks in the journal; they are inside a call `Verify` or `Admit`."""

_UNBOUND: Final = bytes(64)
"""The report_data of evidence that only identifies a trust domain."""


class EvidenceControl(ExplanationControl):
    """The calls about evidence. They raise `ControlError` if they are refused."""

    # ---- what was given

    async def inspect(self, text: str | None = None, data: str | None = None) -> dict[str, Any]:
        """Return what `text` is, or bytes in base64 (`data`), and its contents, as `dstack-emu inspect --json` does."""
        from dstack_emu.inspection.description import as_json

        given = checked(EvidenceInput, {"text": text, "data": data}).content
        found = await _identified(given)
        head = {"what": found.what, "sure": found.sure, "form": list(found.form), "size": len(given)}
        return await run_aside(len(given), lambda: head | as_json(found.description))

    async def verify(
        self, text: str | None = None, data: str | None = None, report_data: str | None = None, strict: bool = False
    ) -> dict[str, Any]:
        """Make every check, as `dstack-emu verify --json` does: by the stack's PCCS, root and clock.

        `other_root` says why the evidence cannot verify here if its quote leads to another root; else it is None.
        """
        from dstack_emu.inspection.checks import all_hold, verify_evidence

        question = checked(EvidenceQuestion, {"text": text, "data": data, "report_data": report_data, "strict": strict})
        given = question.content
        found = await _identified(given)
        evidence = _evidence_of(found)
        try:
            wanted = None if question.report_data is None else pad_report_data(bytes.fromhex(question.report_data))
        except FormatError as error:
            raise ControlError(f"report_data: {error}") from error
        expected = self._expectations(wanted, strict=question.strict)
        with self._recorded("Verify"):
            collect = await self._collector(evidence)
        checks = await asyncio.to_thread(verify_evidence, evidence, collect, expected)
        return {
            "ok": all_hold(checks),
            "what": found.what,
            "root": expected.root,
            "time": expected.now,
            "collateral": self._pccs,
            "other_root": self._other_root(evidence.quote),
            "checks": [asdict(check) for check in checks],
        }

    async def admit(
        self,
        text: str | None = None,
        data: str | None = None,
        caller: str = "app",
        app_id: str | None = None,
        vm_config: str | None = None,
    ) -> dict[str, Any]:
        """Return what each KMS of the stack would decide, as `dstack-emu why --json` explains it, by KMS.

        `caller` is `app` or `kms`. A boot info is a claim that is not verified. Of an app-compose the claim is made
        that it boots on the platform of `app`; its id is `app_id`, by default the beginning of its compose hash.
        """
        from dstack_emu.control.admission import Admission

        question = checked(
            AdmissionQuestion,
            {"text": text, "data": data, "caller": caller, "app_id": app_id, "vm_config": vm_config},
        )
        admission = Admission(self._deployment, question)
        found = None if await admission.is_claim() else await _identified(question.content)
        evidence = None if found is None else _evidence_of(found)
        with self._recorded("Admit"):
            if found is not None and evidence is not None:
                collect = await self._collector(evidence)
                admission.examine(found.what, evidence, self._expectations(), collect, self._pccs)
            return await admission.decide()

    # ---- what the stack has

    def guest_evidence(self, name: str) -> dict[str, str]:
        """Return the present evidence of a trust domain over 64 zero bytes, as its agent's Attest answers (hex)."""
        return {"attestation": self._known_guest(name).domain.attest(_UNBOUND).encode().hex()}

    def certificate(self, name: str) -> dict[str, str]:
        """Return the root of the emulated Intel as PEM; `name` is that of its file."""
        return certificate_pem([self._deployment.context.root_ca], name)

    def kms_certificate(self, kms: str, name: str) -> dict[str, str]:
        """Return the certificates in a file of a KMS's folder as PEM, without keys."""
        folder = self._known_kms(kms).cert_dir
        return certificate_pem([folder / file for file in CERTIFICATES], name)

    # ---- with what it is verified

    @contextmanager
    def _recorded(self, call: str) -> Iterator[None]:
        """Record what is asked within the block as one call, which has nothing of what was given."""
        if not self.journal.enabled:
            yield
            return
        span, status = self.journal.begin(CALLER, call, None, 0, OUTSIDE), 500
        try:
            with entered(span):
                yield
            status = 200
        finally:
            self.journal.end(span, status)

    @property
    def _pccs(self) -> str:
        return self._deployment.context.urls["pccs"]

    def _expectations(self, report_data: bytes | None = None, *, strict: bool = False) -> "Expectations":
        from dstack_emu.attest.verify import TrustAnchor
        from dstack_emu.inspection.checks import Expectations

        context = self._deployment.context
        root = f"the emulated root of this stack, seed {context.config.seed!r}"
        now = context.instrumentation.clock()
        return Expectations(TrustAnchor(context.intel.root_der), root, now, report_data, strict)

    async def _collector(self, evidence: "Evidence") -> "Collect":
        """Ask the stack's PCCS for the collateral; return what returns it, or raises why there is none."""
        patience = self._instrumentation.patience or DEFAULT_TIMEOUT
        pccs = PccsClient(self._pccs, timeout=patience, headers=headers_of(CALLER))
        try:
            collateral = await pccs.collateral(evidence.quote)
        except (TransportError, AttestError) as error:
            problem = error

            def refuse(_quote: bytes) -> Any:
                raise problem

            return refuse
        finally:
            await pccs.close()
        return lambda _quote: collateral

    def _other_root(self, quote: bytes) -> str | None:
        """Say to which root a quote leads if it is not the stack's."""
        from dstack_emu.inspection.roots import root_of_quote

        root = root_of_quote(quote)
        if root is None or root.der == self._deployment.context.intel.root_der:
            return None
        if root.is_intels:
            return (
                "The quote leads to Intel's production root: it may be of real hardware. This stack trusts its own "
                "emulated root alone, and its PCCS has collateral of its own platforms alone. `dstack-emu verify "
                "--intel --pccs URL` verifies it, with a PCCS that has Intel's collateral."
            )
        return (
            f"The quote leads to another root, {root.name}. This stack trusts its own emulated root alone. If the "
            "quote is of a stack with another seed, `dstack-emu verify --offline --seed TEXT` verifies it."
        )


async def _identified(given: bytes) -> "Finding":
    from dstack_emu.inspection.identify import MAX_INPUT_SIZE, inspect_input

    if len(given) > MAX_INPUT_SIZE:
        raise ControlError(f"input of at most {MAX_INPUT_SIZE} bytes expected, got {len(given)}", 413)
    try:
        return await run_aside(len(given), lambda: inspect_input(given))
    except FormatError as error:
        raise ControlError(str(error)) from error


def _evidence_of(found: "Finding") -> "Evidence":
    if found.evidence is None:
        raise ControlError(f"{found.what}: {found.obstacle or 'no evidence in it'}")
    return found.evidence
