"""The gateway of a stack: apps, machines and KMS behind it, reached by curl and openssl."""

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from dstack_sdk import DstackClient

from dstack_emu.cli.stack_summary import summary
from dstack_emu.control.schemas import ControlError
from dstack_emu.deployment.environment import environment
from dstack_emu.deployment.errors import StackError
from dstack_emu.testing import LiveGateway, LiveStack
from tests import tls
from tests.vmm import COMPOSE, VmmClient, configuration


@pytest.fixture(scope="module")
def shared_stack() -> Iterator[LiveStack]:
    with LiveStack(gateway=True, vmm=True) as stack:
        yield stack


@pytest.fixture
def stack(shared_stack: LiveStack) -> LiveStack:
    shared_stack.reset()
    return shared_stack


@pytest.fixture
def dstack_stack(stack: LiveStack) -> LiveStack:
    """The stack of the pytest plugin's fixtures."""
    return stack


def curl(url: str, *options: str, ca: Path | None = None) -> subprocess.CompletedProcess[str]:
    trust = ["--cacert", str(ca)] if ca else []
    command = ["curl", "-sS", "--max-time", "20", *trust, *options, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def fetch(stack: LiveStack, app: str, port: int, path: str = "/", *options: str) -> str:
    """Fetch a page behind the gateway, with TLS terminated there."""
    done = curl(stack.gateway.url_of(app, port) + path, *options, ca=stack.gateway.ca)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def program(text: str) -> Iterator[int]:
    """Run the program of an app on this host; return its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"{text} {self.path} {self.headers['Host']}".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def kms_instance(stack: LiveStack, name: str = "kms-src") -> str:
    instance: str = stack.control.guest(name)["instance_id"]
    return instance


def test_app_of_the_stack_is_reached_by_its_instance_and_its_app_id(stack: LiveStack) -> None:
    app = stack.description["app"]
    with program("hello from") as port:
        for name in (app["instance_id"], app["app_id"]):
            host = stack.gateway.name_of(name, port)
            assert fetch(stack, name, port, "/x") == f"hello from /x {host}:{stack.gateway.ingress[1]}"
    while len(records := stack.journal.find("Connect", service="ingress")) < 2:
        pass  # the client has ended, and the connection is being ended
    assert [(each["connection"]["id"], each["connection"]["port"]) for each in records] == [
        (app["instance_id"], port),
        (app["app_id"], port),
    ]
    assert {each["connection"]["instance_id"] for each in records} == {app["instance_id"]}
    assert {each["connection"]["ended"] for each in records} == {"complete"}
    assert {each["connection"]["client"].rpartition(":")[0] for each in records} == {"127.0.0.1"}


def test_app_url_leads_to_the_agent_of_the_app(stack: LiveStack) -> None:
    app, gateway = stack.description["app"], stack.description["gateway"]
    host, port = stack.gateway.ingress
    assert stack.services["ingress"] == f"{host}:{port}"
    assert gateway["app_url"] == f"https://{app['instance_id']}-8090.app.localhost:{port}"
    assert stack.gateway.instances[app["instance_id"]]["app_url"] == gateway["app_url"]
    done = curl(f"{gateway['app_url']}/prpc/Worker.Version?json", ca=stack.gateway.ca)
    assert json.loads(done.stdout)["version"] == "0.6.0"


def test_fixture_of_the_plugin_reaches_the_app(dstack_gateway: LiveGateway, stack: LiveStack) -> None:
    app = stack.description["app"]
    assert dstack_gateway.url == stack.services["gateway"]
    assert list(dstack_gateway.instances) == [app["instance_id"]]
    shown = curl(f"{dstack_gateway.url_of(app['app_id'], 8090)}/Info", ca=dstack_gateway.ca).stdout
    assert json.loads(shown)["app_id"] == app["app_id"]
    assert dstack_gateway.name_of("app", suffix="s") == "app-s.app.localhost"
    assert dstack_gateway.name_of("app") == "app.app.localhost"


def test_app_has_the_files_of_its_registration_while_it_runs(stack: LiveStack) -> None:
    folder = Path(stack.description["state"]) / "app"
    address = stack.gateway.instances[stack.description["app"]["instance_id"]]["ip"]
    for name, part in (("dstack-wg0.conf", f"Address = {address}/32\n"), ("gateway-cache.json", '"wg_sk":')):
        assert part in (folder / name).read_text()
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    stack.trust_domain("other")
    stack.policy("src").allow("other")
    assert stack.control.boot_guest("other")["boot_error"] == ""
    assert (folder.parent / "other/dstack-wg0.conf").exists()
    assert len({each["ip"] for each in stack.gateway.instances.values()}) == 2
    stack.control.remove_guest("other")
    assert not (folder.parent / "other/dstack-wg0.conf").exists()


def test_app_of_no_registration_is_closed_and_the_journal_says_why(stack: LiveStack) -> None:
    done = curl(stack.gateway.url_of("ab" * 20, 80), ca=stack.gateway.ca)
    assert (done.returncode, done.stdout) == (35, "")
    (record,) = stack.journal.find("Connect", outcome="unanswered")
    assert record["error"] == f"app <{'ab' * 20}> not found"


def test_gateway_has_its_certificate_and_its_keys_from_the_kms_of_the_stack(stack: LiveStack) -> None:
    host, _, port = stack.gateway.url.removeprefix("https://").rpartition(":")
    shown = subprocess.run(
        [
            "openssl",
            "s_client",
            "-connect",
            f"{host}:{port}",
            "-CAfile",
            stack.description["kms_ca"],
            "-verify_ip",
            host,
        ],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=30,
        check=False,
    ).stdout
    assert "Verify return code: 0 (ok)" in shown
    assert "CN = dstack-gateway" in shown
    app_id = stack.control.guest("gateway")["app_id"]
    for side in ("src", "dst"):
        policy = stack.control.policy(side)
        assert policy["gatewayAppId"] == f"0x{app_id}"
        assert f"0x{app_id}" in policy["apps"]
    assert (
        json.loads(curl(f"{stack.gateway.admin_url}/prpc/Admin.Status").stdout)["hosts"][0]["instance_id"]
        == (stack.description["app"]["instance_id"])
    )


def test_every_service_is_healthy_and_named_in_the_variables_of_commands(stack: LiveStack) -> None:
    health = stack.control.health()
    assert {"gateway", "gateway-admin", "ingress", "agent-gateway"} <= health.keys()
    assert set(health.values()) == {"ok"}
    variables, gateway = environment(stack.description), stack.gateway
    assert variables["DSTACK_EMU_GATEWAY"] == gateway.url
    assert variables["DSTACK_EMU_GATEWAY_ADMIN"] == gateway.admin_url
    assert variables["DSTACK_EMU_INGRESS"] == stack.services["ingress"]
    assert variables["DSTACK_EMU_BASE_DOMAIN"] == "app.localhost"
    assert Path(variables["DSTACK_EMU_GATEWAY_CA"]) == gateway.ca
    assert variables["DSTACK_EMU_APP_URL"] == stack.description["gateway"]["app_url"]
    shown = summary(stack.description, 1.0)
    assert stack.description["gateway"]["app_url"] in shown
    assert f"{stack.services['agent-gateway']:<28} guest agent of the gateway\n" in shown


def test_registration_is_recorded_with_who_registered(stack: LiveStack) -> None:
    before = stack.gateway.instances
    stack.control.boot_guest("app")
    (record,) = stack.journal.find("RegisterCvm")
    assert (record["service"], record["caller"], record["outcome"]) == ("gateway", "app", "ok")
    (instance,) = stack.gateway.instances
    assert stack.gateway.instances[instance]["ip"] == before[instance]["ip"]


def test_kms_is_reached_through_the_ingress_with_its_own_certificate(stack: LiveStack) -> None:
    url = stack.gateway.url_of(kms_instance(stack), 8000, "s")
    kms_ca = Path(stack.description["kms_ca"])
    assert json.loads(curl(f"{url}/prpc/KMS.GetMeta?json", ca=kms_ca).stdout)["ca_cert"] == kms_ca.read_text()
    # Terminated, its TLS port gets plain HTTP, which it does not speak.
    assert curl(stack.gateway.url_of(kms_instance(stack), 8000), ca=stack.gateway.ca).returncode == 52


def test_notes_of_the_runbook_about_a_gateway_hold() -> None:
    """Onboard mode is the `-8000` URL, with plain HTTP behind TLS; after /finish the KMS is the `-8000s` URL."""
    with LiveStack(gateway=True, fresh=True) as stack:
        assert "gateway" not in stack.services
        ca, kms_ca = stack.gateway.ca, Path(stack.description["kms_ca"])
        instance = kms_instance(stack)
        onboard, runtime = stack.gateway.url_of(instance, 8000), stack.gateway.url_of(instance, 8000, "s")
        info = json.loads(curl(f"{onboard}/prpc/Onboard.GetAttestationInfo?json", "-d", "", ca=ca).stdout)
        assert info == stack.description["kms"]["src"]
        assert curl(f"{runtime}/prpc/KMS.GetMeta?json", "--insecure").returncode == 35
        stack.policy("src").allow("kms-src").allow("gateway").allow("app")
        answer = curl(f"{onboard}/prpc/Onboard.Bootstrap?json", "-d", '{"domain": "kms.test"}', ca=ca).stdout
        assert "ca_pubkey" in json.loads(answer)
        assert curl(f"{onboard}/finish", ca=ca).stdout == "OK"
        while curl(f"{runtime}/health", ca=kms_ca).returncode:
            pass
        assert json.loads(curl(f"{runtime}/prpc/KMS.GetMeta?json", ca=kms_ca).stdout)["is_dev"] is False
        assert curl(f"{onboard}/prpc/KMS.GetMeta?json", ca=ca).returncode == 52
        # The gateway serves its RPCs once its trust domain has keys; then apps register.
        stack.control.boot_guest("gateway")
        assert stack.control.boot_guest("app")["boot_error"] == ""
        assert list(stack.gateway.instances) == [stack.description["app"]["instance_id"]]


# ---- machines

GATEWAY_COMPOSE = json.dumps(json.loads(COMPOSE) | {"gateway_enabled": True})
KMS_COMPOSE = """
services:
  kms:
    image: dstacktee/dstack-kms
    ports: ["8000:8000"]
    volumes: ["/var/run/dstack.sock:/var/run/dstack.sock", "certs:/kms/certs"]
    configs: [{source: kms.toml, target: /kms/kms.toml}]
volumes: {certs: {}}
configs:
  kms.toml:
    content: |
      [core.auth_api]
      type = "dev"
      [core.auth_api.dev]
      gateway_app_id = "any"
      [core.onboard]
      enabled = true
"""


def deploy(stack: LiveStack, compose: str, **changed: Any) -> tuple[VmmClient, Any]:
    """Allow an app, and deploy it; return its info once it has booted."""
    vmm = VmmClient(stack.services["vmm"])
    policy = stack.control.policy("src")
    compose_hash = vmm.rpc("GetComposeHash", **configuration(compose_file=compose))["hash"]
    policy["apps"][f"0x{compose_hash[:40]}"] = {"composeHashes": [compose_hash], "devices": [], "allowAnyDevice": True}
    stack.control.set_policy("src", policy)
    return vmm, vmm.booted(vmm.deploy(compose_file=compose, **changed))


def test_machine_registers_and_its_app_url_leads_to_its_agent(stack: LiveStack) -> None:
    vmm, info = deploy(stack, GATEWAY_COMPOSE)
    assert (info["boot_progress"], info["boot_error"]) == ("done", "")
    assert info["app_url"] == f"https://{info['instance_id']}-8090.app.localhost:{stack.gateway.ingress[1]}"
    done = curl(f"{info['app_url']}/Info", ca=stack.gateway.ca)
    assert json.loads(done.stdout)["instance_id"] == info["instance_id"]
    assert vmm.rpc("GetMeta")["gateway"] == {
        "url": stack.gateway.url,
        "base_domain": "app.localhost",
        "port": stack.gateway.ingress[1],
        "agent_port": 8090,
        "urls": [stack.gateway.url],
    }
    vmm.rpc("StopVm", id=info["id"])
    assert curl(f"{info['app_url']}/Info", ca=stack.gateway.ca).returncode != 0


def test_kms_in_a_machine_is_reached_as_the_runbook_says(stack: LiveStack) -> None:
    compose = json.dumps(json.loads(GATEWAY_COMPOSE) | {"docker_compose_file": KMS_COMPOSE})
    _, info = deploy(stack, compose)
    assert (info["boot_progress"], info["boot_error"]) == ("done", "")
    onboard = stack.gateway.url_of(info["instance_id"], 8000)
    assert "mr_aggregated" in curl(f"{onboard}/prpc/Onboard.GetAttestationInfo?json", ca=stack.gateway.ca).stdout


# ---- what goes wrong


def test_gateway_of_another_app_id_is_refused_by_the_app(stack: LiveStack) -> None:
    policy = stack.control.policy("src") | {"gatewayAppId": "ab" * 20}
    stack.control.set_policy("src", policy)
    booted = stack.control.boot_guest("app")
    own = stack.control.guest("gateway")["app_id"]
    assert booted["boot_error"].endswith(f": Invalid dstack-gateway app id: {own}")
    assert booted["has_keys"] is True


def test_faults_of_the_gateway_and_the_ingress_reach_apps_and_clients(stack: LiveStack) -> None:
    app = stack.description["app"]
    stack.control.add_fault(service="gateway", call="RegisterCvm", kind="status", status=503, times=1)
    assert "status=503 Service Unavailable" in stack.control.boot_guest("app")["boot_error"]
    assert stack.control.boot_guest("app")["boot_error"] == ""
    rule = stack.control.add_fault(service="ingress", kind="reset", times=1)
    assert curl(stack.gateway.url_of(app["app_id"], 8090), ca=stack.gateway.ca).returncode == 35
    (record,) = stack.journal.find("Connect")
    assert record["error"] == f"made by fault {rule.id}"
    assert "instance_id" in fetch(stack, app["app_id"], 8090, "/Info")
    held = stack.control.add_fault(service="ingress", kind="hang")
    host, port = stack.gateway.ingress
    with socket.create_connection((host, port), timeout=20) as client:
        client.sendall(tls.client_hello(stack.gateway.name_of(app["app_id"], 8090)))
    while stack.journal.find("Connect")[-1].get("error") != "the client ended":
        pass  # it is being ended
    stack.control.lift_fault(held.id)
    with pytest.raises(ControlError, match="kind: delay, hang or reset expected for the ingress"):
        stack.control.add_fault(service="ingress", kind="truncate")
    stack.control.add_fault(service="app", call="Info", kind="status", status=500)
    assert fetch(stack, app["app_id"], 8090, "/Info", "-o", "/dev/null", "-w", "%{http_code}") == "500"


def test_instance_whose_handshake_ends_is_found_again_once_it_registers(stack: LiveStack) -> None:
    app = stack.description["app"]
    stack.gateway.end_handshake(app["instance_id"])
    assert curl(stack.gateway.url_of(app["app_id"], 8090), ca=stack.gateway.ca).returncode == 35
    stack.clock.advance(181)
    while stack.gateway.instances[app["instance_id"]]["handshake_at"] is None:
        pass
    assert "instance_id" in fetch(stack, app["app_id"], 8090, "/Info")
    with pytest.raises(ControlError, match="there is no registered instance 'x'"):
        stack.gateway.end_handshake("x")


def test_custom_domain_leads_to_the_kms_by_its_txt_record(stack: LiveStack) -> None:
    port = stack.gateway.ingress[1]
    options = ["--connect-to", f"kms.test:443:127.0.0.1:{port}", "--insecure", "-w", "%{certs}", "-o", "/dev/null"]
    assert curl("https://kms.test/health", *options).returncode == 35
    stack.control.set_txt_record("_dstack-app-address.KMS.test", f"{kms_instance(stack)}:8000")
    assert stack.control.gateway()["txt_records"] == {"_dstack-app-address.kms.test": f"{kms_instance(stack)}:8000"}
    shown = curl("https://kms.test/health", *options)
    assert shown.returncode == 0
    assert "Issuer:O = Dstack, CN = Dstack KMS CA" in shown.stdout
    stack.control.delete_txt_record("_dstack-app-address.kms.test")
    assert curl("https://kms.test/health", *options).returncode == 35
    with pytest.raises(ControlError, match="there is no TXT record 'x'"):
        stack.control.delete_txt_record("x")
    stack.control.set_txt_record("a.test", "b:1")
    stack.reset()
    assert stack.control.gateway()["txt_records"] == {}


def test_reset_restores_what_is_registered(stack: LiveStack) -> None:
    app, before = stack.description["app"], stack.gateway.instances
    stack.gateway.end_handshake(app["instance_id"])
    stack.control.boot_guest("app")
    assert stack.gateway.instances != before
    stack.reset()
    assert stack.gateway.instances == before
    assert "instance_id" in fetch(stack, app["app_id"], 8090, "/Info")


def test_state_folder_may_get_a_gateway_and_keeps_its_ca_and_its_addresses(tmp_path: Path) -> None:
    state = tmp_path / "s"
    with LiveStack(state=state) as stack:  # it writes policies that know no gateway
        assert stack.control.gateway() == {"instances": {}, "txt_records": {}}
        with pytest.raises(ControlError, match="the stack has no gateway: start it with --gateway"):
            stack.gateway.end_handshake("x")
        document = stack.control.save()
    with LiveStack(state=state, gateway=True) as stack:
        assert "gateway" not in stack.services
        assert set(stack.control.health().values()) == {"ok"}
        with pytest.raises(ControlError, match="the state is of a stack with no gateway: start this one without"):
            stack.control.load(document)
        stack.policy("src").allow("gateway").allow("app")
        stack.control.boot_guest("gateway")
        assert stack.control.boot_guest("app")["boot_error"] == ""
        instance = stack.description["app"]["instance_id"]
        ca, address = stack.gateway.ca.read_text(), stack.gateway.instances[instance]["ip"]
    with LiveStack(state=state, gateway=True) as stack:
        assert stack.gateway.ca.read_text() == ca
        assert stack.gateway.instances[instance]["ip"] == address
        assert "instance_id" in fetch(stack, instance, 8090, "/Info")


def test_app_and_machine_of_0_5_do_not_boot_without_their_gateway() -> None:
    with LiveStack(gateway=True, vmm=True, release="0.5") as stack:
        assert list(stack.gateway.instances) == [stack.description["app"]["instance_id"]]
        image = {"image": "dstack-emu-0.5.11"}
        vmm, info = deploy(stack, GATEWAY_COMPOSE, **image)
        assert (info["status"], info["boot_progress"], info["boot_error"]) == ("running", "done", "")
        stack.control.add_fault(service="gateway", call="RegisterCvm", kind="status", status=503)
        info = vmm.booted(vmm.deploy(compose_file=GATEWAY_COMPOSE, **image))
        assert (info["status"], info["boot_progress"]) == ("exited", "setting up dstack-gateway")
        assert info["boot_error"].startswith("Failed to register CVM, all dstack-gateway urls are down: ")
        folder = Path(stack.description["state"]) / "vms" / info["id"]
        assert not (folder / "gateway-cache.json").exists()
        with pytest.raises(ControlError, match="Failed to register CVM, all dstack-gateway urls are down"):
            stack.control.boot_guest("app")
        assert DstackClient(stack.description["app"]["dstack_sock"]).info().instance_id
        stack.control.clear_faults()
        stack.control.add_fault(service="kms-dst", call="SignCert", kind="status", status=200, body="{}")
        with pytest.raises(ControlError, match="Failed to create RA client: Failed to parse identity: "):
            stack.control.boot_guest("app", "dst")


@pytest.mark.parametrize("domain", ["localhost", "App.test", "a..b", "-a.test", f"{'a' * 64}.test", "x.y." * 60 + "z"])
def test_base_domain_that_cannot_be_one_is_refused(domain: str) -> None:
    with (
        pytest.raises(StackError, match="base_domain: a domain of at least two labels"),
        LiveStack(gateway=True, base_domain=domain),
    ):
        pass


@pytest.mark.parametrize("host", ["", "bad host", "http://app", "127.0.0.1:80", "[::1]", "a..b", "-a", "a" * 64])
def test_app_host_that_cannot_be_one_is_refused(host: str) -> None:
    with (
        pytest.raises(StackError, match="app_host: a host name or an IP address expected"),
        LiveStack(gateway=True, app_host=host),
    ):
        pass


def test_settings_of_a_gateway_without_one_are_refused() -> None:
    with pytest.raises(StackError, match="add --gateway"), LiveStack(app_host="127.0.0.1"):
        pass
