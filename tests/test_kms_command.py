"""`dstack-emu kms` from outside: how it is started, what it prints, which phase it enters, and how it ends.

What it must say where it fails to start was recorded from the real program (process-exits.json), up to where a foreign
parser or the operating system speaks.
"""

import http.client
import json
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from dstack_emu.attest.attestation import decode
from tests.commands import serving
from tests.kms_process import Kms, World, ends, running, variables
from tests.recorded import golden

KEYS = {"root-ca.key", "root-k256.key", "rpc.key", "tmp-ca.key"}
STORED = {*KEYS, "root-ca.crt", "rpc.crt", "tmp-ca.crt", "rpc-domain"}
REISSUE = (
    "Failed to reissue the attested KMS RPC certificate; refusing to start with a potentially unattested certificate"
)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One agent with its PCCS."""
    with serving("agent") as description:
        yield World.of(description)


@pytest.fixture(scope="module")
def stored(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the keys of a bootstrapped KMS, to be copied."""
    folder = tmp_path_factory.mktemp("stored")
    with running(folder, world) as kms:
        kms.bootstrapped("kms.example.test")
    return folder / "certs"


@pytest.fixture(scope="module")
def source(world: World, stored: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kms]:
    """A KMS that has keys, to onboard from."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(stored, folder / "certs")
    with running(folder, world) as kms:
        yield kms


@pytest.fixture
def with_keys(world: World, stored: Path, tmp_path: Path) -> Path:
    """A folder of a KMS that was bootstrapped before."""
    shutil.copytree(stored, tmp_path / "certs")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def recorded_exit(name: str) -> str:
    """What the real program said, on one line."""
    (said,) = (row["stderr"] for row in golden("process-exits.json") if row["name"] == name)
    return str(said).replace("\n\nCaused by:\n    0: ", ": ").replace("\n\nCaused by:\n    ", ": ")


# ---- the line of --json, and --listen


def test_json_line_says_what_a_script_needs_and_the_port_is_kept(world: World, tmp_path: Path) -> None:
    admin = variables({"core.admin.enabled": "true", "core.admin.port": "0", "core.admin.auth_token": "t"})
    with running(tmp_path, world, **admin) as kms:
        said = kms.description
        assert list(said) == ["url", "phase", "address", "admin_url", "grpc", "cert_dir", "kms_ca"]
        assert (said["phase"], said["url"]) == ("onboard", f"http://{said['address']}")
        assert (said["cert_dir"], said["kms_ca"]) == (str(tmp_path / "certs"), str(tmp_path / "certs/root-ca.crt"))
        assert not Path(said["kms_ca"]).exists()
        assert kms.curl("/health", url=said["admin_url"])[0] == 0, "no admin listener before there are keys"
        kms.bootstrapped()
        command = ["curl", "-sS", "--cacert", said["kms_ca"], f"{kms.runtime_url}/prpc/KMS.GetMeta?json"]
        meta = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        assert json.loads(meta)["ca_cert"] == Path(said["kms_ca"]).read_text()
        assert kms.curl("/prpc/Admin.ClearImageCache", url=said["admin_url"])[0] == 401
        assert kms.curl("/health")[0] == 0, "no plain HTTP on that port any more"
        phases = [line for line in kms.log() if "kms_emu: " in line and " phase " in line]
        urls = [line.partition("url=")[2].split()[0] for line in phases]
        assert urls == [kms.url, kms.runtime_url], "the port that was free is kept"
        status, rest, _ = kms.end()
        assert (status, rest) == (0, ""), "nothing else on stdout"


def test_listen_goes_before_the_files_addresses(world: World, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        keys = ("rpc.address", "core.onboard.address", "rpc.port", "core.onboard.port")
        in_use = variables(dict(zip(keys, ("127.0.0.1", "127.0.0.1", port, port), strict=True)))
        with running(tmp_path, world, **in_use) as kms:
            assert kms.description["address"] != f"127.0.0.1:{port}"
            kms.bootstrapped()
            assert kms.rpc("KMS.GetTempCaCert")[0] == 200
        used = f"cannot listen on 127.0.0.1:{port}: the address is in use (set by"
        assert ends(tmp_path, world, "--listen", f"127.0.0.1:{port}") == (2, f"Error: {used} --listen HOST:PORT)")
        admin = variables({"core.admin.enabled": "true", "core.admin.port": port, "core.admin.auth_token": "t"})
        setting = "core.admin.address and core.admin.port"
        assert ends(tmp_path, world, **admin) == (2, f"Error: {used} {setting})")


def test_phases_may_have_ports_of_their_own(world: World, tmp_path: Path) -> None:
    keys = {"core.onboard.address": "localhost", "core.onboard.port": "0", "rpc.address": "127.0.0.1", "rpc.port": "0"}
    with running(tmp_path, world, listen="", **variables(keys)) as kms:
        kms.bootstrapped()
        line = next(line for line in iter(lambda: kms.log()[-1], "") if "runtime phase" in line)
        runtime = line.partition("url=")[2].split()[0]
        assert runtime.rpartition(":")[0] == "https://127.0.0.1"
        assert runtime.rpartition(":")[2] != kms.url.rpartition(":")[2]
        assert kms.curl("/health", url=runtime) == (200, "OK")


# ---- --seed


def test_same_seed_gives_the_same_keys_and_certificates(world: World, tmp_path: Path) -> None:
    found = {}
    for name, options in {"a": ("--seed", "x"), "b": ("--seed", "x"), "c": ("--seed", "y"), "d": ()}.items():
        folder = tmp_path / name
        folder.mkdir()
        with running(folder, world, *options) as kms:
            kms.bootstrapped("kms.example.test")
            assert kms.rpc("KMS.GetTempCaCert")[0] == 200  # it writes its last file before it answers
            found[name] = contents(kms.certs)
    assert set(found["a"]) == {*STORED, "bootstrap-info.json"}
    assert found["a"] == found["b"]
    for one, other in (("a", "c"), ("a", "d")):
        assert {name for name in found[one] if found[one][name] == found[other][name]} == {"rpc-domain"}
    # Dated as of 2026-01-01 with a seed, as of today without.
    dates = {n: x509.load_pem_x509_certificate(found[n]["root-ca.crt"]).not_valid_after_utc for n in ("a", "d")}
    assert str(dates["a"]) == "2035-12-30 00:00:00+00:00"
    assert dates["a"] != dates["d"]


# ---- metrics


def test_metrics_count_calls_that_judge_evidence_however_they_come(world: World, with_keys: Path) -> None:
    def counted() -> dict[str, str]:
        status, text = kms.curl("/metrics")
        assert status == 200
        return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    def count(number: int) -> dict[str, str]:
        # None of them shows evidence: all are refused.
        return {f"dstack_kms_attestation_{what}_total": str(number) for what in ("requests", "failures")}

    with running(with_keys, world) as kms:
        assert counted() == count(0)
        (recorded,) = (row["response"]["body"] for row in golden("wire.json") if row["name"] == "metrics_end")
        assert kms.curl("/metrics")[1] == re.sub(r"(?m) \d+$", " 0", recorded)
        assert kms.rpc("KMS.GetMeta")[0] == 200
        assert kms.rpc("KMS.GetTempCaCert")[0] == 200
        assert counted() == count(0)
        asked = [
            ("GetAppKey?json", "-d", '{"api_version":1}'),
            ("KMS.GetAppKey?json", "-d", '{"api_version":1}', "-H", "Connection: close"),
            ("KMS.KMS.SignCert", "--data-binary", ""),
            ("KMS.GetKmsKey?json", "-d", "not JSON"),
            ("GetKmsKey?json", "-X", "GET"),
            ("GetAppKey", "-X", "PUT"),
        ]
        for number, (path, *arguments) in enumerate(asked, 1):
            assert kms.curl(f"/prpc/{path}", *arguments)[0] >= 400
            assert counted() == count(number)
        for path in ("/prpc/GetNothing", "/prpc//GetAppKey", "/GetAppKey", "/prpc/"):
            assert kms.curl(path, "-d", "")[0] >= 400
        assert counted() == count(len(asked))
    with running(with_keys, world, **variables({"core.metrics.enabled": "false"})) as kms:
        assert kms.curl("/metrics")[0] == 404


# ---- which phase


def test_stored_keys_skip_the_onboard_phase_and_get_a_new_rpc_certificate(world: World, with_keys: Path) -> None:
    before, certificate = contents(with_keys / "certs"), (with_keys / "certs" / "rpc.crt").stat()
    with running(with_keys, world) as kms:
        assert (kms.description["phase"], kms.url) == ("runtime", kms.runtime_url)
        assert kms.rpc("KMS.GetTempCaCert")[0] == 200
        after = contents(kms.certs)
        assert kms.end()[0] == 0
    # Within the same second it is the same certificate, but another file.
    assert (with_keys / "certs" / "rpc.crt").stat().st_mtime_ns > certificate.st_mtime_ns
    assert {**after, "rpc.crt": before["rpc.crt"]} == before
    old, new = (x509.load_pem_x509_certificate(files["rpc.crt"]) for files in (before, after))
    assert old.public_key() == new.public_key()
    new.verify_directly_issued_by(x509.load_pem_x509_certificate(after["root-ca.crt"]))


def test_onboard_phase_that_is_switched_off_needs_keys(world: World, with_keys: Path, tmp_path: Path) -> None:
    off = variables({"core.onboard.enabled": "false"})
    with running(with_keys, world, **off) as kms:
        assert kms.description["phase"] == "runtime"
    shutil.rmtree(with_keys / "certs")
    file = with_keys / "certs" / "tmp-ca.key"
    missing = f"failed to open file `{file}`: No such file or directory"
    assert ends(with_keys, world, **off) == (2, f"Error: {REISSUE}: {missing}")
    assert not list((with_keys / "certs").iterdir())


def test_finish_without_keys_ends_the_kms(world: World, tmp_path: Path) -> None:
    with running(tmp_path, world) as kms:
        assert kms.rpc("Onboard.Finish") == (200, None)
        kms.process.wait(20)
        status, _, log = kms.end()
    assert (status, log[-1]) == (1, recorded_exit("Onboard.Finish without keys"))
    assert not list(kms.certs.iterdir())


def test_signal_in_the_onboard_phase_ends_the_kms_with_a_failure(world: World, tmp_path: Path) -> None:
    with running(tmp_path, world) as kms:
        status, rest, log = kms.end()
    assert (status, rest, log[-1]) == (1, "", recorded_exit("SIGTERM in onboard"))


def test_partial_keys_are_asked_for_again_and_not_overwritten(world: World, with_keys: Path) -> None:
    (with_keys / "certs" / "tmp-ca.key").unlink()
    before = contents(with_keys / "certs")
    with running(with_keys, world) as kms:
        assert kms.description["phase"] == "onboard"
        refusal = {"error": "KMS has already been bootstrapped"}
        assert kms.rpc("Onboard.Bootstrap", {"domain": "kms.example.test"}) == (400, refusal)
        status, answer = kms.rpc("Onboard.Onboard", {"source_url": "https://127.0.0.1:1", "domain": "kms.example.test"})
        assert (status, answer) == (400, {"error": "KMS has already been onboarded"})
    assert contents(with_keys / "certs") == before


# ---- auto_bootstrap_domain


def test_auto_bootstrap_goes_to_the_runtime_phase_by_itself(world: World, tmp_path: Path) -> None:
    with running(tmp_path, world, **variables({"core.onboard.auto_bootstrap_domain": "auto.example.test"})) as kms:
        assert kms.description["phase"] == "runtime"
        status, meta = kms.rpc("KMS.GetMeta")
        assert (status, meta["bootstrap_info"]) == (200, None)
        assert set(contents(kms.certs)) == STORED
        first = contents(kms.certs)
    assert first["rpc-domain"] == b"auto.example.test"
    # At a later start it names the certificate, whatever was stored.
    with running(tmp_path, world, **variables({"core.onboard.auto_bootstrap_domain": "later.example.test"})) as kms:
        later = contents(kms.certs)
    assert {name for name in first if first[name] != later[name]} == {"rpc.crt"}
    names = x509.load_pem_x509_certificate(later["rpc.crt"]).subject.rfc4514_string()
    assert names == "CN=later.example.test"


@pytest.mark.parametrize(
    ("keys", "status", "said"),
    [
        ({"core.onboard.auto_bootstrap_domain": "-a.test"}, 1, "domain contains an invalid DNS label"),
        (
            {"core.auth_api.type": "webhook", "core.auth_api.webhook.url": "http://127.0.0.1:1"},
            1,
            "KMS is not allowed to auto-bootstrap: failed to call KMS auth check: error sending request for url "
            "(http://127.0.0.1:1/bootAuth/kms): Connection refused",
        ),
    ],
)
def test_auto_bootstrap_refused_stores_nothing(
    world: World, tmp_path: Path, keys: dict[str, str], status: int, said: str
) -> None:
    keys = {"core.onboard.auto_bootstrap_domain": "auto.example.test", **keys}
    assert ends(tmp_path, world, **variables(keys)) == (status, f"Error: {said}")
    assert not list((tmp_path / "certs").iterdir())


# ---- keys that cannot be used


def _junk(certs: Path) -> None:
    (certs / "root-ca.key").write_text("junk")


def _no_domain(certs: Path) -> None:
    (certs / "rpc-domain").unlink()


def _another_certificate(certs: Path) -> None:
    shutil.copy(certs / "tmp-ca.crt", certs / "root-ca.crt")


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (_junk, "root-ca.key junk"),
        (_no_domain, "rpc-domain missing"),
        (_another_certificate, "root-ca.crt of another key"),
    ],
)
def test_kms_does_not_start_with_keys_that_are_damaged(world: World, with_keys: Path, damage: Any, name: str) -> None:
    damage(with_keys / "certs")
    recorded = recorded_exit(name).partition(": PEM error")[0].partition(": failed to open")[0]
    status, said = ends(with_keys, world)
    assert status == 2
    assert said.startswith(recorded)


def test_short_k256_key_is_read_as_upstream_reads_it(world: World, with_keys: Path) -> None:
    file = with_keys / "certs" / "root-k256.key"
    file.write_bytes(file.read_bytes()[:31])
    with running(with_keys, world) as kms:
        assert kms.rpc("KMS.GetMeta")[0] == 200
    file.write_bytes(file.read_bytes()[:23])
    assert ends(with_keys, world) == (2, f"Error: {REISSUE}: root-k256.key: 32 bytes expected, got 23")


def test_kms_does_not_start_without_its_agent(world: World, with_keys: Path) -> None:
    status, said = ends(with_keys, world, DSTACK_AGENT_ADDRESS=f"unix:{with_keys}/nobody.sock")
    assert status == 1
    assert said.startswith(recorded_exit("agent down, attest_rpc_cert default"))
    with running(
        with_keys,
        world,
        DSTACK_AGENT_ADDRESS=f"unix:{with_keys}/nobody.sock",
        **variables({"core.attest_rpc_cert": "false", "core.enforce_self_authorization": "false"}),
    ) as kms:
        assert kms.rpc("KMS.GetTempCaCert")[0] == 200


# ---- a clock that is too early


EARLY = r"the clock of this KMS is at 20[2-8]\d-\S+Z, before "


def test_refusal_at_a_time_before_the_documents_names_the_clock_in_the_log(with_keys: Path) -> None:
    with ExitStack() as exits:
        later = World.of(exits.enter_context(serving("agent", "--collateral-issued", "2090-01-01")))
        kms = exits.enter_context(running(with_keys, later))
        status, answer = kms.rpc("KMS.GetTempCaCert")
        assert (status, answer["error"].endswith(": TCBInfo issue date is in the future")) == (400, True), answer
        (line,) = (line for line in kms.log() if "refused" in line)
    assert re.search(rf'is in the future" hint="{EARLY}that date"$', line), line


def test_kms_whose_clock_is_before_its_root_says_so_at_its_start(world: World, with_keys: Path, tmp_path: Path) -> None:
    key, root = generate_private_key(SECP256R1()), tmp_path / "root.pem"
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "root of a time to come")])
    first = datetime(2090, 1, 1, tzinfo=UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, first, datetime(2099, 1, 1, tzinfo=UTC))
    certificate = made.add_extension(x509.BasicConstraints(True, None), critical=True).sign(key, SHA256())
    root.write_bytes(certificate.public_bytes(Encoding.PEM))
    with running(with_keys, world, **variables({"core.attestation.root_ca.tdx": str(root)})) as kms:
        log = "\n".join(kms.log())
    says = "the root under which it verifies, which is of 2090-01-01T00:00:00Z"
    assert re.search(rf'early clock reason="{EARLY}{says}"', log), log
    with running(with_keys, world) as kms:
        assert "early clock" not in "\n".join(kms.log())


def test_admin_listener_needs_a_credential(world: World, tmp_path: Path) -> None:
    said = recorded_exit("admin enabled without token")
    assert ends(tmp_path, world, **variables({"core.admin.enabled": "true"})) == (2, said)


# ---- calls at the same time


def test_concurrent_bootstraps_make_one_set_of_keys(world: World, tmp_path: Path) -> None:
    with running(tmp_path, world) as kms, ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(kms.rpc, "Onboard.Bootstrap", {"domain": f"kms{i}.example.test"}) for i in range(6)]
        answers = [call.result() for call in calls]
        (winner,) = (number for number, (status, _) in enumerate(answers) if status == 200)
        refused = [answer for number, answer in enumerate(answers) if number != winner]
        assert refused == [(400, {"error": "KMS has already been bootstrapped"})] * 5
        assert (kms.certs / "rpc-domain").read_text() == f"kms{winner}.example.test"
        assert json.loads((kms.certs / "bootstrap-info.json").read_text()) == answers[winner][1]
        assert kms.curl("/finish") == (200, "OK")
        assert kms.rpc("KMS.GetMeta")[1]["k256_pubkey"] == answers[winner][1]["k256_pubkey"]


def test_concurrent_onboardings_take_the_keys_once(source: Kms, world: World, tmp_path: Path) -> None:
    with running(tmp_path, world) as kms, ThreadPoolExecutor(4) as pool:
        arguments = [{"source_url": source.runtime_url, "domain": f"kms{i}.example.test"} for i in range(4)]
        answers = list(pool.map(lambda question: kms.rpc("Onboard.Onboard", question), arguments))
        (winner,) = (number for number, (status, _) in enumerate(answers) if status == 200)
        refused = [answer for number, answer in enumerate(answers) if number != winner]
        assert refused == [(400, {"error": "KMS has already been onboarded"})] * 3
        assert (kms.certs / "rpc-domain").read_text() == f"kms{winner}.example.test"
        assert kms.curl("/finish") == (200, "OK")
        assert kms.rpc("KMS.GetMeta")[1]["k256_pubkey"] == source.rpc("KMS.GetMeta")[1]["k256_pubkey"]


def test_concurrent_onboardings_and_bootstraps_make_one_set_of_keys(source: Kms, world: World, tmp_path: Path) -> None:
    with running(tmp_path, world) as kms, ThreadPoolExecutor(4) as pool:
        domain = {"domain": "kms.example.test"}
        asked = [("Onboard.Onboard", {"source_url": source.runtime_url, **domain}), ("Onboard.Bootstrap", domain)] * 2
        answers = [call.result() for call in [pool.submit(kms.rpc, *question) for question in asked]]
        (winner,) = (number for number, (status, _) in enumerate(answers) if status == 200)
        for number, ((method, _), answer) in enumerate(zip(asked, answers, strict=True)):
            if number != winner:
                done = "onboarded" if method == "Onboard.Onboard" else "bootstrapped"
                assert answer == (400, {"error": f"KMS has already been {done}"})
        assert kms.curl("/finish") == (200, "OK")
        assert kms.rpc("KMS.GetMeta")[1]["k256_pubkey"] == answers[winner][1]["k256_pubkey"]


# ---- a guest agent whose VM config cannot be read

UNREADABLE = "decode app info: Failed to decode os image hash: Failed to parse vm config: "


@contextmanager
def relayed(world: World, change: Callable[[str, Any], Any]) -> Iterator[World]:
    """The same world, with a relay before the agent: `change` gets path and answer, and returns another answer."""
    agent = world.agent.removeprefix("unix:")

    class Relay(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with socket.socket(socket.AF_UNIX) as upstream:
                upstream.connect(agent)
                length = f"Content-Length: {len(body)}"
                head = (f"POST {self.path} HTTP/1.1", "Host: x", "Connection: close", length, "", "")
                upstream.sendall("\r\n".join(head).encode() + body)
                answer = http.client.HTTPResponse(upstream)
                answer.begin()
                content = json.dumps(change(self.path, json.load(answer))).encode()
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Relay) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield replace(world, agent=f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()


def with_unreadable_info(path: str, answer: Any) -> Any:
    """Change the VM config that Info tells."""
    return {**answer, "vm_config": "{"} if path.startswith("/Info") else answer


def with_unreadable_evidence(path: str, answer: Any) -> Any:
    """Change the VM config in the evidence, which no quote covers."""
    if not path.startswith("/Attest"):
        return answer
    evidence = decode(bytes.fromhex(answer["attestation"]))
    return {"attestation": replace(evidence, config="{").encode().hex()}


def test_vm_config_of_the_agent_that_cannot_be_read_is_refused_by_attestation_info(
    world: World, tmp_path: Path
) -> None:
    with relayed(world, with_unreadable_info) as unreadable, running(tmp_path, unreadable) as kms:
        status, answer = kms.rpc("Onboard.GetAttestationInfo")
        assert (status, list(answer)) == (400, ["error"])
        assert answer["error"].startswith(f"Failed to decode app info: {UNREADABLE}")
        assert kms.rpc("Onboard.Bootstrap", {"domain": "kms.example.test"})[0] == 200, "by the config of the evidence"
    other = tmp_path / "other"
    other.mkdir()
    with relayed(world, lambda _path, answer: answer) as readable, running(other, readable) as kms:
        assert kms.rpc("Onboard.GetAttestationInfo")[0] == 200


def test_vm_config_in_the_kms_s_own_evidence_that_cannot_be_read_ends_its_self_check(
    world: World, with_keys: Path, tmp_path: Path
) -> None:
    with relayed(world, with_unreadable_evidence) as unreadable:
        fresh = tmp_path / "fresh"
        fresh.mkdir()
        with running(fresh, unreadable) as kms:
            assert kms.rpc("Onboard.GetAttestationInfo")[0] == 200, "by the config that Info tells"
            status, answer = kms.rpc("Onboard.Bootstrap", {"domain": "kms.example.test"})
            context = "KMS is not allowed to bootstrap: failed to build local KMS boot info: "
            assert (status, answer["error"].startswith(context + UNREADABLE)) == (400, True), answer
        with running(with_keys, unreadable) as kms:
            status, answer = kms.rpc("KMS.GetTempCaCert")
            context = "KMS self authorization failed: Failed to load cached self boot info: "
            assert (status, answer["error"].startswith(context + UNREADABLE)) == (400, True), answer
            assert kms.rpc("KMS.GetMeta")[0] == 200
    with running(with_keys, world) as kms:
        assert kms.rpc("KMS.GetTempCaCert")[0] == 200
