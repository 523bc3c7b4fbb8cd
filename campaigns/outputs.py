"""What depends on a seed alone, as files: `python -m campaigns.outputs FOLDER PART`; parts are those of `PARTS`.

The campaign `determinism` runs it in different surroundings. Its own surroundings are those of the process.
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping
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
            process.communicate()  # without a limit, which needs time.sleep: libfaketime lets that fail at times


@contextmanager
def stack(*arguments: str) -> Iterator[dict[str, Any]]:
    """Run a stack until the block ends; yield its description."""
    with running("up", "--free-ports", *arguments) as description:
        yield description


def of_quotes(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield quotes of both releases."""
    for release in ("0.5", "0.6"):
        yield f"quote {release}", said("quote", "--json", "--seed", SEED, "--release", release)


def of_image(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the files of an OS image."""
    said("image", "build", "--seed", SEED, str(folder / "image"))
    yield from files_of(folder / "image")


def of_runbook(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a runbook's evidence."""
    said("runbook", "--seed", SEED, "--evidence", f"{folder / 'runbook'}/")
    yield from files_of(folder / "runbook")


def files_of(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the files below a folder, by their path from its parent."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder.parent)), path.read_bytes()


def of_stack(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield what a stack with a VMM, a gateway and a chain has that depends on no address."""
    with stack(
        "--seed", SEED, "--state", str(folder / "state"), "--vmm", "--gateway", "--auth", "dst=eth"
    ) as description:
        for info in description["kms"].values():
            info["eth_rpc_url"] = ""  # an address
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


PARTS: Final[Mapping[str, Callable[[Path], Iterator[tuple[str, bytes]]]]] = {
    "quotes": of_quotes,
    "image": of_image,
    "stack": of_stack,
    "runbook": of_runbook,
}
"""The makers of the files, the quickest first."""


def main(folder: Path, part: str) -> None:
    """Write the files of a part."""
    found = folder / "found"
    found.mkdir(parents=True)
    for name, content in PARTS[part](folder):
        (found / name.replace("/", " ")).write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
