"""The things that the emulator stores: how each is stored, and how its next start reads it."""

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from dstack_emu.chain import acts
from dstack_emu.chain.acts import Ahead, Kept, act_document
from dstack_emu.chain.errors import StoreError
from dstack_emu.cli.commands import ctl_calls
from dstack_emu.cli.commands.common import UsageError
from dstack_emu.deployment import added_parts, policy_files
from dstack_emu.deployment.added_parts import AddedParts
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.specs import GuestSpec
from dstack_emu.gateway import store as gateway_store
from dstack_emu.gateway.errors import GatewayConfigError, GatewayError
from dstack_emu.gateway.state import GatewayState, InstanceEntry
from dstack_emu.kms_emu import cert_dir
from dstack_emu.kms_emu.cert_dir import RPC_CERT, CertDir
from dstack_emu.kms_emu.errors import KmsConfigError
from dstack_emu.runbook import evidence
from dstack_emu.runbook.evidence import Destination
from dstack_emu.transport import files as transport_files
from dstack_emu.vmm import store as vmm_store
from dstack_emu.vmm.errors import VmmError
from tests import crashing_vmm_store as machines
from tests.crashing_store import files as kms_files

TRACED: Final = frozenset(
    module.__file__
    for module in (
        transport_files,
        cert_dir,
        vmm_store,
        acts,
        gateway_store,
        policy_files,
        added_parts,
        evidence,
        ctl_calls,
    )
    if module.__file__ is not None
)
REFUSALS: Final = (
    KmsConfigError,
    VmmError,
    StoreError,
    GatewayError,
    GatewayConfigError,
    StackError,
    UsageError,
    OSError,
)
"""What says to a person that something could not be stored; of an `OSError` the caller adds what it was."""

HIDDEN: Final = (".writing", ".committed", ".new", ".gone", ".change", ".removing")


@dataclass(frozen=True)
class Thing:
    """Something that is stored in a folder. `read` returns what the next start has, and finishes what was begun.

    `before` stores what is there at first. With `is_named` a refusal names the file or the folder.
    """

    store: Callable[[Path], object]
    read: Callable[[Path], Any]
    before: Callable[[Path], object] = field(default=lambda folder: None)
    is_named: bool = True


@cache
def _keys() -> dict[str, bytes]:
    return kms_files()


def _kms(folder: Path) -> Any:
    place = CertDir(folder)
    place.prepare()
    found = {name: content.hex() for name, content in place.contents().items()}
    return found if place.has_keys() or found else None


def _other_keys() -> dict[str, bytes]:
    return {name: content + b" " for name, content in _keys().items() if name != "bootstrap-info.json"}


def _append(folder: Path) -> None:
    kept = Kept(folder / "chain.jsonl", {"chain_id": 1})
    try:
        kept.add(Ahead(2))
    finally:
        kept.close()


def _chain(folder: Path) -> Any:
    kept = Kept(folder / "chain.jsonl", {"chain_id": 1})
    try:
        return [act_document(act) for act in kept.acts()]
    finally:
        kept.close()


class _Api:
    """What `ctl save` asks."""

    def get(self, path: str) -> dict[str, Any]:
        return {"asked": path, "state": "x" * 5000}


def _saved(folder: Path) -> Any:
    path = folder / "state.json"
    return json.loads(path.read_text()) if path.exists() else None


def _evidence(folder: Path, contents: dict[str, bytes], *, is_folder: bool) -> None:
    destination = Destination(folder / "evidence", is_folder=is_folder)
    try:
        destination.write(contents)
    finally:
        destination.discard()


def _evidence_read(folder: Path) -> Any:
    path = folder / "evidence"
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_text() for file in sorted(path.rglob("*")) if file.is_file()}
    return path.read_bytes().hex() if path.exists() else None


def _add(folder: Path) -> None:
    guest = SimpleNamespace(name="extra", spec=GuestSpec(name="extra"), source="")
    AddedParts(folder).put_guest(guest)  # type: ignore[arg-type]


def _gateway(name: str) -> GatewayState:
    entry = InstanceEntry(app_id="00" * 20, ip="10.0.0.1", public_key=name, registered_at=1)
    return GatewayState(instances={name: entry})


_EVIDENCE: Final = {"manifest.json": b"{}", "responses/1.json": b"[" + b"1," * 2000 + b"1]"}

THINGS: Final[dict[str, Thing]] = {
    "keys of a KMS": Thing(lambda folder: CertDir(folder).store(_keys()), _kms),
    "certificate of a KMS": Thing(
        lambda folder: CertDir(folder).replace(RPC_CERT, b"new"), _kms, lambda folder: CertDir(folder).store(_keys())
    ),
    "restored keys of a KMS": Thing(
        lambda folder: CertDir(folder).overwrite(_other_keys()),
        _kms,
        lambda folder: CertDir(folder).store(_keys()),
        is_named=False,
    ),
    "state of a gateway": Thing(
        lambda folder: gateway_store.Store(folder).save(_gateway("b")),
        lambda folder: gateway_store.Store(folder).load().model_dump(),
        lambda folder: gateway_store.Store(folder).save(_gateway("a")),
    ),
    "policy": Thing(
        lambda folder: policy_files.write(folder / "auth-src.json", policy_files.allow(["00" * 32], [], [])),
        lambda folder: json.loads((folder / "auth-src.json").read_text()),
        lambda folder: policy_files.place([folder / "auth-src.json"]),
        is_named=False,
    ),
    "added parts": Thing(
        _add, lambda folder: [added.part.model_dump() for added in AddedParts(folder).guests()], is_named=False
    ),
    "chain": Thing(_append, _chain, lambda folder: Kept(folder / "chain.jsonl", {"chain_id": 1}).add(Ahead(1))),
    "saved state": Thing(
        lambda folder: ctl_calls.save(_Api(), Namespace(file=folder / "state.json")),  # type: ignore[arg-type]
        _saved,
    ),
    "evidence as a file": Thing(
        lambda folder: _evidence(folder, _EVIDENCE, is_folder=False), _evidence_read, is_named=False
    ),
    "evidence as a folder": Thing(
        lambda folder: _evidence(folder, _EVIDENCE, is_folder=True), _evidence_read, is_named=False
    ),
    **{
        f"machine: {name}": Thing(
            action, machines.view, machines.create if has_machine else lambda folder: None, is_named=False
        )  # the VMM has upstream's words
        for name, (action, has_machine, _) in machines.CASES.items()
    },
}


def read(name: str, folder: Path) -> Any:
    """Start anew: return what is there."""
    if name.startswith("machine"):
        vmm_store.Store(folder).open()
    return THINGS[name].read(folder)


def left(folder: Path) -> list[str]:
    """Return what is unfinished in a folder, and no start has removed."""
    return sorted(
        path.name for path in folder.rglob(".*") if path.name.startswith(HIDDEN) or path.name.endswith((".new", ".tmp"))
    )
