"""An app that boots through a KMS, as a command of its own: its keys, certificates and events, and the ways to fail."""

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from dstack_emu.attest.release import DEFAULT
from dstack_emu.cli.main import parser
from tests import foreign
from tests.commands import ask, run_command, serving, usage_error
from tests.foreign import Guest
from tests.kms_files import copy_keys, write_kms_toml
from tests.ports import free_port, refusing_port
from tests.processes import Command, start
from tests.running import RunningStack, running_kms
from tests.test_foreign_client import RootKeys, hkdf

FAILED = "Failed to request app keys: Failed to get app keys from KMS: "
REFUSED = "Failed to get app key: Request failed with status=400 Bad Request, error="


def failed(url: str) -> str:
    """How the error of a guest of the default release begins if this one KMS gives it no keys."""
    return (
        f"Failed to request app keys: failed to get app keys from KMS: {url}/prpc: "
        if DEFAULT.reports_every_kms
        else FAILED
    )


@pytest.fixture(scope="module")
def booted(ready_stack: RunningStack) -> Iterator[dict[str, Any]]:
    """The app of the stack, booted once more and by itself."""
    with serving("boot", "--kms", ready_stack.services["kms-src"]) as description:
        yield description


def events(agent: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and payload of each runtime event, from GetQuote."""
    log = json.loads(ask(agent["dstack_sock"], "/GetQuote", {"report_data": ""})[1]["event_log"])
    return [(event["event"], event["event_payload"]) for event in log if event["imr"] == 3]


def openssl(*arguments: str) -> str:
    """Run openssl; return what it says."""
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=20, check=False)
    return done.stdout + done.stderr


# ---- keys


def test_booted_app_has_the_keys_that_anyone_with_the_roots_can_compute(
    ready_stack: RunningStack, booted: dict[str, Any]
) -> None:
    app = ready_stack.description["app"]
    assert {name: booted[name] for name in ("app_id", "compose_hash")} == {
        name: app[name] for name in ("app_id", "compose_hash")
    }
    roots = RootKeys(Path(ready_stack.description["kms_ca"]).parent)
    app_key = hkdf(roots.k256, bytes.fromhex(app["app_id"]), b"app-key")
    question = {"path": "wallet", "purpose": "test"}
    answer = ask(booted["dstack_sock"], "/GetKey", question)
    assert answer == ask(ready_stack.services["app"], "/GetKey", question)
    assert answer[1]["key"] == hkdf(app_key, b"wallet").hex()


def test_description_names_the_kms(ready_stack: RunningStack, booted: dict[str, Any]) -> None:
    kms_ca = Path(ready_stack.description["kms_ca"]).read_text()
    assert (booted["kms_url"], booted["gateway_app_id"]) == (ready_stack.services["kms-src"], "any")
    assert Path(booted["kms_ca"]).read_text() == kms_ca
    root = x509.load_pem_x509_certificate(kms_ca.encode()).public_key()
    spki = root.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    info = ask(booted["dstack_sock"], "/Info", {})[1]
    assert json.loads(info["key_provider_info"]) == {"name": "kms", "id": spki.hex()}


def test_another_instance_has_another_disk_key_and_the_same_env_key(
    ready_stack: RunningStack, booted: dict[str, Any]
) -> None:
    kms = [ready_stack.services[f"kms-{side}"] for side in ("src", "dst")]
    roots = RootKeys(Path(ready_stack.description["kms_ca"]).parent)
    with serving("boot", "--kms", kms[1], "--instance", "two", "--platform", "another host") as second:
        assert second["app_id"] == booted["app_id"]
        assert second["instance_id"] != booted["instance_id"]
        assert second["device_id"] != booted["device_id"]
        released = []
        for agent in (booted, second):
            guest = Guest.of(kms[0], agent["dstack_sock"])
            answers = [each.get_app_key().value for each in (guest, guest.at(kms[1]))]
            expected = roots.app_keys(bytes.fromhex(agent["app_id"]), bytes.fromhex(agent["instance_id"]))
            assert [{name: answer[name] for name in expected} for answer in answers] == [expected, expected]
            released.append(expected)
    assert released[0]["disk_crypt_key"] != released[1]["disk_crypt_key"]
    assert released[0]["env_crypt_key"] == released[1]["env_crypt_key"]
    assert released[0]["k256_key"] == released[1]["k256_key"]


# ---- events

BOOT = ["system-preparing", "app-id", "compose-hash", "instance-id", "boot-mr-done"]
AFTER = ["os-image-hash", "key-provider", "storage-fs", "system-ready"]


OF_0_5 = ("--release", "0.5", "--image-version", "0.6.0")
"""A guest of 0.5 with the image that the policy has."""


def test_events_record_the_gpu_policy_and_where_the_keys_came_from(booted: dict[str, Any]) -> None:
    measured = events(booted)
    assert [name for name, _ in measured] == [*BOOT[:3], "gpu-policy-hash", *BOOT[3:], *AFTER]
    assert dict(measured)["gpu-policy-hash"] == hashlib.sha256(b"{}").hexdigest()
    assert dict(measured)["os-image-hash"] == booted["os_image_hash"]


def test_release_0_5_measures_the_kms_and_no_gpu_policy(
    ready_stack: RunningStack, booted: dict[str, Any], tmp_path: Path
) -> None:
    with serving("boot", "--kms", ready_stack.services["kms-src"], *OF_0_5) as old:
        measured = events(old)
        assert [name for name, _ in measured] == [*BOOT, "mr-kms", *AFTER]
        assert dict(measured)["os-image-hash"] == old["os_image_hash"] == booted["os_image_hash"]
        assert dict(measured)["mr-kms"] == ready_stack.description["kms"]["src"]["mr_aggregated"]
        assert old["mr_aggregated"] != booted["mr_aggregated"]
        assert ask(old["dstack_sock"], "/GetTlsKey", {"subject": "old"})[0] == 200
    # Where the KMS's certificate says nothing of what it measures, there is nothing to record.
    copy_keys(tmp_path, ready_stack)
    silent = write_kms_toml(tmp_path, ready_stack, webhook=ready_stack.services["auth-src"], attests=False)
    with (
        running_kms(silent, ready_stack.services["agent-src"]) as url,
        serving("boot", "--kms", url, *OF_0_5) as unaware,
    ):
        assert [name for name, _ in events(unaware)] == BOOT + AFTER


# ---- certificates


def chain_files(folder: Path, chain: list[str]) -> tuple[str, str, str]:
    """Write a chain of three, one file each."""
    paths = [folder / f"{number}.pem" for number in range(3)]
    for path, text in zip(paths, chain, strict=True):
        path.write_text(text)
    leaf, app_ca, root = map(str, paths)
    return leaf, app_ca, root


def test_certificates_pass_openssl_under_the_kms_root(
    ready_stack: RunningStack, booted: dict[str, Any], tmp_path: Path
) -> None:
    request = {
        "subject": "app.example.test",
        "alt_names": ["app.example.test", "10.0.0.1"],
        "usage_server_auth": True,
        "usage_client_auth": False,
        "usage_ra_tls": True,
    }
    answer = ask(booted["dstack_sock"], "/GetTlsKey", request)[1]
    leaf, app_ca, root = chain_files(tmp_path, answer["certificate_chain"])
    assert answer["certificate_chain"][2] == Path(booted["kms_ca"]).read_text()
    trusted = ("verify", "-CAfile", booted["kms_ca"])
    as_server = ("-purpose", "sslserver", "-untrusted", app_ca)
    assert openssl(*trusted, *as_server, "-verify_hostname", "app.example.test", leaf) == f"{leaf}: OK\n"
    assert openssl(*trusted, *as_server, "-verify_ip", "10.0.0.1", leaf) == f"{leaf}: OK\n"
    assert openssl(*trusted, app_ca) == f"{app_ca}: OK\n"
    assert openssl(*trusted, root) == f"{root}: OK\n"
    assert "error 26" in openssl(*trusted, "-purpose", "sslclient", "-untrusted", app_ca, leaf)
    assert "error 20" in openssl(*trusted, leaf), "not without the app CA between"
    certs = Path(ready_stack.description["kms_ca"]).parent
    rpc, temp_ca = str(certs / "rpc.crt"), str(certs / "tmp-ca.crt")
    assert openssl(*trusted, "-purpose", "sslserver", "-verify_ip", "127.0.0.1", rpc) == f"{rpc}: OK\n"
    assert openssl("verify", "-CAfile", temp_ca, temp_ca) == f"{temp_ca}: OK\n"
    # What a guest shows the KMS.
    identity = Guest.of(booted["kms_url"], booted["dstack_sock"]).identity().certificate
    shown = tmp_path / "client.pem"
    shown.write_bytes(identity.public_bytes(Encoding.PEM))
    assert openssl("verify", "-CAfile", temp_ca, "-purpose", "sslclient", str(shown)) == f"{shown}: OK\n"


def emptied(section: str) -> Callable[[dict[str, Any]], object]:
    """An edit of a policy."""
    return lambda policy: policy[section].clear()


def test_certificate_is_refused_in_the_kms_s_words_while_the_policy_denies(
    ready_stack: RunningStack, booted: dict[str, Any]
) -> None:
    refusals = {
        "apps": "Boot denied: app not registered",
        "kms": "KMS self authorization failed: KMS is not allowed: aggregated MR not allowed",
    }
    for section, said in refusals.items():
        with ready_stack.policy_changed("src", emptied(section)):
            status, answer = ask(booted["dstack_sock"], "/GetTlsKey", {"subject": "app"})
            assert (status, said in answer["error"]) == (400, True)
            assert answer["error"].startswith("Failed to sign the CSR: Request failed with status=400 Bad Request, ")
        assert ask(booted["dstack_sock"], "/GetTlsKey", {"subject": "app"})[0] == 200


# ---- keys of a file


def test_key_file_with_keys_of_a_kms_gets_its_certificates_there(
    ready_stack: RunningStack, booted: dict[str, Any], tmp_path: Path
) -> None:
    guest = Guest.of(ready_stack.services["kms-src"], booted["dstack_sock"])
    keys = guest.get_app_key().value
    with foreign.kms(guest.kms_url) as connection:
        temp = connection.call("GetTempCaCert").value
    provider = {
        "url": f"{guest.kms_url}/prpc",
        "pubkey": json.loads(ask(booted["dstack_sock"], "/Info", {})[1]["key_provider_info"])["id"],
        "tmp_ca_key": temp["temp_ca_key"],
        "tmp_ca_cert": temp["temp_ca_cert"],
    }
    names = ("ca_cert", "disk_crypt_key", "env_crypt_key", "k256_key", "k256_signature", "gateway_app_id")
    document = {**{name: keys[name] for name in names}, "key_provider": {"Kms": provider}}
    path = tmp_path / "appkeys.json"
    path.write_text(json.dumps(document))
    with serving("agent", "--keys", str(path)) as agent:
        same = ("app_id", "instance_id", "kms_url", "gateway_app_id")
        assert {name: agent[name] for name in same} == {name: booted[name] for name in same}
        # The file does not say what the KMS measures.
        assert events(agent) == [event for event in events(booted) if event[0] != "mr-kms"]
        question = {"path": "wallet"}
        assert ask(agent["dstack_sock"], "/GetKey", question) == ask(booted["dstack_sock"], "/GetKey", question)
        chain = ask(agent["dstack_sock"], "/GetTlsKey", {"subject": "app"})[1]["certificate_chain"]
        assert chain[2] == Path(agent["kms_ca"]).read_text() == guest.root_ca
        with ready_stack.policy_changed("src", lambda policy: policy["apps"].clear()):
            refusal = ask(agent["dstack_sock"], "/GetTlsKey", {"subject": "app"})[1]["error"]
            assert "Boot denied: app not registered" in refusal
    with refusing_port() as port:
        provider["url"] = f"https://127.0.0.1:{port}/prpc"
        path.write_text(json.dumps(document))
        done = run_command("agent", "--keys", str(path), "--json")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == (
        "Error: Failed to sign the CSR: Failed to send request: error sending request for url "
        f"({provider['url']}/SignCert?json): Connection refused\n"
    )
    provider["url"] = "127.0.0.1:9301"
    path.write_text(json.dumps(document))
    said = f"{path}: key_provider.Kms.url: https://host:port/prpc expected, got '127.0.0.1:9301'"
    assert usage_error("agent", "--keys", str(path)) == said


# ---- refusals


REQUESTING = re.compile("requesting keys for app id [0-9a-f]{40}, compose hash [0-9a-f]{64}")
"""The first line of `boot`."""


def refusal(*arguments: str) -> str:
    """Boot where it must fail: status 1, whose keys it requests, and one line, which is returned without `Error: `."""
    done = run_command("boot", *arguments, "--json")
    requesting, *lines = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (1, b"", 1), done
    assert REQUESTING.fullmatch(requesting)
    return lines[0].removeprefix("Error: ")


def said(url: str, text: str) -> str:
    """A refusal of a KMS as it stands in the line."""
    return f'{failed(url)}{REFUSED}{{ "error": "{text}" }}'


def test_refusal_is_in_the_kms_s_words(ready_stack: RunningStack) -> None:
    url = ready_stack.services["kms-src"]
    kms = ("--kms", url)
    unknown = "App not allowed: Boot denied: app not registered"
    assert refusal(*kms, "--app-id", "11" * 20) == said(url, unknown)
    assert refusal(*kms, "--debug") == said(url, "invalid quote: failed to verify TDX quote: Debug mode is enabled")
    with ready_stack.policy_changed("src", lambda policy: policy["kms"].clear()):
        denied = "KMS self authorization failed: KMS is not allowed: aggregated MR not allowed"
        asked = failed(url) + "Failed to get temp ca cert: Request failed with status=400 Bad Request, error="
        assert refusal(*kms) == f'{asked}{{ "error": "{denied}" }}'


def test_guest_of_another_seed_is_told_so(ready_stack: RunningStack) -> None:
    kms, pccs = ready_stack.services["kms-src"], ready_stack.services["pccs"]
    hint = " (the guest is of the seed 'other': guest, KMS and PCCS must have the same seed; set it by --seed)"
    with_own = refusal("--kms", kms, "--seed", "other")
    assert f"failed to validate the server attestation of {kms}/prpc: failed to verify the attestation" in with_own
    assert ": HTTP 404" in with_own
    assert with_own.endswith(hint)
    with_the_stacks = refusal("--kms", kms, "--seed", "other", "--pccs", pccs)
    assert with_the_stacks.endswith(f"Failed to parse root CA CRL: InvalidCrlSignatureForPublicKey{hint}")
    with serving("boot", "--kms", kms, "--pccs", pccs) as agent:
        assert agent["app_id"] == ready_stack.description["app"]["app_id"]


def test_guest_whose_image_is_not_allowed_is_told_of_the_release_beside_the_words_of_the_kms(
    ready_stack: RunningStack,
) -> None:
    url = ready_stack.services["kms-src"]
    hint = (
        " (the guest is of the release 0.5, with an OS image of version 0.5.11: the policy may be for that of another "
        "release; set it by --release)"
    )
    denied = f'{REFUSED}{{ "error": "App not allowed: Boot denied: OS image is not allowed" }}'
    assert refusal("--kms", url, "--release", "0.5").endswith(denied + hint)


def test_server_that_is_no_kms_is_refused(ready_stack: RunningStack) -> None:
    unreachable = "Failed to get temp ca cert: Failed to send request: error sending request for url "
    with refusing_port() as port:
        url = f"https://127.0.0.1:{port}"
        assert refusal("--kms", url) == f"{failed(url)}{unreachable}({url}/prpc/GetTempCaCert?json): Connection refused"
    plain = ready_stack.services["pccs"].replace("http:", "https:")
    assert refusal("--kms", plain).startswith(f"{failed(plain)}{unreachable}({plain}/prpc/GetTempCaCert?json): TLS: ")


@pytest.mark.parametrize("wrong", ["http://127.0.0.1:1", "https://127.0.0.1:1/prpc", "https://", "https://h:x", "h:1"])
def test_kms_url_that_is_none_is_wrong_use(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser(("boot",)).parse_args(["boot", "--kms", wrong])
    assert ended.value.code == 2
    assert f"--kms: https://host:port expected, without a path, got {wrong!r}" in capsys.readouterr().err


# ---- waiting


@contextmanager
def waiting(url: str) -> Iterator[tuple[Command, IO[str]]]:
    """Boot through a KMS that is not there yet; yield it and its stderr once it has said that it waits."""
    reading, writing = os.pipe()
    with open(reading) as said:
        with open(writing, "w") as errors:
            process = start("boot", "--kms", url, "--wait", "40", "--json", stderr=errors)
        try:
            assert REQUESTING.fullmatch(said.readline().strip())
            assert said.readline().startswith(f"waiting up to 40 s for {url}: {failed(url)}")
            yield process, said
        finally:
            process.end()


def test_boot_waits_for_a_kms_that_is_not_there_yet(ready_stack: RunningStack, tmp_path: Path) -> None:
    port = free_port()
    copy_keys(tmp_path, ready_stack)
    config = write_kms_toml(tmp_path, ready_stack, webhook=ready_stack.services["auth-src"], port=port)
    with waiting(f"https://127.0.0.1:{port}") as (process, _), running_kms(config, ready_stack.services["agent-src"]):
        assert json.loads(process.stdout.readline())["kms_url"] == f"https://127.0.0.1:{port}"


def test_boot_that_waits_can_be_stopped() -> None:
    with refusing_port() as port, waiting(f"https://127.0.0.1:{port}") as (process, said):
        assert (process.end(), said.read()) == ("", "")
    assert process.returncode == 0
