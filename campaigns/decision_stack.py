"""The stack of the campaigns about decisions: two KMS that decide by a file and by a contract, and one without keys.

`DecisionStack` has what changes it, each act in the stack and in the model at once.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from campaigns.case import Act, Outcome, Script
from campaigns.decision_state import GARBAGE, NOBODYS, Domain, State, contracts_of
from dstack_emu import Stack, StackConfig
from dstack_emu.attest.release import RELEASES
from tests.decision_model import Platform, Vendor

PATIENCE: Final = 60.0
"""Seconds that parts wait for one another: on a machine that is busy nothing may be refused for being late."""
PADDING: Final = 8
"""Empty blocks before a case's first one, so that no reorganization reaches what the stack has deployed."""
BASE: Final = "base"
"""The snapshot in which each case begins."""
DECIDED_BY_FILE: Final = ("src", "third")
APPS: Final = ("app", "twin", "wallet", "stranger", "debug", "liar")
"""`twin` is `app` on another host; nobody allows `stranger`; the evidence of the last two does not hold."""
PLATFORMS: Final = {
    "app": "host of app",
    "twin": "host of twin",
    "wallet": "host of wallet",
    "stranger": "host of stranger",
    "debug": "host of debug",
    "liar": "host of liar",
}
STATUSES: Final = ("UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "OutOfDate", "Revoked")


class DecisionStack:
    """A stack in its first state, and the model of it."""

    def __init__(self, stack: Stack, release: str) -> None:
        self.stack, self.control, self.release = stack, stack.control, release
        self._contract = RELEASES[release].auth_contract
        self._base: State | None = None
        self.state = State({}, {}, [], self._contract, {})
        self.baseline_instances: frozenset[str] = frozenset()
        self.misattested: set[str] = set()
        """KMS whose certificate has the evidence of another trust domain, until a revert."""

    @property
    def chain(self) -> Any:
        """The stack's chain."""
        return self.stack.context.chain

    async def prepare(self) -> None:
        """Add the trust domains, allow them, and take the snapshot in which each case begins."""
        control = self.control
        wallet = self.chain.deploy_app(compose_hash=bytes(32), allow_any_device=False)
        compose = {name: f'{{"manifest_version": 2, "name": "{name}", "runner": "none"}}' for name in APPS}
        own = control.guest("app")
        app = self.stack.guests["app"].domain.manifest.text
        await control.add_guest("twin", platform="host of twin", app_id=own["app_id"], compose=app)
        await control.add_guest("wallet", platform="host of wallet", app_id=wallet, compose=compose["wallet"])
        await control.add_guest("stranger", platform="host of stranger", compose=compose["stranger"])
        await control.add_guest("debug", platform="host of debug", compose=compose["debug"], debug=True)
        lie = [{"event": "a-lie", "payload": "", "measured": False}]
        await control.add_guest("liar", platform="host of liar", compose=compose["liar"], events=lie)
        await control.add_kms("third", platform="host of third")
        for name in ("wallet", "debug", "liar", "kms-third"):
            control.allow("src", name)
        for name in ("kms-third", "kms-src", "kms-dst"):
            control.allow("third", name)
        measured = control.guest("wallet")
        app_id = bytes.fromhex(wallet)
        for kind, value in (("compose-hash", measured["compose_hash"]), ("device", measured["device_id"])):
            self.chain.list_entry(kind, bytes.fromhex(value), allowed=True, app_id=app_id)
        third = control.guest("kms-third")
        for kind, value in (("kms-mr", third["mr_aggregated"]), ("kms-device", third["device_id"])):
            self.chain.list_entry(kind, bytes.fromhex(value), allowed=True)
        self.chain.mine(PADDING)
        for kms in ("src", "dst"):  # each finds out about itself
            await control.boot_guest("app", kms)
        self.baseline_instances = frozenset(control.gateway()["instances"])
        control.snapshot(BASE)
        self._base = self._read()

    def _read(self) -> State:
        control = self.control
        domains = {name: self._domain(name) for name in (*APPS, "kms-src", "kms-dst", "kms-third", "gateway")}
        policies = {name: Path(control.policies()[name]).read_text() for name in DECIDED_BY_FILE}
        policy = control.policy("dst")
        contracts = contracts_of(policy, {bytes.fromhex(each[2:]) for each in policy["kms"]["devices"]})
        platforms = {
            domain.platform: Platform(control.platform(domain.platform)["device_id"]) for domain in domains.values()
        }
        state = State(domains, policies, [contracts] * (PADDING + 1), self._contract, platforms)
        state.own = {kms: frozenset({state.asked(f"kms-{kms}")}) for kms in ("src", "dst")}
        return state

    def _domain(self, name: str) -> Domain:
        info = self.control.guest(name)
        return Domain(
            name,
            app_id=str(info["app_id"]),
            compose_hash=str(info["compose_hash"]),
            instance_id=str(info["instance_id"]),
            mr_aggregated=str(info["mr_aggregated"]),
            os_image_hash=str(info["os_image_hash"]),
            platform=str(info["platform"]),
            is_debug=name == "debug",
            lies=name == "liar",
        )

    async def begin(self) -> None:
        """Begin a case."""
        assert self._base is not None
        await self.control.revert(BASE)
        self.misattested.clear()
        self.state = self._base.copy()

    # ---- what changes it

    def change(self, act: Act) -> None:
        """Carry out an act that changes what is decided, in the stack and in the model."""
        given = act.fields
        match act.name:
            case "policy":
                self._edit(given["kms"], given["edit"], given["who"])
            case "chain":
                self._transact(given["list"], given["who"], allowed=given["allowed"])
            case "platform":
                self._set_platform(given["of"], given["set"])
            case "vendor":
                self._set_vendor(given["set"])
            case "clock":
                self.control.set_clock(advance=given["advance"])
            case _:
                raise ValueError(f"no act that changes a decision: {act}")

    def _edit(self, kms: str, edit: str, who: str) -> None:
        text = self.state.edit(kms, edit, who)
        path = Path(self.control.policies()[kms])
        new = path.with_suffix(".new")
        new.write_text(text)
        new.replace(path)  # as an operator's editor does: nobody reads half a policy

    def _transact(self, kind: str, who: str, *, allowed: bool) -> None:
        domain = self.state.domains[who]
        device = self.state.platforms[domain.platform].device_id
        value = {
            "os-image": domain.os_image_hash,
            "kms-mr": domain.mr_aggregated,
            "kms-device": device,
            "compose-hash": domain.compose_hash,
            "device": device,
        }[kind]
        app_id = domain.app_id if kind in ("compose-hash", "device") else None
        raw = None if app_id is None else bytes.fromhex(app_id)
        self.chain.list_entry(kind, bytes.fromhex(value), allowed=allowed, app_id=raw)
        self.state.transact(kind, value, allowed=allowed, app_id=app_id)

    def _set_platform(self, who: str, given: Mapping[str, Any]) -> None:
        name = self.state.domains[who].platform
        self.control.set_platform(name, **given)
        names = {"pck_revoked": "certificate_revoked"}
        changes: dict[str, Any] = {
            names.get(key, key): tuple(value) if isinstance(value, list) else value for key, value in given.items()
        }
        self.state.platforms[name] = replace(self.state.platforms[name], **changes)

    def _set_vendor(self, given: Mapping[str, Any]) -> None:
        self.control.set_vendor(**given)
        state = self.control.vendor()
        datings = ("tcb_info_dating", "qe_identity_dating", "pck_crl_dating", "root_ca_crl_dating")
        self.state.vendor = Vendor(
            enclave_status=state["qe_status"],
            enclave_advisory_ids=tuple(state["qe_advisory_ids"]),
            authority_revoked=state["pck_ca_revoked"],
            # A CRL counts from the day on which it is published: dcap-qvl does not look at its first date.
            outdated=tuple(
                name
                for name in datings
                if state[name] == "expired" or (state[name] == "not-yet-valid" and "crl" not in name)
            ),
        )


@asynccontextmanager
async def decision_stack(release: str, *, auth_api_cache: bool = False) -> AsyncIterator[DecisionStack]:
    """Start a stack, and prepare it; with `auth_api_cache` its KMS keep answers about themselves for a second."""
    config = StackConfig.on_free_ports(
        gateway=True, auth={"dst": "eth"}, patience=PATIENCE, release=release, auth_api_cache=auth_api_cache
    )
    async with Stack(config, progress=lambda *_: None) as stack:
        made = DecisionStack(stack, release)
        await made.prepare()
        yield made


__all__ = ["APPS", "GARBAGE", "NOBODYS", "STATUSES", "DecisionStack", "decision_stack"]


class StackWorld(ABC):
    """A world whose stacks start when a script first needs them, all in one event loop of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._exit = AsyncExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.run_until_complete(self._exit.aclose())
        self._loop.close()

    def run(self, script: Script) -> Outcome:
        """Run a script."""
        return self._loop.run_until_complete(self._run(script))

    @abstractmethod
    async def _run(self, script: Script) -> Outcome: ...
