"""Registration at a gateway: RegisterCvm by clients of the standard library and curl, in its order."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.gateway import RunningGateway, running_gateway, wg_key

APP = "61" * 20


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway")) as running:
        empty = running.server.gateway.capture()
        running.empty = empty  # type: ignore[attr-defined]
        yield running


@pytest.fixture
def fresh(gateway: RunningGateway) -> RunningGateway:
    """The gateway without any instance."""
    state: Any = gateway.empty  # type: ignore[attr-defined]
    gateway.call(lambda: gateway.server.gateway.restore(state))
    gateway.clock[0] = 1_800_000_000
    return gateway


def test_instance_is_registered_by_curl_with_its_certificate(fresh: RunningGateway) -> None:
    client = fresh.ca.instance(b"i" * 20)
    file = str(client.file)
    command = ["curl", "-sS", "--cacert", str(fresh.ca.own.file), "--cert", file, "--key", file]
    body = json.dumps({"client_public_key": wg_key("one")})
    url = f"{fresh.urls['rpc']}/prpc/RegisterCvm?json"
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
    (stored,) = fresh.rpc("debug", "GetSyncData")["instances"]
    assert stored == {
        "instance_id": (b"i" * 20).hex(),
        "app_id": APP,
        "ip": "10.0.0.2",
        "public_key": wg_key("one"),
    }
