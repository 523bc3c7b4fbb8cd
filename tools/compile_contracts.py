"""Compile dstack_emu/chain/contracts/ into the artefacts beside the sources, or check that these are fresh.

`python tools/compile_contracts.py` writes the artefacts, a JSON file with ABI and bytecode for each contract. `--check`
writes nothing, and exits with status 1 if a file is missing or different. The compiler is vyper in the version of
requirements/vyper.txt. It shares no environment with this project, whose cbor2 is newer than vyper accepts: VYPER
names the program; without it `.vyper/bin/vyper` is used, which `make contracts` installs, or the one on the path.

The proxy is assembled here, and needs no compiler.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
CONTRACTS = "dstack_emu/chain/contracts"
REVISIONS: Final = ("0.5.11", "next")
NAMES: Final = ("DstackKms", "DstackApp")

Abi = list[dict[str, Any]]

OPCODES: Final = {
    "ADD": 0x01,
    "SUB": 0x03,
    "SHL": 0x1B,
    "SHR": 0x1C,
    "CALLVALUE": 0x34,
    "CALLDATASIZE": 0x36,
    "CALLDATACOPY": 0x37,
    "CODESIZE": 0x38,
    "CODECOPY": 0x39,
    "EXTCODESIZE": 0x3B,
    "RETURNDATASIZE": 0x3D,
    "RETURNDATACOPY": 0x3E,
    "MLOAD": 0x51,
    "MSTORE": 0x52,
    "SLOAD": 0x54,
    "SSTORE": 0x55,
    "JUMP": 0x56,
    "JUMPI": 0x57,
    "GAS": 0x5A,
    "DUP1": 0x80,
    "DUP3": 0x82,
    "DUP5": 0x84,
    "DUP7": 0x86,
    "SWAP1": 0x90,
    "LOG2": 0xA2,
    "RETURN": 0xF3,
    "DELEGATECALL": 0xF4,
    "REVERT": 0xFD,
}
JUMPDEST: Final = 0x5B
PUSH0: Final = 0x5F

OWNED: Final = ("OwnableUnauthorizedAccount(address account)", "OwnableInvalidOwner(address owner)")
ERRORS: Final = (
    *OWNED,
    "InvalidInitialization()",
    "NotInitializing()",
    "ERC1967InvalidImplementation(address implementation)",
    "ERC1967NonPayable()",
    "UUPSUnauthorizedCallContext()",
    "UUPSUnsupportedProxiableUUID(bytes32 slot)",
    "FailedCall()",
    "AddressEmptyCode(address target)",
)
"""The custom errors of upstream's ABI: `raw_revert` does not tell the compiler of ours."""
PROXY_ERRORS: Final = (
    "AddressEmptyCode(address target)",
    "ERC1967InvalidImplementation(address implementation)",
    "ERC1967NonPayable()",
    "FailedCall()",
)
OLDER: Final = {
    "DstackKms": ("deployAndRegisterApp", "requireTcbUpToDate"),
    "DstackApp": ("initialize", "_requireTcbUpToDate"),
}
"""The function that each contract has in an older form, too, and the argument that this lacks."""
BOOT_INFO: Final = (
    "address appId",
    "bytes32 composeHash",
    "address instanceId",
    "bytes32 deviceId",
    "bytes32 mrAggregated",
    "bytes32 mrSystem",
    "bytes32 osImageHash",
    "string tcbStatus",
    "string[] advisoryIds",
)
DECISIONS: Final = {"DstackKms": ("isAppAllowed", "isKmsAllowed"), "DstackApp": ("isAppAllowed",)}
"""The functions with that argument, which each contract has in its `__default__`."""
RESULTS: Final = {
    "deployAndRegisterApp": ("appId",),
    "kmsInfo": ("k256Pubkey", "caPubkey", "quote", "eventlog"),
}
"""The names of results, which Vyper has no words for."""
MAPPINGS: Final = (
    "registeredApps",
    "kmsAllowedAggregatedMrs",
    "kmsAllowedDeviceIds",
    "allowedOsImages",
    "allowedComposeHashes",
    "allowedDeviceIds",
)
"""The functions that upstream's compiler makes of mappings; their argument has no name there."""


def assemble(text: str) -> bytes:
    """Assemble an .evm file: opcodes, numbers in hex, `@name`, `name:` (a place for jumps) and `name!` (a section).

    Places are relative to the section `runtime!` if they are in it: that is where the code then begins.
    """
    words = [word for line in text.splitlines() for word in line.partition(";")[0].split()]
    places: dict[str, int] = {}
    code = b""
    for final in (False, True):  # the first pass only finds the places: each takes two bytes
        code, base = b"", 0
        for word in words:
            if word.endswith("!"):
                places[word[:-1]] = len(code)
                base = len(code) if word == "runtime!" else base
            elif word.endswith(":"):
                places[word[:-1]] = len(code) - base
                code += bytes([JUMPDEST])
            else:
                code += _encoded(word, places if final else None)
    return code


def _encoded(word: str, places: dict[str, int] | None) -> bytes:
    if word in OPCODES:
        return bytes([OPCODES[word]])
    if word.startswith("@"):
        return bytes([PUSH0 + 2]) + (0 if places is None else places[word[1:]]).to_bytes(2, "big")
    data = int(word, 16).to_bytes((len(word) + 1) // 2, "big")
    return bytes([PUSH0 + len(data)]) + data if any(data) else bytes([PUSH0])


def vyper() -> str:
    """Return the compiler; raise SystemExit if there is none."""
    own = ROOT / ".vyper/bin/vyper"
    found = os.environ.get("VYPER") or (str(own) if own.exists() else shutil.which("vyper"))
    if found is None:
        raise SystemExit("no vyper: `make contracts` installs it, or name the program in VYPER")
    return found


def generate(sources: Path) -> dict[str, str]:
    """Compile everything; return the text of each generated file by its path below the contracts."""
    proxy = assemble((sources / "erc1967_proxy.evm").read_text())
    code = (
        "# Written by tools/compile_contracts.py from erc1967_proxy.evm.\n"
        f'PROXY: constant(Bytes[{len(proxy)}]) = x"{proxy.hex()}"\n'
    )
    made = {"proxy_code.vy": code, "ERC1967Proxy.json": _artefact("ERC1967Proxy", _proxy_abi(), proxy.hex())}
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "proxy_code.vy").write_text(code)
        for revision in REVISIONS:
            for name in NAMES:
                abi, bytecode = _compiled(sources, revision, name, scratch)
                made[f"{revision}/{name}.json"] = _artefact(name, completed(name, abi), bytecode)
    return made


def _compiled(sources: Path, revision: str, name: str, scratch: str) -> tuple[Abi, str]:
    """Run the compiler; `revision` selects the module of that name."""
    paths = (sources, sources / revision, scratch)
    command = [vyper(), *(word for path in paths for word in ("-p", str(path)))]
    # Vyper calls its newer code generator experimental. With it isAppAllowed takes a third fewer steps of an EVM. It
    # fails on an internal function that does nothing but revert.
    command += ["--no-bytecode-metadata", "--experimental-codegen", "-f", "abi,bytecode", str(sources / f"{name}.vy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"vyper refused {name} of {revision}:\n{done.stderr}")
    abi, bytecode = done.stdout.splitlines()
    return json.loads(abi), bytecode.removeprefix("0x")


def completed(name: str, abi: Abi) -> Abi:
    """Return the ABI as upstream's compiler describes the same contract."""
    kept = [item for item in abi if item["type"] not in ("fallback", "constructor")]
    for item in kept:
        _name_values(item)
    function, dropped = OLDER[name]
    newer = next(item for item in kept if item["name"] == function and item["type"] == "function")
    older = {**newer, "inputs": [each for each in newer["inputs"] if each["name"] != dropped]}
    whole = [{"type": "constructor", "stateMutability": "nonpayable", "inputs": []}, *kept, older]
    whole += [_decision(each) for each in DECISIONS[name]] + [_error(text) for text in ERRORS]
    return sorted(whole, key=lambda item: (item["type"], item.get("name", ""), -len(item["inputs"])))


def _name_values(item: dict[str, Any]) -> None:
    if item["type"] == "function":
        for result, named in zip(item["outputs"], RESULTS.get(item["name"], ()), strict=False):
            result["name"] = named
        if item["name"] in MAPPINGS:
            item["inputs"][0]["name"] = ""


def _decision(name: str) -> dict[str, Any]:
    argument = {"name": "bootInfo", "type": "tuple", "components": [_value(each) for each in BOOT_INFO]}
    results = [_value("bool isAllowed"), _value("string reason")]
    return {"type": "function", "name": name, "stateMutability": "view", "inputs": [argument], "outputs": results}


def _value(text: str) -> dict[str, str]:
    """Return the description of a value from its type and name."""
    kind, name = text.split()
    return {"name": name, "type": kind}


def _error(text: str) -> dict[str, Any]:
    name, _, inside = text.rstrip(")").partition("(")
    return {"type": "error", "name": name, "inputs": [_value(inside)] if inside else []}


def _proxy_abi() -> Abi:
    arguments = [_value("address implementation"), _value("bytes _data")]
    upgraded = [{**_value("address implementation"), "indexed": True}]
    return [
        {"type": "constructor", "stateMutability": "payable", "inputs": arguments},
        *(_error(text) for text in PROXY_ERRORS),
        {"type": "event", "name": "Upgraded", "anonymous": False, "inputs": upgraded},
        {"type": "fallback", "stateMutability": "payable"},
    ]


def _artefact(name: str, abi: Abi, bytecode: str) -> str:
    """Return the JSON of an artefact, an item of the ABI on each line."""
    items = ",\n".join(f"    {json.dumps(item)}" for item in abi)
    return f'{{\n  "contractName": "{name}",\n  "abi": [\n{items}\n  ],\n  "bytecode": "0x{bytecode}"\n}}\n'


def stale(generated: dict[str, str], folder: Path) -> list[str]:
    """Compare generated texts with the files; return one line for each difference."""
    problems = []
    for name, text in sorted(generated.items()):
        path = folder / name
        if not path.exists():
            problems.append(f"missing: {CONTRACTS}/{name}")
        elif path.read_text() != text:
            problems.append(f"stale: {CONTRACTS}/{name}")
    return problems


def version() -> str:
    """Return the version of the compiler, such as 0.4.3."""
    said = subprocess.run([vyper(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.match(r"[\d.]+\w*", said)
    return found[0] if found else said


def main() -> int:
    """Write the artefacts, or compare them with --check; return the exit status."""
    parser = argparse.ArgumentParser(description=f"Compile {CONTRACTS}/, or check its artefacts.")
    parser.add_argument("--check", action="store_true", help="compare only; status 1 if an artefact is stale")
    parser.add_argument("--into", type=Path, default=ROOT, help="the folder that has the packages")
    arguments = parser.parse_args()
    pinned = (ROOT / "requirements/vyper.txt").read_text()
    if f"vyper=={version()} " not in pinned:
        print(f"vyper {version()} found; requirements/vyper.txt names another version", file=sys.stderr)
        return 1
    folder = arguments.into / CONTRACTS
    generated = generate(folder)
    if arguments.check:
        problems = stale(generated, folder)
        print("\n".join(problems) or f"{CONTRACTS} is fresh")
        return 1 if problems else 0
    for name, text in generated.items():
        (folder / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
