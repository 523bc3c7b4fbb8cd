"""One run of the runbook on one target: the actions of its cases, each recorded in the transcript.

Every wait for a KMS, a webhook, an agent or a PCCS has a deadline, and the error names what did not answer.
"""

import asyncio
import contextlib
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from dstack_emu.attest.app_info import decode_app_info
from dstack_emu.attest.attestation import Attestation, decode
from dstack_emu.attest.errors import VerificationError
from dstack_emu.attest.eventlog import require_unambiguous
from dstack_emu.attest.verify import VerifiedAttestation
from dstack_emu.chain.errors import ChainError
from dstack_emu.deployment import policy_files
from dstack_emu.kms_emu.agent_client import GuestAgentClient
from dstack_emu.kms_emu.onboarding import ZERO_REPORT_DATA
from dstack_emu.runbook.attested_client import AttestedClient
from dstack_emu.runbook.errors import RunbookError
from dstack_emu.runbook.kms_client import KmsAnswer, KmsClient
from dstack_emu.runbook.step_calls import seen_call
from dstack_emu.runbook.target import Target
from dstack_emu.runbook.transcript import Expected, Transcript, answers, arguments_of, redacted, says, short, summary_of
from dstack_emu.simulator.seed import Entropy
from dstack_emu.transport.pccs_client import AttestationVerifier, Clock, PccsClient
from dstack_emu.transport.ratls import AttestedServer
from dstack_emu.transport.tls import Identity
from dstack_emu.transport.urls import shown_url

if TYPE_CHECKING:
    from dstack_emu.runbook.contracts import ContractsOfTarget

PAUSE: Final = 0.2
"""Seconds between two calls to a KMS that does not answer yet."""

ATTEMPT_TIMEOUT: Final = 20.0
"""The timeout of one of these calls in seconds: one call during a change of phase must not use up all the time."""

START_AGAIN: Final = (
    "the runbook begins with two KMS that have no keys. For a stack of this emulator, start it anew with `up --fresh` "
    "and a new --state folder; in containers: docker compose down --volumes, then EMU_START=fresh docker compose up"
)


HOW_TO_BE_ADMITTED: Final = (
    "the token of its core.onboard.auth_token is expected; give it by --onboard-token or DSTACK_KMS_ONBOARD_TOKEN"
)

HEALTHY: Final = Expected(
    "with status = ok",
    lambda answer: answer.field("status") == "ok" and not answer.field("configError"),
    is_success=True,
)
"""auth-simple's answer at `/`; this emulator adds `configError` if the policy cannot be read."""


class BlockedError(Exception):
    """The rest of a case cannot be checked; the text says what is missing."""


class RunbookRun:
    """One run on one target. Its attributes keep the results of earlier cases that later cases need."""

    def __init__(
        self,
        target: Target,
        kms_client: KmsClient,
        transcript: Transcript,
        *,
        entropy: Entropy,
        clock: Clock,
        patience: float,
        source_token: str = "",
    ) -> None:
        self.source_token = source_token
        self.target, self.kms_client, self.transcript = target, kms_client, transcript
        self._entropy, self._clock, self._patience = entropy, clock, patience
        self._exit = AsyncExitStack()
        self._policies_before: dict[str, bytes | None] = {}
        self._contracts: ContractsOfTarget | None = None
        self.measured: dict[str, dict[str, Any]] = {}
        self.bootstrap: KmsAnswer | None = None
        self.onboarded: KmsAnswer | None = None
        self.meta: dict[str, KmsAnswer] = {}
        self.attested_client: AttestedClient | None = None
        self.app_rule: policy_files.AppRule | None = None
        self._app_image = ""

    async def __aenter__(self) -> Self:
        target = self.target
        self._exit.push_async_callback(self.kms_client.close)
        self.agent = GuestAgentClient(target.app) if target.app else None
        if self.agent is not None:
            self._exit.push_async_callback(self.agent.close)
        if target.chain is not None:
            from dstack_emu.runbook.contracts import ContractsOfTarget  # few targets have a chain

            self._contracts = ContractsOfTarget(target.chain)
            self._exit.push_async_callback(self._contracts.close)
        self.verifier: AttestationVerifier | None = None
        if target.pccs is not None:
            pccs = PccsClient(target.pccs)
            self._exit.push_async_callback(pccs.close)
            self.verifier = AttestationVerifier(pccs, target.anchor, self._clock)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._restore_policies()
            if self._contracts is not None:
                with contextlib.suppress(ChainError):
                    await self._contracts.restore()
        await self._exit.aclose()

    # ---- actions

    async def call(
        self,
        side: str,
        method: str,
        expected: Expected,
        *,
        arguments: dict[str, Any] | None = None,
        identity: Identity | None = None,
        by: str = "",
        keep: str = "",
    ) -> KmsAnswer:
        """Call an RPC of a KMS, compare the answer with what is expected, and keep it as evidence."""
        kms, given = self.target.kms[side], arguments or {}
        if method == "Onboard.Onboard" and self.source_token:
            given = {**given, "source_token": self.source_token}
        answer = await self.kms_client.call(kms, method, given, identity)
        if "source_url" in given:
            given = {**given, "source_url": shown_url(given["source_url"])}
        given = self.transcript.secrets.redact_all(given)  # before it is shown: a long value is shown in part
        request = f"kms-{side} {method}({arguments_of(given)}){f', {by}' if by else ''}"
        self._record(request, answer, expected, keep or method, given)
        before = {"Onboard.Bootstrap": self.bootstrap, "Onboard.Onboard": self.onboarded}
        if "has already been" in answer.error and before.get(method, answer) is None:
            where = self.kms_client.address(kms, method)
            said = self.transcript.secrets.redact(answer.error)
            raise RunbookError(f"kms-{side} at {where}: {said}: {START_AGAIN}")
        return answer

    async def get(self, what: str, url: str, expected: Expected, *, keep: str = "") -> KmsAnswer:
        """GET a page and compare it with what is expected."""
        answer = await self.kms_client.get(url)
        self._record(f"GET {what}", answer, expected, keep, None)
        return answer

    async def post(self, what: str, url: str, document: Any, expected: Expected, *, keep: str) -> KmsAnswer:
        """POST JSON to a service without RPCs and compare the answer with what is expected."""
        answer = await self.kms_client.post(url, document)
        self._record(f"POST {what}", answer, expected, keep, document)
        return answer

    async def finish(self, side: str) -> bool:
        """End a KMS's onboard phase and wait for its runtime phase; return whether that answers."""
        kms, keep = self.target.kms[side], f"finish-{side}"
        if self.kms_client.finishes_by_page:
            page = await self.kms_client.finish_page(kms)
            self._record(f"GET kms-{side}/finish", page, says("OK"), keep, None)
        else:
            await self.call(side, "Onboard.Finish", answers(), keep=keep)
        source = self.meta.get("src") or self.bootstrap
        expected = answers("ca_cert", k256_pubkey=source.field("k256_pubkey") if source else None)
        answer = await self._wait_for_runtime_phase(side)
        self._record(f"kms-{side} KMS.GetMeta()", answer, expected, f"kms-{side}-meta", {})
        if answer.ok:
            self.meta[side] = answer
        return answer.ok

    def _record(
        self, request: str, answer: KmsAnswer, expected: Expected, keep: str, given: dict[str, Any] | None
    ) -> None:
        self.transcript.learn_keys(answer.body)
        shown = replace(answer, body=self.transcript.secrets.redact_all(redacted(answer.body)))
        self.transcript.seen[self.transcript.next_name] = seen_call(request, shown)
        if keep:
            response = {"asked": request, "status": answer.shown, "body": shown.body}
            self.transcript.keep("responses", keep, response if given is None else response | {"arguments": given})
        self.transcript.record(request, summary_of(shown), expected.text_with(answer.success), expected.holds(answer))

    async def apply_policy(self, side: str, name: str, policy: dict[str, Any]) -> None:
        """Replace the policy of one side, a file or what contracts allow, and check that its webhook can read it.

        Raises `RunbookError` if the file cannot be written, or a contract refuses. A contract is that of both sides.
        """
        path = self.target.kms[side].policy
        if path is None:
            await self._apply_on_chain(side, name, policy)
        else:
            self._write_policy(side, path, policy)
            self.transcript.keep("policies", f"auth-{side}-{name}", policy)
        await self.get(f"auth-{side}/ with the policy {name} in place", f"{self.target.kms[side].auth}/", HEALTHY)

    async def _apply_on_chain(self, side: str, name: str, policy: dict[str, Any]) -> None:
        if self._contracts is None:
            raise RunbookError(f"the target names neither a policy of auth-{side} nor a chain")
        devices = [str(info["device_id"]) for info in self.measured.values()]
        sent = await self._contracts.apply(policy, devices)
        self.transcript.keep("policies", f"auth-{side}-{name}", {"policy": policy, "transactions": sent})

    def _write_policy(self, side: str, path: Path, policy: dict[str, Any]) -> None:
        try:
            if side not in self._policies_before:
                self._policies_before[side] = path.read_bytes() if path.exists() else None
            policy_files.write(path, policy)
        except OSError as error:
            raise RunbookError(f"the policy of auth-{side} cannot be written: {path}: {error.strerror}") from error

    def _restore_policies(self) -> None:
        for side, before in self._policies_before.items():
            path = self.target.kms[side].policy
            if before is not None and path is not None:
                with contextlib.suppress(OSError):
                    policy_files.replace(path, before)

    def allow(self, *sides: str, app: bool = False) -> dict[str, Any]:
        """Return a policy that allows these KMS by their measurements, and the app if there is one and `app` is set."""
        measured = [self.measured[side] for side in sides]
        images = [str(info["os_image_hash"]) for info in measured]
        if app and self._app_image:
            images.append(self._app_image)
        rules = [self.app_rule] if app and self.app_rule else []
        return policy_files.allow(images, [str(info["mr_aggregated"]) for info in measured], rules)

    def deny_by_measurement(self, image_of: str) -> dict[str, Any]:
        """Return a policy that allows the image of a KMS, but no measurement that exists."""
        return policy_files.allow([str(self.measured[image_of]["os_image_hash"])], ["00" * 32], [])

    # ---- waiting

    async def wait_until_fresh(self, side: str) -> None:
        """Wait until a KMS states its measurements; raise `RunbookError` if it has keys or does not answer in time."""
        kms, deadline = self.target.kms[side], time.monotonic() + self._patience
        while True:
            answer = await self.kms_client.call(kms, "Onboard.GetAttestationInfo", {}, seconds=ATTEMPT_TIMEOUT)
            if answer.ok:
                return
            if answer.status == 401 or answer.code == "UNAUTHENTICATED":
                where = self.kms_client.address(kms, "Onboard.GetAttestationInfo")
                raise RunbookError(f"kms-{side} at {where} answered {answer.shown}: {HOW_TO_BE_ADMITTED}")
            meta = await self.kms_client.call(kms, "KMS.GetMeta", {}, seconds=ATTEMPT_TIMEOUT)
            if meta.ok:
                where = self.kms_client.address(kms, "KMS.GetMeta")
                raise RunbookError(f"kms-{side} at {where} has keys already: {START_AGAIN}")
            if time.monotonic() > deadline:
                said = answer.error or f"status {answer.status}"
                where = self.kms_client.address(kms, "Onboard.GetAttestationInfo")
                said = short(self.transcript.secrets.redact(said))
                raise RunbookError(f"kms-{side} at {where} does not say what it measures: {said}")
            await asyncio.sleep(PAUSE)

    async def _wait_for_runtime_phase(self, side: str) -> KmsAnswer:
        """Call GetMeta until the KMS, which was told to finish, answers or the time is up; return the answer."""
        deadline = time.monotonic() + self._patience
        while True:
            answer = await self.kms_client.call(self.target.kms[side], "KMS.GetMeta", {}, seconds=ATTEMPT_TIMEOUT)
            if answer.status or time.monotonic() > deadline:
                return answer
            await asyncio.sleep(PAUSE)

    # ---- evidence

    async def verify(self, attestation: Attestation) -> VerifiedAttestation:
        """Verify evidence under the target's root; raise `AttestError`."""
        if self.verifier is None:
            raise VerificationError("no evidence can be verified: the target names no PCCS (services.pccs)")
        return await self.verifier.verify(attestation)

    async def verify_hex(self, text: object) -> VerifiedAttestation:
        """Verify evidence in hex, as it is in an answer; raise `AttestError`."""
        try:
            data = bytes.fromhex(str(text))
        except ValueError as error:
            raise VerificationError(f"hex expected, got {short(text)}") from error
        return await self.verify(decode(data))

    async def verify_server(self, side: str) -> AttestedServer:
        """Verify the evidence in a KMS's certificate under the target's root; raise `AttestError`."""
        return await self.kms_client.verify_server(self.target.kms[side], self.verifier)

    async def make_attested_client(self, temp_ca: KmsAnswer) -> AttestedClient | None:
        """Make the attested client and the rule that allows it; return None if the target names no agent of an app.

        Raises `KmsError` or `AttestError` if the agent gives no evidence or the temporary CA cannot be read.
        """
        if self.agent is None:
            return None
        self.attested_client = AttestedClient.of(temp_ca.body, self.agent, self._entropy, self._clock)
        evidence = await self.agent.evidence(ZERO_REPORT_DATA)
        require_unambiguous(evidence.runtime_events)
        info = decode_app_info(evidence)
        self.app_rule = policy_files.AppRule(info.app_id.hex(), info.compose_hash.hex())
        self._app_image = info.os_image_hash.hex()
        return self.attested_client
