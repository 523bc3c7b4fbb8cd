"""Registration at a gateway: RegisterCvm by clients of the standard library and curl, in its order."""

import json
import random
import ssl
import subprocess
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from dstack_emu.gateway.errors import GatewayError
from dstack_emu.gateway.policies import policy_of
from dstack_emu.gateway.registry import Registration
from tests.gateway import START, Pair, RunningGateway, StubAgent, Table, TestCa, extension, running_gateway, wg_key
from tests.ports import refusing_port

APP = "61" * 20
ONE, TWO = b"1" * 20, b"2" * 20


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway")) as running:
        running.remember()
        yield running


@pytest.fixture
def gateway(started: RunningGateway) -> RunningGateway:
    """A gateway without any instance."""
    started.reset()
    return started


@pytest.fixture(scope="module")
def started_0_5(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway05"), release="0.5") as running:
        running.remember()
        yield running


@pytest.fixture
def gateway_0_5(started_0_5: RunningGateway) -> RunningGateway:
    """A gateway of 0.5.11 without any instance."""
    started_0_5.reset()
    return started_0_5


# ---- what a registration answers


def test_instance_is_registered_by_curl_with_its_certificate(gateway: RunningGateway) -> None:
    file = str(gateway.ca.instance(ONE).file)
    command = ["curl", "-sS", "--cacert", str(gateway.ca.own.file), "--cert", file, "--key", file]
    body = json.dumps({"client_public_key": wg_key("one")})
    url = f"{gateway.urls['rpc']}/prpc/RegisterCvm?json"
    out = subprocess.run([*command, "-d", body, url], capture_output=True, check=True, timeout=20).stdout
    answer = json.loads(out)
    (node,) = answer["gateways"]
    assert answer["wg"] == {
        "client_ip": "10.0.0.2",
        "servers": [{"pk": node["wg_public_key"], "ip": "10.0.0.1/24", "endpoint": "10.0.2.2:51820"}],
    }
    assert answer["agent"] == {
        "external_port": 0,
        "internal_port": 8090,
        "domain": "",
        "app_address_ns_prefix": "_dstack-app-address",
    }
    assert (node["id"], node["url"], len(node["uuid"])) == (1, "https://gateway.example:8000", 32)
    (stored,) = gateway.rpc("debug", "GetSyncData")["instances"]
    assert stored == {"instance_id": ONE.hex(), "app_id": APP, "ip": "10.0.0.2", "public_key": wg_key("one")}


def test_registration_in_protobuf_has_the_same_answer(gateway: RunningGateway) -> None:
    key = wg_key("one").encode()
    client = gateway.ca.instance(ONE)
    body = b"\x0a" + bytes([len(key)]) + key  # field 1, a text
    status, answer, _ = gateway.ask("rpc", "/prpc/RegisterCvm", body, client=client)
    assert status == 200
    assert answer.startswith(b"\x0a")  # field 1, the message wg
    assert b"\x0a\x0810.0.0.2" in answer
    assert gateway.register(client, "one")["wg"]["client_ip"] == "10.0.0.2"


def test_domain_and_port_of_the_answer_are_those_of_the_best_domain(gateway: RunningGateway) -> None:
    for domain, port, more in (
        ("low.example", 1, {"priority": -1}),
        ("other.example", 2, {"priority": 9, "node": 2}),
        ("mine.example", 3, {"priority": 5, "node": 1}),
        ("best.example", 4, {"priority": 5}),
    ):
        gateway.rpc("admin", "AddZtDomain", None, domain=domain, port=port, **more)
    agent = gateway.register(gateway.ca.instance(ONE), "one")["agent"]
    assert (agent["domain"], agent["external_port"]) == ("best.example", 4)
    info = gateway.rpc("rpc", "Info")
    assert (info["base_domain"], info["external_port"], info["version"]) == ("best.example", 4, "0.6.0")


# ---- refusals, in their order


def test_refusals_come_in_upstreams_order(gateway: RunningGateway) -> None:
    ca, body = gateway.ca, {"client_public_key": "no", "port_policy": {"ports": [{"port": 70000}]}}
    gateway.rpc("admin", "SetNodeStatus", id=1, status="down")
    nobody = ca.instance(b"", b"")

    def refusal(client: Pair | None) -> str:
        return gateway.refused("rpc", "RegisterCvm", client, **body)

    assert refusal(None) == "neither app-info nor attestation provided"
    assert refusal(ca.client("no info", extension(3, b"a" * 20))) == "neither app-info nor attestation provided"
    assert refusal(nobody).startswith("port 70000 out of u16 range")
    body["port_policy"] = {"ports": [{"port": 0}]}
    assert refusal(nobody) == "port must be between 1 and 65535"
    body["port_policy"] = {"ports": [{"port": 65535}]}
    assert refusal(nobody) == "this gateway node is marked as down and cannot accept new registrations"
    gateway.rpc("admin", "SetNodeStatus", id=1, status="up")
    assert refusal(nobody) == "[] app id is empty"
    assert refusal(ca.instance(b"")) == "[] instance id is empty"
    one = ca.instance(ONE)
    prefix = f"[{ONE.hex()}] invalid client public key: "
    assert refusal(one).startswith(f"{prefix}invalid WireGuard public key encoding")
    body["client_public_key"] = "bm8="
    assert refusal(one) == f"{prefix}WireGuard public key must decode to 32 bytes"
    gateway.register(ca.instance(TWO), "two")
    body["client_public_key"] = wg_key("two")
    failed = "failed to allocate IP address for client: "
    assert refusal(one) == f"{failed}WireGuard public key is already registered to another instance"
    body["client_public_key"] = wg_key("one")
    assert refusal(ca.instance(TWO, b"b" * 20)) == f"{failed}instance_id is already registered to a different app"
    assert [each["instance_id"] for each in gateway.rpc("debug", "GetSyncData")["instances"]] == [TWO.hex()]
    assert gateway.register(one, "one")["wg"]["client_ip"] == "10.0.0.3"


@pytest.mark.parametrize("bad", [{"key": wg_key("two")}, {"app": "other"}, {"key": "YQ=="}])
def test_refused_debug_registration_leaves_no_trace(gateway: RunningGateway, bad: dict[str, str]) -> None:
    gateway.debug_register("one")
    gateway.debug_register("two")
    before = gateway.rpc("debug", "GetProxyState")
    request = {"instance_id": "one", "app_id": bad.get("app", "app1"), "client_public_key": bad.get("key", wg_key("x"))}
    gateway.refused("debug", "RegisterCvm", None, **request)
    assert gateway.rpc("debug", "GetProxyState") == before


def test_client_of_another_root_fails_in_the_handshake(gateway: RunningGateway, tmp_path: Path) -> None:
    foreign = TestCa(tmp_path, "another root").instance(ONE)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        gateway.ask("rpc", "/prpc/Info", b"", client=foreign)


def test_0_5_checks_that_there_is_a_key_and_no_more(gateway_0_5: RunningGateway) -> None:
    gateway, ca = gateway_0_5, gateway_0_5.ca
    one = ca.instance(ONE)
    refused = gateway.refused("rpc", "RegisterCvm", one, client_public_key="")
    assert refused == f"[{ONE.hex()}] client public key is empty"
    ports = [{"port": 0}, {"port": 70000}, {"port": 80, "pp": True}]
    for client in (one, ca.instance(TWO), ca.instance(ONE, b"b" * 20)):
        gateway.rpc("rpc", "RegisterCvm", client, client_public_key="same", port_policy={"ports": ports})
    assert [each["app_id"] for each in gateway.rpc("debug", "GetSyncData")["instances"]] == [APP, APP]
    policy = gateway.rpc("admin", "GetInstancePortPolicy", instance_id=ONE.hex())
    assert policy["effective"]["ports"] == [{"port": 0, "pp": False}, {"port": 80, "pp": True}]


# ---- addresses


def test_registration_again_keeps_the_address_and_counts_the_new_key_and_policy(gateway: RunningGateway) -> None:
    client = gateway.ca.instance(ONE)
    first = gateway.register(client, "one", port_policy={"ports": [{"port": 80}], "restrict_mode": True})
    again = gateway.register(client, "other", port_policy={"ports": [{"port": 81}], "restrict_mode": True})
    assert again["wg"]["client_ip"] == first["wg"]["client_ip"]
    (stored,) = gateway.rpc("debug", "GetSyncData")["instances"]
    assert stored["public_key"] == wg_key("other")
    policy = gateway.rpc("admin", "GetInstancePortPolicy", instance_id=ONE.hex())
    assert (policy["source"], policy["effective"]["ports"]) == ("instance", [{"port": 81, "pp": False}])


def test_32_registrations_at_once_have_32_addresses(gateway: RunningGateway) -> None:
    clients = [gateway.ca.instance(bytes([number]) * 20) for number in range(32)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda pair: gateway.register(pair[1], str(pair[0])), enumerate(clients)))
    addresses = {answer["wg"]["client_ip"] for answer in answers}
    assert addresses == {f"10.0.0.{number}" for number in range(2, 34)}
    assert set(gateway.rpc("debug", "GetProxyState")["allocated_addresses"]) == addresses


def test_recycled_address_goes_out_again_and_a_fresh_instance_stays(gateway: RunningGateway) -> None:
    gateway.debug_register("old")
    gateway.debug_register("fresh")
    gateway.clock[0] += 36_001
    gateway.debug_register("fresh")
    gateway.call(gateway.server.gateway.recycle)
    assert [each["instance_id"] for each in gateway.rpc("debug", "GetSyncData")["instances"]] == ["fresh"]
    assert gateway.debug_register("new")["wg"]["client_ip"] == "10.0.0.2"
    assert gateway.debug_register("newer")["wg"]["client_ip"] == "10.0.0.4"


WG = """
[core.wg]
ip = "10.1.0.3/28"
reserved_net = ["10.1.0.2/31"]
client_ip_range = "10.1.0.0/29"
"""


def test_pool_leaves_out_reserved_nets_and_its_own_address_and_ends(tmp_path: Path) -> None:
    with running_gateway(tmp_path, WG) as gateway:
        given = [gateway.debug_register(str(number))["wg"]["client_ip"] for number in range(4)]
        assert given == ["10.1.0.1", "10.1.0.4", "10.1.0.5", "10.1.0.6"]
        text = gateway.refused("debug", "RegisterCvm", instance_id="more", app_id="a", client_public_key=wg_key("more"))
        assert text == (
            "failed to allocate IP address for client: IP pool exhausted, no available addresses in client_ip_range"
        )
        assert gateway.debug_register("3")["wg"]["client_ip"] == "10.1.0.6"


def test_addresses_and_keys_are_never_given_twice(gateway: RunningGateway) -> None:
    draw = random.Random(1)
    registry, records = gateway.server.gateway.registry, gateway.server.gateway.records

    def step() -> None:
        id_, app, key = (str(draw.randrange(size)) for size in (12, 2, 14))
        gateway.clock[0] += draw.randrange(9_000)
        registry.recycle()
        before = dict(records.instances)
        try:
            registry.register(Registration(id_, app, wg_key(key), "", None))
        except GatewayError:
            assert records.instances == before

    def steps() -> None:
        for _ in range(120):
            step()
            entries = records.instances.values()
            assert len({each.ip for each in entries}) == len({each.public_key for each in entries}) == len(entries)
            assert {each.ip for each in entries} <= {f"10.0.0.{number}" for number in range(2, 14)}

    gateway.call(steps)


# ---- the webhook


class Webhook:
    """A webhook of the standard library."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.status = 200
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                webhook.asked.append((self.path, json.loads(body)))
                self.send_response(webhook.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/app-auth"
        Thread(target=lambda: self._server.serve_forever(0.01), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_webhook_is_asked_with_the_app_info_and_anything_but_2xx_refuses(tmp_path: Path) -> None:
    webhook = Webhook()
    with running_gateway(tmp_path, f'[core.auth]\nenabled = true\nurl = "{webhook.url}"\n') as gateway:
        client = gateway.ca.instance(ONE)
        gateway.register(client, "one")
        assert webhook.asked == [
            (
                "/app-auth",
                {
                    "app_id": APP,
                    "compose_hash": "00" * 32,
                    "instance_id": ONE.hex(),
                    "device_id": (b"d" * 32).hex(),
                    "mr_system": (b"s" * 32).hex(),
                    "mr_aggregated": (b"g" * 32).hex(),
                    "os_image_hash": (b"o" * 32).hex(),
                    "key_provider_info": b"{}".hex(),
                    "init_script_hashes": [],
                },
            )
        ]
        for status, kind in ((403, "client error (403 Forbidden)"), (503, "server error (503 Service Unavailable)")):
            webhook.status = status
            text = gateway.refused("rpc", "RegisterCvm", client, client_public_key="")
            assert text == f"App authorization failed: Request failed: HTTP status {kind} for url ({webhook.url})"
        webhook.close()
    assert len(webhook.asked) == 3


def test_webhook_that_is_late_refuses(tmp_path: Path) -> None:
    webhook = Webhook()
    more = f'[core.auth]\nenabled = true\nurl = "{webhook.url}"\ntimeout = "0s"\n'
    with running_gateway(tmp_path, more) as gateway:
        text = gateway.refused("rpc", "RegisterCvm", gateway.ca.instance(ONE), client_public_key=wg_key("one"))
    webhook.close()
    assert text == "App authorization failed: Auth timeout: deadline has elapsed"


def test_webhook_that_does_not_answer_refuses(tmp_path: Path) -> None:
    with refusing_port() as port:
        url = f"http://127.0.0.1:{port}/"
        with running_gateway(tmp_path, f'[core.auth]\nenabled = true\nurl = "{url}"\n') as gateway:
            text = gateway.refused("rpc", "RegisterCvm", gateway.ca.instance(ONE), client_public_key=wg_key("one"))
            assert text.startswith("App authorization failed: Failed to send request: error sending request for url")
            assert gateway.rpc("debug", "GetSyncData")["instances"] == []


# ---- port policies


def test_policy_is_the_admins_or_else_the_instances(gateway: RunningGateway) -> None:
    gateway.register(gateway.ca.instance(ONE), "one", port_policy={"ports": [{"port": 80, "pp": True}]})
    id_ = ONE.hex()
    override = {"ports": [{"port": 443, "pp": False}], "restrict_mode": True}
    gateway.rpc("admin", "SetInstancePortPolicy", instance_id=id_, policy=override)
    reported = {"ports": [{"port": 80, "pp": True}], "restrict_mode": False}
    assert gateway.rpc("admin", "GetInstancePortPolicy", instance_id=id_) == {
        "effective": override,
        "source": "admin",
        "instance_reported": reported,
        "admin_override": override,
    }
    for _ in range(2):  # without an override it is no error
        assert gateway.rpc("admin", "ClearInstancePortPolicy", instance_id=id_) is None
    assert gateway.rpc("admin", "GetInstancePortPolicy", instance_id=id_) == {
        "effective": reported,
        "source": "instance",
        "instance_reported": reported,
        "admin_override": None,
    }


def test_policy_that_nobody_set_is_none_and_an_empty_one_is_a_policy(gateway: RunningGateway) -> None:
    nothing = {"effective": None, "source": "none", "instance_reported": None, "admin_override": None}
    gateway.debug_register("one")
    gateway.rpc("admin", "SetInstancePortPolicy", instance_id="one", policy={})
    gateway.rpc("admin", "ClearInstancePortPolicy", instance_id="one")
    assert gateway.rpc("admin", "GetInstancePortPolicy", instance_id="one") == nothing
    client = gateway.ca.instance(TWO)
    empty = {"ports": [], "restrict_mode": False}
    gateway.register(client, "two", port_policy={})
    assert gateway.rpc("admin", "GetInstancePortPolicy", instance_id=TWO.hex())["effective"] == empty


@pytest.mark.parametrize("id_", ["", "unknown"])
def test_policy_of_an_unknown_instance_is_refused(gateway: RunningGateway, id_: str) -> None:
    for method in ("Get", "Set", "Clear"):
        text = gateway.refused("admin", f"{method}InstancePortPolicy", instance_id=id_, policy={})
        assert text == f"instance {id_} not found"


def test_override_that_is_no_policy_is_refused(gateway: RunningGateway) -> None:
    gateway.debug_register("one")
    before = gateway.rpc("admin", "GetInstancePortPolicy", instance_id="one")
    refused: dict[str, dict[str, Any]] = {
        "port policy is required": {},
        "port 65536 out of u16 range": {"policy": {"ports": [{"port": 65536}]}},
        "invalid type: a string, expected u32 for field `port`": {"policy": {"ports": [{"port": "80"}]}},
    }
    for text, body in refused.items():
        assert gateway.refused("admin", "SetInstancePortPolicy", None, instance_id="one", **body).startswith(text)
    assert gateway.rpc("admin", "GetInstancePortPolicy", instance_id="one") == before


def test_policy_survives_a_new_compose_hash_only_as_override(gateway: RunningGateway) -> None:
    policy = {"ports": [{"port": 80}], "restrict_mode": True}
    gateway.register(gateway.ca.instance(ONE), "one", port_policy=policy)
    gateway.register(gateway.ca.instance(ONE), "one")  # unknown is not empty
    assert gateway.rpc("admin", "GetInstancePortPolicy", instance_id=ONE.hex())["source"] == "instance"
    gateway.rpc("admin", "SetInstancePortPolicy", instance_id=ONE.hex(), policy=policy)
    gateway.register(gateway.ca.instance(ONE, compose=b"2" * 32), "one")
    answer = gateway.rpc("admin", "GetInstancePortPolicy", instance_id=ONE.hex())
    assert (answer["source"], answer["instance_reported"]) == ("admin", None)


COMPOSE = json.dumps({"port_policy": {"ports": [{"port": 80, "pp": True}], "restrict_mode": True}})
FETCHED = [
    (json.dumps({"app_compose": COMPOSE}), {"ports": [{"port": 80, "pp": True}], "restrict_mode": True}),
    (json.dumps({"app_compose": "{}"}), {"ports": [], "restrict_mode": False}),
    ("", {"ports": [], "restrict_mode": False}),
]


@pytest.mark.parametrize(("tcb_info", "policy"), FETCHED)
def test_policy_of_an_old_guest_is_asked_of_its_agent(tmp_path: Path, tcb_info: str, policy: dict[str, Any]) -> None:
    table = Table()
    agent = StubAgent(TestCa(tmp_path / "ca", "root"), b"a" * 20)
    agent.tcb_info = tcb_info
    with agent.running() as url, running_gateway(tmp_path, reach=table, ca=agent.ca) as gateway:
        address = urllib.parse.urlsplit(url)
        table.endpoints["one", 8090] = (address.hostname or "", address.port or 0)
        gateway.debug_register("one")
        answer = gateway.rpc("admin", "GetInstancePortPolicy", instance_id="one")
        while answer["source"] == "none":  # the request is under way
            answer = gateway.rpc("admin", "GetInstancePortPolicy", instance_id="one")
        assert (answer["source"], answer["effective"]) == ("instance", policy)
        assert [method for method, _ in agent.asked] == ["Info"]


# ---- handshakes and candidates


def test_handshakes_are_published_by_status(gateway: RunningGateway) -> None:
    gateway.debug_register("one")
    assert gateway.rpc("admin", "GetInstanceHandshakes", instance_id="one") == {"handshakes": []}
    (host,) = gateway.rpc("admin", "Status")["hosts"]
    assert host["latest_handshake"] == START
    seen = [{"observer_node_id": 1, "timestamp": START}]
    assert gateway.rpc("admin", "GetInstanceHandshakes", instance_id="one") == {"handshakes": seen}
    for unknown in ("", "unknown"):
        assert gateway.rpc("admin", "GetInstanceHandshakes", instance_id=unknown) == {"handshakes": []}


def test_instance_without_a_handshake_is_not_online(gateway: RunningGateway) -> None:
    for name in ("one", "two"):
        gateway.debug_register(name)
    assert gateway.rpc("admin", "GetMeta") == {"registered": 2, "online": 2}
    gateway.call(lambda: gateway.server.gateway.registry.end_handshake("one"))
    assert gateway.rpc("admin", "GetMeta") == {"registered": 2, "online": 1}
    assert gateway.rpc("admin", "GetInfo", id="one")["info"]["latest_handshake"] == 0
    gateway.clock[0] += 300
    assert gateway.rpc("admin", "GetMeta") == {"registered": 2, "online": 0}


def candidates(gateway: RunningGateway, name: str) -> list[str]:
    return gateway.call(lambda: [each.id for each in gateway.server.gateway.candidates(name)])


def test_app_id_means_the_freshest_three_and_no_stale_one(gateway: RunningGateway) -> None:
    for name in ("1", "2", "3", "4"):
        gateway.debug_register(name)
        gateway.clock[0] += 10
    assert candidates(gateway, "app1") == ["4", "3", "2"]
    assert candidates(gateway, "1") == ["1"]
    assert candidates(gateway, "nobody") == []
    gateway.clock[0] += 1780  # the third is 30 minutes old
    assert candidates(gateway, "app1") == ["4"]
    assert candidates(gateway, "1") == ["1"]


def test_app_id_of_0_5_means_stale_instances_too(gateway_0_5: RunningGateway) -> None:
    gateway_0_5.debug_register("1")
    gateway_0_5.clock[0] += 10_000
    gateway_0_5.debug_register("2")
    assert candidates(gateway_0_5, "app1") == ["2", "1"]


# ---- rotation


def test_app_id_leads_to_no_instance_that_an_operator_took_out(tmp_path: Path) -> None:
    """Upstream: `set_ready` and `is_eligible` in gateway/src/main_service.rs (pull request 1078): all may be out, the
    instance id leads to each of them, and only an operator puts one back.
    """
    ca = TestCa(tmp_path / "ca", "root")
    one = ONE.hex()
    with running_gateway(tmp_path, ca=ca) as gateway:
        gateway.debug_register("two", app=(b"a" * 20).hex())
        gateway.register(ca.instance(ONE), "one")
        assert candidates(gateway, (b"a" * 20).hex()) == [one, "two"]
        gateway.rpc("admin", "SetInstanceReady", instance_id=one, ready=False)
        gateway.register(ca.instance(ONE), "another key")
        assert candidates(gateway, (b"a" * 20).hex()) == ["two"]
        assert candidates(gateway, one) == [one]
        gateway.rpc("admin", "SetInstanceReady", instance_id="two", ready=False)
        assert candidates(gateway, (b"a" * 20).hex()) == []
    with running_gateway(tmp_path, ca=ca) as gateway:
        assert [each["ready"] for each in gateway.rpc("admin", "Status")["hosts"]] == [False, False]
        gateway.rpc("admin", "SetInstanceReady", instance_id=one, ready=True)
        assert gateway.rpc("admin", "GetInfo", id=one)["info"]["ready"] is True
        assert candidates(gateway, (b"a" * 20).hex()) == [one]
        absent = gateway.refused("admin", "SetInstanceReady", instance_id="nobody", ready=True)
        assert absent == "instance nobody not found"
        assert "ready" in gateway.refused("admin", "SetInstanceReady", instance_id=one)
        assert gateway.rpc("admin", "GetInfo", id=one)["info"]["ready"] is True


# The gateway asks when a test says so.
POLLING = '[core.proxy.health_check]\ninterval = "1h"\n'


@contextmanager
def polling(folder: Path, more: str = POLLING) -> Iterator[tuple[RunningGateway, StubAgent, Table]]:
    """A gateway, the agent of the instances ONE and TWO, and where it listens."""
    table, agent = Table(), StubAgent(TestCa(folder / "ca", "root"), b"a" * 20)
    with agent.running() as url, running_gateway(folder, more, reach=table, ca=agent.ca) as gateway:
        address = urllib.parse.urlsplit(url)
        for instance in (ONE, TWO):
            table.endpoints[instance.hex(), 8090] = (address.hostname or "", address.port or 0)
        yield gateway, agent, table


def health(gateway: RunningGateway, instance: bytes) -> str:
    said: str = gateway.rpc("admin", "GetInfo", id=instance.hex())["info"]["health"]
    return said


def test_app_id_leads_to_healthy_instances_if_there_are_any(tmp_path: Path) -> None:
    """Upstream: docs/app-health-checks.md at 1f7c6cda, and `Health` in gateway/src/models.rs (pull request 1079)."""
    app, one, two = (b"a" * 20).hex(), ONE.hex(), TWO.hex()
    with polling(tmp_path) as (gateway, agent, _):
        ca = gateway.ca
        assert gateway.rpc("admin", "Status")["health_gating"] is True
        gateway.register(ca.instance(ONE), "one", health_check=True, port_policy={})
        assert (health(gateway, ONE), candidates(gateway, app)) == ("unknown", [one])  # there is no other one
        gateway.register(ca.instance(TWO), "two", port_policy={})
        assert (health(gateway, TWO), candidates(gateway, app)) == ("ungated", [two])
        agent.health = {"healthy": True}
        gateway.poll_health()
        assert (health(gateway, ONE), sorted(candidates(gateway, app))) == ("healthy", sorted([one, two]))
        agent.health = {"healthy": False, "unhealthy": [{"name": "web", "status": "starting"}]}
        gateway.poll_health()
        assert (health(gateway, ONE), candidates(gateway, app)) == ("unhealthy", [two])
        assert candidates(gateway, one) == [one]
        gateway.register(ca.instance(ONE), "one", health_check=True, port_policy={})
        assert health(gateway, ONE) == "unhealthy"
        gateway.register(ca.instance(ONE), "key of another boot", health_check=True, port_policy={})
        assert health(gateway, ONE) == "unknown"
        gateway.register(ca.instance(ONE), "key of another boot", port_policy={})
        assert health(gateway, ONE) == "ungated"
        assert [method for method, _ in agent.asked] == ["Health", "Health"]


@pytest.mark.parametrize("is_reached", [True, False])
def test_agent_that_does_not_answer_is_asked_again_before_its_app_is_unhealthy(
    tmp_path: Path, is_reached: bool
) -> None:
    with polling(tmp_path, POLLING + "failure_threshold = 3\n") as (gateway, agent, table):
        gateway.register(gateway.ca.instance(ONE), "one", health_check=True, port_policy={})
        agent.status = 500
        if not is_reached:
            table.endpoints.clear()
        said = []
        for _ in range(3):
            gateway.poll_health()
            said.append(health(gateway, ONE))
        assert said == ["unknown", "unknown", "unhealthy"]


def test_instance_without_a_fresh_handshake_is_not_asked(tmp_path: Path) -> None:
    with polling(tmp_path) as (gateway, agent, _):
        agent.health = {"healthy": True}
        gateway.register(gateway.ca.instance(ONE), "one", health_check=True, port_policy={})
        gateway.clock[0] += 1800
        gateway.poll_health()
        assert (health(gateway, ONE), agent.asked) == ("unknown", [])


def test_without_polling_every_instance_is_in_rotation(tmp_path: Path) -> None:
    with polling(tmp_path, "[core.proxy.health_check]\nenabled = false\n") as (gateway, agent, _):
        gateway.register(gateway.ca.instance(ONE), "one", health_check=True, port_policy={})
        gateway.register(gateway.ca.instance(TWO), "two", port_policy={})
        assert gateway.rpc("admin", "Status")["health_gating"] is False
        assert health(gateway, ONE) == "unknown"
        assert len(candidates(gateway, (b"a" * 20).hex())) == 2
        assert agent.asked == []


# ---- state


def test_instances_are_there_again_after_a_restart(tmp_path: Path) -> None:
    ca = TestCa(tmp_path / "ca", "root")
    with running_gateway(tmp_path, ca=ca) as gateway:
        gateway.register(ca.instance(ONE), "one", port_policy={"restrict_mode": True})
        gateway.rpc("admin", "SetNodeStatus", id=1, status="down")
        before = gateway.rpc("debug", "GetProxyState"), gateway.rpc("admin", "Status")["uuid"]
    with running_gateway(tmp_path, ca=ca) as gateway:
        assert (gateway.rpc("debug", "GetProxyState"), gateway.rpc("admin", "Status")["uuid"]) == before
        assert gateway.rpc("admin", "GetInstancePortPolicy", instance_id=ONE.hex())["source"] == "instance"
        assert gateway.rpc("admin", "GetNodeStatuses") == {"statuses": [{"node_id": 1, "status": "up"}]}
        assert gateway.register(ca.instance(TWO), "two")["wg"]["client_ip"] == "10.0.0.3"


def test_state_is_captured_and_restored(gateway: RunningGateway) -> None:
    gateway.debug_register("one")
    before = gateway.rpc("debug", "GetProxyState")
    captured = gateway.call(gateway.server.gateway.capture)
    gateway.debug_register("two")
    gateway.debug_register("one", key="another")
    assert type(captured).model_validate_json(captured.model_dump_json()) == captured
    gateway.call(lambda: gateway.server.gateway.restore(captured))
    assert gateway.rpc("debug", "GetProxyState") == before


def test_registration_that_cannot_be_stored_is_refused_and_leaves_no_trace(gateway: RunningGateway) -> None:
    gateway.debug_register("one")
    folder = gateway.server.config.core.sync.data_dir
    moved = folder.rename(folder.with_name("moved"))
    try:
        request = {"instance_id": "two", "app_id": "a", "client_public_key": wg_key("two")}
        text = gateway.refused("debug", "RegisterCvm", None, **request)
    finally:
        moved.rename(folder)
    assert text.startswith("failed to store the gateway's state in ")
    assert [each["instance_id"] for each in gateway.rpc("debug", "GetProxyState")["instances"]] == ["one"]


# ---- calls of any form


JUNK: list[Any] = [None, [], "x", 1, {"client_public_key": 1}, {"port_policy": []}, {"instance_id": "\ud800"}]


def test_call_with_any_body_is_answered_or_refused_with_a_reason(gateway: RunningGateway) -> None:
    client = gateway.ca.instance(ONE)
    sent = [("?json", json.dumps(body).encode()) for body in JUNK]
    sent += [("?json", body) for body in (b"", b"{", b"\xff", b"[" * 10_000)]
    sent += [("", body) for body in (b"\x08", b"\x0a\xff", b"\xff" * 20, b"\x0a\x01\xff")]
    for listener in ("rpc", "debug"):
        for query, body in sent:
            status, answer, _ = gateway.ask(listener, f"/prpc/RegisterCvm{query}", body, client=client)
            assert status == 400, (body, answer)
            assert b"internal error" not in answer
    assert gateway.rpc("debug", "GetSyncData")["instances"] == []


@pytest.mark.parametrize(
    "tcb_info", ["{", "{}", '{"app_compose": {}}', '{"app_compose": "{"}', json.dumps({"app_compose": COMPOSE[:-1]})]
)
def test_policy_that_an_agent_does_not_tell_clearly_is_not_known(tcb_info: str) -> None:
    with pytest.raises(GatewayError, match="tcb_info of the agent has no app_compose that can be read"):
        policy_of(tcb_info)


def test_policy_of_an_agent_with_a_wrong_port_is_not_known() -> None:
    compose = json.dumps({"port_policy": {"ports": [{"port": 65536}]}})
    with pytest.raises(GatewayError, match="less than or equal to 65535"):
        policy_of(json.dumps({"app_compose": compose}))
