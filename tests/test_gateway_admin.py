"""What operators of a gateway may do: nodes, DNS credentials, domains and their certificates, the ACME account."""

import contextlib
import hashlib
import http.client
import json
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from prometheus_client.parser import text_string_to_metric_families

from dstack_emu.attest.proto import gateway_pb2
from tests import tls
from tests.gateway import START, TOKEN, RunningGateway, StubAgent, TestCa, running_gateway, wg_key

CREDENTIAL = {"name": "dns", "provider_type": "cloudflare", "cf_api_token": "abcdefghijkl", "cf_zone_id": "z"}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> StubAgent:
    return StubAgent(TestCa(tmp_path_factory.mktemp("ca"), "root"), b"g" * 20)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, agent: StubAgent) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with agent.running() as url, running_gateway(folder, ca=agent.ca, agent_address=url) as running:
        running.remember()
        yield running


@pytest.fixture
def gateway(started: RunningGateway) -> RunningGateway:
    started.reset()
    return started


@pytest.fixture(scope="module")
def gateway_0_5(tmp_path_factory: pytest.TempPathFactory, agent: StubAgent) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway05"), release="0.5", ca=agent.ca) as running:
        yield running


def credential(gateway: RunningGateway, **changed: Any) -> str:
    """Create a DNS credential that is the default; return its id."""
    body = {**CREDENTIAL, "set_as_default": True, **changed}
    id_: str = gateway.rpc("admin", "CreateDnsCredential", None, **body)["id"]
    return id_


def domain(gateway: RunningGateway, name: str = "app.example", **changed: Any) -> Any:
    return gateway.rpc("admin", "AddZtDomain", None, domain=name, **{"port": 443, **changed})


def issued(gateway: RunningGateway, name: str = "app.example") -> Any:
    """Return what is told of a domain once it has a certificate."""
    while True:
        info = gateway.rpc("admin", "GetZtDomain", domain=name)
        if info["cert_status"]["has_cert"]:
            return info


# ---- credentials of operators


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({"X-Admin-Token": TOKEN}, ""),
        ({"Authorization": f"Bearer {TOKEN}"}, ""),
        ({"Authorization": "Basic YW46b3BlcmF0b3I="}, None),
        ({}, "?token=an%20operator%27s%20token"),
    ],
)
def test_operator_needs_a_credential(gateway: RunningGateway, headers: dict[str, str], query: str | None) -> None:
    status, body, sent = gateway.ask("admin", f"/prpc/Status{query or ''}", headers=headers, verb="GET")
    if query is not None:
        assert status == 200, body
        return
    assert (status, body) == (401, b"")
    assert sent["WWW-Authenticate"] == 'Basic realm="dstack-gateway admin"'


def test_operator_of_0_5_needs_none(gateway_0_5: RunningGateway) -> None:
    assert gateway_0_5.ask("admin", "/Status", headers={}, verb="GET")[0] == 200


# ---- every RPC


JUNK: list[Any] = [None, [], "x", 1, {"id": 1}, {"domain": None}, {"policy": []}, {"id": "\ud800"}]


def test_call_with_any_body_is_answered_or_refused_with_a_reason(gateway: RunningGateway) -> None:
    methods = [each.name for each in gateway_pb2.DESCRIPTOR.services_by_name["Admin"].methods if each.name != "Exit"]
    url = urlsplit(gateway.urls["admin"])
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=20)
    sent = [("?json", json.dumps(body).encode(), "application/json") for body in JUNK]
    sent += [("?json", body, "application/json") for body in (b"", b"{", b"\xff")]
    sent += [("", body, "application/octet-stream") for body in (b"\x08", b"\x0a\xff", b"\xff" * 20)]
    for method in methods:
        for query, body, kind in sent:
            connection.request("POST", f"/{method}{query}", body, {"Content-Type": kind, "X-Admin-Token": TOKEN})
            answer = connection.getresponse()
            text = answer.read()
            assert answer.status in (200, 400), (method, body, text)
            assert b"internal error" not in text, (method, body, text)
    connection.close()


@pytest.mark.parametrize("mount", ["", "/prpc"])
@pytest.mark.parametrize("name", ["Status", "Admin.Status"])
def test_names_are_answered_at_both_mounts_with_and_without_prefix(
    gateway: RunningGateway, mount: str, name: str
) -> None:
    status, body, _ = gateway.ask("admin", f"{mount}/{name}", verb="GET")
    assert (status, json.loads(body)["id"]) == (200, 1)
    assert "accel" not in json.loads(body)


def test_0_5_has_its_own_messages_and_no_rotation(gateway: RunningGateway, gateway_0_5: RunningGateway) -> None:
    """Upstream: gateway_rpc.proto at 40eaf35e and at 0182d857."""
    added = {"SetInstanceReady", "RemoveCvm", "ListRejectedInstances", "RemoveNode"}
    for running, fields, status in ((gateway_0_5, set(), 400), (gateway, {"ready", "health"}, 404)):
        running.debug_register("one")
        (host,) = running.rpc("admin", "Status")["hosts"]
        assert host.keys() & {"ready", "health"} == fields
        assert running.rpc("admin", "GetInfo", id="one")["info"].keys() == host.keys()
        running.rpc("admin", "SetNodeUrl", id=7, url="https://seven.example")
        (peer,) = running.rpc("admin", "WaveKvStatus")["persistent"]["peers"]
        assert ("buffered_logs" in peer, "heard_from" in peer) == (not fields, bool(fields))
        unknown = {name for name in added if running.tried("admin", name)[1] == {"error": f"Service not found: {name}"}}
        assert unknown == (set() if fields else added)
        assert running.ask("admin", "/metrics", verb="GET")[0] == (200 if fields else status)


def test_instance_and_node_are_removed_and_the_answer_says_whether_they_were_there(gateway: RunningGateway) -> None:
    """Upstream: `remove_cvm`, `remove_node` and `validate_id` of the gateway (pull requests 1044 and 1046)."""
    gateway.debug_register("one")
    gone = {"record_existed": True, "removed_locally": True}
    never = {"record_existed": False, "removed_locally": False}
    assert gateway.rpc("admin", "RemoveCvm", instance_id="one") == gone
    assert gateway.rpc("admin", "RemoveCvm", instance_id="one") == never
    assert gateway.rpc("admin", "Status")["hosts"] == []
    for wrong, text in (
        ("", "instance_id is empty"),
        ("a b", "instance_id contains whitespace or control characters"),
        ("a" * 129, "instance_id is 129 bytes, limit is 128"),
    ):
        assert gateway.refused("admin", "RemoveCvm", instance_id=wrong) == text
    assert gateway.rpc("admin", "ListRejectedInstances") == {"rejected": []}
    gateway.rpc("admin", "SetNodeUrl", id=7, url="https://seven.example")
    assert gateway.rpc("admin", "RemoveNode", node_id=7) == {"record_existed": True, "removed_from_peer_set": True}
    assert gateway.rpc("admin", "RemoveNode", node_id=7) == {"record_existed": False, "removed_from_peer_set": False}
    assert gateway.rpc("admin", "WaveKvStatus")["persistent"]["peers"] == []
    assert gateway.refused("admin", "RemoveNode", node_id=1) == "a node cannot remove itself"


def test_metrics_are_those_of_the_state_and_need_the_credential(gateway: RunningGateway) -> None:
    """Upstream: the names in gateway/src/metrics.rs (pull request 1037). The Prometheus client reads them."""
    gateway.debug_register("one")
    gateway.rpc("admin", "SetNodeUrl", id=7, url="https://seven.example")
    status, body, headers = gateway.ask("admin", "/metrics", verb="GET")
    assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert gateway.ask("admin", "/metrics", headers={}, verb="GET")[0] == 401
    assert gateway.ask("rpc", "/metrics", verb="GET")[0] == 404
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }
    expected = {
        ("dstack_gateway_cluster_instances",): 1,
        ("dstack_gateway_connections",): 0,
        ("dstack_gateway_cluster_nodes_active",): 1,
        ("dstack_gateway_wg_reconfigure_failures_total",): 0,
        ("dstack_gateway_kv_peer_remote_ack", "persistent", "7"): 0,
        ("dstack_gateway_kv_decode_failures_total", "inst/"): 0,
    }
    assert {name: found[name] for name in expected} == expected


def test_name_of_another_listener_is_unknown(gateway: RunningGateway, gateway_0_5: RunningGateway) -> None:
    for running, expected in ((gateway, 404), (gateway_0_5, 400)):
        paths = {"rpc": ("Admin.Status", "Status", "Nothing"), "admin": ("Tproxy.Info", "RegisterCvm", "Nothing")}
        for listener, names in paths.items():
            for name in names:
                assert running.ask(listener, f"/prpc/{name}")[0] == expected
        assert running.ask("rpc", "/prpc/Tproxy.Info")[0] == 200


# ---- nodes


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("", "invalid peer URL: relative URL without a base"),
        ("gateway", "invalid peer URL: relative URL without a base"),
        ("https://[::1", "invalid peer URL"),
        ("ftp://gateway", "peer URL scheme must be http or https"),
        ("https://", "peer URL must include a host"),
        ("https://user@gateway", "peer URL must not contain credentials"),
        ("https://:pw@gateway", "peer URL must not contain credentials"),
    ],
)
def test_peer_url_that_cannot_be_used_is_refused(gateway: RunningGateway, url: str, text: str) -> None:
    before = gateway.rpc("debug", "GetSyncData")
    assert gateway.refused("admin", "SetNodeUrl", id=2, url=url).startswith(text)
    assert gateway.rpc("debug", "GetSyncData") == before


def test_nodes_have_the_urls_and_statuses_that_were_set(gateway: RunningGateway, gateway_0_5: RunningGateway) -> None:
    for _ in range(2):
        assert gateway.rpc("admin", "SetNodeUrl", id=2, url="https://two.example:8000") is None
    assert gateway.rpc("admin", "SetNodeStatus", id=2, status="down") is None
    for status in ("", "Up", "gone"):
        text = gateway.refused("admin", "SetNodeStatus", id=1, status=status)
        assert text == "invalid status: expected 'up' or 'down'"
    statuses = [{"node_id": 1, "status": "up"}, {"node_id": 2, "status": "down"}]
    assert gateway.rpc("admin", "GetNodeStatuses") == {"statuses": statuses}
    assert gateway.rpc("debug", "GetSyncData")["peer_addrs"] == [
        {"node_id": 1, "url": "https://gateway.example:8000"},
        {"node_id": 2, "url": "https://two.example:8000"},
    ]
    wavekv = gateway.rpc("admin", "WaveKvStatus")
    assert (wavekv["enabled"], wavekv["persistent"]["wal_enabled"], wavekv["ephemeral"]["wal_enabled"]) == (
        False,
        True,
        False,
    )
    assert [each["id"] for each in wavekv["persistent"]["peers"]] == [2]
    assert wavekv["persistent"]["n_keys"] == gateway.rpc("debug", "GetSyncData")["persistent_keys"]
    assert gateway_0_5.rpc("admin", "SetNodeUrl", id=2, url="anything") is None


def test_connections_of_instances_are_counted_by_node(gateway: RunningGateway) -> None:
    nobody = {"total_connections": 0, "node_connections": {}}
    assert gateway.rpc("admin", "GetGlobalConnections") == nobody
    gateway.debug_register("one")
    assert gateway.rpc("admin", "GetGlobalConnections") == {"total_connections": 0, "node_connections": {"1": 0}}
    assert gateway.rpc("admin", "Status")["num_connections"] == 0


def test_dashboard_escapes_what_instances_are_called(gateway: RunningGateway) -> None:
    name = "<script>alert(1)</script>"
    gateway.debug_register(name, app="<b>")
    status, body, headers = gateway.ask("admin", "/", verb="GET")
    page = body.decode()
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>" not in page
    assert "EMULATED" in page
    assert gateway.ask("admin", "/", headers={}, verb="GET")[0] == 401


def test_dashboard_that_cannot_be_built_is_an_error(gateway: RunningGateway) -> None:
    gateway.debug_register("one")
    gateway.clock.clear()  # nobody tells the time
    try:
        assert gateway.ask("admin", "/", verb="GET")[0] == 500
    finally:
        gateway.clock.append(START)
    assert gateway.ask("admin", "/", verb="GET")[0] == 200


# ---- DNS credentials


def test_credential_is_shown_without_its_token(gateway: RunningGateway) -> None:
    id_ = credential(gateway)
    gateway.clock[0] += 5
    shown = gateway.rpc("admin", "UpdateDnsCredential", id=id_, name="new", cf_api_url="https://api.example")
    assert shown == {
        "id": id_,
        "name": "new",
        "provider_type": "cloudflare",
        "cf_api_token": "abcd...ijkl",
        "cf_api_url": "https://api.example",
        "dns_txt_ttl": 60,
        "max_dns_wait": 300,
        "created_at": START,
        "updated_at": START + 5,
    }
    assert gateway.rpc("admin", "GetDnsCredential", id=id_) == shown
    assert gateway.rpc("admin", "ListDnsCredentials") == {"credentials": [shown], "default_id": id_}
    assert gateway.rpc("admin", "GetDefaultDnsCredential") == {"default_id": id_, "credential": shown}
    for token, redacted in (("12345678", "*" * 8), ("", ""), ("123456789", "1234...6789")):
        answer = gateway.rpc("admin", "UpdateDnsCredential", id=id_, cf_api_token=token)
        assert answer["cf_api_token"] == redacted


def test_four_credentials_at_once_have_four_ids(gateway: RunningGateway) -> None:
    with ThreadPoolExecutor(4) as pool:
        ids = set(pool.map(lambda _: credential(gateway), range(4)))
    assert {each["id"] for each in gateway.rpc("admin", "ListDnsCredentials")["credentials"]} == ids
    assert len(ids) == 4


def test_credential_that_cannot_be_used_is_refused(gateway: RunningGateway) -> None:
    refused: dict[str, dict[str, Any]] = {
        "unsupported provider type: route53": {"provider_type": "route53"},
        "dns_txt_ttl must be greater than zero": {"dns_txt_ttl": 0},
        "max_dns_wait must be greater than zero": {"max_dns_wait": 0},
    }
    for text, changed in refused.items():
        assert gateway.refused("admin", "CreateDnsCredential", None, **{**CREDENTIAL, **changed}) == text
    for method in ("Get", "Update", "SetDefault"):
        assert gateway.refused("admin", f"{method}DnsCredential", id="x") == "dns credential not found"
    assert gateway.rpc("admin", "ListDnsCredentials") == {"credentials": [], "default_id": None}
    assert gateway.rpc("admin", "GetDefaultDnsCredential") == {"default_id": "", "credential": None}


def test_0_5_takes_times_of_zero(gateway_0_5: RunningGateway) -> None:
    answer = gateway_0_5.rpc("admin", "CreateDnsCredential", None, **CREDENTIAL, dns_txt_ttl=0, max_dns_wait=0)
    assert (answer["dns_txt_ttl"], answer["max_dns_wait"]) == (0, 0)


def test_credential_in_use_is_not_deleted(gateway: RunningGateway) -> None:
    default, used = credential(gateway), credential(gateway, set_as_default=False)
    domain(gateway, dns_cred_id=used)
    refused = {
        default: "cannot delete the default DNS credential; set a different default first",
        used: "cannot delete DNS credential: domain app.example uses it",
    }
    for id_, text in refused.items():
        assert gateway.refused("admin", "DeleteDnsCredential", id=id_) == text
    gateway.rpc("admin", "DeleteZtDomain", domain="app.example")
    assert gateway.rpc("admin", "DeleteDnsCredential", id=used) is None


# ---- domains


@pytest.mark.parametrize("spelling", ["APP.example", "*.app.example", " app.example. ", "*.APP.EXAMPLE.."])
def test_spellings_of_a_domain_are_one_domain(gateway: RunningGateway, spelling: str) -> None:
    added = domain(gateway, spelling, priority=-3, node=7)
    assert added["config"] == {
        "domain": "app.example",
        "dns_cred_id": None,
        "port": 443,
        "node": 7,
        "priority": -3,
    }
    text = gateway.refused("admin", "AddZtDomain", domain="app.example", port=1)
    assert text == "ZT-Domain config already exists: app.example"
    updated = gateway.rpc("admin", "UpdateZtDomain", domain=spelling, port=80, dns_cred_id="")
    assert gateway.rpc("admin", "GetZtDomain", domain=spelling) == updated
    assert gateway.rpc("admin", "DeleteZtDomain", domain=spelling) is None
    for method in ("Get", "Delete"):
        assert gateway.refused("admin", f"{method}ZtDomain", domain=spelling) == "ZT-Domain config not found"
    assert gateway.refused("admin", "UpdateZtDomain", domain=spelling, port=1) == "ZT-Domain config not found"


NO_NAME = "domain must be a non-empty ASCII DNS name of at most 253 bytes"
NO_LABEL = "domain contains an invalid DNS label"


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"domain": ""}, NO_NAME),
        ({"domain": "."}, NO_NAME),
        ({"domain": "bücher.example"}, NO_NAME),
        ({"domain": "a." * 126 + "aa"}, NO_NAME),
        ({"domain": "a..example"}, NO_LABEL),
        ({"domain": "-a.example"}, NO_LABEL),
        ({"domain": "a-.example"}, NO_LABEL),
        ({"domain": "a_b.example"}, NO_LABEL),
        ({"domain": "a" * 64}, NO_LABEL),
        ({"port": 0}, "port must be between 1 and 65535"),
        ({"port": 65536}, "port out of range: out of range integral type conversion attempted"),
        ({"dns_cred_id": "x"}, "specified dns credential not found"),
    ],
)
def test_domain_that_cannot_be_used_is_refused(gateway: RunningGateway, changed: dict[str, Any], text: str) -> None:
    body = {"domain": "a.example", "port": 443, **changed}
    for method in ("Add", "Update"):
        assert gateway.refused("admin", f"{method}ZtDomain", None, **body) == text
    assert gateway.rpc("admin", "ListZtDomains") == {"domains": []}


def test_one_of_two_additions_at_once_is_refused(gateway: RunningGateway) -> None:
    with ThreadPoolExecutor(2) as pool:
        tried = [pool.submit(gateway.tried, "admin", "AddZtDomain", None, domain="a.b", port=1) for _ in range(2)]
    assert sorted(each.result()[0] for each in tried) == [200, 400]


def test_0_5_takes_a_domain_as_it_is(gateway_0_5: RunningGateway) -> None:
    assert domain(gateway_0_5, "*.A_B.Example.", port=0)["config"]["domain"] == "A_B.Example."
    assert gateway_0_5.refused("admin", "GetZtDomain", domain="a_b.example") == "ZT-Domain config not found"
    assert gateway_0_5.rpc("admin", "DeleteZtDomain", domain="A_B.Example.") is None


# ---- certificates


def test_domain_gets_a_wildcard_certificate_and_keeps_it_when_it_is_deleted(
    gateway: RunningGateway, agent: StubAgent
) -> None:
    credential(gateway)
    assert not domain(gateway)["cert_status"]["has_cert"]
    info = issued(gateway)
    not_after = START + 90 * 86400
    assert info["cert_status"] == {
        "has_cert": True,
        "not_after": not_after,
        "issued_by": 1,
        "issued_at": START,
        "loaded_in_memory": True,
    }
    entry = gateway.call(lambda: gateway.server.gateway.certificates.get("app.example"))
    assert entry is not None
    leaf, ca = x509.load_pem_x509_certificates(entry.chain.encode())
    leaf.verify_directly_issued_by(ca)
    assert "EMULATED" in leaf.subject.rfc4514_string()
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["*.app.example"]
    assert leaf.not_valid_after_utc.timestamp() == not_after
    spki = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    acme = gateway.rpc("rpc", "AcmeInfo")
    (quoted,) = acme["quoted_hist_keys"]
    bound = hashlib.sha512(b"zt-cert:" + spki).hexdigest()
    assert quoted["public_key"] == spki.hex()
    assert (json.loads(quoted["quote"])["report_data"], json.loads(quoted["attestation"])["attestation"]) == (
        bound,
        bound,
    )
    account = hashlib.sha512(b"acme-account:" + acme["account_uri"].encode()).hexdigest()
    assert json.loads(acme["account_quote"])["report_data"] == account
    listed = gateway.rpc("admin", "ListCertAttestations", domain="app.example")
    assert listed["latest"]["public_key"] == spki.hex()
    gateway.rpc("admin", "DeleteZtDomain", domain="app.example")
    assert gateway.rpc("admin", "ListCertAttestations", domain="app.example") == listed
    assert gateway.call(lambda: gateway.server.gateway.certificates.get("app.example")) is entry


@pytest.mark.parametrize(
    ("name", "fits"), [("a.app.example", True), ("app.example", False), ("a.b.app.example", False)]
)
def test_wildcard_is_for_one_label(gateway: RunningGateway, name: str, fits: bool) -> None:
    gateway.clock[0] = int(time.time())
    credential(gateway)
    domain(gateway)
    issued(gateway)
    entry = gateway.call(lambda: gateway.server.gateway.certificates.get("app.example"))
    assert entry is not None
    *_, ca = x509.load_pem_x509_certificates(entry.chain.encode())
    client = tls.client(ca.public_bytes(Encoding.PEM).decode())
    sent, received = ssl.MemoryBIO(), ssl.MemoryBIO()
    serving = tls.server(entry.chain, entry.key).wrap_bio(sent, received, server_side=True)
    asking = client.wrap_bio(received, sent, server_hostname=name)
    with contextlib.nullcontext() if fits else pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        for _ in range(2):
            for side in (asking, serving):
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
        assert serving.version()


def test_certificate_is_renewed_when_it_is_due_or_forced(gateway: RunningGateway) -> None:
    credential(gateway)
    domain(gateway)
    issued(gateway)

    def renew(**body: Any) -> Any:
        return gateway.rpc("admin", "RenewZtDomainCert", None, domain="app.example", **body)

    assert renew() == {"renewed": False, "not_after": 0}
    gateway.clock[0] += 1
    assert renew(force=True) == {"renewed": True, "not_after": START + 1 + 90 * 86400}
    gateway.clock[0] += 61 * 86400
    assert gateway.rpc("admin", "RenewCert") == {"renewed": True}
    history = gateway.rpc("admin", "ListCertAttestations", domain="app.example")["history"]
    assert [each["generated_at"] for each in history] == [START + 1 + 61 * 86400, START + 1, START]
    assert len(gateway.rpc("admin", "ListCertAttestations", domain="app.example", limit=2)["history"]) == 2
    failed = "certificate renewal failed: ZT-Domain config not found"
    for other in ("other.example", "*.app.example"):
        assert gateway.refused("admin", "RenewZtDomainCert", domain=other, force=True) == failed
    assert gateway.rpc("admin", "ReloadCert") is None
    assert gateway.rpc("admin", "ForceReleaseCertLock", domain="app.example") is None


@pytest.mark.parametrize("spoiled", ["expired", "of another key", "no certificate"])
def test_stored_certificate_that_cannot_be_used_leaves_the_old_one(gateway: RunningGateway, spoiled: str) -> None:
    credential(gateway)
    for name in ("app.example", "other.example"):
        domain(gateway, name)
        issued(gateway, name)

    def loaded(name: str) -> Any:
        return gateway.call(lambda: gateway.server.gateway.certificates.get(name))

    old, other = loaded("app.example"), loaded("other.example")
    changed = {"expired": {"not_after": START}, "of another key": {"key": other.key}, "no certificate": {"chain": ""}}
    stored, new = gateway.server.gateway.records.certificates, other.model_copy()
    stored |= {"app.example": old.model_copy(update=changed[spoiled]), "other.example": new}
    assert gateway.rpc("admin", "ReloadCert") is None
    assert loaded("app.example") is old
    assert loaded("other.example") is new


def test_stored_certificate_that_cannot_be_used_is_not_loaded_at_the_start(tmp_path: Path) -> None:
    with running_gateway(tmp_path) as gateway:
        credential(gateway)
        domain(gateway)
        issued(gateway)
    file = tmp_path / "data/gateway-state.json"
    state = json.loads(file.read_text())
    state["certificates"]["app.example"]["key"] = "no key"
    file.write_text(json.dumps(state))
    with running_gateway(tmp_path) as gateway:
        status = gateway.rpc("admin", "GetZtDomain", domain="app.example")["cert_status"]
        assert (status["has_cert"], status["loaded_in_memory"]) == (True, False)
        assert gateway.rpc("admin", "RenewZtDomainCert", domain="app.example", force=True)["renewed"]
        assert issued(gateway)["cert_status"]["loaded_in_memory"]


def test_what_cannot_be_stored_is_refused_and_leaves_no_trace(gateway: RunningGateway) -> None:
    credential(gateway)
    domain(gateway)
    issued(gateway)
    before = gateway.call(gateway.server.gateway.capture)
    shown = gateway.call(lambda: gateway.server.gateway.certificates.get("app.example"))
    folder = gateway.server.config.core.sync.data_dir
    moved = folder.rename(folder.with_name("moved"))
    try:
        for method, body in (
            ("RenewZtDomainCert", {"domain": "app.example", "force": True}),
            ("RotateAcmeCredentials", {}),
            ("SetNodeStatus", {"id": 1, "status": "down"}),
            ("DeleteZtDomain", {"domain": "app.example"}),
        ):
            assert "failed to store the gateway's state in " in gateway.refused("admin", method, None, **body)
    finally:
        moved.rename(folder)
    assert gateway.call(gateway.server.gateway.capture) == before
    assert gateway.call(lambda: gateway.server.gateway.certificates.get("app.example")) is shown


def test_domain_without_a_dns_credential_gets_no_certificate(gateway: RunningGateway) -> None:
    domain(gateway)
    text = gateway.refused("admin", "RenewZtDomainCert", domain="app.example")
    assert text == "certificate renewal failed: no default DNS credential configured"
    assert gateway.rpc("admin", "RenewCert") == {"renewed": True}
    assert not gateway.rpc("admin", "GetZtDomain", domain="app.example")["cert_status"]["has_cert"]


def test_agent_that_does_not_quote_leaves_a_certificate_without_attestation(
    gateway: RunningGateway, agent: StubAgent
) -> None:
    credential(gateway)
    agent.status = 500
    try:
        domain(gateway)
        issued(gateway)
    finally:
        agent.status = 200
    assert gateway.rpc("admin", "ListCertAttestations", domain="app.example") == {"latest": None, "history": []}


# ---- the ACME account


def test_account_is_rotated_and_belongs_to_one_directory(gateway: RunningGateway) -> None:
    none = "no ZT-Domain configured for ACME credential rotation"
    assert gateway.refused("admin", "RotateAcmeCredentials") == none
    assert gateway.rpc("admin", "SetCaa") is None
    credential(gateway)
    domain(gateway)
    issued(gateway)
    first = gateway.rpc("rpc", "AcmeInfo")["account_uri"]
    gateway.rpc("admin", "SetCertbotConfig", acme_url="https://acme.example/directory")
    other = "stored ACME credentials are for a different ACME directory; call RotateAcmeCredentials to switch"
    text = gateway.refused("admin", "RenewZtDomainCert", domain="app.example", force=True)
    assert text.startswith(f"certificate renewal failed: {other}")
    assert gateway.refused("admin", "SetCaa").startswith("failed to set CAA records for 1/1 domains: app.example; ")
    rotated = gateway.rpc("admin", "RotateAcmeCredentials")
    assert (rotated["domains_updated"], rotated["account_uri"] != first) == (1, True)
    assert gateway.rpc("rpc", "AcmeInfo")["account_uri"] == rotated["account_uri"]
    assert gateway.rpc("admin", "RenewZtDomainCert", domain="app.example", force=True)["renewed"]
    assert gateway.rpc("admin", "SetCaa") is None


def test_0_5_has_neither_rotation_nor_caa(gateway_0_5: RunningGateway) -> None:
    assert gateway_0_5.refused("admin", "RotateAcmeCredentials") == "Service not found: RotateAcmeCredentials"
    text = "set_caa is not implemented for multi-domain certificates yet"
    assert gateway_0_5.refused("admin", "SetCaa") == text


def test_certbot_has_upstreams_defaults_and_keeps_what_is_not_named(gateway: RunningGateway) -> None:
    config = {
        "renew_interval_secs": 43200,
        "renew_before_expiration_secs": 2592000,
        "renew_timeout_secs": 300,
        "acme_url": "",
    }
    assert gateway.rpc("admin", "GetCertbotConfig") == config
    assert gateway.rpc("admin", "SetCertbotConfig", renew_timeout_secs=7) is None
    assert gateway.rpc("admin", "GetCertbotConfig") == {**config, "renew_timeout_secs": 7}


def test_registration_of_a_node_that_is_down_is_refused_until_it_is_up(gateway: RunningGateway) -> None:
    gateway.rpc("admin", "SetNodeStatus", id=1, status="down")
    request = {"instance_id": "one", "app_id": "a", "client_public_key": wg_key("one")}
    text = gateway.refused("debug", "RegisterCvm", None, **request)
    assert text == "this gateway node is marked as down and cannot accept new registrations"
    gateway.rpc("admin", "SetNodeStatus", id=1, status="up")
    assert gateway.debug_register("one")["wg"]["client_ip"] == "10.0.0.2"


# ---- at the same time


def test_renewal_that_meets_another_one_does_nothing_unless_the_lock_is_released(
    gateway: RunningGateway, agent: StubAgent
) -> None:
    credential(gateway)
    domain(gateway)
    issued(gateway)

    def renew() -> bool:
        renewed: bool = gateway.rpc("admin", "RenewZtDomainCert", domain="app.example", force=True)["renewed"]
        return renewed

    with ThreadPoolExecutor(2) as pool:
        with agent.held("GetQuote") as is_asked:
            first = pool.submit(renew)
            is_asked.wait(20)
            assert not renew()
            gateway.rpc("admin", "ForceReleaseCertLock", domain="app.example")
            second = pool.submit(renew)
        assert first.result(20)
        assert second.result(20)


def test_rotation_that_meets_another_one_is_refused(gateway: RunningGateway, agent: StubAgent) -> None:
    credential(gateway)
    domain(gateway)
    issued(gateway)
    text = "ACME credential rotation or CAA reconciliation is already in progress"
    with ThreadPoolExecutor(1) as pool:
        with agent.held("GetQuote") as is_asked:
            rotation = pool.submit(gateway.rpc, "admin", "RotateAcmeCredentials")
            is_asked.wait(20)
            for method in ("RotateAcmeCredentials", "SetCaa"):
                assert gateway.refused("admin", method) == text
        assert rotation.result(20)["domains_updated"] == 1
