"""The ingress of `dstack-emu gateway`, and dstack's own test of a proxy, where that is there.

`DSTACK_GATEWAY_TESTS` is the folder `dstack/gateway/test-run` of Dstack-TEE/dstack (312dc605). Its test_proxy.sh needs
`ip`, `ss`, `openssl` and about five minutes:
`DSTACK_GATEWAY_TESTS=…/test-run make test ARGS="-n 0 tests/test_gateway_ingress.py"`.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from dstack_emu.attest.release import RELEASES
from dstack_emu.gateway.config import GatewayConfig
from dstack_emu.gateway.configured_ingress import ingress_settings
from dstack_emu.gateway.ingress.settings import IngressSettings, Timeouts
from dstack_emu.transport.errors import ConfigError
from tests import tls
from tests.commands import serving, usage_error
from tests.identities import Identity, self_signed
from tests.ingress import TIMEOUT, app_server, echo
from tests.ports import free_port
from tests.repository import ROOT

SUITE: Final = os.environ.get("DSTACK_GATEWAY_TESTS", "")
NEXT: Final = RELEASES["0.6"]


def document(folder: Path, identity: Identity, proxy: str) -> Path:
    """Write a gateway.toml with a static certificate of example.org."""
    file = folder / "gateway.toml"
    file.write_text(
        f"""
address = "127.0.0.1:0"
[tls]
key = "{identity.key_file}"
certs = "{identity.cert_file}"
[tls.mutual]
ca_certs = "{identity.cert_file}"
[core]
rpc_domain = ""
set_ulimit = false
[core.debug]
insecure_localhost_backend = true
insecure_skip_attestation = true
[core.sync]
data_dir = "{folder / "data"}"
[core.proxy]
base_domain = "example.org"
cert_chain = "{identity.cert_file}"
cert_key = "{identity.key_file}"
listen_addr = "127.0.0.1"
{proxy}
"""
    )
    return file


def test_gateway_serves_the_ports_and_the_certificate_of_its_file(tmp_path: Path) -> None:
    identity, log = self_signed(tmp_path, "static", "*.example.org"), tmp_path / "log"
    first = free_port()
    proxy = f'listen_port = "{first}-{first}"\nthread_per_core = false\n[core.proxy.ktls]\n'
    config = str(document(tmp_path, identity, proxy))
    with app_server(echo) as endpoint, serving("gateway", "--release", "0.6", "-c", config, log=log) as said:
        assert said["urls"]["ingress"] == f"127.0.0.1:{first}"
        sock = socket.create_connection(("127.0.0.1", first), timeout=TIMEOUT)
        context, name = tls.client(Path(identity.cert_file).read_text()), f"localhost-{endpoint[1]}.example.org"
        with context.wrap_socket(sock, server_hostname=name) as client:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
    assert "kTLS is configured but unavailable" in log.read_text()
    assert "connection_rebalance is set but has no effect" in log.read_text()
    assert f"gateway at {said['urls']['rpc']}, ingress at 127.0.0.1:{first}. " in log.read_text()


def test_port_of_the_ingress_that_is_in_use_ends_the_gateway(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = str(document(tmp_path, self_signed(tmp_path, "static"), f"listen_port = {port}"))
        assert usage_error("gateway", "--release", "0.6", "-c", config) == (
            f"cannot listen on 127.0.0.1:{port}: the address is in use (set by core.proxy.listen_port)"
        )


def test_limits_are_those_of_the_file(tmp_path: Path) -> None:
    identity = self_signed(tmp_path, "static")
    config = GatewayConfig.load(
        document(
            tmp_path,
            identity,
            "max_connections_per_app = 7\nbuffer_size = 4096\ninbound_pp_enabled = true\n[core.proxy.timeouts]\n"
            'connect = "1s"\nhandshake = "2s"\ndns_resolve = "3s"\nidle = "4s"\nwrite = "5s"\nshutdown = "6s"\n'
            'total = "7s"\npp_header = "8s"\n',
        )
    )
    timeouts = Timeouts(connect=1, handshake=2, dns=3, idle=4, write=None, shutdown=6, total=7, proxy_header=8)
    assert ingress_settings(config, NEXT) == IngressSettings(
        timeouts=timeouts,
        max_connections_per_app=7,
        buffer_size=4096,
        reads_proxy_header=True,
        insecure_localhost_backend=True,
    )


def test_limits_are_those_of_the_gateway_toml_that_is_shipped() -> None:
    assert ingress_settings(GatewayConfig(), NEXT) == IngressSettings()
    assert ingress_settings(GatewayConfig(), RELEASES["0.5"]).timeouts == Timeouts(write=5)


def test_limits_of_data_are_off_where_the_file_says_so(tmp_path: Path) -> None:
    proxy = "[core.proxy.timeouts]\ndata_timeout_enabled = false"
    config = GatewayConfig.load(document(tmp_path, self_signed(tmp_path, "static"), proxy))
    timeouts = ingress_settings(config, RELEASES["0.5"]).timeouts
    assert (timeouts.idle, timeouts.write, timeouts.shutdown) == (None, None, None)
    assert timeouts.total == 5 * 3600


@pytest.mark.skipif(not SUITE, reason="DSTACK_GATEWAY_TESTS is not set: dstack's test_proxy.sh was not run")
@pytest.mark.timeout(1200)
def test_proxy_suite_of_dstack_passes(tmp_path: Path) -> None:
    for tool in ("ip", "ss", "openssl"):
        assert shutil.which(tool), f"test_proxy.sh needs {tool}"
    program = tmp_path / "dstack-gateway"
    command = shlex.join([sys.executable, "-m", "dstack_emu", "gateway", "--release", "0.6"])
    program.write_text(f'#!/bin/sh\nexport PYTHONPATH={shlex.quote(str(ROOT))}\nexec {command} "$@"\n')
    program.chmod(0o755)
    given = {
        "GATEWAY_BIN": str(program),
        "WG_IFACE": "lo",
        "BASE_PORT": str(free_port()),
        "WORK": str(tmp_path / "work"),
    }
    done = subprocess.run(
        ["bash", f"{SUITE}/test_proxy.sh"], env={**os.environ, **given}, capture_output=True, text=True, timeout=1200
    )
    passed = re.search(r"(\d+) passed, (\d+) failed, (\d+) skipped", done.stdout)
    assert passed is not None, done.stdout + done.stderr
    assert (done.returncode, passed[2]) == (0, "0"), done.stdout
    assert int(passed[1]) >= 61, done.stdout


def test_name_servers_of_the_file_are_addresses_with_ports(tmp_path: Path) -> None:
    identity = self_signed(tmp_path, "static")
    config = GatewayConfig.load(
        document(tmp_path, identity, 'app_address_dns_servers = ["127.0.0.1:53", "[::1]:5353"]')
    )
    assert config.core.proxy.app_address_dns_servers == (("127.0.0.1", 53), ("::1", 5353))
    for wrong in ("127.0.0.1", "localhost:53", "::1:53", "127.0.0.1:65536", "[127.0.0.1]:53", ""):
        with pytest.raises(ConfigError, match="an IP address with a port expected"):
            GatewayConfig.load(document(tmp_path, identity, f'app_address_dns_servers = ["{wrong}"]'))
