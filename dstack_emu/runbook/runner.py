"""Carrying the runbook out: the moves that its cases are made of, on one target, each taken down in the journal."""

import asyncio
import contextlib
import time
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Final, Self

from dstack_emu.attest.app_info import decode_app_info
from dstack_emu.attest.attestation import Attestation, decode
from dstack_emu.attest.errors import VerificationError
from dstack_emu.attest.verify import VerifiedAttestation
from dstack_emu.deployment import policy_files
from dstack_emu.kms_emu.agent_client import GuestAgentClient
from dstack_emu.kms_emu.onboarding import ZERO_REPORT_DATA
from dstack_emu.runbook.attested_client import AttestedClient
from dstack_emu.runbook.kms_client import KmsAnswer, KmsClient
from dstack_emu.runbook.target import Target
from dstack_emu.runbook.transcript import Expected, Transcript, answers, arguments_of, redacted, says, short, summary_of
from dstack_emu.simulator.seed import Entropy
from dstack_emu.transport.pccs_client import AttestationVerifier, Clock, PccsClient
from dstack_emu.transport.ratls import AttestedServer
from dstack_emu.transport.tls import Identity

PAUSE: Final = 0.2
"""Seconds between two questions to a KMS that does not answer yet."""

START_AGAIN: Final = (
    "the runbook begins with two KMS that have no keys. For a stack of this emulator, start it anew with `up --fresh` "
    "and a new --state folder; in containers: docker compose down --volumes, then EMU_START=fresh docker compose up"
)


WELL: Final = Expected(
    "with status = ok",
    lambda answer: answer.field("status") == "ok" and not answer.field("configError"),
    is_success=True,
)
"""What auth-simple answers at `/`; `configError` is this emulator's word for a policy that cannot be read."""


class RunbookError(Exception):
    """The runbook cannot be carried out here; the text says what is in its way."""


class BlockedError(Exception):
    """The rest of a case cannot be judged; the text says for want of what."""


class RunbookRun:
    """One run on one target. What later cases need of earlier ones stands in the attributes."""

    def __init__(
        self, target: Target, caller: KmsClient, journal: Transcript, *, entropy: Entropy, clock: Clock, patience: float
    ) -> None:
        self.target, self.caller, self.journal = target, caller, journal
        self._entropy, self._clock, self._patience = entropy, clock, patience
        self._exit = AsyncExitStack()
        self._policies_before: dict[str, bytes | None] = {}
        self.measured: dict[str, dict[str, Any]] = {}
        self.bootstrap: KmsAnswer | None = None
        self.onboarded: KmsAnswer | None = None
        self.meta: dict[str, KmsAnswer] = {}
        self.client: AttestedClient | None = None
        self.app_rule: policy_files.AppRule | None = None
        self._app_image = ""

    async def __aenter__(self) -> Self:
        target = self.target
        self._exit.push_async_callback(self.caller.close)
        self.agent = GuestAgentClient(target.app) if target.app else None
        if self.agent is not None:
            self._exit.push_async_callback(self.agent.close)
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
            self._put_policies_back()
        await self._exit.aclose()

    # ---- moves

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
        """Call an RPC of a KMS and hold the answer against what is expected; keep it as evidence."""
        kms, given = self.target.kms[side], arguments or {}
        answer = await self.caller.call(kms, method, given, identity)
        asked = f"kms-{side} {method}({arguments_of(given)}){f', {by}' if by else ''}"
        self._judge(asked, answer, expected, keep or method, given)
        before = {"Onboard.Bootstrap": self.bootstrap, "Onboard.Onboard": self.onboarded}
        if "has already been" in answer.error and before.get(method, answer) is None:
            where = self.caller.address(kms, method)
            raise RunbookError(f"kms-{side} at {where}: {answer.error}: {START_AGAIN}")
        return answer

    async def get(self, what: str, url: str, expected: Expected, *, keep: str = "") -> KmsAnswer:
        """GET a page and hold it against what is expected."""
        answer = await self.caller.get(url)
        self._judge(f"GET {what}", answer, expected, keep, None)
        return answer

    async def post(self, what: str, url: str, document: Any, expected: Expected, *, keep: str) -> KmsAnswer:
        """POST JSON to a service without RPCs and hold the answer against what is expected."""
        answer = await self.caller.post(url, document)
        self._judge(f"POST {what}", answer, expected, keep, document)
        return answer

    async def finish(self, side: str) -> bool:
        """End a KMS's onboard phase, and wait until its runtime phase answers; return whether it does."""
        kms, keep = self.target.kms[side], f"finish-{side}"
        if self.caller.finishes_by_page:
            await self.get(f"kms-{side}/finish", f"{kms.onboard}/finish", says("OK"), keep=keep)
        else:
            await self.call(side, "Onboard.Finish", answers(), keep=keep)
        source = self.meta.get("src") or self.bootstrap
        wanted = answers("ca_cert", k256_pubkey=source.field("k256_pubkey") if source else None)
        answer = await self._wait_until_it_runs(side)
        self._judge(f"kms-{side} KMS.GetMeta()", answer, wanted, f"kms-{side}-meta", {})
        if answer.ok:
            self.meta[side] = answer
        return answer.ok

    def _judge(
        self, asked: str, answer: KmsAnswer, expected: Expected, keep: str, given: dict[str, Any] | None
    ) -> None:
        if keep:
            response = {"asked": asked, "status": answer.shown, "body": redacted(answer.body)}
            self.journal.keep("responses", keep, response if given is None else response | {"arguments": given})
        self.journal.note(asked, summary_of(answer), expected.words(answer.success), expected.holds(answer))

    async def apply(self, side: str, name: str, policy: dict[str, Any]) -> None:
        """Copy a policy over one side's, at once, and ask the webhook whether it is well.

        Raises `RunbookError` where the file cannot be written.
        """
        path = self.target.kms[side].policy
        try:
            if side not in self._policies_before:
                self._policies_before[side] = path.read_bytes() if path.exists() else None
            policy_files.write(path, policy)
        except OSError as error:
            raise RunbookError(f"the policy of auth-{side} cannot be written: {path}: {error.strerror}") from error
        self.journal.keep("policies", f"auth-{side}-{name}", policy)
        await self.get(f"auth-{side}/ with the policy {name} in place", f"{self.target.kms[side].auth}/", WELL)

    def _put_policies_back(self) -> None:
        for side, before in self._policies_before.items():
            if before is not None:
                with contextlib.suppress(OSError):
                    policy_files.replace(self.target.kms[side].policy, before)

    def allow(self, *sides: str, app: bool = False) -> dict[str, Any]:
        """A policy that allows these KMS by what they measured, and the app where there is one."""
        measured = [self.measured[side] for side in sides]
        images = [str(info["os_image_hash"]) for info in measured]
        if app and self._app_image:
            images.append(self._app_image)
        rules = [self.app_rule] if app and self.app_rule else []
        return policy_files.allow(images, [str(info["mr_aggregated"]) for info in measured], rules)

    def deny_by_measurement(self, image_of: str) -> dict[str, Any]:
        """A policy that allows a KMS's image and a measurement that nobody has."""
        return policy_files.allow([str(self.measured[image_of]["os_image_hash"])], ["00" * 32], [])

    # ---- waiting

    async def wait_until_fresh(self, side: str) -> None:
        """Ask a KMS what it measures until it answers; raise `RunbookError` where it has keys, or never answers."""
        kms, deadline = self.target.kms[side], time.monotonic() + self._patience
        while True:
            answer = await self.caller.call(kms, "Onboard.GetAttestationInfo", {})
            if answer.ok:
                return
            meta = await self.caller.call(kms, "KMS.GetMeta", {})
            if meta.ok:
                where = self.caller.address(kms, "KMS.GetMeta")
                raise RunbookError(f"kms-{side} at {where} has keys already: {START_AGAIN}")
            if time.monotonic() > deadline:
                said = answer.error or f"status {answer.status}"
                where = self.caller.address(kms, "Onboard.GetAttestationInfo")
                raise RunbookError(f"kms-{side} at {where} does not say what it measures: {short(said)}")
            await asyncio.sleep(PAUSE)

    async def _wait_until_it_runs(self, side: str) -> KmsAnswer:
        """Ask a KMS that was told to finish for its metadata, until it answers or patience ends; return the answer."""
        deadline = time.monotonic() + self._patience
        while True:
            answer = await self.caller.call(self.target.kms[side], "KMS.GetMeta", {})
            if answer.status or time.monotonic() > deadline:
                return answer
            await asyncio.sleep(PAUSE)

    # ---- evidence

    async def verify(self, attestation: Attestation) -> VerifiedAttestation:
        """Judge evidence under the target's root; raise `AttestError`."""
        if self.verifier is None:
            raise VerificationError("no PCCS is named, so no evidence can be judged")
        return await self.verifier.verify(attestation)

    async def verify_hex(self, text: object) -> VerifiedAttestation:
        """The same for evidence as an answer has it."""
        try:
            data = bytes.fromhex(str(text))
        except ValueError as error:
            raise VerificationError(f"hex expected, got {short(text)}") from error
        return await self.verify(decode(data))

    async def peer(self, side: str) -> AttestedServer:
        """What a KMS proves by its certificate, judged under the target's root; raise `AttestError`."""
        return await self.caller.peer(self.target.kms[side], self.verifier)

    async def make_client(self, temp_ca: KmsAnswer) -> AttestedClient | None:
        """Make the attested client, and the rule that allows it; None where no app's agent is named.

        Raises `KmsError` or `AttestError` where the agent or the temporary CA are no good.
        """
        if self.agent is None:
            return None
        self.client = AttestedClient.of(temp_ca.body, self.agent, self._entropy, self._clock)
        info = decode_app_info(await self.agent.evidence(ZERO_REPORT_DATA))
        self.app_rule = policy_files.AppRule(info.app_id.hex(), info.compose_hash.hex())
        self._app_image = info.os_image_hash.hex()
        return self.client
