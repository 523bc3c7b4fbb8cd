"""The compiled contracts: two revisions, because dstack's contracts differ between releases.

In revision 0.5.11 an owner hands over at once. In revision next the new owner has to accept, and each change of a
policy emits PolicyChanged, too. `tools/compile_contracts.py` writes the files from the sources beside them.
"""

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from dstack_emu.attest.release import AuthEthRevision


@dataclass(frozen=True, slots=True)
class Artefact:
    """A contract: its ABI, and the code that creates it."""

    name: str
    abi: list[dict[str, Any]]
    bytecode: bytes


def kms_contract(revision: AuthEthRevision) -> Artefact:
    """Return DstackKms."""
    return _read(f"{revision}/DstackKms.json")


def app_contract(revision: AuthEthRevision) -> Artefact:
    """Return DstackApp."""
    return _read(f"{revision}/DstackApp.json")


def proxy_contract() -> Artefact:
    """Return ERC1967Proxy."""
    return _read("ERC1967Proxy.json")


def _read(path: str) -> Artefact:
    value = json.loads(files("dstack_emu.chain").joinpath("contracts", path).read_bytes())
    return Artefact(value["contractName"], value["abi"], bytes.fromhex(value["bytecode"][2:]))
