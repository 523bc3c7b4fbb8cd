"""The entry point of the image: the settings in a container's environment become options of `up`."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.repository import ROOT
from tests.their_kms import script


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """A folder with a `dstack-emu` that prints its arguments, one on a line."""
    script(tmp_path, "dstack-emu", """printf '%s\\n' "$@\"""")
    return tmp_path


def arguments_of(folder: Path, *arguments: str, **environment: str) -> list[str]:
    """The arguments that `dstack-emu` gets."""
    done = subprocess.run(
        ["sh", str(ROOT / "compose" / "entrypoint"), *arguments],
        env={"PATH": f"{folder}:{os.environ['PATH']}", "DSTACK_EMU_STATE": "/state", **environment},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return done.stdout.splitlines()


def test_own_parts_become_options(started: Path) -> None:
    always = ["up", "--listen", "0.0.0.0", "--state", "/state"]
    assert arguments_of(started) == always
    own = {
        "EMU_WEBHOOK_SRC": "http://user:a b@hook:3000",
        "EMU_KMS_DST": "their kms -c {config}",
        "EMU_KMS_WAIT": "90",
    }
    given = ["--kms-wait", "90", "--kms", "dst=their kms -c {config}", "--webhook", "src=http://user:a b@hook:3000"]
    assert arguments_of(started, **own) == [*always, *given]
    assert arguments_of(started, "up", "--kms", "src=external", **own) == [*always, *given, "--kms", "src=external"]
    assert arguments_of(started, "kms", "--config", "x", **own) == ["kms", "--config", "x"]


def test_settings_become_options_and_those_of_the_container_come_last(started: Path) -> None:
    settings = {
        "EMU_START": "fresh",
        "EMU_SEED": "--a 'b",
        "EMU_RELEASE": "0.5",
        "EMU_AUTH_CONTRACT": "next",
        "EMU_DOMAIN": "stack other",
        "EMU_PORT_KMS_SRC": "9400",
        "EMU_PORT_VMM": "9500",
        "EMU_VMM": "1",
        "EMU_GATEWAY": "1",
        "EMU_BASE_DOMAIN": "apps.test",
        "EMU_APP_HOST": "my-app",
        "EMU_PORT_INGRESS": "9600",
        "EMU_AUTH": "src=eth",
        "EMU_ETH_RPC_URL": "http://node:8545",
        "EMU_KMS_CONTRACT": "0x12",
        "EMU_ETH_BLOCK_CACHE": "4",
        "EMU_OTLP": "http://otel:4318",
    }
    assert arguments_of(started, "up", "--release", "0.6", **settings) == [
        *["up", "--listen", "0.0.0.0", "--state", "/state"],
        *["--port", "ingress=9600", "--port", "vmm=9500", "--port", "kms-src=9400"],
        *["--domain", "stack", "--domain", "other"],
        *["--auth", "src=eth", "--eth-block-cache", "4", "--kms-contract", "0x12", "--eth-rpc-url", "http://node:8545"],
        *["--otlp", "http://otel:4318"],
        *["--gateway", "--app-host", "my-app", "--base-domain", "apps.test"],
        "--vmm",
        "--seed=--a 'b",
        *["--auth-contract", "next", "--release", "0.5", "--fresh", "--release", "0.6"],
    ]
    assert arguments_of(started, EMU_START="ready") == arguments_of(started)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("EMU_START", "now", "ready or fresh expected, got 'now'"),
        ("EMU_VMM", "yes", "1 or nothing expected, got 'yes'"),
        ("EMU_GATEWAY", "yes", "1 or nothing expected, got 'yes'"),
    ],
)
def test_setting_with_another_value_is_refused(started: Path, name: str, value: str, expected: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        arguments_of(started, **{name: value})
    assert (caught.value.returncode, caught.value.stdout) == (2, "")
    assert caught.value.stderr == f"Error: {name}: {expected}\n"
    assert arguments_of(started, "quote", **{name: value}) == ["quote"]
