"""kms.toml and the variables that override it: every key by its name, every mistake by its variable."""

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from dstack_emu.attest.release import RELEASES
from dstack_emu.kms_emu.config import KmsConfig
from dstack_emu.transport.errors import ConfigError
from dstack_emu.transport.settings import merge
from tests.commands import usage_error
from tests.kms_process import variables


def configured(variables: dict[str, str], document: str = "") -> KmsConfig:
    """What a file and variables make together."""
    return KmsConfig.from_document(merge(tomllib.loads(document), KmsConfig.overrides(variables)), "kms.toml")


def leaves(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of each key."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


KEYS = dict(leaves(KmsConfig()))
DURATIONS = {"core.auth_api.webhook.timeout": "10s", "core.image.download_timeout": "2m"}
"""The keys with a duration as upstream writes it, and their defaults."""


def as_text(value: Any) -> str:
    """A default as a variable says it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(value)
    return "" if value is None else str(value)


def durations(text: str) -> float:
    """The webhook's time limit that a file says."""
    document = f"[core.auth_api.webhook]\ntimeout = {text}\n"
    return configured({}, document).core.auth_api.webhook.timeout


@pytest.mark.parametrize("key", [key for key in KEYS if key != "default"])
def test_every_key_can_be_set_by_a_variable(key: str) -> None:
    default = KEYS[key]
    said = DURATIONS.get(key) or as_text(default)
    assert configured(variables({key: said})) == KmsConfig()
    other: Any
    match default:
        case bool():
            other, text = not default, as_text(not default)
        case int():
            other, text = 4711, "4711"
        case float() if key in DURATIONS:
            other, text = 180.0, "3m"
        case float():
            other, text = 0.25, "250ms"
        case Path() | None:
            other, text = Path("/somewhere else"), "/somewhere else"
        case list():
            other, text = ["a.example", "::1"], "a.example, ::1"
        case _:
            text = {
                "core.auth_api.type": "dev",
                "core.admin_token_hash": "ab" * 32,
                "emulator.rpc_cert_evidence": "legacy",
            }.get(key, 'a text = "with" [signs]')
            other = text
    changed = dict(leaves(configured(variables({key: text}))))
    assert changed == {**KEYS, key: other}


def test_variable_goes_before_the_file_and_leaves_its_neighbours() -> None:
    file = '[core]\nsite_name = "of the file"\n[core.auth_api.webhook]\nurl = "http://of.the.file"\n'
    config = configured({"DSTACK_EMU_KMS_CORE__AUTH_API__WEBHOOK__URL": "http://of.the.variable"}, file)
    assert config.core.auth_api.webhook.url == "http://of.the.variable"
    assert config.core.site_name == "of the file"


def test_other_variables_are_left_alone() -> None:
    others = {"ROCKET_PORT": "1", "KMS_PORT": "2", "DSTACK_EMU_KMSX": "3", "dstack_emu_kms_rpc__port": "4"}
    assert configured(others) == KmsConfig()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("CORE__SIGHT_NAME", "x", "kms.toml has no key core.sight_name"),
        ("CORE_SITE_NAME", "x", "kms.toml has no key core_site_name"),
        ("RPC__PORT__NUMBER", "1", "kms.toml has no key rpc.port.number"),
        ("", "1", "kms.toml has no key "),
        ("RPC__", "1", "kms.toml has no key rpc."),
        ("RPC", "1", "rpc is a section of kms.toml, a key expected"),
        ("DEFAULT", "1", "default is a section of kms.toml, a key expected"),
        ("RPC__PORT", "http", "Input should be a valid integer, unable to parse string as an integer, got 'http'"),
        ("RPC__PORT", "65536", "Input should be less than or equal to 65535, got '65536'"),
        ("RPC__PORT", "", "Input should be a valid integer, unable to parse string as an integer, got ''"),
        ("CORE__IMAGE__VERIFY", "yes", "true or false expected, got 'yes'"),
        ("CORE__IMAGE__VERIFY", "True", "true or false expected, got 'True'"),
        ("CORE__AUTH_API__TYPE", "eth", "Input should be 'webhook' or 'dev', got 'eth'"),
        ("CORE__IMAGE__DOWNLOAD_TIMEOUT", "2 minutes", "Value error, a duration such as 10s, 2m, 1h or 1d, or never,"),
        ("CORE__ADMIN_TOKEN_HASH", "abc", "Value error, the SHA-256 of the token in hex expected: 64 digits"),
    ],
)
def test_variable_that_cannot_be_is_named(name: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        configured({f"DSTACK_EMU_KMS_{name}": value})
    assert str(refusal.value).startswith(f"DSTACK_EMU_KMS_{name}: {said}")
    right = {"CORE__SITE_NAME": "x", "RPC__PORT": "1", "CORE__IMAGE__VERIFY": "false", "CORE__AUTH_API__TYPE": "dev"}
    right |= {"CORE__IMAGE__DOWNLOAD_TIMEOUT": "2m", "CORE__ADMIN_TOKEN_HASH": "ab" * 32}
    configured({f"DSTACK_EMU_KMS_{key}": text for key, text in right.items()})


@pytest.mark.parametrize(
    ("text", "seconds"), [("0s", 0), ("10s", 10), ("2m", 120), ("1h", 3600), ("7d", 604800), ("007s", 7)]
)
def test_duration_is_a_number_with_its_unit(text: str, seconds: float) -> None:
    assert durations(f'"{text}"') == seconds


@pytest.mark.parametrize("text", ["never", "99999999999999999999d"])
def test_duration_that_never_ends_is_one_that_can_be_waited_for(text: str) -> None:
    assert 10**9 < durations(f'"{text}"') < 10**10


@pytest.mark.parametrize("text", ["-1", "30", "1.5", '"-1"', '"30"', '"500ms"', '"1.5s"', '" 1s"', '"1S"', '"s"', '""'])
def test_duration_without_one_of_its_units_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        durations(text)
    said = "a duration such as 10s, 2m, 1h or 1d, or never, expected, got "
    assert str(refusal.value).startswith(f"kms.toml: core.auth_api.webhook.timeout: Value error, {said}")
    assert durations('"30s"') == 30


def test_file_whose_section_is_no_table_is_refused_by_key() -> None:
    with pytest.raises(ConfigError, match="^kms.toml: core: Input should be a valid dictionary"):
        configured({"DSTACK_EMU_KMS_CORE__SITE_NAME": "x"}, "core = 1")
    assert configured({"DSTACK_EMU_KMS_CORE__SITE_NAME": "x"}, "core = {}").core.site_name == "x"


def test_command_ends_with_the_variables_name(tmp_path: Path) -> None:
    (tmp_path / "kms.toml").write_text("")
    wrong = {"DSTACK_EMU_KMS_CORE__SIGHT_NAME": "x"}
    said = usage_error("kms", "-c", str(tmp_path / "kms.toml"), environment=wrong)
    assert said == "DSTACK_EMU_KMS_CORE__SIGHT_NAME: kms.toml has no key core.sight_name"


@pytest.mark.parametrize("value", ["AB" * 32, "0x" + "ab" * 32])
def test_token_hash_is_read_as_upstream_reads_hex(value: str) -> None:
    assert configured({}, f'[core]\nadmin_token_hash = "{value}"').core.admin_token_hash == "ab" * 32


def test_listening_at_sets_both_phases_and_nothing_else() -> None:
    changed = dict(leaves(KmsConfig().listening_at("127.0.0.1", 1)))
    both = {"rpc.address": "127.0.0.1", "core.onboard.address": "127.0.0.1", "rpc.port": 1, "core.onboard.port": 1}
    assert changed == {**KEYS, **both}


TYPED = {
    "core.enforce_self_authorization": ("off", "no", 0, 1, "false", [False]),
    "core.image.verify": ("off", "true", 1.0),
    "core.attestation.insecure_allow_external_trust_anchors": ("yes", "on", 1),
    "core.onboard.public_key_handover": ("no", 0),
    "core.admin.insecure_no_auth": ("on", 1),
    "rpc.port": ("8000", 8000.0, True),
    "core.admin.auth_token": (12345, True),
    "core.site_name": (1, True),
    "core.cert_dir": (1, True),
    "rpc.tls.key": (False, 7),
    "core.image.download_timeout": (120, "500ms", "-1"),
    "core.attestation.collateral_ttl": (True, "soon", -1),
    "core.admin.tls.key": (1,),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in TYPED.items() for value in values])
def test_value_of_another_type_is_refused_by_its_key(key: str, value: object) -> None:
    *sections, name = key.split(".")
    wrong, right = (
        f"[{'.'.join(sections)}]\n{name} = {json.dumps(each, default=str)}\n" for each in (value, KEYS[key])
    )
    with pytest.raises(ConfigError) as refusal:
        configured({}, wrong)
    assert str(refusal.value).startswith(f"kms.toml: {key}: ")
    assert "12345" not in str(refusal.value)
    if KEYS[key] is not None and key not in DURATIONS:
        assert configured({}, right) == KmsConfig()


def test_value_of_a_token_is_in_no_error() -> None:
    with pytest.raises(ConfigError) as refusal:
        configured(variables({"core.admin_token_hash": "the token itself"}))
    assert str(refusal.value).endswith("the SHA-256 of the token in hex expected: 64 digits")


# ---- the file of dstack 0.6

DOCUMENTED_IN_0_6: dict[str, Any] = {
    "default.workers": 8,
    "default.max_blocking": 64,
    "default.ident": "DStack KMS",
    "default.temp_dir": "/tmp",
    "default.keep_alive": 10,
    "default.log_level": "info",
    "rpc.address": "0.0.0.0",
    "rpc.port": 8000,
    "rpc.tls.key": "/etc/kms/certs/rpc.key",
    "rpc.tls.certs": "/etc/kms/certs/rpc.crt",
    "core.cert_dir": "/etc/kms/certs",
    "core.subject_postfix": ".dstack",
    "core.site_name": "",
    "core.enforce_self_authorization": True,
    "core.attest_rpc_cert": True,
    "core.sev_snp_key_release": False,
    "core.aws_nitro_tpm_key_release": False,
    "core.nitro_enclave_key_release": False,
    "core.attestation.insecure_allow_external_trust_anchors": False,
    "core.image.verify": True,
    "core.image.cache_dir": "/usr/share/dstack/images",
    "core.image.download_url": "http://localhost:8000/{OS_IMAGE_HASH}.tar.gz",
    "core.image.download_timeout": "2m",
    "core.admin.enabled": False,
    "core.admin.address": "127.0.0.1",
    "core.admin.port": 8001,
    "core.admin.auth_token": "",
    "core.admin.htpasswd_file": "",
    "core.admin.insecure_no_auth": False,
    "core.metrics.enabled": True,
    "core.auth_api.type": "webhook",
    "core.auth_api.webhook.url": "http://auth-api:8000",
    "core.auth_api.dev.gateway_app_id": "any",
    "core.onboard.enabled": True,
    "core.onboard.auto_bootstrap_domain": "",
    "core.onboard.address": "0.0.0.0",
    "core.onboard.port": 8000,
}
"""Each key of the `kms.toml` in dstack's repository shortly before 0.6.0, with its value there."""

COMMENTED_OUT_IN_0_6: dict[str, Any] = {
    "core.attestation.urls.pccs": "https://pccs.phala.network",
    "core.attestation.urls.amd_kds": "https://kdsintf.amd.com/vcek/v1",
    "core.attestation.root_ca.tdx": "/etc/dstack/roots/intel-sgx-root-ca.der",
    "core.attestation.root_ca.gcp_tpm": "/etc/dstack/roots/gcp-tpm-root-ca.pem",
    "core.attestation.root_ca.aws_nitro_enclave": "/etc/dstack/roots/aws-nitro-enclave-root-ca.pem",
    "core.attestation.root_ca.aws_nitro_tpm": "/etc/dstack/roots/aws-nitro-tpm-root-ca.pem",
    "core.attestation.root_ca.sev_snp_milan": "/etc/dstack/roots/amd-milan-ark.pem",
    "core.attestation.root_ca.sev_snp_genoa": "/etc/dstack/roots/amd-genoa-ark.pem",
    "core.attestation.root_ca.sev_snp_turin": "/etc/dstack/roots/amd-turin-ark.pem",
}
DESCRIBED_IN_0_6: dict[str, Any] = {
    "core.auth_api.webhook.timeout": "60s",
    "core.onboard.auth_token": "a token",
    "core.onboard.htpasswd_file": "/etc/kms/users",
    "core.onboard.public_key_handover": False,
    "core.admin.tls.key": "/etc/kms/certs/rpc.key",
    "core.admin.tls.certs": "/etc/kms/certs/rpc.crt",
}
"""What the documents and acceptance tests of 0.6 set beside that."""

GONE_IN_0_6: dict[str, Any] = {
    "core.admin_token_hash": "ab" * 32,
    "core.pccs_url": "https://pccs.phala.network",
    "core.onboard.quote_enabled": True,
    "rpc.tls.mutual.ca_certs": "/etc/kms/certs/tmp-ca.crt",
    "rpc.tls.mutual.mandatory": False,
}
AFTER_0_6_0 = ("core.keyring_dir", "core.attestation.sev_snp_tcb_requirements_file")


def toml_of(keys: dict[str, Any]) -> str:
    """A file with these keys, each section written once."""
    sections: dict[str, list[str]] = {}
    for key, value in keys.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(f"{name} = {json.dumps(value)}")
    return "".join(f"[{section}]\n" + "\n".join(lines) + "\n" for section, lines in sections.items())


def test_file_of_0_6_is_our_defaults_but_for_loopback() -> None:
    listening = dict.fromkeys(("rpc.address", "core.onboard.address"), "127.0.0.1")
    config = configured({}, toml_of(DOCUMENTED_IN_0_6 | listening))
    assert config.default["ident"] == "DStack KMS"
    assert config.model_copy(update={"default": {}}) == KmsConfig()


@pytest.mark.parametrize("keys", [COMMENTED_OUT_IN_0_6, DESCRIBED_IN_0_6, GONE_IN_0_6])
def test_each_key_that_0_6_knew_or_knows_is_read(keys: dict[str, Any]) -> None:
    changed = dict(leaves(configured({}, toml_of(keys))))
    for key, value in keys.items():
        read = changed[key]
        assert read == (60.0 if key in DURATIONS else Path(value) if isinstance(read, Path) else value)


@pytest.mark.parametrize("key", AFTER_0_6_0)
def test_key_of_a_later_release_is_named(key: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        configured({}, toml_of({key: "/var/lib/kms/keyring"}))
    assert str(refusal.value) == f"kms.toml: {key}: unknown key"
    assert configured({}, toml_of({"core.cert_dir": "/var/lib/kms"})).core.cert_dir == Path("/var/lib/kms")


IGNORED = {
    "core.admin_token_hash": ("ab" * 32, ["0.6"]),
    "rpc.tls.mutual.mandatory": (True, ["0.6"]),
    "core.onboard.quote_enabled": (False, ["0.5", "0.6"]),
}


@pytest.mark.parametrize("release", ["0.5", "0.6"])
@pytest.mark.parametrize("key", IGNORED)
def test_setting_that_a_release_ignores_is_said(key: str, release: str) -> None:
    value, ignored_by = IGNORED[key]
    said = [
        setting.partition(" ")[0] for setting, _ in configured({}, toml_of({key: value})).ineffective(RELEASES[release])
    ]
    assert said == ([key] if release in ignored_by else [])
    assert not list(KmsConfig().ineffective(RELEASES[release]))
