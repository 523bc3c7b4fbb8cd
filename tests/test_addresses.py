"""Every address of the machine: where a stack listens, and the names in its certificates, as curl judges both."""

import json
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.kms_names import kms_names
from dstack_emu.testing import LiveStack
from dstack_emu.transport.errors import ListenError
from dstack_emu.transport.http import Application, Request, Response
from dstack_emu.transport.listen import bind_tcp, reachable, serve
from dstack_emu.transport.localhost_socket import LocalhostSocket, bound_host
from tests.commands import usage_error
from tests.ports import free_port


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


HAS_IPV6 = _has_ipv6()
needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="this machine has no IPv6")


def curl(*words: str) -> subprocess.CompletedProcess[str]:
    """Request a page as a shell does; certificates are verified."""
    command = ("curl", "-sS", "--noproxy", "*", "--max-time", "20", *words)
    return subprocess.run(command, capture_output=True, text=True, check=False)


SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""An empty SETTINGS frame of HTTP/2, the first of both sides: length, type 4, flags, stream."""


def port_of(url: str) -> int:
    """The port in a URL."""
    return int(url.rpartition(":")[2])


@contextmanager
def stack_on(host: str, *domains: str, **settings: Any) -> Iterator[LiveStack]:
    """A ready stack that listens on an address."""
    with LiveStack(host=host, domains=domains, **settings) as live:
        yield live


def meta_at(live: LiveStack, name: str, *words: str) -> dict[str, Any]:
    """GetMeta of the source KMS under a name, verified by its root."""
    url = f"https://{name}:{port_of(live.services['kms-src'])}/prpc/KMS.GetMeta?json"
    done = curl("--cacert", live.description["kms_ca"], *words, url)
    assert (done.returncode, done.stderr) == (0, ""), (url, done)
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["k256_pubkey"]
    return answer


def answers_at(live: LiveStack, name: str) -> None:
    """The agent, the PCCS and the webhooks answer under a name, too."""
    for service, path in (("app", "/Info"), ("pccs", "/health"), ("auth-src", "/"), ("verifier", "/health")):
        done = curl("--fail", "-o", "/dev/null", f"http://{name}:{port_of(live.services[service])}{path}")
        assert (done.returncode, done.stderr) == (0, ""), (service, name)


@needs_ipv6
def test_every_address_has_certificates_that_fit_and_so_has_a_name_of_ones_own() -> None:
    with stack_on("::", "kms.example.com", "10.0.0.1") as live:
        assert live.description["kms_names"] == ["kms.example.com", "10.0.0.1", "localhost", "127.0.0.1", "::1"]
        assert live.services["kms-src"].startswith("https://[::1]:")
        for name in ("127.0.0.1", "[::1]", "localhost"):
            meta_at(live, name)
            answers_at(live, name)
        port = port_of(live.services["kms-src"])
        meta_at(live, "kms.example.com", "--resolve", f"kms.example.com:{port}:127.0.0.1")
        root, other = live.description["kms_ca"], f"other.example.com:{port}"
        refused = curl("--cacert", root, "--resolve", f"{other}:127.0.0.1", f"https://{other}/prpc/KMS.GetMeta?json")
        assert (refused.returncode, "certificate" in refused.stderr) == (60, True)
        assert live.boot().has_keys


def test_localhost_answers_on_both_families_in_every_phase_and_after_a_restart() -> None:
    names = ("127.0.0.1", "[::1]", "localhost") if HAS_IPV6 else ("127.0.0.1", "localhost")
    with stack_on("localhost", grpc=True) as live:
        for name in names:
            meta_at(live, name)
            answers_at(live, name)
        targets, trust = live.description["grpc"], ssl.create_default_context(cafile=live.description["kms_ca"])
        trust.verify_flags &= ~ssl.VERIFY_X509_STRICT  # Python 3.13's, which wants an extension that KMS do not have
        for host in (name.strip("[]") for name in names):
            with socket.create_connection((host, port_of(targets["app-grpc"])), timeout=10) as plain:
                plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS)
                assert plain.recv(9)[3:4] == SETTINGS[3:4]
            with socket.create_connection((host, port_of(targets["kms-src-grpc"])), timeout=10) as plain:
                trust.wrap_socket(plain, server_hostname=host).close()
        live.kms("src").restart()
        third = live.kms("third")
        for name in names:
            meta_at(live, name)
            assert curl("--fail", f"http://{name}:{port_of(third.url)}/health").returncode == 0
        live.reset()
        for name in names:
            meta_at(live, name)
        assert live.control.health()["kms-src"] == "ok"


@needs_ipv6
def test_control_on_an_ipv6_loopback_keeps_its_guard() -> None:
    with stack_on("::1", fresh=True) as live:
        url = live.services["control"]
        assert url.startswith("http://[::1]:")
        assert curl("--fail", f"{url}/clock").returncode == 0
        refused = curl(f"{url}/clock", "-H", "Host: attacker.example")
        assert "Host: localhost or an IP address expected, got 'attacker.example'" in refused.stdout
        kms = live.kms("src")
        kms.policy.allow(kms)
        kms.bootstrap()
        meta_at(live, "[::1]")


@pytest.mark.parametrize(
    ("host", "given", "names"),
    [
        ("127.0.0.1", (), ("127.0.0.1",)),
        ("127.0.0.1", ("kms.local",), ("kms.local", "127.0.0.1")),
        ("0.0.0.0", (), ("127.0.0.1", "localhost")),
        ("", (), ("127.0.0.1", "localhost")),
        ("::", (), ("localhost", "127.0.0.1", "::1")),
        ("0:0::0", (), ("localhost", "127.0.0.1", "::1")),
        ("localhost", (), ("localhost", "127.0.0.1", "::1")),
        ("::1", (), ("localhost", "::1")),
        ("fd00::2", ("a.example", "b.example"), ("a.example", "b.example", "fd00::2")),
        ("fd00::2", ("fd00::3",), ("localhost", "fd00::3", "fd00::2")),
    ],
)
def test_names_of_the_certificates_follow_the_address(
    host: str, given: tuple[str, ...], names: tuple[str, ...]
) -> None:
    assert kms_names(host, given) == names


def test_names_and_addresses_that_cannot_be_are_refused_by_the_option() -> None:
    problem = usage_error("up", "--free-ports", "--domain", "kms_1.example")
    assert problem == "--domain: a DNS name or an IP address expected, got 'kms_1.example'"
    problem = usage_error("up", "--free-ports", "--listen", "192.0.2.1")
    assert ("this machine has no such address" in problem, "--listen 192.0.2.1" in problem) == (True, True)
    with pytest.raises(StackError, match="a link-local address has no URL"):
        kms_names("fe80::1%eth0", ())


def test_default_certificate_has_the_one_name_that_it_always_had() -> None:
    with LiveStack(fresh=True) as live:
        kms = live.kms("src")
        kms.policy.allow(kms)
        kms.bootstrap()
        chain = Path(kms.info["certs"], "rpc.crt").read_text()
    command = ("openssl", "x509", "-noout", "-subject", "-ext", "subjectAltName")
    shown = subprocess.run(command, input=chain, text=True, capture_output=True, check=True)
    assert "IP Address:127.0.0.1\n" in shown.stdout
    assert "CN = 127.0.0.1" in shown.stdout


async def _page(request: Request) -> Response:
    return Response.of("here", "text/plain")


async def test_socket_of_localhost_is_two_with_one_port_and_can_be_bound_again() -> None:
    port = free_port()
    sock = bind_tcp("localhost", port)
    assert isinstance(sock, LocalhostSocket)
    assert (sock.twin is not None, bound_host(sock), reachable(sock)) == (HAS_IPV6, "localhost", f"127.0.0.1:{port}")
    with pytest.raises(ListenError, match="the address is in use"):
        bind_tcp("localhost", port)
    app = Application()
    app.add("GET", "/", _page)
    copy = sock.dup()
    server = await serve(app, sock)
    await server.close()
    if HAS_IPV6:
        assert copy.twin is not None
        with socket.create_connection(("::1", port), timeout=10):  # the copy still listens
            pass
    copy.close()
    bind_tcp("localhost", port).close()


@needs_ipv6
def test_localhost_whose_port_is_in_use_on_one_family_is_refused_by_that_address() -> None:
    port = free_port()
    taken = socket.create_server(("::1", port), family=socket.AF_INET6)
    with taken, pytest.raises(ListenError, match=rf"\[::1\]:{port}"):
        bind_tcp("localhost", port)
    bind_tcp("localhost", port).close()
