"""The listeners of a gateway, its identity, its start and its end."""

import contextlib
import gzip
import hashlib
import http.client
import json
import os
import resource
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dcap_qvl
import msgpack
import pytest
from cryptography import x509

from dstack_emu.gateway.config import GatewayConfig
from dstack_emu.gateway.errors import GatewayConfigError, GatewayError
from dstack_emu.transport.errors import ConfigError, ListenError
from tests.gateway import (
    TOKEN,
    RunningGateway,
    StubAgent,
    TestCa,
    config_text,
    extension,
    running_gateway,
    wg_key,
    with_more,
)
from tests.ports import refusing_port
from tests.processes import Command, start
from tests.running import RunningStack

OWN_APP = b"g" * 20
IDENTIFIED = """
[core]
rpc_domain = "gateway.test"
[core.debug]
insecure_skip_attestation = false
"""


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> StubAgent:
    return StubAgent(TestCa(tmp_path_factory.mktemp("ca"), "root"), OWN_APP)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, agent: StubAgent) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway")
    more = f'{IDENTIFIED}[core.sync]\nenabled = true\n[tls]\nkey = "{folder}/key"\ncerts = "{folder}/certs"\n'
    more += f'[tls.mutual]\nca_certs = "{folder}/ca.pem"\n'
    with agent.running() as url, running_gateway(folder, more, ca=agent.ca, agent_address=url) as running:
        running.folder = folder  # type: ignore[attr-defined]
        yield running


# ---- the gateway's identity


def test_certificate_is_the_agents_and_its_files_are_private(gateway: RunningGateway, agent: StubAgent) -> None:
    requests = dict(agent.asked)
    assert requests["GetTlsKey"] == {
        "subject": "dstack-gateway",
        "alt_names": ["gateway.test", "gateway.example"],
        "usage_ra_tls": True,
        "usage_server_auth": True,
        "usage_client_auth": True,
        "not_before": None,
        "not_after": None,
        "with_app_info": True,
    }
    folder: Path = gateway.folder  # type: ignore[attr-defined]
    for name in ("key", "certs", "ca.pem"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    assert not list(folder.glob(".*"))
    address = urlsplit(gateway.urls["rpc"])
    presented = ssl.get_server_certificate((address.hostname or "", address.port or 0))
    shown = x509.load_pem_x509_certificate(presented.encode())
    names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"gateway.test", "gateway.example"}


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_rpc_listener_speaks_both_versions_of_tls(gateway: RunningGateway, version: ssl.TLSVersion) -> None:
    context = gateway.client_tls(None)
    context.minimum_version = context.maximum_version = version
    address = urlsplit(gateway.urls["rpc"])
    connection = http.client.HTTPSConnection(address.hostname or "", address.port, timeout=20, context=context)
    connection.request("GET", "/health")
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (200, b"OK")
    connection.close()


def test_listeners_speak_tls_or_plaintext_alone(gateway: RunningGateway) -> None:
    for listener in ("rpc", "admin", "debug"):
        address = urlsplit(gateway.urls[listener])
        where = (address.hostname or "", address.port or 0)
        if listener == "rpc":
            with socket.create_connection(where, timeout=20) as sock:
                sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b"HTTP/" not in sock.recv(100)
        else:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                ssl.get_server_certificate(where, timeout=20)
    assert gateway.ask("debug", "/health", verb="GET")[:2] == (200, b"OK")
    assert gateway.ask("admin", "/health", verb="GET")[0] == 404
    assert gateway.ask("rpc", "/health", verb="GET")[2]["X-App-Version"].startswith("v0.6.0 (git:")


def test_peers_are_told_to_gateways_of_the_same_app(gateway: RunningGateway) -> None:
    ca = gateway.ca
    own, other = (ca.client("peer", extension(3, app)) for app in (OWN_APP, b"o" * 20))
    assert gateway.refused("rpc", "GetPeers") == "Client authentication is required"
    assert gateway.refused("rpc", "GetPeers", ca.client("no app")) == "Client authentication is required"
    assert gateway.refused("rpc", "GetPeers", other) == "Remote app id is not from dstack-gateway"
    url = "https://gateway.example:8000"
    peers = {"my_id": 1, "my_url": url, "peers": [{"id": 1, "url": url}]}
    assert gateway.rpc("rpc", "GetPeers", own) == peers


# ---- replication, of which there is none


def test_message_of_another_node_is_refused(gateway: RunningGateway) -> None:
    ca = gateway.ca
    own, other = (ca.client("peer", extension(3, app)) for app in (OWN_APP, b"o" * 20))

    def status(client: Any, body: bytes, store: str = "persistent") -> int:
        return gateway.ask("rpc", f"/wavekv/sync/{store}", body, client=client)[0]

    def message(sender: int) -> bytes:
        return gzip.compress(msgpack.packb([sender, b"", {}, []]))

    assert status(None, message(2)) == 401
    assert status(ca.client("no app"), message(2)) == 401
    assert status(other, message(2)) == 403
    assert status(own, b"no gzip") == 400
    assert status(own, gzip.compress(b"\xc1")) == 400
    assert status(own, gzip.compress(bytes(17 << 20))) == 400
    assert status(own, message(0)) == 400
    assert status(own, message(2), "other") == 404
    assert status(own, message(2)) == 503
    assert status(own, bytes(11 << 20)) == 413


# ---- the start


def started_with(folder: Path, more: str = "", **given: Any) -> None:
    with running_gateway(folder, more, **given):
        pass


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ("[core.sync]\nenabled = true\nnode_id = 0\n", "node_id must be greater than 0"),
        ('[core.proxy]\ntls_crypto_provider = "openssl"\n', "core.proxy.tls_crypto_provider"),
        ('[core.proxy]\nlisten_port = "9-3"\n', "invalid port range: 9 > 3"),
        ('[core.proxy]\nbase_domain = "a"\ncert_chain = "/none"\ncert_key = "/none"\n', "failed to load static proxy"),
        ('[core.wg]\nreserved_net = ["10.9.0.0/31"]\n', "Reserved net is not in the network"),
        ('[core.wg]\nreserved_net = ["10.0.0.2/31"]\n', "Wg peer IP is not in the reserved net"),
        ('[core.wg]\nclient_ip_range = "10.9.0.0/25"\n', "Client IP range is not in the network"),
        ('[core.admin]\nauth_token = ""\n', "admin API is enabled but neither auth_token nor htpasswd_file"),
        ("[core.recycle]\nenabled = 1\n", "core.recycle.enabled"),
        ('[core.debug]\naddress = "nowhere"\n', "core.debug.address: host:port"),
    ],
)
def test_configuration_that_upstream_does_not_start_with_is_refused(tmp_path: Path, more: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        started_with(tmp_path, more)
    assert not (tmp_path / "data").exists()


def test_release_decides_about_admins_and_static_certificates(tmp_path: Path) -> None:
    more = '[core.admin]\nauth_token = ""\n[core.proxy]\nbase_domain = "a"\ncert_chain = "/none"\ncert_key = "/none"\n'
    started_with(tmp_path, more, release="0.5")
    environment = {"DSTACK_GATEWAY_ADMIN_TOKEN": TOKEN}
    with running_gateway(tmp_path, '[core.admin]\nauth_token = ""\n', environment=environment) as gateway:
        assert gateway.rpc("admin", "GetMeta") == {"registered": 0, "online": 0}


def test_old_name_of_the_admin_token_is_read() -> None:
    config = GatewayConfig.model_validate({"core": {"admin": {"admin_token": "old", "unknown": 1}}})
    assert config.core.admin.auth_token == "old"


def test_port_in_use_ends_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ListenError, match="the address is in use"):
            started_with(tmp_path, f'[core.admin]\naddress = "{address}"\n')


@pytest.mark.parametrize("more", [IDENTIFIED, IDENTIFIED.replace("gateway.test", "")])
def test_without_an_agent_nothing_is_written(tmp_path: Path, more: str) -> None:
    ca = TestCa(tmp_path / "ca", "root")
    before = {path: path.read_bytes() for path in (tmp_path / "ca").iterdir()}
    with refusing_port() as port, pytest.raises(GatewayError, match="Failed to (generate certs|get app info): guest"):
        started_with(tmp_path, more, ca=ca, agent_address=f"http://127.0.0.1:{port}")
    assert not (tmp_path / "data").exists()
    assert {path: path.read_bytes() for path in before} == before


def test_state_that_cannot_be_read_ends_the_start(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "gateway-state.json").write_text('{"instances": {"one": {}}}')
    with pytest.raises(GatewayConfigError, match="is no state of a gateway: instances.one.app_id"):
        started_with(tmp_path)


@pytest.mark.parametrize("raises", [True, False])
def test_limit_of_open_files_is_raised_where_the_file_says_so(tmp_path: Path, raises: bool) -> None:
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lower = 1000
    resource.setrlimit(resource.RLIMIT_NOFILE, (lower, hard))
    try:
        started_with(tmp_path, f"[core]\nset_ulimit = {str(raises).lower()}\n")
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard if raises else lower, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


def test_without_debug_there_is_no_debug_listener(tmp_path: Path) -> None:
    more = "[core.debug]\ninsecure_enable_debug_rpc = false\n[core.admin]\nenabled = false\n"
    with running_gateway(tmp_path, more) as gateway:
        assert list(gateway.urls) == ["rpc"]


# ---- the command


def started_command(file: Path, *arguments: str) -> Command:
    """Start `dstack-emu gateway`, whose log nobody reads."""
    with open(os.devnull, "wb") as log:
        return start("gateway", "-c", str(file), *arguments, stderr=log)


def test_command_ends_when_an_operator_ends_it(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(config_text(tmp_path, TestCa(tmp_path / "ca", "root")))
    process = started_command(file, "--json")
    admin = urlsplit(json.loads(process.stdout.readline())["urls"]["admin"])
    connection = http.client.HTTPConnection(admin.hostname or "", admin.port, timeout=20)
    headers = {"X-Admin-Token": TOKEN}
    connection.request("POST", "/prpc/Exit", b"\x0a", headers)  # a field whose length is missing
    refused = connection.getresponse()
    assert (refused.status, bool(refused.read())) == (400, True)
    connection.request("POST", "/prpc/Exit?json", b"{}", headers)
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (200, b"null")
    connection.close()
    assert process.wait() == 0


@pytest.mark.parametrize(
    ("release", "path", "body"),
    [
        ("0.6", "/Exit?json", b""),
        ("0.6", "/prpc/Admin.Exit?json", b'{"force": true, "other": 1}'),
        ("0.6", "/Exit", b"\x08\x01"),
        ("0.5", "/Exit", b"\x0a"),
    ],
)
def test_exit_ends_a_gateway(tmp_path: Path, release: str, path: str, body: bytes) -> None:
    with running_gateway(tmp_path, release=release) as gateway:
        status, answer, _ = gateway.ask("admin", path, body)
        assert (status, answer) == (200, b"null" if "json" in path else b"")
        gateway.wait_for_exit()


def test_connections_are_counted_and_end_with_the_gateway(tmp_path: Path) -> None:
    def counted(gateway: RunningGateway, number: int) -> None:
        while gateway.rpc("admin", "Status")["num_connections"] != number:
            pass  # it is being accepted, or closed

    with running_gateway(tmp_path, has_ingress=True) as gateway:
        host, _, port = gateway.urls["ingress"].rpartition(":")
        held = socket.create_connection((host, int(port)), timeout=20)
        counted(gateway, 1)
        for _ in range(3):
            with socket.create_connection((host, int(port)), timeout=20) as refused:
                refused.sendall(b"no TLS")
                with contextlib.suppress(ConnectionError):
                    assert refused.recv(1) == b""
        counted(gateway, 1)
        assert gateway.ask("admin", "/Exit?json", b"")[:2] == (200, b"null")
        gateway.wait_for_exit()
    with held, contextlib.suppress(ConnectionError):
        assert held.recv(1) == b""


def test_instances_survive_a_kill_of_the_process(tmp_path: Path) -> None:
    ca = TestCa(tmp_path / "ca", "root")
    file = tmp_path / "gateway.toml"
    file.write_text(config_text(tmp_path, ca))
    process = started_command(file, "--json")
    debug = urlsplit(json.loads(process.stdout.readline())["urls"]["debug"])
    connection = http.client.HTTPConnection(debug.hostname or "", debug.port, timeout=20)
    for name in ("one", "two"):
        request = {"instance_id": name, "app_id": "a", "client_public_key": wg_key(name)}
        connection.request("POST", "/prpc/RegisterCvm?json", json.dumps(request))
        assert json.loads(connection.getresponse().read())["wg"]["client_ip"]
    process.send_signal(9)
    process.wait()
    connection.close()
    with running_gateway(tmp_path, ca=ca) as gateway:
        stored = gateway.rpc("debug", "GetSyncData")["instances"]
        assert [(each["instance_id"], each["ip"]) for each in stored] == [("one", "10.0.0.2"), ("two", "10.0.0.3")]


def test_command_reports_a_wrong_file_with_a_status(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(with_more(config_text(tmp_path, TestCa(tmp_path / "ca", "root")), "[core.sync]\nnode_id = -1\n"))
    assert started_command(file).wait() == 2


# ---- in a stack: certificates and evidence of a KMS


@pytest.fixture(scope="module")
def in_stack(tmp_path_factory: pytest.TempPathFactory, ready_stack: RunningStack) -> Iterator[RunningGateway]:
    """A gateway whose guest agent is that of the stack's app."""
    folder = tmp_path_factory.mktemp("gateway")
    ca = TestCa(folder / "ca", "unused")
    more = f'''{IDENTIFIED.replace("gateway.test", "127.0.0.1")}
[tls]
key = "{folder}/key"
certs = "{folder}/certs"
[tls.mutual]
ca_certs = "{folder}/ca.pem"
[core.attestation]
insecure_allow_external_trust_anchors = true
[core.attestation.urls]
pccs = "{ready_stack.services["pccs"]}"
[core.attestation.root_ca]
tdx = "{ready_stack.description["root_ca"]}"
'''
    with running_gateway(folder, more, ca=ca, agent_address=ready_stack.services["app"]) as running:
        running.ca = ca.replaced(folder / "ca.pem")
        yield running


def agents_certificate(stack: RunningStack, file: Path, **request: Any) -> Path:
    """Write a certificate of the app's agent, with its key, to a file."""
    body = json.dumps({"subject": "dstack-guest-agent", "usage_client_auth": True, **request})
    status, text = stack.curl(f"{stack.services['app']}/GetTlsKey?json", "-d", body)
    assert status == 200, text
    answer = json.loads(text)
    file.write_text(answer["key"] + "\n".join(answer["certificate_chain"]))
    return file


@pytest.mark.parametrize("request_", [{"with_app_info": True}, {"usage_ra_tls": True}])
def test_instance_is_identified_by_its_kms_or_by_its_evidence(
    in_stack: RunningGateway, ready_stack: RunningStack, tmp_path: Path, request_: dict[str, bool]
) -> None:
    info = json.loads(ready_stack.curl(f"{ready_stack.services['app']}/Info?json", "-d", "{}")[1])
    file = agents_certificate(ready_stack, tmp_path / "client.pem", **request_)
    in_stack.rpc("rpc", "RegisterCvm", file, client_public_key=wg_key("one"), port_policy={})
    (stored,) = in_stack.rpc("debug", "GetSyncData")["instances"]
    assert (stored["instance_id"], stored["app_id"]) == (info["instance_id"], info["app_id"])


def test_evidence_of_another_key_is_refused_at_every_call(
    gateway: RunningGateway, ready_stack: RunningStack, tmp_path: Path
) -> None:
    file = agents_certificate(ready_stack, tmp_path / "client.pem", usage_ra_tls=True)
    leaf, *_ = x509.load_pem_x509_certificates(file.read_bytes())
    found = leaf.extensions.get_extension_for_oid(x509.ObjectIdentifier("1.3.6.1.4.1.62397.1.8")).value
    thief = gateway.ca.instance(b"1" * 20, more=[(found, False)])
    for method in ("RegisterCvm", "Info", "Nothing"):
        assert gateway.refused("rpc", method, thief) == "invalid quote: report data mismatch"


def test_certificate_of_the_app_without_identity_is_refused(
    in_stack: RunningGateway, ready_stack: RunningStack, tmp_path: Path
) -> None:
    file = agents_certificate(ready_stack, tmp_path / "client.pem")
    text = in_stack.refused("rpc", "RegisterCvm", file, client_public_key=wg_key("one"))
    assert text == "neither app-info nor attestation provided"


def test_keys_of_domains_are_quoted_by_the_agent(in_stack: RunningGateway) -> None:
    credential = {"name": "dns", "provider_type": "cloudflare", "cf_api_token": "t", "set_as_default": True}
    in_stack.rpc("admin", "CreateDnsCredential", None, **credential)
    in_stack.rpc("admin", "AddZtDomain", domain="app.example", port=443)
    acme = in_stack.rpc("rpc", "AcmeInfo")
    while not acme["quoted_hist_keys"]:  # the certificate is being issued
        acme = in_stack.rpc("rpc", "AcmeInfo")
    (quoted,) = acme["quoted_hist_keys"]
    bound = hashlib.sha512(b"zt-cert:" + bytes.fromhex(quoted["public_key"])).digest()
    quote = bytes.fromhex(json.loads(quoted["quote"])["quote"])
    assert dcap_qvl.Quote.parse(quote).report.report_data == bound
