"""app-compose.json as the guests of each release read it, and every refusal beside the manifest that passes."""

import hashlib
import json
from typing import Any

import pytest

from dstack_emu.attest.app_compose import AppManifest, Port, PortPolicy, VerityVolume
from dstack_emu.attest.app_policy import (
    GuestFacts,
    launch_token_hash,
    verify_gpu_policy,
    verify_key_provider_id,
    verify_key_provider_inputs,
    verify_policy,
)
from dstack_emu.attest.app_requirements import GpuPolicy
from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.release import RELEASES

V0_5, V0_6 = RELEASES["0.5"], RELEASES["0.6"]
MINIMAL: dict[str, Any] = {"manifest_version": 2, "name": "app", "runner": "docker-compose"}
TOKEN = "unit-test-launch-token-0000000001"
# Of upstream's own unit test.
TOKEN_HASH = "28faa1319055d733ad9651f5ab7689c15b04609846bcd27b3c5bc8df6246f5a3"
LITE = json.dumps({"tdx_attestation_variant": "lite"})
FACTS = GuestFacts(os_version="0.6.0", vm_config=LITE, user_config=json.dumps({"dstack": {"launch_token": TOKEN}}))


def manifest(release: Any = V0_6, /, **changes: Any) -> AppManifest:
    return AppManifest.parse(json.dumps(MINIMAL | changes), release)


def parse_refusal(text: str, release: Any = V0_6) -> str:
    with pytest.raises(FormatError) as caught:
        AppManifest.parse(text, release)
    assert str(caught.value).startswith("app-compose: ")
    return str(caught.value).removeprefix("app-compose: ")


def policy_refusal(manifest: AppManifest, facts: GuestFacts = FACTS, release: Any = V0_6) -> str:
    with pytest.raises(VerificationError) as caught:
        verify_policy(manifest, facts, release)
    assert str(caught.value).startswith("Failed to verify app-compose policy: ")
    return str(caught.value).removeprefix("Failed to verify app-compose policy: ")


def requiring(**requirements: Any) -> AppManifest:
    return manifest(manifest_version="3", requirements=requirements)


# ---- Reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", [V0_5, V0_6], ids=lambda each: each.name)
def test_minimal_manifest_has_the_defaults(release: Any) -> None:
    text = json.dumps(MINIMAL)
    assert AppManifest.parse(text, release) == AppManifest(
        text=text,
        gpu_policy_hash=hashlib.sha256(b"{}").digest(),
        manifest_version=2,
        name="app",
        runner="docker-compose",
    )
    read = AppManifest.parse(text, release)
    assert (read.public_tcbinfo, read.secure_time, read.file_system(), read.key_provider_kind) == (
        True,
        True,
        "zfs",
        "none",
    )


def test_full_manifest_is_read() -> None:
    read = manifest(
        manifest_version="3",
        runner="nerdctl-compose",
        docker_compose_file="services: {}",
        public_logs=True,
        public_tcbinfo=False,
        key_provider="local",
        key_provider_id="AABB",
        allowed_envs=["A", "B"],
        no_instance_id=True,
        secure_time=False,
        storage_fs="EXT4",
        swap_size="2G",
        port_policy={"ports": [{"port": 80}, {"port": 443, "pp": True}], "restrict_mode": True},
        snapshotter="stargz",
        init_script=["one", "two"],
        event_log_version=2,
        verity_volumes=[{"source": "model.img", "verity_root": "11" * 32, "target": "/models"}],
        requirements={"gpu_policy": {"allow_debug": True}},
        swap_size_of_tomorrow=1,
    )
    assert (read.manifest_version, read.runner, read.snapshotter, read.event_log_version) == (
        3,
        "nerdctl-compose",
        "stargz",
        2,
    )
    assert (read.key_provider_kind, read.key_provider_id, read.allowed_envs) == ("local", b"\xaa\xbb", ("A", "B"))
    assert (read.file_system(), read.swap_size) == ("ext4", 2 << 30)
    assert read.port_policy == PortPolicy((Port(80), Port(443, True)), restrict_mode=True)
    assert read.init_script_hashes == (hashlib.sha256(b"one").digest(), hashlib.sha256(b"two").digest())
    assert read.verity_volumes == (VerityVolume("model.img", b"\x11" * 32, "/models"),)
    assert read.requirements is not None
    assert read.requirements.gpu_policy == GpuPolicy(allow_debug=True)


def test_compose_hash_is_over_the_very_bytes() -> None:
    text = json.dumps(MINIMAL, indent=3)
    assert AppManifest.parse(text, V0_6).compose_hash == hashlib.sha256(text.encode()).digest()


@pytest.mark.parametrize("release", [V0_5, V0_6], ids=lambda each: each.name)
@pytest.mark.parametrize("absent", ["manifest_version", "name", "runner"])
def test_required_member_that_is_absent_is_refused(absent: str, release: Any) -> None:
    document = {name: value for name, value in MINIMAL.items() if name != absent}
    assert parse_refusal(json.dumps(document), release) == f"missing field `{absent}`"


def test_manifest_of_a_compose_file_alone_is_refused() -> None:
    assert parse_refusal('{"docker_compose_file":""}') == "missing field `manifest_version`"


@pytest.mark.parametrize("release", [V0_5, V0_6], ids=lambda each: each.name)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": 1}, "name: text expected, got 1"),
        ({"name": None}, "name: text expected, got null"),
        ({"runner": ["bash"]}, 'runner: text expected, got ["bash"]'),
        ({"features": "kms"}, 'features: array expected, got "kms"'),
        ({"features": [1]}, "features: [0]: text expected, got 1"),
        ({"docker_compose_file": {}}, "docker_compose_file: text expected, got {}"),
        ({"public_logs": "yes"}, 'public_logs: true or false expected, got "yes"'),
        ({"public_sysinfo": 1}, "public_sysinfo: true or false expected, got 1"),
        ({"public_tcbinfo": None}, "public_tcbinfo: true or false expected, got null"),
        ({"kms_enabled": "true"}, 'kms_enabled: true or false expected, got "true"'),
        ({"gateway_enabled": 0}, "gateway_enabled: true or false expected, got 0"),
        ({"tproxy_enabled": 0}, "tproxy_enabled: true or false expected, got 0"),
        ({"local_key_provider_enabled": ""}, 'local_key_provider_enabled: true or false expected, got ""'),
        ({"key_provider": "sgx"}, "key_provider: 'none' or 'local' or 'kms' or 'tpm' expected, got \"sgx\""),
        ({"key_provider": 1}, "key_provider: 'none' or 'local' or 'kms' or 'tpm' expected, got 1"),
        ({"key_provider_id": "0x00"}, "key_provider_id: Non-hexadecimal digit found"),
        ({"allowed_envs": [None]}, "allowed_envs: [0]: text expected, got null"),
        ({"no_instance_id": "no"}, 'no_instance_id: true or false expected, got "no"'),
        ({"secure_time": "no"}, 'secure_time: true or false expected, got "no"'),
        ({"storage_fs": False}, "storage_fs: text expected, got false"),
        ({"swap_size": -1}, "swap_size: integer of 64 bits, not negative, expected, got -1"),
        ({"swap_size": ""}, "swap_size: Empty memory size"),
        ({"swap_size": "2X"}, "swap_size: Unknown memory size suffix: X"),
        ({"swap_size": "1.5G"}, "swap_size: Invalid numeric value: 1.5"),
        ({"swap_size": "0xZZ"}, "swap_size: Invalid hexadecimal value: ZZ"),
        ({"port_policy": {"ports": [{}]}}, "port_policy: ports: [0]: missing field `port`"),
        (
            {"port_policy": {"ports": [{"port": 70000}]}},
            "port_policy: ports: [0]: port: integer of 16 bits, not negative, expected, got 70000",
        ),
        ({"port_policy": {"restrict_mode": 1}}, "port_policy: restrict_mode: true or false expected, got 1"),
    ],
)
def test_mistyped_member_is_refused(change: dict[str, Any], words: str, release: Any) -> None:
    assert parse_refusal(json.dumps(MINIMAL | change), release) == words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"snapshotter": "zfs"}, "snapshotter: 'overlayfs' or 'stargz' expected, got \"zfs\""),
        ({"init_script": ["one", 2]}, "init_script: [1]: text expected, got 2"),
        ({"init_script": ["x"] * 6}, "init_script: init_script supports at most 5 scripts"),
        ({"event_log_version": 3}, "event_log_version: unknown event log version: 3"),
        ({"event_log_version": 0}, "event_log_version: unknown event log version: 0"),
        ({"event_log_version": "2"}, 'event_log_version: integer of 32 bits, not negative, expected, got "2"'),
        ({"requirements": []}, "requirements: object expected, got []"),
        ({"requirements": {"platforms": "dstack-tdx"}}, 'requirements: platforms: array expected, got "dstack-tdx"'),
        (
            {"requirements": {"tdx_measure_acpi_tables": "yes"}},
            'requirements: tdx_measure_acpi_tables: true or false expected, got "yes"',
        ),
        ({"requirements": {"gpu_policy": None}}, "requirements: gpu_policy: object expected, got null"),
        ({"verity_volumes": [{}]}, "verity_volumes: [0]: missing field `source`"),
        (
            {"verity_volumes": [{"source": "a", "verity_root": "00", "target": "/a"}]},
            "verity_volumes: [0]: verity_root: 32 bytes expected, got 1",
        ),
        (
            {"verity_volumes": [{"source": "a", "verity_root": "00" * 32, "target": "a"}]},
            "verity_volumes: [0]: target: volume target must be an absolute path, got 'a'",
        ),
    ],
)
def test_members_of_manifest_3_are_read_by_0_6_and_ignored_by_0_5(change: dict[str, Any], words: str) -> None:
    assert parse_refusal(json.dumps(MINIMAL | change)) == words
    if "init_script" in change:  # a member of 0.5 too, of one text
        assert parse_refusal(json.dumps(MINIMAL | change), V0_5).startswith("init_script: text expected, got ")
    else:
        assert manifest(V0_5, **change).name == "app"


@pytest.mark.parametrize("where", ["requirements", "gpu_policy"])
def test_unknown_requirement_is_refused(where: str) -> None:
    requirements = {"attest_gpu": False} if where == "requirements" else {"gpu_policy": {"allow_debugger": True}}
    unknown = "attest_gpu" if where == "requirements" else "allow_debugger"
    refused = parse_refusal(json.dumps(MINIMAL | {"manifest_version": "3", "requirements": requirements}))
    assert f"unknown field `{unknown}`" in refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("[]", "object expected, got []"),
        ('{"name":"a","name":"a"}', "duplicate field `name`"),
        ('{"manifest_version":NaN}', "expected value, got NaN"),
    ],
)
def test_text_that_is_no_object_is_refused(text: str, words: str) -> None:
    assert parse_refusal(text).startswith(words)


def test_older_switches_name_the_key_provider_unless_it_is_named() -> None:
    assert manifest(kms_enabled=True, local_key_provider_enabled=True).key_provider_kind == "kms"
    assert manifest(local_key_provider_enabled=True).key_provider_kind == "local"
    assert manifest(kms_enabled=True, key_provider="none").key_provider_kind == "none"
    assert manifest(kms_enabled=True, key_provider=None).key_provider_kind == "kms"


@pytest.mark.parametrize("change", [{"gateway_enabled": True}, {"tproxy_enabled": True}, {"features": ["tproxy-net"]}])
def test_gateway_is_asked_for_in_three_ways(change: dict[str, Any]) -> None:
    assert manifest(**change).has_gateway
    assert not manifest().has_gateway


@pytest.mark.parametrize(
    ("value", "size"), [(5, 5), ("5", 5), ("0x10", 16), ("2k", 2048), ("3M", 3 << 20), ("1T", 1 << 40)]
)
def test_swap_size_has_units(value: Any, size: int) -> None:
    assert manifest(swap_size=value).swap_size == size


def test_one_init_script_may_be_a_text_or_null() -> None:
    assert manifest(init_script="one").init_script == ("one",)
    assert manifest(init_script=None).init_script == ()


def test_unknown_file_system_is_refused_once_there_are_keys() -> None:
    with pytest.raises(VerificationError, match="Invalid filesystem type: btrfs, supported types: zfs, ext4$"):
        manifest(storage_fs="btrfs").file_system()


# ---- Manifest versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 2, "1", "2", "3", " 3 "])
def test_0_6_boots_manifests_up_to_3(value: Any) -> None:
    read = manifest(manifest_version=value)
    assert read.manifest_version == int(value)
    verify_policy(read, FACTS, V0_6)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "numeric manifest_version is only supported for legacy versions 1 and 2; use a string for newer versions"),
        (0, "numeric manifest_version is only supported for legacy versions 1 and 2; use a string for newer versions"),
        (-1, "manifest_version must be a positive integer"),
        (2.5, "invalid type: 2.5, expected a string manifest version, or legacy numeric 1/2"),
        (True, "invalid type: true, expected a string manifest version, or legacy numeric 1/2"),
        (None, "invalid type: null, expected a string manifest version, or legacy numeric 1/2"),
        ("", "manifest_version must not be empty"),
        ("0", "manifest_version must be greater than 0"),
        ("03", 'manifest_version must be a canonical integer string, got "03"'),
        ("+3", 'manifest_version must be a canonical integer string, got "+3"'),
        ("3.0", 'manifest_version must be a positive integer string, got "3.0"'),
        ("-3", 'manifest_version must be a positive integer string, got "-3"'),
        ("4294967296", 'manifest_version must be a positive integer string, got "4294967296"'),
    ],
)
def test_0_6_refuses_other_forms_of_the_manifest_version(value: Any, words: str) -> None:
    assert parse_refusal(json.dumps(MINIMAL | {"manifest_version": value})) == f"manifest_version: {words}"


def test_0_6_refuses_to_boot_manifest_4() -> None:
    assert policy_refusal(manifest(manifest_version="4")) == "Unsupported manifest_version: 4, max supported: 3"


@pytest.mark.parametrize("value", [0, 1, 2, 3, 4, 2**32 - 1])
def test_0_5_boots_any_number(value: int) -> None:
    verify_policy(manifest(V0_5, manifest_version=value), FACTS, V0_5)


@pytest.mark.parametrize("value", ["2", "3", -1, 2**32, 2.5, None])
def test_0_5_refuses_what_is_no_number_of_32_bits(value: Any) -> None:
    refused = parse_refusal(json.dumps(MINIMAL | {"manifest_version": value}), V0_5)
    assert refused.startswith("manifest_version: integer of 32 bits, not negative, expected")


@pytest.mark.parametrize("version", [1, 2, "2"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"requirements": {}}, "requirements requires"),
        ({"runner": "nerdctl-compose"}, "nerdctl-compose requires"),
        ({"init_script": ["one", "two"]}, "multiple init scripts require"),
    ],
)
def test_what_needs_manifest_3_is_refused_below_it(change: dict[str, Any], words: str, version: Any) -> None:
    verify_policy(manifest(**change, manifest_version="3"), FACTS, V0_6)
    assert policy_refusal(manifest(**change, manifest_version=version)) == (
        f'{words} manifest_version >= 3; use string manifest_version "3" so older guests fail closed'
    )
    if "init_script" not in change:  # which is one text in 0.5
        verify_policy(manifest(V0_5, **change), FACTS, V0_5)


@pytest.mark.parametrize("runner", ["docker-compose", "bash"])
def test_snapshotter_belongs_to_nerdctl_compose(runner: str) -> None:
    change = {"manifest_version": "3", "snapshotter": "overlayfs"}
    verify_policy(manifest(**change, runner="nerdctl-compose"), FACTS, V0_6)
    words = "snapshotter is only supported by the nerdctl-compose runner"
    assert policy_refusal(manifest(**change, runner=runner)) == words


# ---- Requirements ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requirement", [">=0.6.0", ">=0.5.0, <0.7.0", "0.6", "~0.6.0", "*"])
def test_os_version_that_fits_passes(requirement: str) -> None:
    verify_policy(requiring(os_version=requirement), FACTS, V0_6)


@pytest.mark.parametrize(
    ("requirement", "words"),
    [
        (">=0.6.1", "Unsupported dstack OS version: current 0.6.0, required >=0.6.1"),
        ("0.7", "Unsupported dstack OS version: current 0.6.0, required ^0.7"),
        (">0.6.0, <0.7", "Unsupported dstack OS version: current 0.6.0, required >0.6.0, <0.7"),
        ("v0.6", "Invalid requirements.os_version: v0.6: version comparator expected, got 'v0.6'"),
    ],
)
def test_os_version_that_does_not_fit_is_refused(requirement: str, words: str) -> None:
    assert policy_refusal(requiring(os_version=requirement)) == words


def test_os_version_of_the_guest_that_is_none_is_refused() -> None:
    facts = GuestFacts(os_version="0.6", vm_config=LITE)
    words = "Invalid current dstack OS version: 0.6: semantic version expected, got '0.6'"
    assert policy_refusal(requiring(os_version="*"), facts) == words
    verify_policy(requiring(), facts, V0_6)


@pytest.mark.parametrize("platforms", [None, ["dstack-tdx"], ["dstack-amd-sev-snp", "dstack-tdx"]])
def test_platforms_that_have_this_one_pass(platforms: Any) -> None:
    verify_policy(requiring(platforms=platforms), FACTS, V0_6)


@pytest.mark.parametrize(
    ("platforms", "words"),
    [
        ([], "Unsupported attestation platform: requirements.platforms is empty"),
        (
            ["dstack-gcp-tdx", "dstack-amd-sev-snp"],
            "Unsupported attestation platform: current dstack-tdx, allowed [dstack-gcp-tdx, dstack-amd-sev-snp]",
        ),
        (
            ["dstack-tdx", "tdx"],
            "Invalid requirements.platforms[1]: tdx: unknown variant `tdx`, expected one of `dstack-tdx`, "
            "`dstack-gcp-tdx`, `dstack-nitro-enclave`, `dstack-amd-sev-snp`, `dstack-aws-nitro-tpm`",
        ),
    ],
)
def test_platforms_that_have_not_this_one_are_refused(platforms: list[str], words: str) -> None:
    assert policy_refusal(requiring(platforms=platforms)) == words


@pytest.mark.parametrize(
    ("measured", "good", "bad", "needed"),
    [(True, "{}", LITE, "ACPI table measurement"), (False, LITE, "{}", "TDX lite attestation")],
)
def test_acpi_tables_decide_about_the_attestation_variant(measured: bool, good: str, bad: str, needed: str) -> None:
    required = requiring(tdx_measure_acpi_tables=measured)
    verify_policy(required, GuestFacts("0.6.0", good), V0_6)
    assert policy_refusal(required, GuestFacts("0.6.0", bad)) == (
        "unsupported TDX attestation mode: "
        f"requirements.tdx_measure_acpi_tables={str(measured).lower()} requires {needed}"
    )
    verify_policy(required, GuestFacts("0.6.0", bad, tee_variant="dstack-gcp-tdx"), V0_6)


def test_acpi_tables_need_a_vm_config_that_can_be_read() -> None:
    refused = policy_refusal(requiring(tdx_measure_acpi_tables=True), GuestFacts("0.6.0", "no JSON"))
    assert refused.startswith(
        "failed to parse vm_config for requirements.tdx_measure_acpi_tables: Failed to parse vm config: "
    )


def test_launch_token_hash_equals_upstreams() -> None:
    assert launch_token_hash(TOKEN).hex() == TOKEN_HASH


@pytest.mark.parametrize("spelled", [TOKEN_HASH, TOKEN_HASH.upper()])
def test_launch_token_that_fits_passes(spelled: str) -> None:
    verify_policy(requiring(launch_token_hash=spelled), FACTS, V0_6)


@pytest.mark.parametrize(
    ("user_config", "words"),
    [
        (None, "failed to read user_config for requirements.launch_token_hash: there is none"),
        ("no JSON", "failed to parse user_config as JSON for requirements.launch_token_hash"),
        ("{}", "user_config is missing dstack.launch_token"),
        ('{"dstack":"token"}', "user_config is missing dstack.launch_token"),
        ('{"dstack":{"launch_token":1}}', "user_config dstack.launch_token is not a string"),
        (
            '{"dstack":{"launch_token":"short"}}',
            "launch token too short: got 5 bytes, minimum is 32; use a random token since launch_token_hash is public",
        ),
        (
            f'{{"dstack":{{"launch_token":"{"x" * 32}"}}}}',
            'launch token mismatch: sha256("dstack-launch-token/v1:" || launch token) '
            "does not match requirements.launch_token_hash",
        ),
    ],
)
def test_launch_token_that_does_not_fit_is_refused(user_config: str | None, words: str) -> None:
    facts = GuestFacts("0.6.0", LITE, user_config=user_config)
    assert policy_refusal(requiring(launch_token_hash=TOKEN_HASH), facts) == words


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("xyz", "invalid requirements.launch_token_hash: not a hex string: "),
        ("aabb", "invalid requirements.launch_token_hash: expected 32-byte sha256 hex, got 2 bytes"),
    ],
)
def test_launch_token_hash_that_is_none_is_refused(given: str, words: str) -> None:
    assert policy_refusal(requiring(launch_token_hash=given)).startswith(words)


def test_plain_sha256_of_the_token_is_not_its_hash() -> None:
    plain = hashlib.sha256(TOKEN.encode()).hexdigest()
    assert policy_refusal(requiring(launch_token_hash=plain)).startswith("launch token mismatch")


def test_user_config_is_not_read_without_the_requirement() -> None:
    verify_policy(requiring(), GuestFacts("0.6.0", LITE, user_config="no JSON"), V0_6)


@pytest.mark.parametrize(
    ("runner", "requirements", "words"),
    [
        (
            "docker-compose",
            {"health_check": True, "health_status_file": "health"},
            "requirements.health_status_file must be an absolute path: health",
        ),
        (
            "bash",
            {"health_check": True},
            "requirements.health_check needs health_status_file for the bash runner; "
            "without containers to inspect there is nothing to judge",
        ),
    ],
)
def test_health_check_that_cannot_be_made_is_refused(runner: str, requirements: Any, words: str) -> None:
    refused = manifest(manifest_version="3", runner=runner, requirements=requirements)
    assert policy_refusal(refused) == words
    for passing in (requirements | {"health_check": False}, {"health_check": True, "health_status_file": "/health"}):
        verify_policy(manifest(manifest_version="3", runner=runner, requirements=passing), FACTS, V0_6)


def test_first_requirement_that_fails_is_named() -> None:
    both = requiring(os_version=">=9.0.0", platforms=[], launch_token_hash="xyz")
    assert policy_refusal(both).startswith("Unsupported dstack OS version")


# ---- GPU policy and key provider ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requirements", "canonical"),
    [
        (None, b"{}"),
        ({}, b"{}"),
        ({"gpu_policy": {}}, b"{}"),
        ({"gpu_policy": {"attest_gpu": True}}, b'{"attest_gpu":true}'),
        ({"gpu_policy": {"rego": "x", "allow_debug": True}}, b'{"allow_debug":true,"rego":"x"}'),
    ],
)
def test_gpu_policy_is_hashed_as_it_is_written(requirements: Any, canonical: bytes) -> None:
    read = manifest(manifest_version="3", requirements=requirements)
    assert read.gpu_policy_hash == hashlib.sha256(canonical).digest()


def test_absent_gpu_policy_has_the_hash_of_real_hardware() -> None:
    assert manifest().gpu_policy_hash.hex() == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_policy_in_rego_counts_as_one_that_does_not_hold() -> None:
    verify_gpu_policy(requiring(gpu_policy={"attest_gpu": False}))
    with pytest.raises(VerificationError, match="failed to apply GPU Rego policy: policies in Rego are not evaluated"):
        verify_gpu_policy(requiring(gpu_policy={"rego": "package policy"}))


def test_key_provider_id_pins_the_provider() -> None:
    verify_key_provider_id(manifest(), b"\x01\x02")
    verify_key_provider_id(manifest(key_provider_id="0102"), b"\x01\x02")
    with pytest.raises(VerificationError, match="^Unexpected key provider id: 0103, expected: 0102$"):
        verify_key_provider_id(manifest(key_provider_id="0102"), b"\x01\x03")


def test_key_provider_that_cannot_be_asked_is_refused() -> None:
    verify_key_provider_inputs(manifest(), [], V0_6)
    verify_key_provider_inputs(manifest(kms_enabled=True), ["https://127.0.0.1"], V0_6)
    verify_key_provider_inputs(manifest(key_provider="tpm"), [], V0_6)
    for refused, release, words in (
        (manifest(kms_enabled=True), V0_6, "No KMS URLs are set"),
        (manifest(V0_5, key_provider="tpm"), V0_5, "Tpm key provider is not supported"),
    ):
        with pytest.raises(VerificationError, match=f"^Failed to request app keys: {words}$"):
            verify_key_provider_inputs(refused, [], release)
