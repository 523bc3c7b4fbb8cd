"""What a guest refuses before it asks for keys, in every way that a trust domain comes about, beside what passes.

Texts and rules in full are in tests/test_app_compose.py; here each rule is met where users meet it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.control.schemas import ControlError
from dstack_emu.testing import LiveStack
from tests.commands import run_command, serving, usage_error

MANIFEST: dict[str, Any] = {"manifest_version": 2, "name": "app", "runner": "docker-compose", "kms_enabled": True}
TOKEN = "unit-test-launch-token-0000000001"
# Of upstream's own unit test.
TOKEN_HASH = "28faa1319055d733ad9651f5ab7689c15b04609846bcd27b3c5bc8df6246f5a3"
POLICY = "Failed to verify app-compose policy: "
FAIL_CLOSED = 'manifest_version >= 3; use string manifest_version "3" so older guests fail closed'
NUMERIC = "numeric manifest_version is only supported for legacy versions 1 and 2; use a string for newer versions"
ABSENT: Any = object()


def three(**changes: Any) -> dict[str, Any]:
    return {"manifest_version": "3", **changes}


def needs(**requirements: Any) -> dict[str, Any]:
    return three(requirements=requirements)


Case = tuple[dict[str, Any], str, dict[str, Any]]
"""What is changed in an app-compose, the refusal, and the change beside it that passes."""

IN_BOTH: tuple[Case, ...] = (
    ({"manifest_version": ABSENT}, "app-compose: missing field `manifest_version`", {"manifest_version": 1}),
    ({"name": ABSENT}, "app-compose: missing field `name`", {"name": ""}),
    ({"runner": ABSENT}, "app-compose: missing field `runner`", {"runner": "bash"}),
    ({"runner": 1}, "app-compose: runner: text expected, got 1", {"runner": "docker-compose"}),
    ({"docker_compose_file": {}}, "app-compose: docker_compose_file: text expected", {"docker_compose_file": "a: b"}),
    ({"public_logs": "yes"}, 'app-compose: public_logs: true or false expected, got "yes"', {"public_logs": True}),
    ({"public_sysinfo": 1}, "app-compose: public_sysinfo: true or false expected", {"public_sysinfo": True}),
    ({"public_tcbinfo": 0}, "app-compose: public_tcbinfo: true or false expected", {"public_tcbinfo": False}),
    ({"features": "kms"}, "app-compose: features: array expected", {"features": ["kms", "tproxy-net"]}),
    ({"kms_enabled": 1}, "app-compose: kms_enabled: true or false expected", {"kms_enabled": False}),
    ({"local_key_provider_enabled": 1}, "app-compose: local_key_provider_enabled: true or", {"kms_enabled": True}),
    ({"gateway_enabled": 1}, "app-compose: gateway_enabled: true or false expected", {"gateway_enabled": True}),
    ({"tproxy_enabled": 1}, "app-compose: tproxy_enabled: true or false expected", {"tproxy_enabled": True}),
    ({"key_provider": "sgx"}, "app-compose: key_provider: 'none' or 'local' or 'kms'", {"key_provider": "kms"}),
    ({"key_provider_id": "0xaa"}, "app-compose: key_provider_id: Non-hexadecimal digit", {"key_provider_id": "aa"}),
    ({"allowed_envs": "A"}, "app-compose: allowed_envs: array expected", {"allowed_envs": ["A"]}),
    ({"no_instance_id": 1}, "app-compose: no_instance_id: true or false expected", {"no_instance_id": True}),
    ({"secure_time": 1}, "app-compose: secure_time: true or false expected", {"secure_time": True}),
    ({"storage_fs": 1}, "app-compose: storage_fs: text expected", {"storage_fs": "ext4"}),
    ({"swap_size": "2X"}, "app-compose: swap_size: Unknown memory size suffix: X", {"swap_size": "2G"}),
    ({"port_policy": {"ports": [{}]}}, "app-compose: port_policy: ports: [0]", {"port_policy": {"ports": []}}),
)
IN_0_5: tuple[Case, ...] = (
    ({"init_script": ["a"]}, 'app-compose: init_script: text expected, got ["a"]', {"init_script": "a"}),
    ({"manifest_version": "2"}, "app-compose: manifest_version: integer of 32 bits", {"manifest_version": 2}),
    ({"manifest_version": "3"}, "app-compose: manifest_version: integer of 32 bits", {"manifest_version": 3}),
    # What 0.5 does not know it does not read.
    ({"manifest_version": -1}, "app-compose: manifest_version: integer of 32 bits", {"requirements": {"no_such": 1}}),
)
IN_0_6: tuple[Case, ...] = (
    ({"manifest_version": "4"}, f"{POLICY}Unsupported manifest_version: 4, max supported: 3", three()),
    ({"manifest_version": "03"}, "app-compose: manifest_version: manifest_version must be a canonical", three()),
    ({"manifest_version": 3}, f"app-compose: manifest_version: {NUMERIC}", {"manifest_version": 2}),
    ({"requirements": {}}, f"{POLICY}requirements requires {FAIL_CLOSED}", needs()),
    ({"runner": "nerdctl-compose"}, f"{POLICY}nerdctl-compose requires {FAIL_CLOSED}", three(runner="nerdctl-compose")),
    (
        {"init_script": ["a", "b"]},
        f"{POLICY}multiple init scripts require {FAIL_CLOSED}",
        three(init_script=["a", "b"]),
    ),
    (three(init_script=["a"] * 6), "app-compose: init_script: init_script supports at most 5", {"init_script": "a"}),
    (
        three(snapshotter="stargz"),
        f"{POLICY}snapshotter is only supported by the nerdctl-compose runner",
        three(snapshotter="stargz", runner="nerdctl-compose"),
    ),
    (
        {"event_log_version": 3},
        "app-compose: event_log_version: unknown event log version: 3",
        {"event_log_version": 2},
    ),
    ({"verity_volumes": [{}]}, "app-compose: verity_volumes: [0]: missing field `source`", {"verity_volumes": []}),
    (needs(no_such=1), "app-compose: requirements: unknown field `no_such`", needs()),
    (
        needs(gpu_policy={"no_such": 1}),
        "app-compose: requirements: gpu_policy: unknown field `no_such`",
        needs(gpu_policy={"attest_gpu": True}),
    ),
    (
        needs(os_version=">=0.6.1"),
        f"{POLICY}Unsupported dstack OS version: current 0.6.0, required >=0.6.1",
        needs(os_version=">=0.6.0"),
    ),
    (needs(os_version="six"), f"{POLICY}Invalid requirements.os_version: six: ", needs(os_version="0.6")),
    (
        needs(platforms=[]),
        f"{POLICY}Unsupported attestation platform: requirements.platforms is empty",
        needs(platforms=None),
    ),
    (
        needs(platforms=["dstack-amd-sev-snp"]),
        f"{POLICY}Unsupported attestation platform: current dstack-tdx, allowed [dstack-amd-sev-snp]",
        needs(platforms=["dstack-amd-sev-snp", "dstack-tdx"]),
    ),
    (
        needs(platforms=["tdx"]),
        f"{POLICY}Invalid requirements.platforms[0]: tdx: unknown variant `tdx`",
        needs(platforms=["dstack-tdx"]),
    ),
    (
        needs(tdx_measure_acpi_tables=True),
        f"{POLICY}unsupported TDX attestation mode: requirements.tdx_measure_acpi_tables=true requires ACPI table",
        needs(tdx_measure_acpi_tables=False),
    ),
    (
        needs(launch_token_hash="00" * 32),
        f'{POLICY}launch token mismatch: sha256("dstack-launch-token/v1:" || launch token) does not match',
        needs(launch_token_hash=TOKEN_HASH),
    ),
    (
        needs(health_check=True, health_status_file="health"),
        f"{POLICY}requirements.health_status_file must be an absolute path: health",
        needs(health_check=True, health_status_file="/health"),
    ),
    (
        needs(gpu_policy={"rego": "package policy"}),
        "Failed to measure app info: failed to verify GPU TEE attestation: failed to apply GPU Rego policy: ",
        needs(gpu_policy={}),
    ),
)
CASES = [
    *(("0.5", *case) for case in (*IN_BOTH, *IN_0_5)),
    *(("0.6", *case) for case in (*IN_BOTH, *IN_0_6)),
]


def app_compose(change: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in {**MANIFEST, **change}.items() if value is not ABSENT})


@pytest.fixture(scope="module")
def stack() -> Iterator[LiveStack]:
    with LiveStack(release="0.6", fresh=True) as running:
        yield running


@pytest.mark.parametrize(("release", "refused", "words", "passing"), CASES)
def test_app_is_refused_before_it_asks_for_keys(
    stack: LiveStack, release: str, refused: dict[str, Any], words: str, passing: dict[str, Any]
) -> None:
    spec = {"release": release, "user_config": json.dumps({"dstack": {"launch_token": TOKEN}})}
    before = stack.control.describe()["guests"].keys()
    with pytest.raises(ControlError) as refusal:
        stack.control.add_guest("refused", compose=app_compose(refused), **spec)
    assert str(refusal.value).removeprefix("trust domain refused: ").startswith(words)
    assert stack.control.describe()["guests"].keys() == before
    stack.control.add_guest("passing", compose=app_compose(passing), **spec)
    stack.control.remove_guest("passing")


@pytest.mark.parametrize("release", ["0.5", "0.6"])
def test_compose_file_alone_is_no_app_compose(stack: LiveStack, release: str) -> None:
    with pytest.raises(ControlError, match="app-compose: missing field `manifest_version`$"):
        stack.app(compose={"docker_compose_file": ""}, release=release)
    stack.app(compose={**MANIFEST, "docker_compose_file": ""}, release=release).remove()


@pytest.mark.parametrize(
    ("user_config", "words"),
    [
        (None, "failed to read user_config for requirements.launch_token_hash: there is none"),
        ("{}", "user_config is missing dstack.launch_token"),
        ('{"dstack":{"launch_token":"short"}}', "launch token too short: got 5 bytes, minimum is 32"),
    ],
)
def test_launch_token_comes_from_the_user_config(stack: LiveStack, user_config: str | None, words: str) -> None:
    compose = app_compose(needs(launch_token_hash=TOKEN_HASH))
    with pytest.raises(ControlError) as refusal:
        stack.control.add_guest("refused", compose=compose, user_config=user_config)
    assert str(refusal.value).startswith(POLICY + words)
    stack.control.add_guest("passing", compose=compose, user_config=json.dumps({"dstack": {"launch_token": TOKEN}}))
    stack.control.remove_guest("passing")


def test_acpi_tables_are_required_of_a_guest_of_the_legacy_variant(tmp_path: Path) -> None:
    compose, config = tmp_path / "app-compose.json", tmp_path / "sys-config.json"
    compose.write_text(app_compose(needs(tdx_measure_acpi_tables=True)))
    config.write_text(json.dumps({"vm_config": json.dumps({"cpu_count": 1, "memory_size": 2 * 1024**3})}))
    options = ("--release", "0.6", "--app-compose", str(compose))
    with serving("agent", *options, "--sys-config", str(config)) as agent:
        assert agent["app_id"]
    done = run_command("agent", *options, "--json")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"requirements.tdx_measure_acpi_tables=true requires ACPI table measurement" in done.stderr


@pytest.mark.parametrize("release", ["0.5", "0.6"])
def test_kms_in_a_trust_domain_of_a_refused_app_does_not_start(stack: LiveStack, release: str) -> None:
    with pytest.raises(ControlError) as refusal:
        stack.control.add_kms("refused", release=release, compose=app_compose({"public_logs": "yes"}))
    assert 'app-compose: public_logs: true or false expected, got "yes"' in str(refusal.value)
    assert "refused" not in stack.control.all_kms()
    assert "kms-refused" not in stack.control.describe()["guests"]
    stack.control.add_kms("passing", release=release, compose=app_compose({"public_logs": True}))
    stack.control.remove_kms("passing")


@pytest.mark.parametrize("command", [("agent",), ("boot", "--kms", "https://127.0.0.1:1"), ("quote",)])
def test_commands_refuse_it_too(command: tuple[str, ...], tmp_path: Path) -> None:
    compose = tmp_path / "app-compose.json"
    compose.write_text('{"docker_compose_file":""}')
    for release in ("0.5", "0.6"):
        said = usage_error(*command, "--release", release, "--app-compose", str(compose))
        assert said == "app-compose: missing field `manifest_version`"
    compose.write_text(app_compose(needs(os_version=">=7")))
    done = run_command(*command, "--release", "0.6", "--app-compose", str(compose))
    words = f"Error: {POLICY}Unsupported dstack OS version: current 0.6.0, required >=7\n"
    assert (done.returncode, done.stdout, done.stderr.decode()) == (1, b"", words)
    compose.write_text(app_compose(needs(os_version=">=0.6")))
    passing = (*command, "--release", "0.6", "--app-compose", str(compose))
    if command[0] == "agent":
        with serving(*passing) as agent:
            assert agent["app_id"]
    else:  # boot asks a KMS, which is not there
        done = run_command(*passing)
        assert (done.returncode, b"Connection refused" in done.stderr) == (
            (1, True) if "boot" in command else (0, False)
        )


def test_quote_of_an_app_that_passes_is_made(tmp_path: Path) -> None:
    compose, user_config = tmp_path / "app-compose.json", tmp_path / "user-config"
    compose.write_text(app_compose(needs(os_version="0.6", launch_token_hash=TOKEN_HASH)))
    user_config.write_text(json.dumps({"dstack": {"launch_token": TOKEN}}))
    options = ("--release", "0.6", "--app-compose", str(compose), "--user-config", str(user_config))
    done = run_command("quote", "--json", *options)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["quote"]
