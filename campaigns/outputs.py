"""Everything that depends on a seed alone, as files: `python -m campaigns.outputs FOLDER`.

The campaign `determinism` runs it in different surroundings. Its own surroundings are those of the process.
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.stack_bytes import everything

SEED: Final = "determinism"
COMPOSE: Final = json.dumps(
    {"manifest_version": 2, "name": "one", "runner": "docker-compose", "docker_compose_file": "services: {}"}
)


def command(*arguments: str) -> list[str]:
    """Return a command line of `dstack-emu`."""
    return [sys.executable, "-m", "dstack_emu", *arguments]


def said(*arguments: str) -> bytes:
    """Return what a command prints."""
    return subprocess.run(command(*arguments), stdout=subprocess.PIPE, check=True).stdout


def asked(url: str, body: Mapping[str, Any]) -> Any:
    """Send a body in JSON; return the answer."""
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
        return json.loads(answer.read())


@contextmanager
def running(*arguments: str) -> Iterator[dict[str, Any]]:
    """Run a command until the block ends; yield the line of JSON that it prints. Its log is shown if there is none."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command(*arguments, "--json"), stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                log.seek(0)
                raise RuntimeError(f"{' '.join(arguments)}: {log.read()[-4000:]}")
            yield json.loads(line)
        finally:
            process.terminate()
            process.communicate(timeout=60)


@contextmanager
def stack(*arguments: str) -> Iterator[dict[str, Any]]:
    """Run a stack until the block ends; yield its description."""
    with running("up", "--free-ports", *arguments) as description:
        yield description


def of_commands(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield what commands make that start no stack, and the evidence of a runbook."""
    for release in ("0.5", "0.6"):
        yield f"quote {release}", said("quote", "--json", "--seed", SEED, "--release", release)
    said("image", "build", "--seed", SEED, str(folder / "image"))
    said("runbook", "--seed", SEED, "--evidence", f"{folder / 'runbook'}/")
    for part in ("image", "runbook"):
        for path in sorted((folder / part).rglob("*")):
            if path.is_file():
                yield str(path.relative_to(folder)), path.read_bytes()


def of_stack(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield what a stack with a VMM, a gateway and a chain has that depends on no address."""
    with stack("--seed", SEED, "--state", str(folder), "--vmm", "--gateway", "--auth", "dst=eth") as description:
        yield from everything(description).items()
        vmm, chain = description["services"]["vmm"], description["services"]["chain"]
        image = asked(f"{vmm}/prpc/ListImages?json", {})["images"][0]["name"]
        machine = {"name": "one", "image": image, "compose_file": COMPOSE, "vcpu": 1, "memory": 1024, "disk_size": 1}
        yield "machine", json.dumps(asked(f"{vmm}/prpc/CreateVm?json", {**machine, "stopped": True})).encode()
        yield "chain.json", json.dumps(description["chain"], sort_keys=True).encode()
        for number in range(int(_call(chain, "eth_blockNumber"), 16) + 1):
            yield f"block {number}", json.dumps(_call(chain, "eth_getBlockByNumber", hex(number), True)).encode()
        yield "accounts", json.dumps(_call(chain, "eth_accounts")).encode()


def _call(chain: str, method: str, *params: object) -> Any:
    return asked(chain, {"jsonrpc": "2.0", "id": 1, "method": method, "params": params})["result"]


def main(folder: Path) -> None:
    """Write all files."""
    found = folder / "found"
    found.mkdir(parents=True)
    for name, content in (*of_commands(folder), *of_stack(folder / "state")):
        (found / name.replace("/", " ")).write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
