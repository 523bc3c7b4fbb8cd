"""Runs the scripts of `linearizability`: the tracks as tasks of one event loop, over the sockets of a stack."""

import asyncio
from collections.abc import Awaitable
from typing import Any

from campaigns.case import Act, Finding, Outcome, Script
from campaigns.decision_stack import DecisionStack, StackWorld, decision_stack
from campaigns.fail_open_world import answered, post
from campaigns.linear_history import MAX_AGE, Call, History, judge_order
from dstack_emu import ControlError

NOON = "2026-06-01T12:00:00Z"
"""The time at which each case begins; the clock stands still between its acts."""


class LinearWorld(StackWorld):
    """A stack whose KMS keep answers about themselves, and one, the default, whose KMS do not."""

    def __init__(self, *, trusts_cache: bool) -> None:
        super().__init__()
        self._trusts_cache = trusts_cache
        self._stacks: dict[bool, DecisionStack] = {}

    async def _run(self, script: Script) -> Outcome:
        caches = any(act.fields["caches"] for act in script if act.name == "stack")
        if caches not in self._stacks:
            made = decision_stack("0.6", auth_api_cache=caches)
            self._stacks[caches] = await self._exit.enter_async_context(made)
        stack = self._stacks[caches]
        await stack.begin()
        stack.control.set_clock(freeze=NOON)
        max_age = MAX_AGE if caches and self._trusts_cache else 0.0
        case = _Case(stack, History(stack.state.copy(), stack.control.clock()["now"], max_age))
        tracks: dict[int, list[Act]] = {}
        for act in script:
            if act.name != "stack":
                tracks.setdefault(act.fields["track"], []).append(act)
        await asyncio.gather(*(case.follow(track) for track in tracks.values()))
        return case.judged()


class _Case:
    """One case in progress."""

    def __init__(self, stack: DecisionStack, history: History) -> None:
        self._stack, self._history = stack, history
        self._calls: list[Call] = []
        self._position = stack.control.journal.position
        self._outcome = Outcome()

    async def follow(self, track: list[Act]) -> None:
        """Carry out the acts of a track."""
        for act in track:
            for _ in range(act.fields["steps"]):
                await asyncio.sleep(0)
            await self._perform(act)

    async def _perform(self, act: Act) -> None:
        given, control = act.fields, self._stack.control
        match act.name:
            case "boot":
                await self._call(given["who"], "Boot", control.boot_guest(given["who"], given["kms"]))
            case "certificate":
                url = f"{control.guest(given['who'])['url']}/GetTlsKey?json"
                await self._call(given["who"], "GetTlsKey", answered(post(url, {"subject": "x"})))
            case "temporary CA":
                service = f"kms-{given['kms']}"
                url = f"{self._stack.stack.services[service]}/prpc/KMS.GetTempCaCert?json"
                await self._call(service, "GetTempCaCert", answered(post(url, {})))
            case "onboard":
                await self._call("kms-third", "Onboard", control.onboard_kms("third", given["source"]))
            case _:
                self._stack.change(act)
                self._history.change(self._stack.state.copy(), control.clock()["now"])

    async def _call(self, service: str, rpc: str, work: Awaitable[Any]) -> None:
        call = Call(service, rpc, self._history.now)
        self._calls.append(call)
        try:
            await work
        except ControlError as error:
            if error.status not in (403, 409):
                raise
            self._outcome.counts[f"{rpc}: refused"] += 1
        else:
            self._outcome.counts[f"{rpc}: succeeded"] += 1
        call.answered = self._history.now

    def judged(self) -> Outcome:
        """Judge all calls, once they have ended."""
        self._find_roots()
        for call in self._calls:
            self._history.judge(call, self._outcome)
        judge_order(self._calls, self._outcome)
        self._outcome.counts["concurrent changes"] += sum(call.answered > call.invoked for call in self._calls)
        unseen = [call for call in self._calls if call.root is None]
        if unseen:
            self._outcome.findings.append(Finding("a call that the journal has not", str(unseen[0])))
        return self._outcome

    def _find_roots(self) -> None:
        """Find each call's record: a service's calls of one kind never overlap within a track, and tracks differ."""
        roots = self._stack.control.journal.records(since=self._position)
        for call in self._calls:
            for root in roots:
                if (root["service"], root["call"]) == (call.service, call.rpc):
                    call.root = root
                    roots.remove(root)
                    break
