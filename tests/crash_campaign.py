"""kill -9 at random moments of Bootstrap and of Onboard, and what the next start makes of it. `make crash` runs it.

No part of the test suite: it takes minutes. What must never happen is a start that finds something between all keys and
none, a KMS that answered with keys and has others afterwards, or one that cannot be set up again. Of three moments one
lies anywhere in the call, one after the first file was written, one after all were. The suite's own version, which
kills at every step but of the storing alone, is tests/test_crash.py.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.foreign import kms
from tests.repository import ROOT
from tests.running import RunningStack, running_stack

SLACK = 1.5
"""Moments reach this far beyond the time that an undisturbed call takes, so that some come after its end."""
PATIENCE = 10
"""Seconds to wait for a file that shows how far the call is."""


class Kms:
    """A KMS process of one folder, ready."""

    def __init__(self, config: Path, agent: str) -> None:
        command = [sys.executable, "-m", "dstack_emu", "kms", "-c", str(config), "--listen", "127.0.0.1:0", "--json"]
        env = {**os.environ, "DSTACK_AGENT_ADDRESS": agent}
        log = config.with_suffix(".log")
        with log.open("w") as errors:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=errors, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the KMS ended with {self.process.wait()}: {log.read_text()}"
        self.description: dict[str, Any] = json.loads(line)

    def end(self, number: int) -> None:
        """Send a signal and wait for the end."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Campaign:
    """Rounds of one call against one stack's agent, webhook, PCCS and source KMS."""

    def __init__(self, stack: RunningStack, method: str, root: Path, chance: random.Random) -> None:
        self.stack, self.method, self.root, self.chance = stack, method, root, chance
        self.agent = stack.services["agent-dst"]
        self.arguments = {"domain": "127.0.0.1"}
        if method == "Onboard":
            self.arguments["source_url"] = stack.services["kms-src"]
        self.found: Counter[str] = Counter()

    def config(self, certs: Path) -> Path:
        """Write the kms.toml of a folder that exists and is empty."""
        certs.mkdir()
        path = certs.with_suffix(".toml")
        path.write_text(
            f"""
[rpc]
tls = {{ key = "{certs}/rpc.key", certs = "{certs}/rpc.crt", mutual = {{ ca_certs = "{certs}/tmp-ca.crt" }} }}
[core]
cert_dir = "{certs}"
image = {{ verify = false }}
auth_api = {{ webhook = {{ url = "{self.stack.services["auth-dst"]}" }} }}
[core.attestation]
insecure_allow_external_trust_anchors = true
urls = {{ pccs = "{self.stack.services["pccs"]}" }}
root_ca = {{ tdx = "{self.stack.description["root_ca"]}" }}
"""
        )
        return path

    def ask(self, url: str) -> str | None:
        """Make the call; the root key's public half, or None where the connection ended before the answer."""
        try:
            with kms(url) as connection:
                return str(connection.call(self.method, **self.arguments).value["k256_pubkey"])
        except (OSError, http.client.HTTPException):
            return None

    def undisturbed(self) -> float:
        """Seconds that the call takes when nobody interferes."""
        process = Kms(self.config(self.root / "undisturbed"), self.agent)
        began = time.monotonic()
        assert self.ask(process.description["url"])
        took = time.monotonic() - began
        process.end(signal.SIGKILL)
        return took

    def round(self, number: int, seconds: float) -> None:
        """Kill one KMS in the middle of the call, start it again, and judge."""
        certs = self.root / f"round-{number}"
        config = self.config(certs)
        process = Kms(config, self.agent)
        answers: list[str | None] = []
        url = process.description["url"]
        call = threading.Thread(target=lambda: answers.append(self.ask(url)))
        call.start()
        began = time.monotonic()
        first = ("", ".writing", ".committed")[number % 3]
        while first and call.is_alive() and not (certs / first).exists() and time.monotonic() - began < PATIENCE:
            pass
        time.sleep(self.chance.uniform(0, {"": SLACK * seconds, ".writing": 0.1, ".committed": 0.03}[first]))
        process.end(signal.SIGKILL)
        call.join()
        left = sorted(path.name for path in certs.iterdir())
        self.judge(config, certs, answers[0])
        self.found["answered" if answers[0] else "cut off"] += 1
        self.found["something unfinished was left"] += any(name.startswith(".") for name in left)

    def judge(self, config: Path, certs: Path, answered: str | None) -> None:
        """Start again: all keys, and those that were answered, or none, and the call can be made again."""
        process = Kms(config, self.agent)
        try:
            if process.description["phase"] == "onboard":
                assert answered is None, "keys that were answered are gone"
                assert not list(certs.iterdir()), f"left: {sorted(certs.iterdir())}"
                assert self.ask(process.description["url"]), "the second call was refused"
                self.found["asked again"] += 1
                return
            with kms(process.description["url"]) as connection:
                public = connection.call("GetMeta").value["k256_pubkey"]
            assert answered in (None, public), "other keys than those that were answered"
            hidden = [path.name for path in certs.iterdir() if path.name.startswith(".")]
            assert not hidden, f"left: {hidden}"
            self.found["all keys"] += 1
        finally:
            process.end(signal.SIGKILL)


def main() -> int:
    """Run the campaign; return 1 where something came between all and none."""
    parser = argparse.ArgumentParser(description="kill -9 at random moments of Bootstrap and of Onboard")
    parser.add_argument("--times", type=int, default=100, help="rounds of each (%(default)s)")
    parser.add_argument("--seed", default="crash", help="of the moments (%(default)s)")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with running_stack() as stack, tempfile.TemporaryDirectory(prefix="crash-") as folder:
        for method in ("Bootstrap", "Onboard"):
            root = Path(folder, method)
            root.mkdir()
            campaign = Campaign(stack, method, root, chance)
            seconds = campaign.undisturbed()
            print(f"{method}: an undisturbed call takes {seconds * 1000:.0f} ms", flush=True)
            for number in range(1, arguments.times + 1):
                try:
                    campaign.round(number, seconds)
                except AssertionError as error:
                    print(f"{method}, round {number}: {error}", flush=True)
                    return 1
                if number % 10 == 0 or number == arguments.times:
                    said = ", ".join(f"{what} {count}" for what, count in sorted(campaign.found.items()))
                    print(f"{method}: {number} of {arguments.times}: {said}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
