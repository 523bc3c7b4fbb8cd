"""Runs the scripts of `fail-open` on a stack of each release, in an event loop of its own."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Final

import aiohttp

from campaigns.case import Act, Finding, Outcome, Script
from campaigns.decision_stack import DecisionStack, StackWorld, decision_stack
from campaigns.decision_state import State
from campaigns.fail_open_judge import LATE, Seen, calls, judge
from dstack_emu import ControlError
from dstack_emu.observability.fault_rules import InstalledRule

HARMLESS: Final = ("delay", "slow")
"""Faults after which a call still has to succeed."""
LOOK: Final = 0.002
"""Seconds between two looks at whether a call has stalled."""
KEY_PATH: Final = "campaign"


class FailOpenWorld(StackWorld):
    """A stack of each release; a script without an act that names one is of 0.6."""

    def __init__(self) -> None:
        super().__init__()
        self._stacks: dict[str, DecisionStack] = {}
        self._keys: dict[str, dict[str, str]] = {}
        self._before: dict[str, list[State]] = {}

    async def _run(self, script: Script) -> Outcome:
        release = next((act.fields["name"] for act in script if act.name == "release"), "0.6")
        stack = await self._stack(release)
        await stack.begin()
        case = _Case(stack, self._keys[release], self._before.get(release, []))
        for act in script:
            if act.name != "release":
                await case.perform(act)
        self._before[release] = case.earlier
        return case.outcome

    async def _stack(self, release: str) -> DecisionStack:
        if release not in self._stacks:
            stack = await self._exit.enter_async_context(decision_stack(release))
            self._stacks[release] = stack
            self._keys[release] = {stack.control.guest("app")["app_id"]: await _key_of(stack, "app")}
            await stack.control.boot_guest("wallet")
            self._keys[release][stack.control.guest("wallet")["app_id"]] = await _key_of(stack, "wallet")
        return self._stacks[release]


async def _key_of(stack: DecisionStack, who: str) -> str:
    url = f"{stack.control.guest(who)['url']}/GetKey?json"
    return str((await post(url, {"path": KEY_PATH, "purpose": ""}))[1].get("key"))


async def post(url: str, fields: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """POST JSON; the status is 0 if the connection fails."""
    timeout = aiohttp.ClientTimeout(total=60)
    connector = aiohttp.TCPConnector(ssl=False, force_close=True)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
            session.post(url, json=fields) as answer,
        ):
            text = await answer.text(errors="replace")  # a fault may have made other bytes of it
            status = answer.status
    except aiohttp.ClientError as error:
        return 0, {"error": str(error)}
    with contextlib.suppress(ValueError):
        document = json.loads(text)
        if isinstance(document, dict):
            return status, document
    return status, {"error": text}


class _Case:
    """One case in progress."""

    def __init__(self, stack: DecisionStack, keys: dict[str, str], before: list[State]) -> None:
        self._stack, self._keys = stack, keys
        self.outcome = Outcome()
        self._rules: list[InstalledRule] = []
        self._before = before  # a guest may still register anew by what was so at the end of the last case
        self.earlier: list[State] = []
        self._certified = set(stack.baseline_instances)
        self._has_handed_over = False
        self._shown: set[str] = set()
        """Whose evidence an agent has shown as its own."""

    async def perform(self, act: Act) -> None:
        """Carry out one act."""
        given, control = act.fields, self._stack.control
        match act.name:
            case "fault":
                self._rules.append(control.add_fault(**given))
            case "swap":
                await self._swap(given["service"], given["with"])
            case "lift":
                control.clear_faults()
                self._rules.clear()
            case "restart":
                await self._restart(given["kms"])
            case "boot":
                await self._boot(act)
            case "certificate":
                await self._certificate(act)
            case "onboard":
                await self._onboard(given["source"])
            case "temporary CA":
                await self._ask(given["kms"], "GetTempCaCert")
            case "no evidence":
                await self._ask(given["kms"], given["rpc"])
            case _:
                self.earlier.append(self._stack.state.copy())
                self._stack.change(act)

    async def _swap(self, service: str, who: str) -> None:
        """Let an agent answer with the evidence of another trust domain, of an app that may not be a KMS."""
        url = f"{self._stack.control.guest(who)['url']}/Attest?json"
        status, answer = await post(url, {"report_data": bytes(64).hex()})
        if status == 200:
            fault = {"kind": "status", "status": 200, "body": answer}
            self._rules.append(self._stack.control.add_fault(service=service, call="Attest", **fault))
            self._shown.add(who)

    # ---- calls

    async def _restart(self, kms: str) -> None:
        task = asyncio.ensure_future(self._stack.control.restart_kms(kms))
        await self._until_done(task, {rule.id: rule.met for rule in self._rules})
        try:
            await task
        except ControlError:
            self._count("restart", "failed")
        if self._shown:  # its new certificate may have the evidence of another trust domain
            self._stack.misattested.add(kms)
        self._stack.state.own[kms] = frozenset({None})

    async def _boot(self, act: Act) -> None:
        who, kms = act.fields["who"], act.fields["kms"]
        control = self._stack.control
        had_keys = control.guest(who)["has_keys"]  # a boot that is refused changes nothing
        error, seen = await self._call(act, (who, "Boot"), lambda: control.boot_guest(who, kms))
        has_keys = control.guest(who)["has_keys"]
        got = _has_released(seen, kms, "GetAppKey", who)
        server = [state.invalid(f"kms-{kms}") for state in seen.moments]
        if error is None:
            await self._judge_keys(who, got=got)
            if all(server):
                self._find("keys of a KMS whose evidence does not hold", f"{who} took them of {kms}: {server}")
            return
        if error.status != 403:
            return
        if has_keys and not had_keys:
            self._find("keys after a refusal", f"{who} of {kms}: {error}")
        refused = any(r["outcome"] != "ok" for r, _ in calls(seen.records) if r["service"] == f"kms-{kms}")
        if not (seen.faults or refused or any(server) or kms in self._stack.misattested or LATE in str(error)):
            self._find("boot refused without a reason", f"{who} by {kms}: {error}")

    async def _judge_keys(self, who: str, *, got: bool) -> None:
        if not got:
            self._find("keys that no KMS released", who)
        expected = self._keys.get(self._stack.state.domains[who].app_id)
        if expected is not None and not self._stack.control.guest(who)["has_keys"]:
            self._find("a boot that succeeds without keys", who)
        elif expected is not None and (key := await _key_of(self._stack, who)) != expected and not self._rules:
            self._find("other keys than the app's", f"{who} has {key}")

    async def _certificate(self, act: Act) -> None:
        who = act.fields["who"]
        url = f"{self._stack.control.guest(who)['url']}/GetTlsKey?json"
        await self._call(act, (who, "GetTlsKey"), lambda: answered(post(url, {"subject": KEY_PATH})))

    async def _ask(self, kms: str, rpc: str) -> None:
        url = f"{self._stack.stack.services[f'kms-{kms}']}/prpc/KMS.{rpc}?json"
        act = Act(rpc)
        error, seen = await self._call(act, (f"kms-{kms}", rpc), lambda: answered(post(url, {"api_version": 1})))
        if error is None and rpc != "GetTempCaCert" and not seen.faults:
            self._find(f"{rpc} without evidence", f"answered by {kms}")

    async def _onboard(self, source: str) -> None:
        control, folder = self._stack.control, Path(self._stack.control.kms("third")["certs"])
        was_fresh = control.kms("third")["phase"] == "onboard" and not self._has_handed_over
        _, seen = await self._call(
            Act("onboard"), ("kms-third", "Onboard"), lambda: control.onboard_kms("third", source)
        )
        if not was_fresh:
            return
        released = _has_released(seen, source, "GetKmsKey", "kms-third")
        has_keys = (folder / "root-k256.key").exists()
        if not has_keys:
            return
        self._has_handed_over = True
        if not released:
            self._find("root keys that no KMS released", f"of {source}")
        if all(state.invalid(f"kms-{source}") for state in seen.moments):
            self._find("root keys of a KMS whose evidence does not hold", f"of {source}")
        denied = [state.denied("third", "kms", state.asked(f"kms-{source}")) for state in seen.moments]
        if all(denied):
            self._find("root keys of a KMS that the receiver's webhook denies", f"of {source}: {denied}")
        own = Path(control.kms("src")["certs"]) / "root-k256.key"
        if (folder / "root-k256.key").read_bytes() != own.read_bytes():
            self._find("other root keys", f"of {source}")

    async def _call(
        self, act: Act, root: tuple[str, str], work: Callable[[], Awaitable[Any]]
    ) -> tuple[ControlError | None, Seen]:
        """Make a call, change something meanwhile, end stalls, and judge."""
        stack, journal = self._stack, self._stack.control.journal
        moments, position = [stack.state.copy()], journal.position
        met = {rule.id: rule.met for rule in self._rules}
        task = asyncio.ensure_future(work())
        if (meanwhile := act.fields.get("meanwhile")) is not None:
            for _ in range(act.fields["steps"]):
                await asyncio.sleep(0)
            stack.change(Act(meanwhile["act"], {key: value for key, value in meanwhile.items() if key != "act"}))
            moments.append(stack.state.copy())
        error = None
        try:
            await self._until_done(task, met)
            await task
        except ControlError as refusal:
            error = refusal
            self._count(act.name, "refused")
        else:
            self._count(act.name, "succeeded")
        seen = self._seen(moments, met, journal.records(since=position), root)
        judge(seen, self.outcome)
        self._learn(seen)
        self.earlier.extend(moments)
        self._judge_instances(seen)
        return error, seen

    async def _until_done(self, task: "asyncio.Future[Any]", met: dict[str, int]) -> None:
        """Wait for a call; if it stalls, move the clock on by a minute and let the stalled connection end."""
        while any(rule.fault.kind == "hang" for rule in self._rules) and not task.done():
            await asyncio.wait({task}, timeout=LOOK)
            for rule in [rule for rule in self._rules if rule.fault.kind == "hang"]:
                if rule.met > met[rule.id]:
                    self._stack.control.set_clock(advance="60s")
                    with contextlib.suppress(ControlError):  # it may have met its last call meanwhile
                        self._stack.control.lift_fault(rule.id)
        if not task.done():
            await asyncio.wait({task})

    def _seen(self, moments: list[State], met: dict[str, int], records: list[Any], root: tuple[str, str]) -> Seen:
        hit = [rule for rule in self._rules if rule.met > met[rule.id]]
        faults = Counter(f"{rule.fault.service} {rule.fault.kind}" for rule in hit if rule.fault.kind not in HARMLESS)
        behind = {0}
        for rule in hit:
            blocks = rule.fault.blocks or 1
            if rule.fault.service != "chain":
                continue
            if rule.fault.kind == "stale":
                behind.add(blocks)
            if rule.fault.kind == "reorg":
                self._stack.state.reorganize(blocks)
                moments.append(self._stack.state.copy())
        self._rules = [rule for rule in self._rules if not rule.lifted.is_set()]
        self.outcome.counts.update(f"hit by {name}" for name in faults)
        return Seen(moments, [*self._before, *self.earlier], records, root, faults, tuple(sorted(behind)))

    def _learn(self, seen: Seen) -> None:
        """Update what each KMS may know of itself, after it was asked something."""
        asked = {record["service"] for record, _ in calls(seen.records)}
        for kms, own in self._stack.state.own.items():
            if None in own and f"kms-{kms}" in asked:
                found = frozenset(state.judged(kms) for state in seen.moments) | (own - {None})
                found |= {state.asked(who) for state in seen.moments for who in self._shown}
                self._stack.state.own[kms] = found | {None} if seen.faults else found

    def _given(self, records: Iterable[Any]) -> set[str]:
        """Return the instances to which a KMS gave a certificate."""
        domains = self._stack.state.domains
        signed = [each for each in records if each["call"] == "SignCert" and "released" in each]
        return {domains[each["caller"]].instance_id for each in signed if each["caller"] in domains}

    def _judge_instances(self, seen: Seen) -> None:
        """Judge who is registered at the gateway: an instance to which a KMS gave a certificate."""
        self._certified |= self._given(certificate for certificate, _ in calls(seen.records))
        if unknown := set(self._stack.control.gateway()["instances"]) - self._certified:
            # A guest whose registration stalled in the case before may register only now.
            unknown -= self._given(self._stack.control.journal.find("SignCert"))
        if unknown:
            self._find("registered without a certificate", ", ".join(sorted(unknown)))

    def _find(self, rule: str, text: str) -> None:
        self.outcome.findings.append(Finding(rule, text))

    def _count(self, name: str, how: str) -> None:
        self.outcome.counts[f"{name}: {how}"] += 1


def _has_released(seen: Seen, kms: str, rpc: str, caller: str) -> bool:
    return any(
        (record["service"], record["call"], record["caller"]) == (f"kms-{kms}", rpc, caller) and "released" in record
        for record, _ in calls(seen.records)
    )


async def answered(sent: Awaitable[tuple[int, dict[str, Any]]]) -> None:
    """Wait for an answer; raise `ControlError` with the status of a refusal if it is no success."""
    status, answer = await sent
    if status != 200:
        raise ControlError(str(answer.get("error", status)), 403)
