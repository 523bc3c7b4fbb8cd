"""The runbook by hand, in bash and curl, against `dstack-emu up --fresh`.

`runbook_by_hand.sh` is ours. If the document that the runbook was handed to us in lies beside the external vectors, its
own commands from "Shared setup" on are run, too: a page whose lines have lost their fences, so that a command and what
follows it stand on one line in places. `FUSED` takes those apart, `LEFT_OUT` leaves out what starts, deploys and stops
machines, and `read` is all that is changed in the rest.

Both are run if DSTACK_EMU_DOCUMENTS is set (`make documents`).
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

from tests.documents import RUN_DOCUMENTS
from tests.kms_machines import KMS_TOML, app_compose, kms_service, mapping
from tests.recorded import EXTERNAL
from tests.repository import ROOT
from tests.running import RunningStack, running_stack
from tests.vmm import VmmClient

BY_HAND = ROOT / "tests" / "runbook_by_hand.sh"
DOCUMENT = EXTERNAL.parent / "seeds" / "kms-self-authorization-runbook.txt"
FIRST = "export REPO_ROOT="
"""Where the shared setup begins."""
FOLDER = "/tmp/kms-self-auth"

FUSED = (
    r"^(EOF)(?=.)",
    r"^(done)(?=.)",
    r"(\| jq \.)(?=\S)",
    rf"({FOLDER}/[\w-]+\.(?:json|pid))(?=[A-Z]|- )",
    r'(/finish")(?=.)',
    rf"({FOLDER})(?=[A-Z])",
    r"^(export \w+='[^']*')(?=.)",
    r"^([A-Z_]+=\$\(.*\))(?=[A-Z])",
    r"(\|\| true)(?=.)",
)
"""Ends of commands that the next line is fused to."""

COMMAND = re.compile(r"(export|mkdir|cd|cat|curl|until|sed|cp|echo|bun|vmm-cli\.py|kill|tar) |\./|[A-Z_]+=")
LEFT_OUT = {
    r"\bbun\b": "our stack has the webhooks",
    r"REPO_ROOT": "nor is there a checkout of dstack",
    r"^echo \$!": "their process ids",
    r"^vmm-cli\.py": "our stack has the KMS",
    r"<kms-\w+-runtime-host>": "a place to fill in; the address was exported before",
    r"sdk/simulator|^\./": "our stack has the guest agents",
    r"^kill": "our stack is stopped by whoever started it",
}

KEPT = ("curl -s", "cat >", "jq -r", 'sed "s/', "cp /tmp", "tar czf", "export KMS_")
"""What must come through whole: as often in the script as in the document."""


def document() -> str:
    """Return the document from the shared setup on, its fused lines taken apart."""
    text = DOCUMENT.read_text()
    text = text[text.index(FIRST) :]
    for end in FUSED:
        text = re.sub(end, r"\1\n", text, flags=re.MULTILINE)
    return text


def commands(text: str) -> Iterator[str]:
    """The commands of a page of prose, each with the lines that belong to it."""
    lines = iter(text.splitlines())
    for line in lines:
        if not COMMAND.match(line):
            continue
        command = [line]
        end = "EOF" if "<<" in line else "done" if line.startswith("until ") else None
        while end is not None and command[-1] != end:
            command.append(next(lines))
        while end is None and command[-1].endswith("\\"):
            command.append(next(lines))
        yield "\n".join(command)


@dataclass(frozen=True)
class Place:
    """Where the runbook is run: hosts and ports of KMS and webhooks by name, and the source as kms-dst reaches it."""

    addresses: Mapping[str, str]
    source: str

    @classmethod
    def stack(cls, stack: RunningStack) -> Self:
        """The KMS of a stack."""
        addresses = {name: url.partition("://")[2] for name, url in stack.services.items()}
        return cls(addresses, f"https://{addresses['kms-src']}/prpc")

    @classmethod
    def machines(cls, stack: RunningStack) -> Self:
        """Two KMS that are deployed by the requests of vmm-cli.py, with the webhooks of a stack on their host."""
        addresses = dict(cls.stack(stack).addresses)
        vmm = VmmClient(stack.services["vmm"])
        for side in ("src", "dst"):
            webhook = f"http://10.0.2.2:{addresses[f'auth-{side}'].rpartition(':')[2]}"
            toml = KMS_TOML.replace("${AUTH_WEBHOOK_URL:-http://auth-api:8000}", webhook)
            port = mapping(8000)
            vm_id = vmm.deploy(name=f"kms-{side}", compose_file=app_compose({"kms": kms_service()}, toml), ports=[port])
            assert vmm.booted(vm_id)["boot_progress"] == "done"
            addresses[f"kms-{side}"] = f"127.0.0.1:{port['host_port']}"
        return cls(addresses, f"https://10.0.2.2:{addresses['kms-src'].rpartition(':')[2]}/prpc")


def read(command: str, folder: Path, place: Place) -> str:
    """A command as it is read here: our folder, our ports, and no failing curl where a refusal is expected."""
    if "denied.json" in command:
        command = command.replace("curl -sf ", "curl -s ")
    for side, port in (("src", 9301), ("dst", 9302)):
        command = command.replace(f"127.0.0.1:{port}", place.addresses[f"kms-{side}"])
    for side, port in (("src", 3101), ("dst", 3102)):
        command = command.replace(f"127.0.0.1:{port}", place.addresses[f"auth-{side}"])
    command = command.replace('"source_url\\":\\"${KMS_SRC_RUNTIME%/}/prpc', f'"source_url\\":\\"{place.source}')
    return command.replace(FOLDER, str(folder))


def is_left_out(command: str) -> bool:
    """Return whether a command is none for here."""
    return any(re.search(pattern, command) for pattern in LEFT_OUT)


def by_hand(folder: Path, place: Place) -> str:
    """Return our own script."""
    addresses = (f"KMS_{side.upper()}={place.addresses[f'kms-{side}']}" for side in ("src", "dst"))
    return "\n".join((f"cd {folder}", *addresses, f"KMS_SOURCE={place.source}", BY_HAND.read_text()))


def of_the_document(folder: Path, place: Place) -> str:
    """Return the document's commands, having made sure that they were taken out of it whole."""
    text = document()
    kept = [command for command in commands(text) if not is_left_out(command)]
    script = "\n".join(kept)
    for word in KEPT:
        placeholders = len(re.findall(rf"{word}.*<kms-", text))
        assert script.count(word) == text.count(word) - placeholders > 0, word
    for reason in LEFT_OUT:
        assert any(re.search(reason, command) for command in commands(text)), f"nothing to leave out: {reason}"
    for end in FUSED:
        assert re.search(end, DOCUMENT.read_text(), re.MULTILINE), f"nothing to take apart: {end}"
    return "\n".join(read(command, folder, place) for command in kept)


Script = Callable[[Path, Place], str]
SCRIPTS: dict[str, Script] = {"ours": by_hand}
if DOCUMENT.exists() and shutil.which("jq"):
    SCRIPTS["the document's"] = of_the_document


@RUN_DOCUMENTS
@pytest.mark.parametrize("where", [Place.stack, Place.machines], ids=["stack", "machines"])
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_runbook_by_hand_gives_what_it_expects(
    script: Script, where: Callable[[RunningStack], Place], tmp_path: Path
) -> None:
    folder = tmp_path / "kms-self-auth"
    is_deployed = where == Place.machines
    with running_stack("--fresh", *(["--vmm"] if is_deployed else []), "--policies", str(folder)) as stack:
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail"],
            input=script(folder, where(stack)),
            cwd=tmp_path,
            env={**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert_as_expected(folder, None if is_deployed else stack.description["kms"])
    if script is of_the_document:
        assert (tmp_path / "kms-self-auth-results.tar.gz").stat().st_size > 1000


def assert_as_expected(folder: Path, measured: dict[str, Any] | None) -> None:
    """What the document says of each case, of the files that its commands leave, and what the KMS are, if known."""

    def left(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        return found

    for side in ("src", "dst"):
        info = left(f"kms-{side}-attestation")
        assert {"device_id", "mr_aggregated", "os_image_hash", "tee_variant"} <= set(info)
        assert measured is None or info == measured[side]
    # Case 1
    assert left("bootstrap-src-denied") == {
        "error": "KMS is not allowed to bootstrap: boot denied: aggregated MR not allowed"
    }
    # Case 2
    bootstrapped = left("bootstrap-src-allowed")
    assert set(bootstrapped) == {"ca_pubkey", "k256_pubkey", "attestation"}
    assert left("kms-src-meta")["bootstrap_info"] == bootstrapped
    # Case 3
    assert "Source KMS is not allowed for onboarding: boot denied" in left("onboard-dst-denied")["error"]
    assert left("onboard-dst-allowed") == {"k256_pubkey": bootstrapped["k256_pubkey"]}
    assert left("kms-dst-meta")["k256_pubkey"] == bootstrapped["k256_pubkey"]
    # Case 4
    assert set(left("get-temp-ca-allowed")) == {"temp_ca_cert", "temp_ca_key", "ca_cert"}
    assert left("get-temp-ca-denied") == {
        "error": "KMS self authorization failed: KMS is not allowed: aggregated MR not allowed"
    }
