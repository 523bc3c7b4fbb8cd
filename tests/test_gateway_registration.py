"""Registration of a machine at its gateway, at a boot and later, against a gateway that is not ours."""

import base64
import configparser
import datetime
import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dstack_emu.testing import LiveStack
from tests.ports import refusing_port
from tests.their_gateway import TheirGateway, certificate_of, their_gateway
from tests.vmm import COMPOSE, VmmClient

COMPOSE_FILE = json.dumps(
    json.loads(COMPOSE)
    | {
        "manifest_version": "3",
        "gateway_enabled": True,
        "port_policy": {"ports": [{"port": 80, "pp": True}], "restrict_mode": True},
        "requirements": {"health_check": True},
    }
)
APP_ID = hashlib.sha256(COMPOSE_FILE.encode()).hexdigest()[:40]
OID_APP_INFO = x509.ObjectIdentifier("1.3.6.1.4.1.62397.1.9")
OID_QUOTE = x509.ObjectIdentifier("1.3.6.1.4.1.62397.1.8")
NO_ROUTE = "dstack-gateway registration failed, the app has no ingress route: "
ALL_DOWN = "Failed to register CVM, all dstack-gateway urls are down: Failed to register CVM: "


def allow(stack: LiveStack, *, gateway_app_id: str) -> None:
    """Allow the app, and name it a gateway."""
    policy = stack.control.policy("src")
    compose_hash = hashlib.sha256(COMPOSE_FILE.encode()).hexdigest()
    policy["apps"][f"0x{APP_ID}"] = {"composeHashes": [f"0x{compose_hash}"], "devices": [], "allowAnyDevice": True}
    policy["gatewayAppId"] = gateway_app_id
    stack.control.set_policy("src", policy)


@pytest.fixture
def gateway(vmm_stack: LiveStack) -> Iterator[TheirGateway]:
    """A gateway in the trust domain of the stack's app, which the policy names."""
    allow(vmm_stack, gateway_app_id=vmm_stack.description["app"]["app_id"])
    with run_gateway(vmm_stack) as running:
        yield running


def run_gateway(stack: LiveStack) -> Any:
    chain, key = certificate_of(stack.description["app"]["dstack_sock"])
    return their_gateway(chain, key, Path(stack.description["kms_ca"]).read_text())


def boot(vmm: VmmClient, *urls: str) -> tuple[str, Any]:
    vm_id = vmm.deploy(compose_file=COMPOSE_FILE, gateway_urls=list(urls))
    return vm_id, vmm.booted(vm_id)


def folder(stack: LiveStack, vm_id: str) -> Path:
    return Path(stack.description["state"]) / "vms" / vm_id


def test_machine_registers_with_a_certificate_that_names_its_app(
    vmm: VmmClient, vmm_stack: LiveStack, gateway: TheirGateway
) -> None:
    vm_id, info = boot(vmm, gateway.url)
    assert (info["status"], info["boot_progress"], info["boot_error"]) == ("running", "done", "")
    progress = [event["body"] for event in info["events"] if event["event"] == "boot.progress"]
    assert progress.index("data disk ready") < progress.index("setting up dstack-gateway") < progress.index("done")
    ((path, body, certificate),) = gateway.requests
    assert path == "/prpc/RegisterCvm?json"
    assert body["health_check"] is True
    assert body["port_policy"] == {"ports": [{"port": 80, "pp": True}], "restrict_mode": True}
    assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "dstack-guest-agent"
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    info_bytes = certificate.extensions.get_extension_for_oid(OID_APP_INFO).value.public_bytes()
    assert bytes.fromhex(APP_ID) in info_bytes
    assert bytes.fromhex(info["instance_id"]) in info_bytes
    with pytest.raises(x509.ExtensionNotFound):
        certificate.extensions.get_extension_for_oid(OID_QUOTE)
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=9, hours=23) < left <= datetime.timedelta(days=10)
    _assert_files(folder(vmm_stack, vm_id), body["client_public_key"])
    vmm.rpc("StopVm", id=vm_id)
    assert not (folder(vmm_stack, vm_id) / "dstack-wg0.conf").exists()
    assert not (folder(vmm_stack, vm_id) / "gateway-cache.json").exists()


def _assert_files(machine: Path, public_key: str) -> None:
    text = (machine / "dstack-wg0.conf").read_text()
    interface, *peers = text.split("[Peer]\n")
    parser = configparser.ConfigParser()
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # as configparser's documents do it
    parser.read_string(interface)
    own = parser["Interface"]
    assert (own["ListenPort"], own["Address"]) == ("9182", "10.4.0.7/32")
    private = base64.b64decode(own["PrivateKey"])
    assert (private[0] & 7, private[31] & 192) == (0, 64)  # as `wg genkey` makes them
    public = X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    assert base64.b64encode(public).decode() == public_key
    assert [peer.splitlines()[:4] for peer in peers] == [
        [
            f"PublicKey = {key}",
            f"AllowedIPs = 10.4.0.{number}/32",
            f"Endpoint = 192.0.2.{number}:51820",
            "PersistentKeepalive = 25",
        ]
        for key, number in (
            ("Zmlyc3QgaW4gb3JkZXIsIHNlY29uZCBpbiBhbnN3ZXI=", 1),
            ("c2Vjb25kIGluIG9yZGVyLCBmaXJzdCBpbiBhbnN3ZXI=", 2),
        )
    ]
    cache = json.loads((machine / "gateway-cache.json").read_text())
    assert (cache["wg_sk"], cache["wg_pk"]) == (own["PrivateKey"], public_key)
    assert {path.stat().st_mode & 0o777 for path in (machine / "dstack-wg0.conf", machine / "gateway-cache.json")} == {
        0o600
    }


def test_gateway_before_0_5_6_is_shown_a_certificate_with_evidence(vmm: VmmClient, gateway: TheirGateway) -> None:
    gateway.answers.append((400, {"error": "neither app-info nor no attestation provided"}))
    _, info = boot(vmm, gateway.url)
    assert info["boot_error"] == ""
    certificates = [certificate for _, _, certificate in gateway.requests]
    has_evidence = [OID_QUOTE in {each.oid for each in found.extensions} for found in certificates]
    assert has_evidence == [False, True]
    assert certificates[0].public_key() == certificates[1].public_key()


def test_next_gateway_is_asked_and_the_first_error_is_reported(vmm: VmmClient, gateway: TheirGateway) -> None:
    with refusing_port() as port:
        _, info = boot(vmm, f"https://127.0.0.1:{port}", gateway.url)
        assert info["boot_error"] == ""
        gateway.answers.append((400, {"error": "app not welcome"}))
        _, info = boot(vmm, gateway.url, f"https://127.0.0.1:{port}")
    error = f'{NO_ROUTE}{ALL_DOWN}Request failed with status=400 Bad Request, error={{"error": "app not welcome"}}'
    assert (info["status"], info["boot_progress"], info["boot_error"]) == ("running", "done", error)


def test_machine_registers_again_by_the_clock_and_after_a_failure_sooner(
    vmm: VmmClient, vmm_stack: LiveStack, gateway: TheirGateway
) -> None:
    vm_id, _ = boot(vmm, gateway.url)
    gateway.wait_for_request()
    vmm_stack.control.set_clock(advance=179)
    vmm_stack.control.set_clock(advance=2)
    gateway.wait_for_request()
    assert len(gateway.requests) == 2
    keys = {(body["client_public_key"], certificate.serial_number) for _, body, certificate in gateway.requests}
    assert len(keys) == 1
    vmm.rpc("StopVm", id=vm_id)
    gateway.answers.append((400, {"error": "not yet"}))
    vm_id, info = boot(vmm, gateway.url)
    gateway.wait_for_request()
    assert info["boot_error"].startswith(NO_ROUTE)
    assert not (folder(vmm_stack, vm_id) / "dstack-wg0.conf").exists()
    assert (folder(vmm_stack, vm_id) / "gateway-cache.json").exists()  # what it made is kept for the next attempt
    vmm_stack.control.set_clock(advance=31)
    gateway.wait_for_request()
    assert gateway.requests[-1][2].serial_number == gateway.requests[-2][2].serial_number


def test_gateway_of_another_app_is_refused_unless_any_is_allowed(
    vmm: VmmClient, vmm_stack: LiveStack, gateway: TheirGateway
) -> None:
    app_id = vmm_stack.description["app"]["app_id"]
    allow(vmm_stack, gateway_app_id="ab" * 20)
    _, info = boot(vmm, gateway.url)
    where = f"failed to validate the server attestation of {gateway.url}/prpc: "
    assert info["boot_error"] == f"{NO_ROUTE}{ALL_DOWN}{where}Invalid dstack-gateway app id: {app_id}"
    # A text that contains the app id allows it, as upstream's does.
    allow(vmm_stack, gateway_app_id=f"0x{app_id.upper()}, 0x{'ab' * 20}")
    assert boot(vmm, gateway.url)[1]["boot_error"] == ""
    allow(vmm_stack, gateway_app_id="")
    _, info = boot(vmm, gateway.url)
    assert info["boot_error"] == f"{NO_ROUTE}Missing allowed dstack-gateway app id"
    allow(vmm_stack, gateway_app_id="any")
    assert boot(vmm, gateway.url)[1]["boot_error"] == ""


def test_gateway_with_a_certificate_of_another_root_is_refused_unless_any_is_allowed(
    vmm: VmmClient, vmm_stack: LiveStack, tmp_path: Path
) -> None:
    files = ["-keyout", f"{tmp_path}/key.pem", "-out", f"{tmp_path}/cert.pem"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", *files]
    subprocess.run([*made, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True, timeout=30)
    certificate, key = ((tmp_path / name).read_text() for name in ("cert.pem", "key.pem"))
    allow(vmm_stack, gateway_app_id="ab" * 20)
    with their_gateway(certificate, key, Path(vmm_stack.description["kms_ca"]).read_text()) as gateway:
        _, info = boot(vmm, gateway.url)
        assert info["boot_error"].startswith(f"{NO_ROUTE}{ALL_DOWN}Failed to send request: ")
        assert "certificate verify failed: self-signed certificate" in info["boot_error"]
        assert gateway.requests == []
        allow(vmm_stack, gateway_app_id="any")
        assert boot(vmm, gateway.url)[1]["boot_error"] == ""


def test_machine_without_gateway_urls_has_no_route(vmm: VmmClient, vmm_stack: LiveStack) -> None:
    allow(vmm_stack, gateway_app_id="any")
    vm_id, info = boot(vmm)
    assert (info["status"], info["boot_progress"]) == ("running", "done")
    assert info["boot_error"] == f"{NO_ROUTE}Missing gateway urls"
    assert f"error: {NO_ROUTE}Missing gateway urls\n" in vmm.ask(f"/logs?id={vm_id}")[1].decode()
