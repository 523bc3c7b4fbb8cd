"""All that changes in a stack while it runs, as data: captured, kept, saved to a file, and put back.

In it: the policy files, what the vendor says, the clock, faults, each trust domain's log and keys, each KMS's phase and
folder, the positions of every source of randomness and of the journal. Not in it: what grows from the seed alone,
ports, connections. Capturing and putting back both empty the caches of collateral, so that what follows is asked alike.

Putting back changes only what differs. A KMS that gained, lost or changed its keys since is restarted, which costs some
ten milliseconds more; so does a trust domain or a KMS that has to be made again.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dstack_emu.attest.app_info import BootInfo
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eventlog import RuntimeEvent
from dstack_emu.control.schemas import ControlError
from dstack_emu.deployment.clock import ClockState
from dstack_emu.deployment.guests import GuestSpec, RunningGuest, start_guest
from dstack_emu.deployment.kms import KmsSpec, RunningKms, remove_kms, start_kms
from dstack_emu.kms_emu.cert_dir import PRIVATE, RPC_CERT
from dstack_emu.kms_emu.server import Memory
from dstack_emu.observability.fault_rules import FaultRulesState, FaultState
from dstack_emu.observability.spans import headers_of
from dstack_emu.simulator.agent import ProvidedKeys
from dstack_emu.simulator.app_keys import AppKeys
from dstack_emu.simulator.guest_boot import KmsIssuer
from dstack_emu.simulator.intel import IntelState, VendorState
from dstack_emu.simulator.platform import PlatformState
from dstack_emu.simulator.trust_domain import TrustDomainState
from dstack_emu.transport.ratls import TIMEOUT as KMS_TIMEOUT
from dstack_emu.transport.ratls import RaTlsClient
from dstack_emu.transport.tls import Identity
from dstack_emu.transport.validation import describe

if TYPE_CHECKING:
    from dstack_emu.deployment.stack import Stack

FORMAT: Final = "dstack-emu state"
VERSION: Final = 1

Register = Annotated[bytes, Field(min_length=48, max_length=48)]
Count = Annotated[int, Field(ge=0)]


class _Data(BaseModel):
    # Bytes are base64 in JSON.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_bytes="base64", val_json_bytes="base64")


class KeysState(_Data):
    """What a trust domain got from a KMS, and shows to it."""

    keys: AppKeys
    identity: Identity
    kms: str
    demo_certificate: str


class GuestState(_Data):
    """A trust domain: what it is, what its log claims, and its keys, where a KMS gave it some."""

    spec: GuestSpec
    rtmr3: Register
    events: tuple[RuntimeEvent, ...]
    streams: dict[str, Count]
    keys: KeysState | None = None


class KmsState(_Data):
    """A KMS: its phase, its folder, and what it remembers. Its trust domain is among the guests."""

    spec: KmsSpec
    phase: Literal["onboard", "runtime"]
    files: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]+\.?[a-z0-9-]*$")], bytes]
    own_boot_info: BootInfo | None
    requests: Count
    failures: Count
    measured: dict[str, Any] | None


class StackState(_Data):
    """The whole."""

    format: Literal["dstack-emu state"] = FORMAT
    version: Literal[1] = VERSION
    seed: str
    clock: ClockState
    vendor: VendorState
    platforms: dict[str, PlatformState]
    policies: dict[str, bytes | None]
    faults: tuple[FaultState, ...]
    fault_count: Count
    guests: dict[str, GuestState]
    kms: dict[str, KmsState]
    journal: Count

    @classmethod
    def read(cls, document: Any) -> Self:
        """Check what `save` gave; raise `ControlError` saying what is wrong with anything else."""
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ControlError(f"a document of the format {FORMAT!r} expected: what `save` wrote")
        if document.get("version") != VERSION:
            raise ControlError(f"state: version {VERSION} expected, got {document.get('version')!r:.40}")
        try:
            return cls.model_validate_json(json.dumps(document))
        except ValidationError as error:
            raise ControlError(f"state: {describe(error)}") from error
        except (FormatError, ValueError, RecursionError) as error:
            raise ControlError(f"state: {error}") from error


# ---- capturing


def capture_state(stack: "Stack") -> StackState:
    """What a stack is now."""
    world = stack.world
    intel, faults = stack.intel.capture(), world.faults.capture()
    state = StackState(
        seed=stack.config.seed,
        clock=world.clock.capture(),
        vendor=intel.vendor,
        platforms=dict(intel.platforms),
        policies={side: _content(path) for side, path in stack.policies.items()},
        faults=faults.faults,
        fault_count=faults.count,
        guests={name: _guest_state(guest) for name, guest in stack.guests.items()},
        kms={side: _kms_state(stack, kms) for side, kms in stack.kms_parts.items()},
        journal=world.journal.capture(),
    )
    world.forget()
    return state


def _guest_state(guest: RunningGuest) -> GuestState:
    domain = guest.domain.capture()
    streams = {name: stream.capture() for name, stream in guest.streams.items()}
    keys = _keys_state(guest)
    return GuestState(spec=guest.spec, rtmr3=domain.rtmr3, events=domain.events, streams=streams, keys=keys)


def _keys_state(guest: RunningGuest) -> KeysState | None:
    provided = guest.agent.capture()
    if provided is None or guest.issuer is None:
        return None
    return KeysState(
        keys=provided.keys,
        identity=guest.issuer.identity,
        kms=guest.kms,
        demo_certificate=provided.demo_certificate,
    )


def _kms_state(stack: "Stack", kms: RunningKms) -> KmsState:
    server = stack.kms[kms.spec.name]
    if server.phase not in ("onboard", "runtime"):
        raise ControlError(f"kms-{kms.spec.name} is {server.phase}: nothing to go back to", 409)
    memory = server.memory
    return KmsState(
        spec=kms.spec,
        phase="onboard" if server.phase == "onboard" else "runtime",
        files=_files(kms.certs),
        own_boot_info=memory.own_boot_info,
        requests=memory.requests,
        failures=memory.failures,
        measured=stack.kms_info.get(kms.spec.name),
    )


def _files(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        return {}
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


# ---- putting back


async def apply_state(stack: "Stack", state: StackState) -> None:
    """Make a stack what it was when its state was captured, in this process or another one of the same seed."""
    if state.seed != stack.config.seed:
        raise ControlError(f"the state is of a stack with the seed {state.seed!r:.60}, not {stack.config.seed!r:.60}")
    _require_whole(stack, state)
    world = stack.world
    enabled, world.journal.enabled = world.journal.enabled, False  # putting back is no call
    try:
        world.faults.clear()
        world.clock.restore(state.clock)
        await _apply_parts(stack, state)
        stack.intel.restore(IntelState(state.vendor, state.platforms))
        for side, content in state.policies.items():
            _put(stack.policies[side], content)
        for side, kms_state in state.kms.items():
            await _apply_kms(stack, stack.kms_parts[side], kms_state)
        for name, guest_state in state.guests.items():
            await _apply_guest(stack, stack.guests[name], guest_state)
        world.faults.restore(FaultRulesState(state.fault_count, state.faults))
        world.forget()
    finally:
        world.journal.enabled = enabled
    world.journal.restore(state.journal)


def _require_whole(stack: "Stack", state: StackState) -> None:
    """Refuse a state that names too little or too much, before anything is changed."""
    own_guests = {name for name in stack.guests if name == "app" or name in ("kms-src", "kms-dst")}
    missing = own_guests - state.guests.keys() | {"src", "dst"} - state.kms.keys()
    missing |= {f"kms-{side}" for side in state.kms} - state.guests.keys()
    if missing:
        raise ControlError(f"state: {', '.join(sorted(missing))}: expected, and not there")
    for name, guest in state.guests.items():
        if guest.spec.name != name or (guest.keys is not None and guest.keys.kms not in state.kms):
            raise ControlError(f"state: guests.{name}: fits no trust domain")
        if name.startswith("kms-") and name[4:] not in state.kms:
            raise ControlError(f"state: guests.{name}: the trust domain of no KMS")
    for side, kms in state.kms.items():
        if kms.spec.name != side:
            raise ControlError(f"state: kms.{side}: fits no KMS")
    policies = {"src", "dst", *(side for side, kms in state.kms.items() if kms.spec.webhook == "own")}
    if state.policies.keys() != policies:
        raise ControlError(f"state: policies: {', '.join(sorted(policies))} expected")


async def _apply_parts(stack: "Stack", state: StackState) -> None:
    """End the parts that were not there then, or were others, and make those that were there and are not."""
    for side, kms in list(stack.kms_parts.items()):
        if side not in state.kms or state.kms[side].spec != kms.spec:
            await remove_kms(stack, kms)
    for name, guest in list(stack.guests.items()):
        if name not in state.guests or state.guests[name].spec != guest.spec:
            await guest.close()
            del stack.guests[name]
            stack.services.pop(guest.service, None)
    for side, kms_state in state.kms.items():
        if side not in stack.kms_parts:
            await start_kms(stack, kms_state.spec)
    for name, guest_state in state.guests.items():
        if name not in stack.guests:
            await start_guest(stack, guest_state.spec, name)


async def _apply_guest(stack: "Stack", guest: RunningGuest, state: GuestState) -> None:
    guest.domain.restore(TrustDomainState(state.rtmr3, state.events))
    for name, stream in guest.streams.items():
        stream.restore(state.streams.get(name, 0))
    if guest.name.startswith("kms-") or _keys_state(guest) == state.keys:
        return
    if state.keys is None:
        guest.agent.restore(None)
        await guest.use(None, "")
        return
    world, kept = stack.world, state.keys
    client = RaTlsClient(
        f"{stack.services[f'kms-{kept.kms}']}/prpc",
        identity=kept.identity,
        root_ca=kept.keys.ca_cert,
        timeout=world.patience or KMS_TIMEOUT,
        headers=headers_of(guest.name),
    )
    issuer = KmsIssuer(client, guest.domain.vm_config_json, kept.identity)
    guest.agent.restore(ProvidedKeys(kept.keys, issuer, kept.demo_certificate))
    await guest.use(issuer, kept.kms)


async def _apply_kms(stack: "Stack", kms: RunningKms, state: KmsState) -> None:
    side, server = kms.spec.name, stack.kms[kms.spec.name]

    def put_files() -> None:
        shutil.rmtree(kms.certs, ignore_errors=True)
        kms.certs.mkdir(mode=0o700)
        for name, data in state.files.items():
            path = kms.certs / name
            path.touch(mode=0o600 if name in PRIVATE else 0o644)
            path.write_bytes(data)

    # The RPC certificate is issued anew at each start, so it is no sign of other keys.
    has, had = ({n: d for n, d in files.items() if n != RPC_CERT} for files in (_files(kms.certs), state.files))
    if server.phase == state.phase == "onboard":
        if has != had:
            put_files()
    elif server.phase != state.phase or has != had:
        await server.restart(put_files, onboard=state.phase == "onboard")
    server.memory = Memory(state.own_boot_info, state.requests, state.failures)
    stack.note_url(side)
    if state.measured is None:
        stack.kms_info.pop(side, None)
    else:
        stack.kms_info[side] = state.measured


def _put(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    elif _content(path) != content:
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_bytes(content)
        temporary.replace(path)
