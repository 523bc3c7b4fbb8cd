"""The KMS authorization runbook, step by step: curl, openssl, and policy files that are copied over one another.

Source of the steps: test cases 1 to 4 of dstack's runbook for KMS self authorization. Nothing is restarted, and nothing
is waited for but an answer.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests import foreign
from tests.foreign import Guest
from tests.recorded import golden
from tests.running import RunningStack, running_stack

WRONG_MR = "00" * 32
SRC_DOMAIN, DST_DOMAIN = "kms-src.example.test", "kms-dst.example.test"
TEMP_CA = "KMS.GetTempCaCert"


class Runbook:
    """Policy variants beside a stack, made of what its KMS say they measure, and the steps that several cases share."""

    def __init__(self, stack: RunningStack, folder: Path) -> None:
        self.stack, self._folder = stack, folder
        measured = stack.description["kms"]
        src, dst = measured["src"], measured["dst"]
        self._write("deny-by-mr", [src["os_image_hash"]], [WRONG_MR])
        self._write("allow-src", [src["os_image_hash"]], [src["mr_aggregated"]])
        self._write(
            "allow-both", [src["os_image_hash"], dst["os_image_hash"]], [src["mr_aggregated"], dst["mr_aggregated"]]
        )

    def _write(self, name: str, os_images: list[str], measurements: list[str]) -> None:
        policy = {
            "osImages": [f"0x{image}" for image in os_images],
            "gatewayAppId": "any",
            "kms": {"mrAggregated": [f"0x{mr}" for mr in measurements], "devices": [], "allowAnyDevice": True},
            "apps": {},
        }
        (self._folder / f"{name}.json").write_text(json.dumps(policy, indent=2))

    def apply(self, side: str, name: str) -> None:
        """Copy a variant over the policy of one side."""
        shutil.copyfile(self._folder / f"{name}.json", self.stack.policies[side])

    def bootstrap(self) -> tuple[int, dict[str, Any]]:
        """Ask the source to bootstrap."""
        return self.stack.rpc("kms-src", "Onboard.Bootstrap", {"domain": SRC_DOMAIN})

    def onboard(self) -> tuple[int, dict[str, Any]]:
        """Ask the destination to onboard from the source."""
        source = self.stack.services["kms-src"].replace("http://", "https://")
        return self.stack.rpc("kms-dst", "Onboard.Onboard", {"source_url": f"{source}/prpc", "domain": DST_DOMAIN})

    def finish(self, service: str) -> None:
        """End a KMS's onboard phase; it answers OK, and TLS on the same port from then on."""
        assert self.stack.curl(f"{self.stack.services[service]}/finish") == (200, "OK")

    def error(self, answer: tuple[int, dict[str, Any]]) -> str:
        """The text of a refusal."""
        status, body = answer
        assert (status, list(body)) == (400, ["error"])
        return str(body["error"])


@pytest.fixture
def runbook(fresh_stack: RunningStack, tmp_path: Path) -> Runbook:
    """The runbook's starting point."""
    return Runbook(fresh_stack, tmp_path)


def openssl(*arguments: str, stdin: str = "") -> str:
    """Run openssl; return what it says on both outputs."""
    both: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    run = subprocess.run(["openssl", *arguments], input=stdin.encode(), timeout=20, check=False, **both)
    return bytes(run.stdout).decode(errors="replace")


def handshake(url: str, *arguments: str) -> str:
    """Connect to a KMS with `openssl s_client` and hang up."""
    return openssl("s_client", "-connect", urlsplit(url).netloc, *arguments)


# ---- preparations


def test_fresh_stack_waits_where_the_runbook_begins(fresh_stack: RunningStack) -> None:
    for side in ("src", "dst"):
        kms, auth = fresh_stack.services[f"kms-{side}"], fresh_stack.services[f"auth-{side}"]
        assert kms.startswith("http://")
        assert fresh_stack.curl(f"{kms}/")[0] == 200
        assert json.loads(fresh_stack.curl(f"{auth}/")[1])["status"] == "ok"
        status, info = fresh_stack.rpc(f"kms-{side}", "Onboard.GetAttestationInfo")
        assert status == 200
        assert info == fresh_stack.description["kms"][side]
        assert [len(info[name]) for name in ("device_id", "mr_aggregated", "os_image_hash")] == [64, 64, 64]
        assert info["tee_variant"] == "dstack-tdx"
        policy = json.loads(fresh_stack.policies[side].read_text())
        assert policy["kms"] == {"mrAggregated": [], "devices": [], "allowAnyDevice": True}
    assert len({fresh_stack.description["kms"][side]["mr_aggregated"] for side in ("src", "dst")}) == 2


# ---- cases 1 and 2


def test_bootstrap_follows_the_policy(runbook: Runbook) -> None:
    stack = runbook.stack
    refused = "KMS is not allowed to bootstrap: boot denied: "
    assert runbook.error(runbook.bootstrap()) == refused + "OS image is not allowed"  # the placeholder policy
    runbook.apply("src", "deny-by-mr")
    assert runbook.error(runbook.bootstrap()) == refused + "aggregated MR not allowed"
    assert not list(Path(stack.description["kms_ca"]).parent.iterdir()), "a refused bootstrap leaves no keys"

    runbook.apply("src", "allow-src")
    status, keys = runbook.bootstrap()
    assert status == 200
    assert sorted(keys) == ["attestation", "ca_pubkey", "k256_pubkey"]
    assert keys["attestation"]
    assert runbook.error(runbook.bootstrap()) == "KMS has already been bootstrapped"
    runbook.finish("kms-src")

    status, meta = stack.rpc("kms-src", "KMS.GetMeta")
    assert status == 200
    assert meta["k256_pubkey"] == keys["k256_pubkey"]
    assert meta["bootstrap_info"] == keys
    assert meta["ca_cert"] == Path(stack.description["kms_ca"]).read_text()
    assert ca_pubkey(meta["ca_cert"]) == keys["ca_pubkey"]
    # The same by GET, as a browser asks, and with the certificate checked under the name it was made for.
    url = stack.services["kms-src"].replace("http://", "https://")
    status, text = stack.curl(f"{url}/prpc/KMS.GetMeta")
    assert (status, json.loads(text)) == (200, meta)
    assert verified(stack, url, SRC_DOMAIN)
    assert not verified(stack, url, DST_DOMAIN)


def verified(stack: RunningStack, url: str, name: str) -> bool:
    """Whether openssl takes a KMS for one of that name under the root of the source KMS."""
    said = handshake(url, "-CAfile", stack.description["kms_ca"], "-verify_hostname", name)
    return "Verify return code: 0 (ok)" in said


def ca_pubkey(certificate: str) -> str:
    """SPKI of a PEM certificate in hex, by openssl."""
    pem = openssl("x509", "-noout", "-pubkey", stdin=certificate)
    command = ["openssl", "pkey", "-pubin", "-outform", "DER"]
    return subprocess.run(command, input=pem.encode(), capture_output=True, timeout=20, check=True).stdout.hex()


def test_finish_without_keys_ends_with_a_failure() -> None:
    with running_stack("--fresh") as stack:
        assert stack.curl(f"{stack.services['kms-src']}/finish") == (200, "OK")
        status, stderr = stack.ended()
    assert status == 1
    assert stderr.endswith("Error: kms-src ended: Failed to onboard\n")


# ---- case 3


def test_onboarding_follows_the_policies_of_both_sides(runbook: Runbook) -> None:
    stack = runbook.stack
    runbook.apply("src", "allow-both")
    assert runbook.bootstrap()[0] == 200
    runbook.finish("kms-src")

    runbook.apply("dst", "deny-by-mr")
    refused = "Failed to onboard: Source KMS is not allowed for onboarding: boot denied: aggregated MR not allowed"
    assert runbook.error(runbook.onboard()) == refused

    # The receiver allows the source now, but the source does not know the receiver.
    runbook.apply("dst", "allow-src")
    runbook.apply("src", "allow-src")
    refusal = runbook.error(runbook.onboard())
    assert refusal.startswith("Failed to onboard: Request failed with status=400 Bad Request, error=")
    assert "Boot denied: aggregated MR not allowed" in refusal
    # Nor does a source that denies itself hand out anything.
    runbook.apply("src", "deny-by-mr")
    assert "KMS self authorization failed: KMS is not allowed: aggregated MR" in runbook.error(runbook.onboard())
    certs = Path(stack.description["state"], "kms-dst", "certs")
    assert not list(certs.iterdir()), "a refused onboarding leaves no keys"

    runbook.apply("src", "allow-both")
    status, onboarded = runbook.onboard()
    assert status == 200
    assert runbook.error(runbook.onboard()) == "KMS has already been onboarded"
    runbook.finish("kms-dst")

    metas = {side: stack.rpc(f"kms-{side}", "KMS.GetMeta")[1] for side in ("src", "dst")}
    assert metas["src"]["k256_pubkey"] == metas["dst"]["k256_pubkey"] == onboarded["k256_pubkey"]
    assert ca_pubkey(metas["src"]["ca_cert"]) == ca_pubkey(metas["dst"]["ca_cert"])
    assert metas["dst"]["bootstrap_info"] is None
    # Each has a certificate of its own under the one root.
    for side, domain in (("src", SRC_DOMAIN), ("dst", DST_DOMAIN)):
        assert verified(stack, stack.services[f"kms-{side}"], domain)
    # The destination's own policy does not allow it, so it may not hand out a thing; its source may.
    refusal = runbook.error(stack.rpc("kms-dst", TEMP_CA))
    assert refusal == "KMS self authorization failed: KMS is not allowed: aggregated MR not allowed"
    assert stack.rpc("kms-src", TEMP_CA)[0] == 200


# ---- case 4


class Caller:
    """A trust domain that calls a KMS by curl: with a client certificate over its evidence, made once."""

    def __init__(self, stack: RunningStack, agent: str, folder: Path) -> None:
        self._stack, self._agent = stack, agent
        guest = Guest.of(stack.services["kms-src"], stack.services[agent])
        identity = guest.identity()
        self._file = folder / f"{agent}.pem"
        key = identity.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self._file.write_bytes(key + identity.certificate.public_bytes(Encoding.PEM))

    def ask(self, rpc: str, arguments: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """POST one RPC in JSON."""
        url = f"{self._stack.services['kms-src']}/prpc/{rpc}?json"
        status, text = self._stack.curl(url, "--cert", str(self._file), "-d", json.dumps(arguments))
        return status, json.loads(text)

    def signing_request(self) -> dict[str, Any]:
        """Arguments of SignCert for a new key of this domain."""
        key = foreign.new_key()
        evidence = foreign.attest(self._stack.services[self._agent], foreign.spki_of(key))
        return foreign.signing_request(key, evidence, "runbook.example.test")


TRUSTED = {
    TEMP_CA: ["ca_cert", "temp_ca_cert", "temp_ca_key"],
    "KMS.GetKmsKey": ["keys", "temp_ca_key"],
    "KMS.GetAppKey": [
        *("ca_cert", "disk_crypt_key", "env_crypt_key", "gateway_app_id"),
        *("k256_key", "k256_signature", "os_image_hash", "tproxy_app_id"),
    ],
    "KMS.SignCert": ["certificate_chain"],
    "KMS.GetAppEnvEncryptPubKey": ["public_key", "signature", "signature_v1", "timestamp"],
}
"""Each RPC that is gated, and what it answers."""


@pytest.mark.parametrize("rpc", TRUSTED)
def test_trusted_rpc_follows_the_policy(ready_stack: RunningStack, tmp_path: Path, rpc: str) -> None:
    book, policy = Runbook(ready_stack, tmp_path), ready_stack.policies["src"]
    shutil.copyfile(policy, tmp_path / "allow-all.json")
    caller = Caller(ready_stack, "agent-dst" if rpc == "KMS.GetKmsKey" else "app", tmp_path)
    arguments: dict[str, Any] = {"app_id": "11" * 20} if rpc == "KMS.GetAppEnvEncryptPubKey" else {}
    if rpc == "KMS.SignCert":
        arguments = caller.signing_request()
    before = caller.ask(rpc, arguments)
    assert (before[0], sorted(before[1])) == (200, TRUSTED[rpc])
    try:
        for _ in range(2):
            book.apply("src", "deny-by-mr")
            refusal = book.error(caller.ask(rpc, arguments))
            assert refusal == "KMS self authorization failed: KMS is not allowed: aggregated MR not allowed"
            assert ready_stack.rpc("kms-dst", TEMP_CA)[0] == 200
            assert ready_stack.rpc("kms-src", "KMS.GetMeta")[0] == 200
            book.apply("src", "allow-all")
            assert _but_time(caller.ask(rpc, arguments)) == _but_time(before)
    finally:
        book.apply("src", "allow-all")


def _but_time(answer: tuple[int, dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    status, body = answer
    return status, {name: value for name, value in body.items() if name not in ("timestamp", "signature_v1")}


# ---- the runtime listener


@pytest.mark.parametrize("side", ["src", "dst"])
def test_rpc_certificate_carries_usage_and_attestation(ready_stack: RunningStack, side: str) -> None:
    certificate = handshake(ready_stack.services[f"kms-{side}"])
    text = openssl("x509", "-noout", "-text", "-certopt", "ext_dump", stdin=certificate)
    lines = [line.strip() for line in text.splitlines()]
    usage = lines.index("1.3.6.1.4.1.62397.1.4:")
    dump = bytes.fromhex(lines[usage + 1].split(" - ")[1].split("   ")[0].replace("-", " "))
    assert dump == b"\x04\x07kms:rpc"
    attestation = lines[lines.index("1.3.6.1.4.1.62397.1.8:") + 1].split(" - ")[1]
    assert attestation.startswith("04 82"), "an OCTET STRING of some kilobytes"
    assert "critical" not in lines[usage]
    assert "Issuer: O = Dstack, CN = Dstack KMS CA" in lines
    assert "Subject: CN = 127.0.0.1" in lines
    assert "IP Address:127.0.0.1" in lines


def test_tls_versions_as_recorded(ready_stack: RunningStack) -> None:
    assert golden("tls.json")["listener"] == "TLS 1.3 and 1.2 accepted, 1.1 refused"
    url = ready_stack.services["kms-src"]
    weak = ("-cipher", "DEFAULT@SECLEVEL=0")  # or openssl itself refuses to speak 1.1
    assert "tlsv1 alert protocol version" in handshake(url, "-tls1_1", *weak)
    assert "New, TLSv1.2, Cipher is ECDHE-ECDSA-" in handshake(url, "-tls1_2")
    assert "New, TLSv1.3, Cipher is TLS_" in handshake(url, "-tls1_3")


def test_tls_shows_the_leaf_alone_and_asks_for_a_certificate(ready_stack: RunningStack) -> None:
    recorded = golden("tls.json")
    assert recorded["server_sends_chain"].startswith("leaf only")
    assert recorded["client_auth"].startswith("requested, not required")
    said = handshake(ready_stack.services["kms-src"], "-tls1_2", "-showcerts")
    assert said.count("-----BEGIN CERTIFICATE-----") == 1
    assert "Client Certificate Types: " in said
    assert "New, TLSv1.2" in said


def test_printed_kms_ca_is_enough_for_curl(ready_stack: RunningStack) -> None:
    command = ["curl", "-sS", "--cacert", ready_stack.description["kms_ca"]]
    for side in ("src", "dst"):
        url = f"{ready_stack.services[f'kms-{side}']}/prpc/KMS.GetTempCaCert?json"
        run = subprocess.run([*command, url], capture_output=True, text=True, timeout=20, check=False)
        assert run.stderr == ""
        assert "temp_ca_key" in json.loads(run.stdout)
