"""Trust domains of both releases at one stack: several KMS, the encrypted environment, and what ends a boot early.

The environment is encrypted by the published SDK; a quote is read by the tutorial's rule, without code of this project.
"""

import hashlib
import json
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import load_pem_x509_certificate
from dstack_sdk import EnvVar, encrypt_env_vars_sync

from dstack_emu.testing import LiveKms, LiveStack, LiveTrustDomain, refused
from tests.commands import ask, run_command, serving, usage_error
from tests.ports import refusing_port

VERSION = "0.6.0"
MANIFEST: dict[str, Any] = {
    "manifest_version": 2,
    "name": "app",
    "runner": "docker-compose",
    "kms_enabled": True,
    "allowed_envs": ["TOKEN", "GREETING"],
}
RELEASES = ("0.5", "0.6")


@pytest.fixture(scope="module")
def running() -> Iterator[LiveStack]:
    with LiveStack(release="0.6") as stack:
        yield stack


@pytest.fixture
def stack(running: LiveStack) -> Iterator[LiveStack]:
    with running.put_back():
        yield running


def app(stack: LiveStack, release: str, compose: dict[str, Any] | None = None, **spec: Any) -> LiveTrustDomain:
    """A trust domain that both policies allow."""
    guest = stack.app(release=release, compose=MANIFEST if compose is None else compose, **spec)
    for side in ("src", "dst"):
        stack.policy(side).allow(guest)
    return guest


@contextmanager
def denied(stack: LiveStack, *sides: str) -> Iterator[None]:
    """Empty the apps of policies."""
    before = {side: stack.policy(side).content for side in sides}
    for side, policy in before.items():
        stack.policy(side).set({**policy, "apps": {}})
    yield
    for side, policy in before.items():
        stack.policy(side).set(policy)


def issuer_of(stack: LiveStack, guest: LiveTrustDomain) -> set[str]:
    """The KMS that sign its certificate."""
    stack.journal.start()
    guest.rpc("GetTlsKey", subject="app")
    return {call["service"] for call in stack.journal.find("*SignCert")}


# ---- several KMS


@pytest.mark.parametrize("release", RELEASES)
def test_second_kms_gives_what_the_first_refuses_and_issues_the_certificates(stack: LiveStack, release: str) -> None:
    guest = app(stack, release)
    with denied(stack, "src"):
        assert guest.boot(["src", "dst"]).has_keys
        assert issuer_of(stack, guest) == {"kms-dst"}
    assert issuer_of(stack, guest.boot(["src", "dst"])) == {"kms-src"}


@pytest.mark.parametrize("release", RELEASES)
def test_error_of_several_kms_has_every_answer_in_0_6_and_the_first_in_0_5(stack: LiveStack, release: str) -> None:
    guest = app(stack, release)
    urls = [f"{stack.kms(side).url}/prpc" for side in ("src", "dst")]
    answer = (
        "Failed to get app key: Request failed with status=400 Bad Request, "
        'error={\n  "error": "App not allowed: Boot denied: app not registered"\n}'
    )
    with denied(stack, "src", "dst"), refused() as refusal:
        guest.boot(["src", "dst"])
    every = f"Failed to request app keys: failed to get app keys from KMS: {urls[0]}: {answer}; {urls[1]}: {answer}"
    text = every if release == "0.6" else f"Failed to request app keys: Failed to get app keys from KMS: {answer}"
    assert refusal.text == f"{text} (app id {guest.app_id}, compose hash {guest.compose_hash})"
    assert not guest.has_keys
    assert guest.boot(["src", "dst"]).has_keys


def test_kms_without_keys_is_passed_over_and_alone_is_an_error(stack: LiveStack) -> None:
    guest = app(stack, "0.6")
    stack.kms("empty", webhook="src")
    assert guest.boot(["empty", "src"]).has_keys
    with pytest.raises(Exception, match="kms-empty has no keys: it is in its onboard phase, onboard it first"):
        guest.boot("empty")


@pytest.mark.parametrize("release", RELEASES)
def test_boot_command_tries_each_kms_in_order(stack: LiveStack, release: str) -> None:
    options = ("--release", release, "--image-version", VERSION)
    kms = stack.kms().url
    with refusing_port() as port:
        absent = f"https://127.0.0.1:{port}"
        with serving("boot", "--kms", absent, "--kms", kms, *options) as guest:
            assert guest["kms_url"] == kms
            assert ask(guest["dstack_sock"], "/GetTlsKey", {"subject": "app"})[0] == 200
        both = run_command("boot", "--kms", absent, "--kms", f"{absent}/", "--json", *options)
    answer = (
        "Failed to get temp ca cert: Failed to send request: error sending request for url "
        f"({absent}/prpc/GetTempCaCert?json): Connection refused"
    )
    every = (
        f"Failed to request app keys: failed to get app keys from KMS: {absent}/prpc: {answer}; {absent}/prpc: {answer}"
    )
    said = every if release == "0.6" else f"Failed to request app keys: Failed to get app keys from KMS: {answer}"
    assert (both.returncode, both.stderr.decode().splitlines()[1:]) == (1, [f"Error: {said}"])


# ---- the encrypted environment


def encrypted(kms: LiveKms, guest: LiveTrustDomain, *variables: tuple[str, str]) -> str:
    """Encrypt variables for an app as its deployer does: with the published SDK, for the key that the KMS names."""
    public_key = kms.rpc("GetAppEnvEncryptPubKey", app_id=guest.app_id)["public_key"]
    return encrypt_env_vars_sync([EnvVar(*variable) for variable in variables], public_key)


VARIABLES = (("GREETING", 'say "hi"'), ("SECRET", "not allowed"), ("TOKEN", "abc"))


@pytest.mark.parametrize("release", RELEASES)
def test_environment_of_the_sdk_is_decrypted_and_filtered(stack: LiveStack, release: str) -> None:
    plain = app(stack, release)
    guest = app(stack, release, encrypted_env=encrypted(stack.kms(), plain, *VARIABLES), instance="with env")
    assert guest.info["decrypted_env"] is None, "it has no keys yet"
    path = Path(guest.boot().info["decrypted_env"])
    assert path.read_text() == 'GREETING="say \\"hi\\""\nTOKEN=abc\n'
    document = path.with_name(".decrypted-env.json")
    assert json.loads(document.read_text()) == {"GREETING": 'say "hi"', "TOKEN": "abc"}
    assert {stat.S_IMODE(each.stat().st_mode) for each in (path, document)} == {0o600}
    guest.remove()
    assert not path.exists()
    assert not document.exists()
    assert plain.boot().info["decrypted_env"] is None


@pytest.mark.parametrize("release", RELEASES)
def test_environment_that_cannot_be_used_ends_the_boot(stack: LiveStack, release: str) -> None:
    plain = app(stack, release)
    sealed = encrypted(stack.kms(), plain, *VARIABLES)
    broken = sealed[:-2] + ("00" if sealed[-2:] != "00" else "01")
    for index, (env, words) in enumerate(
        (
            (broken, "Failed to decrypt env file: Decryption failed: aead::Error"),
            ("00" * 31, "Failed to decrypt env file: Invalid ephemeral public key length"),
            (
                encrypted(stack.kms(), plain, ("TOKEN", "x" * 131_073)),
                "Environment variable value too long for key: TOKEN",
            ),
        )
    ):
        guest = app(stack, release, encrypted_env=env, instance=str(index))
        events = guest.rpc("GetQuote", report_data="")["event_log"]
        with refused() as refusal:
            guest.boot()
        assert (refusal.text, guest.has_keys) == (words, False)
        assert guest.rpc("GetQuote", report_data="")["event_log"] == events
    assert app(stack, release, encrypted_env=sealed, instance="good").boot().has_keys


def test_environment_follows_a_snapshot(stack: LiveStack) -> None:
    plain = app(stack, "0.6")
    guest = app(stack, "0.6", encrypted_env=encrypted(stack.kms(), plain, *VARIABLES), instance="with env")
    stack.snapshot("before")
    path = Path(guest.boot().info["decrypted_env"])
    text = path.read_text()
    stack.snapshot("after")
    stack.revert("before")
    assert (guest.info["decrypted_env"], path.exists()) == (None, False)
    stack.revert("after")
    assert (guest.info["decrypted_env"], path.read_text()) == (str(path), text)


@pytest.mark.parametrize("release", RELEASES)
def test_boot_command_decrypts_a_file_in_either_form(stack: LiveStack, release: str, tmp_path: Path) -> None:
    guest = app(stack, release)
    sealed = encrypted(stack.kms(), guest, *VARIABLES)
    compose, raw, text = tmp_path / "app-compose.json", tmp_path / "encrypted-env", tmp_path / "encrypted-env.hex"
    compose.write_text(json.dumps(MANIFEST))
    raw.write_bytes(bytes.fromhex(sealed))
    text.write_text(f"{sealed}\n")
    options = ("--release", release, "--image-version", VERSION, "--app-compose", str(compose))
    for file in (raw, text):
        with serving("boot", "--kms", stack.kms().url, "--encrypted-env", str(file), *options) as booted:
            assert Path(booted["decrypted_env"]).read_text() == 'GREETING="say \\"hi\\""\nTOKEN=abc\n'
    raw.write_bytes(b"\1" * 200)
    done = run_command("boot", "--kms", stack.kms().url, "--encrypted-env", str(raw), "--json", *options)
    assert (done.returncode, done.stdout) == (1, b"")
    compose_hash = hashlib.sha256(compose.read_bytes()).hexdigest()
    assert done.stderr.decode().splitlines() == [
        f"requesting keys for app id {compose_hash[:40]}, compose hash {compose_hash}",
        "Error: Failed to decrypt env file: Decryption failed: aead::Error",
    ]
    raw.write_bytes(b"\1" * (256 * 1024 + 1))
    words = f"{raw}: encrypted environment: at most 262144 bytes expected, got 262145"
    assert usage_error("boot", "--kms", stack.kms().url, "--encrypted-env", str(raw), *options) == words


def test_environment_without_a_key_ends_the_boot_in_0_6_and_is_none_in_0_5(tmp_path: Path) -> None:
    sealed = tmp_path / "encrypted-env"
    sealed.write_bytes(b"\1" * 200)
    with serving("agent", "--release", "0.5", "--encrypted-env", str(sealed)) as agent:
        assert Path(agent["decrypted_env"]).read_text() == ""
    done = run_command("agent", "--release", "0.6", "--encrypted-env", str(sealed), "--json")
    words = "Error: encrypted env is present but the key provider gave no valid env crypt key\n"
    assert (done.returncode, done.stderr.decode()) == (1, words)
    with serving("agent", "--release", "0.6") as agent:
        assert agent["app_id"]


# ---- who an app is bound to


def accepts(quote: bytes, app_compose: str) -> bool:
    """Verify, by the tutorial's rule, that a quote is of the app with this app-compose.json.

    A quote of version 4 has a header of 48 bytes; mr_config_id is at 184 of the report: `01` and the compose hash.
    """
    version, tee_type = struct.unpack_from("<H2xI", quote)
    bound = quote[48 + 184 : 48 + 184 + 48]
    digest = hashlib.sha256(app_compose.encode()).digest()
    return (version, tee_type) == (4, 0x81) and bound == b"\x01" + digest + bytes(15)


@pytest.mark.parametrize("release", RELEASES)
def test_quote_of_a_default_app_names_its_compose_hash(stack: LiveStack, release: str) -> None:
    guest = stack.app(release=release, name="default")
    stack.policy().allow(guest)
    guest.boot()
    compose = json.loads(guest.rpc("Info")["tcb_info"])["app_compose"]
    quote = bytes.fromhex(guest.rpc("GetQuote", report_data="")["quote"])
    assert accepts(quote, compose)
    assert not accepts(quote, compose.replace("default", "another"))
    other = app(stack, release, mr_config_id="00" * 48)
    assert not accepts(bytes.fromhex(other.boot().rpc("GetQuote", report_data="")["quote"]), json.dumps(MANIFEST))


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(
    ("bound", "words"),
    [
        ("01" + "22" * 32 + "00" * 15, "Invalid mr_config_id"),
        ("02" + "22" * 32 + "00" * 15, "Invalid mr_config_id"),
        ("04" + "22" * 32 + "00" * 15, "Invalid mr_config_id version"),
    ],
)
def test_mr_config_id_that_does_not_fit_ends_the_boot(stack: LiveStack, release: str, bound: str, words: str) -> None:
    guest = app(stack, release, mr_config_id=bound)
    with refused() as refusal:
        guest.boot()
    assert (refusal.text, guest.has_keys) == (f"Failed to verify app: {words}", False)
    fitting = f"01{guest.compose_hash}{'00' * 15}"
    assert app(stack, release, mr_config_id=fitting, instance="fitting").boot().has_keys


@pytest.mark.parametrize("release", RELEASES)
def test_app_that_pins_another_kms_does_not_boot(stack: LiveStack, release: str) -> None:
    root = load_pem_x509_certificate(stack.kms().root_ca.read_bytes()).public_key()
    own = root.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo).hex()
    other = own[:-2] + ("00" if own[-2:] != "00" else "01")
    assert app(stack, release, {**MANIFEST, "key_provider_id": own}).boot().has_keys
    for bound in (None, "00" * 48):
        guest = app(stack, release, {**MANIFEST, "key_provider_id": other}, mr_config_id=bound)
        with refused() as refusal:
            guest.boot()
        # What the host bound the guest to names the other KMS, too, and is verified first.
        of_host = "Invalid mr_config key_provider_id" if release == "0.6" else "Invalid mr_config_id"
        pinned = f"Unexpected key provider id: {own}, expected: {other}"
        assert refusal.text == f"Failed to verify app: {of_host if bound is None else pinned}"


def test_what_an_app_keeps_private_is_hidden_outside_in_both_versions(stack: LiveStack) -> None:
    guest = app(stack, "0.6", {**MANIFEST, "public_tcbinfo": False}).boot()
    outside = {version: ask(guest.url, f"/prpc/{version}/Info", {})[1] for version in ("v0", "v1")}
    hidden = {version: [name for name, value in answer.items() if value == ""] for version, answer in outside.items()}
    cloud = ["cloud_vendor", "cloud_product"]
    assert hidden == {
        "v0": ["tcb_info", "vm_config", *cloud],
        "v1": ["app_compose", "vm_config", "key_provider_info", *cloud],
    }
    inside = ask(guest.url, "/v1/Info", {})[1]
    assert [name for name, value in inside.items() if value == ""] == cloud


@pytest.mark.parametrize("release", RELEASES)
def test_unknown_file_system_ends_the_boot(stack: LiveStack, release: str) -> None:
    guest = app(stack, release, {**MANIFEST, "storage_fs": "btrfs"})
    with refused() as refusal:
        guest.boot()
    words = "Failed to parse kernel cmdline: Failed to parse storage_fs: Invalid filesystem type: btrfs, "
    assert (refusal.text, guest.has_keys) == (f"{words}supported types: zfs, ext4", False)
    assert app(stack, release, {**MANIFEST, "storage_fs": "EXT4"}).boot().has_keys


def test_scripts_and_a_log_of_version_2_are_measured_and_admitted(stack: LiveStack) -> None:
    scripts = ["echo one", "echo two"]
    compose = {**MANIFEST, "manifest_version": "3", "init_script": scripts, "event_log_version": 2}
    guest = app(stack, "0.6", compose).boot()
    answer = guest.rpc("GetQuote", report_data="")
    log = [event for event in json.loads(answer["event_log"]) if event["imr"] == 3]
    hashes = [hashlib.sha256(script.encode()).hexdigest() for script in scripts]
    assert [event["event_payload"] for event in log if event["event"] == "init-script-hash"] == hashes
    rtmr3 = bytes(48)
    for event in log:
        line = {"name": event["event"], "payload": event["event_payload"], "type": 0x08000001}
        digest = hashlib.sha384(json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode()).digest()
        assert (event["version"], event["digest"]) == (2, digest.hex())
        rtmr3 = hashlib.sha384(rtmr3 + digest).digest()
    assert bytes.fromhex(answer["quote"])[376 + 144 : 424 + 144] == rtmr3
    assert guest.rpc("Attest", report_data="")["attestation"].startswith("83a776657273696f6e01"), "msgpack, version 1"


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("provider", ["none", "local"])
def test_app_that_names_another_key_provider_gets_no_keys_from_a_kms(
    stack: LiveStack, release: str, provider: str
) -> None:
    guest = app(stack, release, {**MANIFEST, "key_provider": provider})
    with refused() as refusal:
        guest.boot()
    words = f"app-compose: key_provider: kms expected, or none at all, got {provider}, whose guest needs no KMS"
    assert (refusal.text, guest.has_keys) == (words, False)
    assert app(stack, release, {**MANIFEST, "key_provider": "kms"}).boot().has_keys
