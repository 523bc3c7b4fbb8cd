"""Nothing emulated must start by accident where real machines could get its keys, or have a part."""

import json
import re
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.production import reality_of
from tests.commands import run_command, usage_error
from tests.kms_process import World, ends, running, variables, write_kms_toml
from tests.recorded import external_path, intel_root

PCCS = "http://127.0.0.1:9"


def emulated_root() -> bytes:
    """The root certificate of an emulated vendor, PEM."""
    return Intel(Seed.of("production")).root.public_bytes(Encoding.PEM)


@pytest.fixture
def nobody(tmp_path: Path) -> World:
    """A world in which nothing answers: a KMS refuses before it asks."""
    return World("unix:/nonexistent", PCCS, str(tmp_path / "root.pem"), "")


def without_root(folder: Path, world: World) -> None:
    path = write_kms_toml(folder, world)
    path.write_text(re.sub("(?m)^(insecure|root_ca).*\n", "", path.read_text()))


def test_kms_refuses_the_root_of_intel_unless_it_is_told_to_trust_it(nobody: World, tmp_path: Path) -> None:
    without_root(tmp_path, nobody)
    status, said = ends(tmp_path, nobody)
    assert status == 2
    assert f"{tmp_path}/kms.toml: the root certificate is Intel's own." in said
    assert "or add --trust-production" in said
    with running(tmp_path, nobody, "--trust-production") as kms:
        assert kms.description["phase"] == "onboard"


def test_kms_refuses_the_root_of_intel_in_a_file(nobody: World, tmp_path: Path) -> None:
    Path(nobody.root_ca).write_bytes(intel_root())
    status, said = ends(tmp_path, nobody)
    assert (status, "the root certificate is Intel's own" in said) == (2, True)


def test_kms_refuses_a_pccs_for_real_hardware(nobody: World, tmp_path: Path) -> None:
    Path(nobody.root_ca).write_bytes(emulated_root())
    key = variables({"core.attestation.urls.pccs": "https://PCCS.phala.network./tdx"})
    status, said = ends(tmp_path, nobody, **key)
    assert (status, "the PCCS at pccs.phala.network serves real hardware" in said) == (2, True)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8081", "http://pccs:8081", "https://notintel.com", "", "http://[::1]:1"]
)
def test_emulated_root_with_a_pccs_of_ones_own_is_not_production(url: str) -> None:
    anchor = TrustAnchor.of(x509.load_pem_x509_certificate(emulated_root()))
    assert reality_of(anchor, url) == ""


REAL_PCCS = "https://pccs.phala.network"


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        (("verifier", "--pccs", REAL_PCCS), "evidence of real hardware is verified with --intel alone"),
        (("agent", "--pccs", REAL_PCCS), "it knows no platform of the emulated Intel"),
        (("vmm", "--pccs", REAL_PCCS), "a machine here is of the emulated Intel: see --root and --pccs"),
    ],
)
def test_commands_refuse_a_pccs_for_real_hardware(command: tuple[str, ...], advice: str) -> None:
    assert usage_error(*command) == f"the PCCS at pccs.phala.network serves real hardware: {advice}"


def test_root_of_intel_in_a_file_is_trusted_under_its_own_name_alone(tmp_path: Path) -> None:
    file, quote = tmp_path / "root.pem", external_path("intel-tdx-quote.bin")
    file.write_bytes(intel_root())
    for command in (("verify", str(quote)), ("verifier",)):
        said = usage_error(*command, "--root", str(file))
        assert said.startswith(
            "the root certificate is Intel's own: evidence of real hardware is verified with --intel"
        )
    assert usage_error("vmm", "--root", str(file)).startswith("the root certificate is Intel's own: a machine here is")
    assert run_command("verify", str(quote), "--intel", "--collateral", str(file)).returncode == 2  # which is none


def test_gateway_refuses_the_root_of_intel_unless_it_verifies_nothing(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text("")
    said = usage_error("gateway", "--config", str(file))
    assert said.startswith(f"{file}: the root certificate is Intel's own. This gateway is an emulator")


ELSEWHERE = {
    "services": dict.fromkeys(("auth-src", "auth-dst", "kms-src", "kms-dst", "pccs"), "http://127.0.0.1:9"),
    "policies": {"src": "a", "dst": "b"},
}
"""The description of a stack that names a PCCS and no root."""


def test_runbook_judges_real_hardware_with_intel_alone(tmp_path: Path) -> None:
    file, own, intels = (tmp_path / name for name in ("stack.json", "root.pem", "intel.pem"))
    own.write_bytes(emulated_root())
    intels.write_bytes(intel_root())
    real = {**ELSEWHERE["services"], "pccs": REAL_PCCS}
    for description, what in (
        (ELSEWHERE, "the root certificate is Intel's own"),
        ({**ELSEWHERE, "root_ca": str(intels)}, "the root certificate is Intel's own"),
        ({**ELSEWHERE, "root_ca": str(own), "services": real}, "the PCCS at pccs.phala.network serves real hardware"),
    ):
        file.write_text(json.dumps(description))
        assert usage_error("runbook", "--against", str(file)) == (
            f"{what}: in {file}, root_ca and services.pccs of an emulated stack are expected, or --intel, which judges "
            "real hardware"
        )
    said = run_command("runbook", "--against", str(file), "--intel", "--wait", "0").stderr.decode()
    assert said.startswith("Error: kms-src at http://127.0.0.1:9 does not say what it measures")
