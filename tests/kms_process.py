"""`dstack-emu kms` as a process of its own, beside one `dstack-emu agent` with its PCCS: no whole stack is needed.

The webhook is upstream's `dev`, which allows everyone, unless a test sets another.
"""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.processes import Command, start

TIMEOUT = 60


@dataclass(frozen=True)
class World:
    """What a KMS needs from outside: where its agent and its PCCS answer, and the root that quotes lead to."""

    agent: str
    pccs: str
    root_ca: str
    os_image_hash: str

    @classmethod
    def of(cls, description: dict[str, Any]) -> "World":
        """Take the line that `dstack-emu agent --json` prints."""
        return cls(
            f"unix:{description['dstack_sock']}",
            description["pccs_url"],
            description["root_ca"],
            description["os_image_hash"],
        )


class Kms:
    """One KMS, ready; its log is a file in its folder."""

    def __init__(self, process: Command, description: dict[str, Any], log: Path) -> None:
        self.process, self.description, self._log = process, description, log
        self.url: str = description["url"]
        self.certs = Path(description["cert_dir"])

    @property
    def runtime_url(self) -> str:
        """Where it answers once it has keys."""
        return f"https://{self.description['address']}"

    def log(self) -> list[str]:
        """The lines on its stderr so far."""
        return self._log.read_text().splitlines()

    def curl(self, path: str, *arguments: str, url: str = "") -> tuple[int, str]:
        """Ask it with curl, certificates unchecked; return status (0: no answer) and body."""
        command = ["curl", "-sk", "--max-time", "20", "-w", "\n%{http_code}", *arguments, f"{url or self.url}{path}"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False).stdout
        body, _, status = out.rpartition("\n")
        return int(status), body

    def rpc(self, method: str, arguments: dict[str, Any] | None = None) -> tuple[int, Any]:
        """POST one RPC in JSON, in the phase that its prefix names; return status and parsed answer."""
        url = self.url if method.startswith("Onboard.") else self.runtime_url
        status, body = self.curl(f"/prpc/{method}?json", "-d", json.dumps(arguments or {}), url=url)
        return status, json.loads(body)

    def bootstrapped(self, domain: str = "127.0.0.1") -> Any:
        """Bootstrap and finish; return the answer."""
        status, answer = self.rpc("Onboard.Bootstrap", {"domain": domain})
        assert status == 200, answer
        assert self.curl("/finish") == (200, "OK")
        return answer

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, list[str]]:
        """Send a signal, if it still runs; return exit status, the rest of stdout, and the log."""
        rest = self.process.end(number, TIMEOUT)
        return self.process.wait(), rest, self.log()


def write_kms_toml(folder: Path, world: World) -> Path:
    """Write the kms.toml of a KMS whose keys are in `folder`/certs; tests change it by variables."""
    certs, path = folder / "certs", folder / "kms.toml"
    path.write_text(
        f"""
[rpc]
tls = {{ key = "{certs}/rpc.key", certs = "{certs}/rpc.crt", mutual = {{ ca_certs = "{certs}/tmp-ca.crt" }} }}
[core]
cert_dir = "{certs}"
[core.image]
verify = false
[core.attestation]
insecure_allow_external_trust_anchors = true
urls = {{ pccs = "{world.pccs}" }}
root_ca = {{ tdx = "{world.root_ca}" }}
[core.auth_api]
type = "dev"
"""
    )
    return path


def variables(keys: dict[str, str]) -> dict[str, str]:
    """The variables that set keys of kms.toml, such as `core.site_name`."""
    return {f"DSTACK_EMU_KMS_{key.upper().replace('.', '__')}": value for key, value in keys.items()}


def _start(folder: Path, world: World, arguments: tuple[str, ...], environment: dict[str, str]) -> tuple[Command, Path]:
    config, log = folder / "kms.toml", folder / "kms.log"
    if not config.exists():
        write_kms_toml(folder, world)
    environment = {"DSTACK_AGENT_ADDRESS": world.agent, **environment}
    with log.open("w") as errors:
        return start("kms", "-c", str(config), "--json", *arguments, stderr=errors, environment=environment), log


@contextmanager
def running(
    folder: Path, world: World, *arguments: str, listen: str = "127.0.0.1:0", **environment: str
) -> Iterator[Kms]:
    """Run a KMS on a folder until the block ends; keywords are variables of its environment."""
    where = ("--listen", listen) if listen else ()
    process, log = _start(folder, world, (*where, *arguments), environment)
    try:
        line = process.stdout.readline()
        assert line, f"the KMS ended with {process.wait(TIMEOUT)}: {log.read_text()}"
        yield Kms(process, json.loads(line), log)
    finally:
        process.end(timeout=TIMEOUT)


def ends(folder: Path, world: World, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run a KMS that ends by itself; return its status and the last line on stderr. It must say nothing on stdout."""
    process, log = _start(folder, world, ("--listen", "127.0.0.1:0", *arguments), environment)
    assert process.rest(TIMEOUT) == ""
    return process.wait(), log.read_text().splitlines()[-1]
