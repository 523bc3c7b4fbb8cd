"""An emulated KMS must not start by accident where real machines could get its keys."""

import re
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.production import reality_of
from tests.kms_process import World, ends, running, variables, write_kms_toml
from tests.recorded import external_path

PCCS = "http://127.0.0.1:9"


def intel_root() -> bytes:
    """The root certificate in a quote of real hardware, PEM."""
    quote = external_path("intel-tdx-quote.bin").read_bytes()
    found: list[bytes] = re.findall(rb"-----BEGIN.*?-----END CERTIFICATE-----\n", quote, re.DOTALL)
    return found[-1]


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
