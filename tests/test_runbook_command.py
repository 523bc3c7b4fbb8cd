"""`dstack-emu runbook`: it passes and fails where it must, and its evidence is the same bytes each time."""

import gzip
import hashlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.cli.runbook_report import RunbookReport
from dstack_emu.runbook.cases import MEASURED
from dstack_emu.runbook.kms_client import KmsAnswer
from dstack_emu.runbook.target import Target, TargetError
from dstack_emu.runbook.transcript import Step
from tests.commands import run_command, usage_error
from tests.recorded import golden
from tests.repository import ROOT
from tests.running import RunningStack, running_kms, running_stack

CASES = 6
"""Five, and the preparations."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run on a stack of its own: what it printed, and the evidence that it left."""

    stdout: str
    stderr: str
    evidence: bytes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Two of one seed, with other options, one of another seed, and two by gRPC of the first seed."""
    folder = tmp_path_factory.mktemp("evidence")
    found = {}
    one = ["--seed", "one"]
    by_grpc = [*one, "--transport", "grpc"]
    wanted = {
        "plain": one,
        "json": [*one, "-vv", "--json"],
        "other": [],
        "grpc": by_grpc,
        "grpc json": [*by_grpc, "--json"],
    }
    for name, arguments in wanted.items():
        is_folder = name == "other"
        path = folder / name if is_folder else folder / f"{name}.tar.gz"
        done = run_command("runbook", *arguments, "--evidence", f"{path}/" if is_folder else str(path))
        assert done.returncode == 0, done.stderr.decode()
        found[name] = Run(
            done.stdout.decode(), done.stderr.decode(), archive_of(path) if is_folder else path.read_bytes()
        )
    assert len(list(folder.iterdir())) == len(found), "nothing but the archives"
    return found


@pytest.fixture(scope="module")
def files(runs: dict[str, Run]) -> dict[str, bytes]:
    """The files of the first archive by name."""
    return contents(runs["plain"].evidence)


def archive_of(folder: Path) -> bytes:
    """The files of a folder as an archive, as GNU tar would make one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(folder, "kms-self-auth", filter=lambda member: None if member.isdir() and not member.name else member)
    return buffer.getvalue()


def contents(archive: bytes) -> dict[str, bytes]:
    """The files of an archive by name."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar.getmembers():
            file = tar.extractfile(member)
            if member.isdir():
                continue
            assert file is not None
            found[member.name.removeprefix("kms-self-auth/")] = file.read()
    return found


# ---- on a stack of its own


def test_runbook_passes_on_a_stack_of_its_own_and_says_so(runs: dict[str, Run]) -> None:
    out = runs["plain"].stdout
    assert "\033" not in out, "colours are for terminals"
    assert out.rstrip().endswith("The runbook passes.")
    steps = re.findall(r"^  (\S+) +(\d\.\d+) +(.*) → (.*) \[expected: (.*)\]$", out, re.MULTILINE)
    assert {state for state, *_ in steps} == {"ok"}
    assert len(steps) == len(re.findall(r"^  \w", out, re.MULTILINE))
    said = {name: got for _, name, _, got, _ in steps}
    assert said["1.1"] == "400 KMS is not allowed to bootstrap: boot denied: OS image is not allowed"
    assert said["1.3"] == "400 KMS is not allowed to bootstrap: boot denied: aggregated MR not allowed"
    assert "400 App not allowed: No attestation provided" in said.values()
    assert sum("400 KMS self authorization failed: " in got for got in said.values()) == 4
    assert re.findall(r"^ +(\d)  .* (\w+)$", out, re.MULTILINE) == [(str(n), "passed") for n in range(CASES)]


def test_json_is_one_object_with_every_step(runs: dict[str, Run]) -> None:
    (line,) = runs["json"].stdout.splitlines()
    report = json.loads(line)
    assert (report["ok"], report["transport"], report["seed"]) == (True, "prpc", "one")
    assert [case["case"] for case in report["cases"]] == list(range(CASES))
    for case in report["cases"]:
        assert case["ok"] is True
        for step in case["steps"]:
            assert set(step) == {"name", "asked", "got", "expected", "ok", "seconds"}
            assert all(step[name] for name in ("asked", "got", "expected"))
    assert "Case 5: " in runs["json"].stderr, "progress goes there"


def steps_of(run: Run) -> list[dict[str, Any]]:
    """Every step of a run with --json."""
    return [step for case in json.loads(run.stdout)["cases"] for step in case["steps"]]


def test_runbook_by_grpc_has_the_same_steps_and_texts_with_statuses_of_its_own(runs: dict[str, Run]) -> None:
    report = json.loads(runs["grpc json"].stdout)
    assert (report["ok"], report["transport"]) == (True, "grpc")
    statuses = set()
    for ours, theirs in zip(steps_of(runs["json"]), steps_of(runs["grpc json"]), strict=True):
        assert (ours["name"], ours["ok"]) == (theirs["name"], theirs["ok"])
        if "/finish" in ours["asked"]:
            finished = (theirs["asked"][-16:], theirs["got"], theirs["expected"])
            assert finished == ("Onboard.Finish()", "OK null", "OK")
        elif ours["got"].startswith("400 "):
            code, _, text = theirs["got"].partition(" ")
            statuses.add(code)
            # A KMS asks its source by pRPC in either run, on whatever port that has.
            assert unported(text) == unported(ours["got"].removeprefix("400 "))
            assert ours["expected"] == theirs["expected"]
        elif ours["got"].startswith("no answer: TLS: "):  # a handshake that the KMS refuses; each library has its words
            assert "SSLV3_ALERT_HANDSHAKE_FAILURE" in ours["got"]
            assert theirs["got"].startswith("no answer: failed to connect to all addresses; last error: UNAVAILABLE: ")
            assert ours["expected"] == theirs["expected"]
        elif " KMS." in ours["asked"] or " Onboard." in ours["asked"]:
            assert theirs["got"] == re.sub("^200", "OK", ours["got"])
            assert theirs["expected"] == re.sub("^200", "OK", ours["expected"])
        else:
            assert (ours["got"], ours["expected"]) == (theirs["got"], theirs["expected"])
    assert statuses == {"PERMISSION_DENIED", "UNAUTHENTICATED"}


def unported(text: str) -> str:
    """A text without the ports in it."""
    return re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1", text)


def test_evidence_of_a_run_by_grpc_names_its_statuses(runs: dict[str, Run]) -> None:
    files = contents(runs["grpc"].evidence)
    denied = next(json.loads(data) for name, data in files.items() if name.endswith("-get-temp-ca-denied.json"))
    assert denied["status"] == "PERMISSION_DENIED"
    assert denied["body"] == {"error": "KMS self authorization failed: KMS is not allowed: aggregated MR not allowed"}
    assert b"127.0.0.1" not in gzip.decompress(runs["grpc"].evidence)
    assert json.loads(files["manifest.json"])["transport"] == "grpc"


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colours_are_for_terminals_that_want_them(
    no_color: str, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8") as terminal, open(ours, "rb", buffering=0) as seen:
        RunbookReport(terminal).step(Step("1.1", "a\033[2J", "b", "c", True, 0.0))
        line = seen.read(1000)
    assert (b"\033[32mok" in line) is coloured
    assert line.endswith(b" 1.1   a\\x1b[2J \xe2\x86\x92 b [expected: c]\r\n"), "a stack's words move no cursor"


# ---- evidence


def test_evidence_of_the_same_seed_is_the_same_bytes(runs: dict[str, Run]) -> None:
    assert runs["plain"].evidence == runs["json"].evidence
    assert runs["plain"].evidence != runs["other"].evidence
    assert runs["grpc"].evidence == runs["grpc json"].evidence


def test_evidence_has_what_the_runbook_says_to_save(files: dict[str, bytes]) -> None:
    names = "\n".join(files)
    for wanted in (
        "responses/.*-kms-src-attestation.json",
        "responses/.*-kms-dst-attestation.json",
        "responses/.*-bootstrap-src-denied-by-deny-self.json",
        "responses/.*-bootstrap-src-allowed.json",
        "responses/.*-onboard-dst-denied.json",
        "responses/.*-onboard-dst-allowed.json",
        "responses/.*-kms-src-meta.json",
        "responses/.*-kms-dst-meta.json",
        "responses/.*-get-temp-ca-allowed.json",
        "responses/.*-get-temp-ca-denied.json",
        "policies/.*-auth-src-deny-self.json",
        "policies/.*-auth-src-allow-both.json",
        "policies/.*-auth-dst-deny-src.json",
        "policies/.*-auth-dst-allow-src.json",
        "logs/kms-src.log",
        "logs/auth-src.log",
        "runbook.json",
        "calls.json",
        "index.html",
        "manifest.json",
    ):
        assert re.search(f"^{wanted}$", names, re.MULTILINE), wanted
    report = json.loads(files["runbook.json"])
    assert report["ok"] is True
    assert "seconds" not in report["cases"][1]["steps"][0]
    denied = next(json.loads(data) for name, data in files.items() if name.endswith("-get-temp-ca-denied.json"))
    assert denied["body"] == {"error": "KMS self authorization failed: KMS is not allowed: aggregated MR not allowed"}
    assert b"aggregated MR not allowed" in files["logs/auth-src.log"]


def test_evidence_has_a_manifest_with_the_sum_of_each_file(files: dict[str, bytes]) -> None:
    manifest = json.loads(files["manifest.json"])
    assert manifest["seed"] == "one"
    assert manifest["files"] == {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in files.items()
        if name != "manifest.json"
    }


class Page(HTMLParser):
    """Finds what a page links to and loads, its ids, and elements that are not closed where they should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.headings: list[int] = []
        self.count: Counter[str] = Counter()
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.count[tag] += 1
        self.links += [str(given["href"])] if "href" in given else []
        self.loads += [f"{tag} {name}" for name in given if name in ("src", "srcset", "data", "xlink:href", "style")]
        self.ids += [str(given["id"])] if "id" in given else []
        self.headings += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def test_evidence_has_a_page_that_shows_every_step_and_loads_nothing(files: dict[str, bytes]) -> None:
    text = files["index.html"].decode()
    page = Page(text)
    assert (page.loads, page.count["script"], page.count["link"], page.count["img"]) == ([], 0, 0, 0)
    assert not re.search(r"@import|url\(|https?://(?!kms-|10\.0\.2\.2)", text)
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.removeprefix("#") in page.ids if link.startswith("#") else link in files for link in page.links)
    assert page.headings[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(page.headings)), "no level is left out"
    report = json.loads(files["runbook.json"])
    steps = [step for case in report["cases"] for step in case["steps"]]
    assert page.count["article"] == len(steps)
    # Each step that asked a service has its picture; those that compare what is known already have none.
    assert {step["name"] for step in steps} - set(json.loads(files["calls.json"])) == {"5.2", "5.4", "5.5"}
    assert page.count["svg"] == page.count["figure"] == len(steps) - 3
    for name in files.keys() - {"index.html", "manifest.json"}:
        assert hashlib.sha256(files[name]).hexdigest() in text, name


def test_page_shows_rule_and_measured_value_beside_the_policy(files: dict[str, bytes]) -> None:
    text = files["index.html"].decode()
    (case,) = re.findall('<article aria-labelledby="step-1.3">(.*?)</article>', text, re.DOTALL)
    measured = json.loads(files["responses/0.03-kms-src-attestation.json"])["body"]["mr_aggregated"]
    rows = [re.sub("<[^>]*>", "", row) for row in re.findall("<tr>(.*?)</tr>", case)]
    assert [row.replace(" ", "") for row in rows] == [f"got{measured}", f"wanted{'00' * 32}"]
    assert "Rule: <code>kms_mr_aggregated</code>" in case
    assert "denied: aggregated MR not allowed" in case
    assert "<mark>" in case


def test_evidence_has_neither_private_keys_nor_addresses_nor_folders(
    runs: dict[str, Run], files: dict[str, bytes]
) -> None:
    unpacked = gzip.decompress(runs["plain"].evidence)
    for secret in (b"PRIVATE KEY", b"127.0.0.1", b"/tmp/"):
        assert secret not in unpacked
    keys = next(json.loads(data) for name, data in files.items() if "get-app-key-allowed" in name)
    for name in ("disk_crypt_key", "env_crypt_key", "k256_key"):
        assert keys["body"][name] == "(a private key was here)"
    assert keys["body"]["k256_signature"]


def test_evidence_has_no_time_and_no_owner_of_this_machine(runs: dict[str, Run]) -> None:
    evidence = runs["plain"].evidence
    assert evidence[4:8] == bytes(4), "gzip's own time"
    with tarfile.open(fileobj=io.BytesIO(evidence)) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(1767225600, 0, 0, "", "", 0o644)}


def test_evidence_that_cannot_be_written_is_known_before_the_run(tmp_path: Path) -> None:
    text = usage_error("runbook", "--evidence", str(tmp_path / "none" / "evidence.tar.gz"))
    assert text == f"--evidence: cannot write {tmp_path}/none/evidence.tar.gz: No such file or directory"
    (tmp_path / "mine").write_text("")
    for path in (tmp_path, f"{tmp_path}/mine/"):
        text = usage_error("runbook", "--evidence", str(path))
        assert text == f"--evidence: cannot write {path}: an empty folder, or a new one, expected"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# ---- on a stack that runs elsewhere


def write(path: Path, document: Any) -> Path:
    """Write JSON."""
    path.write_text(json.dumps(document))
    return path


def test_runbook_passes_on_a_stack_that_runs_elsewhere_once(fresh_stack: RunningStack, tmp_path: Path) -> None:
    file = Path(fresh_stack.description["state"], "stack.json")
    evidence = tmp_path / "evidence.tar.gz"
    done = run_command("runbook", "--against", str(file), "--evidence", str(evidence))
    assert done.returncode == 0, done.stdout.decode()
    assert b"The runbook passes." in done.stdout
    assert fresh_stack.rpc("kms-src", "KMS.GetTempCaCert")[0] == 200
    files = contents(evidence.read_bytes())
    assert not any(name.startswith("logs/") for name in files), "they are where it runs"
    (seen,) = json.loads(files["calls.json"])["1.1"]
    assert (seen["caller"], seen["service"], seen["call"]) == ("runbook", "kms-src", "Bootstrap")
    assert "inner" not in seen, "what it led to is in the journal of that stack"
    assert "It ran on a stack that runs elsewhere" in files["index.html"].decode()
    # Its KMS have keys now: the policies stay as they are, and it says how to begin anew.
    before = [path.read_text() for path in fresh_stack.policies.values()]
    evidence.unlink()
    done = run_command("runbook", "--against", str(file), "--evidence", str(evidence))
    assert (done.returncode, evidence.exists()) == (2, False)
    (text,) = done.stderr.decode().splitlines()
    url = fresh_stack.services["kms-src"].replace("http:", "https:")
    assert text.startswith(f"Error: kms-src at {url} has keys already: the runbook begins with two KMS that have no")
    assert "up --fresh" in text
    assert [path.read_text() for path in fresh_stack.policies.values()] == before


def test_kms_that_has_keys_but_was_not_finished_is_no_beginning(fresh_stack: RunningStack, tmp_path: Path) -> None:
    info = fresh_stack.description["kms"]["src"]
    policy = json.loads(fresh_stack.policies["src"].read_text())
    policy["osImages"] = [f"0x{info['os_image_hash']}"]
    policy["kms"]["mrAggregated"] = [f"0x{info['mr_aggregated']}"]
    own = json.dumps(policy)
    fresh_stack.policies["src"].write_text(own)
    assert fresh_stack.rpc("kms-src", "Onboard.Bootstrap", {"domain": "a.test"})[0] == 200
    done = run_command("runbook", "--against", str(write(tmp_path / "stack.json", fresh_stack.description)))
    assert done.returncode == 2
    assert "KMS has already been bootstrapped: the runbook begins with two KMS that have" in done.stderr.decode()
    assert fresh_stack.policies["src"].read_text() == own, "policies are put back"


def test_stack_without_app_and_pccs_is_judged_as_far_as_it_goes(fresh_stack: RunningStack, tmp_path: Path) -> None:
    description = dict(fresh_stack.description)
    needed = ("auth-src", "auth-dst", "kms-src", "kms-dst")
    minimal = {
        "services": {name: description["services"][name] for name in needed},
        "policies": description["policies"],
    }
    report = json.loads(run_command("runbook", "--json", "--against", str(write(tmp_path / "s.json", minimal))).stdout)
    assert report["ok"] is True
    skipped = [step for case in report["cases"] for step in case["steps"] if step["ok"] is None]
    assert {step["got"] for step in skipped} == {
        "the target names no PCCS (services.pccs)",
        "the target names no app's agent (services.app)",
        "the target names no verifier (services.verifier)",
    }


def test_runbook_passes_by_grpc_on_a_stack_of_release_0_5_that_runs_elsewhere() -> None:
    with running_stack("--fresh", "--grpc", "--release", "0.5") as stack:
        file = Path(stack.description["state"], "stack.json")
        done = run_command("runbook", "--against", str(file), "--transport", "grpc", "--json")
        again = run_command("runbook", "--against", str(file), "--transport", "grpc")
    assert_passed_in_release_0_5(done, "UNAUTHENTICATED")
    assert again.returncode == 2
    assert f"kms-src at {stack.description['grpc']['kms-src-grpc']} has keys already" in again.stderr.decode()


def assert_passed_in_release_0_5(done: subprocess.CompletedProcess[bytes], status: str) -> None:
    """A run passed, and the KMS refused a client without evidence as its release does."""
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"], report["upstream"]) == (0, True, "0.5.11"), done.stderr
    (bare,) = [step for case in report["cases"] for step in case["steps"] if step["name"] == "5.10"]
    assert bare["got"] == f"{status} App not allowed: No attestation provided"


def test_source_url_is_where_the_destination_is_sent(fresh_stack: RunningStack, tmp_path: Path) -> None:
    file = write(tmp_path / "stack.json", fresh_stack.description)
    nowhere = "https://127.0.0.1:9/prpc"
    done = run_command("runbook", "--json", "--against", str(file), "--source-url", nowhere, "--wait", "1")
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"]) == (1, False)
    failed = [step for case in report["cases"] for step in case["steps"] if step["ok"] is False]
    assert {step["name"] for step in failed} == {"3.3", "3.6", "3.8"}
    assert all(f"Onboard(source_url={nowhere}, " in step["asked"] for step in failed)
    assert all("Connection refused" in step["got"] for step in failed)
    assert report["cases"][4]["ok"] is True, "what needs the source alone is judged all the same"


def test_webhook_that_reads_other_policies_fails_what_depends_on_them(
    fresh_stack: RunningStack, tmp_path: Path
) -> None:
    elsewhere = {side: str(tmp_path / f"auth-{side}.json") for side in ("src", "dst")}
    file = write(tmp_path / "stack.json", {**fresh_stack.description, "policies": elsewhere})
    done = run_command("runbook", "--against", str(file))
    out = done.stdout.decode()
    assert done.returncode == 1
    results = re.findall(r"^ +(\d)  .* (passed|FAILED|not checked)$", out, re.MULTILINE)
    assert results == [
        ("0", "passed"),
        ("1", "passed"),
        ("2", "FAILED"),
        ("3", "not checked"),
        ("4", "not checked"),
        ("5", "not checked"),
    ]
    assert "the rest of this case → kms-src has no keys" in out
    assert "2 of 6 passed." in out


def test_app_whose_log_can_be_read_in_two_ways_is_no_attested_client(fresh_stack: RunningStack, tmp_path: Path) -> None:
    event = {"event": "compose-hash:", "payload": "00"}
    made = json.dumps({"name": "forger", "events": [event]})
    url, kind = f"{fresh_stack.services['control']}/guests", ("-H", "Content-Type: application/json")
    forger = json.loads(fresh_stack.curl(url, *kind, "-d", made)[1])
    services = {**fresh_stack.services, "app": forger["dstack_sock"]}
    file = write(tmp_path / "stack.json", {**fresh_stack.description, "services": services})
    done = run_command("runbook", "--json", "--against", str(file))
    steps = [step for case in json.loads(done.stdout)["cases"] for step in case["steps"]]
    refused = [step for step in steps if " is ambiguous: 'compose-hash:' " in step["asked"] + step["got"]]
    assert (done.returncode, bool(refused)) == (1, True), steps


# ---- a KMS that does not ask


@contextmanager
def careless(stack: RunningStack, folder: Path) -> Iterator[dict[str, str]]:
    """Two KMS beside a stack, in its trust domains, that allow everyone without asking."""
    with ExitStack() as exits:
        urls = {}
        for side in ("src", "dst"):
            certs = folder / side
            config = folder / f"{side}.toml"
            config.write_text(
                f"""
                [rpc]
                address = "127.0.0.1"
                port = 0
                [rpc.tls]
                key = "{certs}/rpc.key"
                certs = "{certs}/rpc.crt"
                [rpc.tls.mutual]
                ca_certs = "{certs}/tmp-ca.crt"
                [core]
                cert_dir = "{certs}"
                [core.auth_api]
                type = "dev"
                [core.onboard]
                address = "127.0.0.1"
                port = 0
                [core.image]
                verify = false
                [core.attestation]
                insecure_allow_external_trust_anchors = true
                [core.attestation.urls]
                pccs = "{stack.services["pccs"]}"
                [core.attestation.root_ca]
                tdx = "{stack.description["root_ca"]}"
                """
            )
            urls[f"kms-{side}"] = exits.enter_context(running_kms(config, stack.services[f"agent-{side}"]))
        yield urls


def test_kms_that_does_not_ask_its_webhook_fails(fresh_stack: RunningStack, tmp_path: Path) -> None:
    with careless(fresh_stack, tmp_path) as kms:
        description = {**fresh_stack.description, "services": {**fresh_stack.services, **kms}}
        file = write(tmp_path / "stack.json", description)
        evidence = tmp_path / "evidence.tar.gz"
        done = run_command("runbook", "--json", "--against", str(file), "--evidence", str(evidence))
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"]) == (1, False)
    failed = {step["name"]: step for case in report["cases"] for step in case["steps"] if step["ok"] is False}
    assert list(failed) == ["1.1", "3.3", "4.7", "4.8", "4.9", "4.10"]
    assert failed["1.1"]["got"] == "200 ca_pubkey, k256_pubkey, attestation"
    assert failed["1.1"]["expected"] == "an error that says 'not allowed' or 'denied'"
    assert [case["ok"] for case in report["cases"]] == [True, False, True, False, False, True]
    assert json.loads(contents(evidence.read_bytes())["manifest.json"])["ok"] is False, "failures are evidence, too"


# ---- wrong use

NOWHERE = {
    "services": dict.fromkeys(("auth-src", "auth-dst", "kms-src", "kms-dst"), "http://127.0.0.1:9"),
    "policies": {"src": "a", "dst": "b"},
}


def test_description_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "stack.json"
    assert usage_error("runbook", "--against", str(file)) == f"{file}: cannot be read: No such file or directory"


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ("[", "JSON expected: "),
        ("[]", "the document: Input should be "),
        ("{}", "services: Field required"),
        ('{"services": {"auth-src": "ftp://a"}}', "services.auth-src: Value error, http(s)://host:port expected, got "),
        ('{"services": {"auth-src": "http://a:99999"}}', "services.auth-src: Value error, http(s)://"),
        (json.dumps({**NOWHERE, "root_ca": "none"}), "root_ca: "),
        (
            json.dumps({**NOWHERE, "release": "0.7"}),
            "release: Value error, dstack release: 0.5 or 0.6 expected, got '0.7'",
        ),
        (json.dumps({**NOWHERE, "runtime": {"source": "http://a"}}), "runtime.source: unknown key"),
    ],
)
def test_description_that_is_none_is_refused_by_name(tmp_path: Path, document: str, text: str) -> None:
    file = tmp_path / "stack.json"
    file.write_text(document)
    with pytest.raises(TargetError) as refusal:
        Target.load(file)
    assert str(refusal.value).startswith(f"{file}: {text}")


def test_description_may_name_other_addresses_for_the_runtime_phase(tmp_path: Path) -> None:
    document = {**NOWHERE, "runtime": {"src": "https://b"}, "source_url": "https://c/prpc"}
    target = Target.load(write(tmp_path / "stack.json", document))
    assert (target.kms["src"].onboard, target.kms["src"].runtime) == ("http://127.0.0.1:9", "https://b")
    assert (target.kms["dst"].onboard, target.kms["dst"].runtime) == ("http://127.0.0.1:9", "https://127.0.0.1:9")
    assert (target.source_url, target.kms["src"].policy) == ("https://c/prpc", tmp_path / "a")


def test_description_without_grpc_is_refused_for_a_run_by_grpc(tmp_path: Path) -> None:
    file = write(tmp_path / "stack.json", NOWHERE)
    with pytest.raises(TargetError) as refusal:
        Target.load(file, by_grpc=True)
    needed = "not there, and --transport grpc needs it: start the stack with `up --grpc`"
    assert str(refusal.value) == f"{file}: grpc.kms-src-grpc: {needed}"
    write(file, {**NOWHERE, "grpc": {"kms-src-grpc": "http://127.0.0.1"}})
    text = usage_error("runbook", "--against", str(file), "--transport", "grpc")
    assert text == f"{file}: grpc.kms-src-grpc: host:port expected, got 'http://127.0.0.1'"


def test_kms_that_does_not_answer_by_grpc_is_named(tmp_path: Path) -> None:
    names = [f"kms-{side}-grpc{more}" for side in ("src", "dst") for more in ("", "-mtls")]
    file = write(tmp_path / "stack.json", {**NOWHERE, "grpc": dict.fromkeys(names, "127.0.0.1:9")})
    done = run_command("runbook", "--against", str(file), "--transport", "grpc", "--wait", "0")
    expected = "Error: kms-src at 127.0.0.1:9 does not say what it measures: no answer: Connection refused\n"
    assert (done.returncode, done.stderr.decode()) == (2, expected)


def test_kms_that_does_not_answer_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "stack.json", NOWHERE)
    done = run_command("runbook", "--against", str(file), "--wait", "0")
    expected = "Error: kms-src at http://127.0.0.1:9 does not say what it measures: no answer: Connection refused\n"
    assert (done.returncode, done.stderr.decode()) == (2, expected)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--source-url", ["https://127.0.0.1:9"]), ("--intel", [])],
)
def test_option_about_a_stack_elsewhere_is_refused_without_one(option: str, value: list[str]) -> None:
    text = usage_error("runbook", option, *value)
    assert text == f"{option} is only for a stack that runs elsewhere: give --against, too"


def test_measurements_name_the_variant_by_either_name() -> None:
    (row,) = (row for row in golden("wire.json") if row["name"] == "attinfo_after_bootstrap")
    recorded = json.loads(row["response"]["body"])
    assert {"tee_variant", "attestation_mode"} & set(recorded) == {"tee_variant"}
    nameless = {name: value for name, value in recorded.items() if name != "tee_variant"}
    for body in (recorded, nameless | {"attestation_mode": "dstack-tdx"}):
        assert MEASURED.holds(KmsAnswer(200, body))
        assert not MEASURED.holds(KmsAnswer(200, body | {"mr_aggregated": "00"}))
        assert not MEASURED.holds(KmsAnswer(400, body))
    assert not MEASURED.holds(KmsAnswer(200, nameless))


def test_interrupted_run_leaves_nothing_behind(short_folder: Path) -> None:
    evidence = short_folder / "evidence.tar.gz"
    command = [sys.executable, "-m", "dstack_emu", "runbook", "--evidence", str(evidence)]
    environment = {**os.environ, "TMPDIR": str(short_folder)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert process.stderr.readline().startswith(b"\xe2\x80\xa6 starting kms-src")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert list(short_folder.iterdir()) == []


def test_runbook_passes_on_a_stack_of_release_0_5() -> None:
    assert_passed_in_release_0_5(run_command("runbook", "--release", "0.5", "--json"), "400")


def test_runbook_deploys_its_kms_and_passes_in_both_releases(tmp_path: Path) -> None:
    for release in ("0.5", "0.6"):
        file = tmp_path / f"{release}.tar.gz"
        done = run_command("runbook", "--deploy", "--release", release, "--json", "--evidence", str(file))
        assert done.returncode == 0, done.stderr.decode()
        assert json.loads(done.stdout)["ok"] is True
        log = contents(file.read_bytes())["logs/kms-dst.log"].decode()
        assert "[dstack] kms: quotes are verified under the emulated Intel's root" in log
        assert log.endswith("[dstack] done\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--deploy", "--transport", "grpc"], "leave out --transport grpc, or --deploy"),
        (["--deploy", "--kms", "src=external"], "leave out --kms, or --deploy"),
        (["--deploy", "--against", "x.json"], "leave out --against, or --deploy"),
        (["--runbook-ports"], "--runbook-ports is about the machines of --deploy: give --deploy, too"),
    ],
)
def test_deploy_goes_without_what_names_other_kms(arguments: list[str], text: str) -> None:
    assert text in usage_error("runbook", *arguments)
