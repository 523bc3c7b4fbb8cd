"""The stack's own app with files of the user's own: its identity, its environment, wrong files, and a later run."""

import hashlib
import json
import logging
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dstack_emu import Stack, StackConfig, StackError
from dstack_emu.attest.encrypted_env import seal
from dstack_emu.control.schemas import ControlError
from tests.commands import run_command, usage_error
from tests.own_stack import PATIENCE, own_stack

MANIFEST: dict[str, Any] = {
    "manifest_version": 2,
    "name": "wallet",
    "runner": "docker-compose",
    "docker_compose_file": "services: {}\n",
    "allowed_envs": ["TOKEN", "GREETING"],
}
ENVIRONMENT = '# secrets\r\n TOKEN = a=b "c" \nGREETING=first\nGREETING=hello\n\nOTHER=secret\n'
ALLOWED = {"GREETING": "hello", "TOKEN": 'a=b "c"'}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """An app-compose with line ends that must be kept, and an environment."""
    compose, environment = tmp_path / "app-compose.json", tmp_path / "app.env"
    compose.write_bytes(json.dumps(MANIFEST, indent=1).replace("\n", "\r\n").encode())
    environment.write_text(ENVIRONMENT, newline="")
    return {"app_compose": compose, "env_file": environment}


def of(path: Path, **changes: Any) -> Path:
    """Write a changed app-compose beside a file."""
    changed = path.with_name("changed.json")
    changed.write_text(json.dumps({**MANIFEST, **changes}))
    return changed


def environment_of(stack: Stack) -> dict[str, str]:
    found: dict[str, str] = json.loads((stack.state / "app" / ".decrypted-env.json").read_text())
    return found


async def test_bytes_of_the_file_are_the_identity_and_the_policies_allow_it(
    files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    compose_hash = hashlib.sha256(files["app_compose"].read_bytes()).hexdigest()
    async with own_stack(**files) as stack:
        app = stack.description()["app"]
        assert (app["compose_hash"], app["app_id"]) == (compose_hash, compose_hash[:40])
        for path in stack.policies.values():
            assert json.loads(path.read_text())["apps"][f"0x{app['app_id']}"]["composeHashes"] == [f"0x{compose_hash}"]
        assert environment_of(stack) == ALLOWED == stack.app.environment
        assert app["decrypted_env"] == str(stack.app.decrypted_env)
        assert (stack.state / "app" / ".decrypted-env").read_text() == 'GREETING=hello\nTOKEN="a=b \\"c\\""\n'
        dropped = "allowed_envs of the app-compose does not name 'OTHER': the app's guest drops what it does not name"
        assert dropped in caplog.messages
        assert not any("secret" in record.getMessage() for record in caplog.records)


def test_what_is_sealed_opens_with_the_secret_key_alone() -> None:
    secret = X25519PrivateKey.from_private_bytes(bytes(range(32)))
    sealed = seal(b"text", secret.public_key().public_bytes_raw(), bytes(range(44)))
    shared = secret.exchange(X25519PublicKey.from_public_bytes(sealed[:32]))
    assert AESGCM(shared).decrypt(sealed[32:44], sealed[44:], None) == b"text"


async def test_environment_of_a_stack_without_keys_is_encrypted_at_the_first_boot(files: dict[str, Path]) -> None:
    paths = {name: str(path) for name, path in files.items()}  # as somebody writes them into dstack_settings
    async with own_stack(**paths, fresh=True) as stack:
        control = stack.control
        assert "decrypted_env" not in stack.description()["app"]
        control.allow("src", "kms-src")
        control.allow("src", "app")
        await control.onboard_kms("src", None)
        control.snapshot("without keys")
        booted = await control.boot_guest("app")
        assert (booted["has_keys"], environment_of(stack)) == (True, ALLOWED)
        control.snapshot("with keys")
        await control.revert("without keys")
        assert (stack.app.encrypted_env, stack.app.environment, stack.app.decrypted_env) == (b"", {}, None)
        await control.revert("with keys")
        assert environment_of(stack) == ALLOWED


async def test_key_whose_signature_is_not_of_the_root_key_encrypts_nothing(files: dict[str, Path]) -> None:
    async with own_stack(**files, patience=PATIENCE) as stack:
        stack.app.encrypted_env = b""
        other = stack.app.agent.keys.k256_key
        stack.control.add_fault(
            service="kms-src",
            call="*GetMeta",
            kind="status",
            status=200,
            body=json.dumps({"k256_pubkey": "02" + other.hex()}),
        )
        with pytest.raises(ControlError, match="signature of the KMS's k256 root key 02.* expected, got that of 0"):
            await stack.control.boot_guest("app")
        assert stack.app.encrypted_env == b""
        stack.control.clear_faults()
        await stack.control.boot_guest("app")
        assert environment_of(stack) == ALLOWED


async def test_state_of_a_stack_with_another_app_is_refused(files: dict[str, Path]) -> None:
    async with own_stack(fresh=True) as plain:
        saved = plain.control.save()
    async with own_stack(**files, fresh=True) as stack:
        with pytest.raises(ControlError, match="of a stack with another app: start this one with its app-compose"):
            await stack.control.load(saved)
        await stack.control.load(stack.control.save())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({}, "app-compose {}: No such file or directory"),
    "no JSON": ({"text": b"{"}, "app-compose {}: Expecting property name"),
    "docker-compose file": (
        {"text": b"services: {}"},
        "app-compose {}: Expecting value: line 1 column 1 (char 0): JSON expected, in which docker_compose_file is the "
        "text of the docker-compose file",
    ),
    "no object": ({"text": b"[]"}, "app-compose {}: object expected"),
    "not UTF-8": ({"text": b"\xff"}, "app-compose {}: UTF-8 text expected (invalid start byte at byte 0)"),
    "member": ({"change": {"name": 1}}, "app-compose {}: name: text expected, got 1"),
    "key provider": (
        {"change": {"key_provider": "local"}},
        "app-compose {}: key_provider: kms expected, or none at all, got local, whose guest needs no KMS",
    ),
    "requirements": (
        {"change": {"manifest_version": "3", "requirements": {"platforms": ["amd-sev-snp"]}}},
        "app-compose {}: Failed to verify app-compose policy: ",
    ),
}


@pytest.mark.parametrize("case", WRONG)
async def test_app_compose_that_cannot_run_is_named_before_anything_starts(tmp_path: Path, case: str) -> None:
    content, words = WRONG[case]
    path = tmp_path / "app-compose.json"
    if content:
        path.write_bytes(content.get("text") or json.dumps({**MANIFEST, **content.get("change", {})}).encode())
    config = StackConfig.on_free_ports(app_compose=path, state=tmp_path / "state")
    with pytest.raises(StackError) as caught:
        async with Stack(config):
            pass
    assert str(caught.value).startswith(words.format(path))
    assert list((tmp_path / "state").glob("*/*")) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("TOKEN", "line 1: NAME=VALUE expected"),
        ("# a\n\n=secret", "line 3: NAME=VALUE expected"),
        ("TOKEN=" + "x" * 131_073, "Environment variable value too long for key: TOKEN"),
        ("\n".join(f"N{number}=" for number in range(1025)), "Too many environment variables: 1025"),
        ("N=" + "x" * 262_144, "at most 262144 bytes expected, got 262240"),
    ],
)
async def test_environment_that_the_guest_would_refuse_is_named_before_anything_starts(
    files: dict[str, Path], text: str, words: str
) -> None:
    files["env_file"].write_text(text)
    with pytest.raises(StackError) as caught:
        async with own_stack(**files):
            pass
    assert str(caught.value) == f"env-file {files['env_file']}: {words}"


def test_commands_name_what_is_wrong_with_the_files(files: dict[str, Path]) -> None:
    environment = str(files["env_file"])
    assert usage_error("up", "--free-ports", "--env-file", environment) == (
        f"env-file {environment}: the generated app-compose allows no variables: "
        "name one with allowed_envs by --app-compose"
    )
    missing = str(files["env_file"].with_name("missing"))
    options = ("--app-compose", str(files["app_compose"]), "--user-config", missing)
    assert usage_error("exec", *options, "--", "true") == f"user-config {missing}: No such file or directory"


def test_command_has_the_variables_of_the_app(files: dict[str, Path]) -> None:
    options = [f"--{name.replace('_', '-')}={path}" for name, path in files.items()]
    script = 'echo "$GREETING|$TOKEN|$OTHER"; stat -c %a "$DSTACK_EMU_SOCKETS" "$DSTACK_EMU_SOCKETS"/*.sock'
    done = run_command("exec", *options, "--", "sh", "-c", script)
    assert done.stdout.decode().splitlines() == ['hello|a=b "c"|', "755", "777", "777"], done.stderr


async def test_sockets_are_open_to_every_user_who_can_open_the_state_folder(short_folder: Path) -> None:
    state = short_folder / "state"
    async with own_stack(state=state, fresh=True, grpc=True):
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (state, *state.glob("app/*"), state / "app")}
    assert modes == {"state": 0o700, "app": 0o755, "dstack.sock": 0o777, "tappd.sock": 0o777, "grpc.sock": 0o777}


async def test_later_run_with_another_app_says_what_changed_and_what_to_do(
    files: dict[str, Path], short_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with own_stack(**files, state=short_folder) as stack:
        before = stack.description()["app"]["compose_hash"]
    files["app_compose"] = of(files["app_compose"], name="renamed")
    caplog.set_level(logging.WARNING)
    async with own_stack(**files, state=short_folder) as stack:
        now = hashlib.sha256(files["app_compose"].read_bytes()).hexdigest()
        told = [message for message in caplog.messages if "has changed since the last run" in message]
        assert len(told) == 1
        assert f"its compose hash was {before}, and is {now}. {stack.policies['src']} was written for" in told[0]
        assert "dstack-emu ctl policy allow src app && dstack-emu ctl guest boot app" in told[0]
        assert not stack.app.agent.has_keys
        stack.control.allow("src", "app")
        await stack.control.boot_guest("app")
        assert environment_of(stack) == ALLOWED
    caplog.clear()
    async with own_stack(**files, state=short_folder) as stack:
        assert (stack.app.agent.has_keys, caplog.messages) == (True, [caplog.messages[0]])
        assert "OTHER" in caplog.messages[0]
