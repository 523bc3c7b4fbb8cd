"""One KMS of each release, side by side: statuses on every listener, and what its certificates carry."""

import hashlib
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests import foreign
from tests.commands import serving
from tests.foreign import Authority, Guest
from tests.kms_process import Kms, World, ends, running, variables
from tests.ports import free_port, refusing_port
from tests.reflected import reflected
from tests.transports import UNAVAILABLE

RELEASES = ("0.5", "0.6")
DOMAIN = "127.0.0.1"
LIMIT = 10 * 1024 * 1024
"""Bytes of a body that a real KMS reads."""
PREPARING = hashlib.sha384(b"\x01\0\0\x08:system-preparing:").digest()
"""The digest of a guest's first event, as real hardware has it."""


@dataclass(frozen=True)
class Pair:
    """A KMS in its onboard phase, and one in its runtime phase with an admin listener and gRPC."""

    fresh: Kms
    ready: Kms

    def url(self, listener: str) -> str:
        urls = {"Onboard": self.fresh.url, "KMS": self.ready.url, "Admin": self.ready.description["admin_url"]}
        return str(urls[listener])


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One agent with its PCCS."""
    with serving("agent", "--release", "0.6") as description:
        yield World.of(description)


@pytest.fixture(scope="module")
def pairs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pair]]:
    """Both KMS of each release."""
    keys = {
        "core.onboard.auto_bootstrap_domain": DOMAIN,
        "core.admin.enabled": "true",
        "core.admin.port": "0",
        "core.admin.insecure_no_auth": "true",
        "emulator.grpc.enabled": "true",
        "emulator.grpc.port": "0",
        "emulator.grpc.mtls_port": "0",
        "emulator.grpc.admin_port": "0",
    }
    with ExitStack() as stack:
        made = {}
        for release in RELEASES:
            fresh, ready = (tmp_path_factory.mktemp(f"{name}-{release}") for name in ("fresh", "ready"))
            made[release] = Pair(
                stack.enter_context(running(fresh, world, "--release", release)),
                stack.enter_context(running(ready, world, "--release", release, **variables(keys))),
            )
        yield made


def guest(pair: Pair, world: World) -> Guest:
    return Guest.of(pair.ready.url, world.agent.removeprefix("unix:"))


@pytest.mark.parametrize(("release", "status"), [("0.5", 400), ("0.6", 404)])
@pytest.mark.parametrize("listener", ["Onboard", "KMS", "Admin"])
def test_unknown_method(pairs: dict[str, Pair], listener: str, release: str, status: int) -> None:
    pair = pairs[release]
    got, answer = pair.fresh.curl(f"/prpc/{listener}.Nothing?json", "-d", "{}", url=pair.url(listener))
    assert (got, json.loads(answer)) == (status, {"error": "Service not found: Nothing"})
    got, answer = pair.fresh.curl("/prpc/Nothing", "--data-binary", "", url=pair.url(listener))
    assert (got, b"Service not found: Nothing" in answer.encode()) == (status, True)


@pytest.mark.parametrize(("release", "status"), [("0.5", 400), ("0.6", 413)])
@pytest.mark.parametrize(
    ("listener", "method"), [("Onboard", "Bootstrap"), ("KMS", "GetMeta"), ("Admin", "ClearImageCache")]
)
def test_body_over_the_limit(
    pairs: dict[str, Pair], listener: str, method: str, release: str, status: int, tmp_path: Path
) -> None:
    pair, body = pairs[release], tmp_path / "body"
    arguments = (f"/prpc/{listener}.{method}?json", "-H", "Expect:", "--data-binary", f"@{body}")
    body.write_bytes(b'{"domain":""}'.ljust(LIMIT + 1))
    got, answer = pair.fresh.curl(*arguments, url=pair.url(listener))
    assert (got, json.loads(answer)) == (status, {"error": "failed to read data: payload too large"})
    body.write_bytes(b'{"domain":""}'.ljust(LIMIT))
    assert "payload too large" not in pair.fresh.curl(*arguments, url=pair.url(listener))[1]


@pytest.mark.parametrize("release", RELEASES)
def test_port_that_demands_a_certificate_refuses_none(pairs: dict[str, Pair], world: World, release: str) -> None:
    pair, caller = pairs[release], guest(pairs[release], world)
    target = pair.ready.description["grpc"]["mtls_port"]
    stranger = Authority.invent("Dstack Client Temp CA").issue(foreign.new_key(), None)
    for identity in (None, stranger):
        with reflected(target, caller.root_ca, identity) as client, pytest.raises(grpc.RpcError) as error:
            client.channel.unary_unary("/kms.KMS/GetMeta")(b"", timeout=foreign.TIMEOUT)
        assert error.value.code().name == UNAVAILABLE
    with reflected(target, caller.root_ca, caller.identity()) as client:
        assert client.call("kms.KMS/GetMeta").value


@pytest.mark.parametrize(("release", "keeps_digests"), [("0.5", False), ("0.6", True)])
def test_log_in_certificates(pairs: dict[str, Pair], world: World, release: str, keeps_digests: bool) -> None:
    caller, key = guest(pairs[release], world), foreign.new_key()
    attestation = foreign.attest(caller.agent, foreign.spki_of(key))
    assert PREPARING in attestation
    with foreign.kms(caller.kms_url, root_ca=caller.root_ca) as connection:
        signed = connection.call("SignCert", **foreign.signing_request(key, attestation, "app.example.test")).value
    leaf = x509.load_pem_x509_certificate(signed["certificate_chain"][0].encode()).public_bytes(Encoding.DER)
    assert (b"system-preparing" in leaf, PREPARING in leaf) == (True, keeps_digests)
    own = x509.load_pem_x509_certificate((pairs[release].ready.certs / "rpc.crt").read_bytes())
    assert (PREPARING in own.public_bytes(Encoding.DER)) is keeps_digests


# ---- no key is lost, and nobody waits in vain


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("kept", ["root-ca.key", "root-k256.key"])
def test_auto_bootstrap_never_overwrites_a_root_key(world: World, tmp_path: Path, release: str, kept: str) -> None:
    keys = variables({"core.onboard.auto_bootstrap_domain": DOMAIN})
    options = ("--release", release)
    with running(tmp_path, world, *options, **keys) as kms:
        certs = kms.certs
    whole = {path.name: path.read_bytes() for path in certs.iterdir()}
    for name in whole:
        if name != kept:
            (certs / name).unlink()
    status, line = ends(tmp_path, world, *options, **keys)
    assert status == 1
    assert line.startswith(f"Error: KMS has already been bootstrapped: {certs} has {kept}, but not tmp-ca.crt, ")
    assert {path.name: path.read_bytes() for path in certs.iterdir()} == {kept: whole[kept]}
    for name, data in whole.items():
        (certs / name).write_bytes(data)
    with running(tmp_path, world, *options, **keys) as kms:
        assert kms.rpc("KMS.GetMeta")[0] == 200


@pytest.mark.parametrize("release", RELEASES)
def test_rpc_port_turns_clients_away_until_the_onboard_phase_has_ended(
    world: World, tmp_path: Path, release: str
) -> None:
    with ExitStack() as stack:
        rpc = ("127.0.0.2", stack.enter_context(refusing_port()))  # held on 127.0.0.1, so nobody takes it meanwhile
        keys = {
            "rpc.address": rpc[0],
            "rpc.port": str(rpc[1]),
            "core.onboard.address": "127.0.0.1",
            "core.onboard.port": str(free_port()),
        }
        kms = stack.enter_context(running(tmp_path, world, "--release", release, listen="", **variables(keys)))

        def require_refusal() -> None:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(rpc, 20)

        require_refusal()
        assert kms.rpc("Onboard.Bootstrap", {"domain": DOMAIN})[0] == 200
        require_refusal()
        assert kms.curl("/finish") == (200, "OK")
        assert kms.runtime_url == f"https://{rpc[0]}:{rpc[1]}"
        assert kms.curl("/health", url=kms.runtime_url) == (200, "OK")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(kms.url.rpartition(":")[2])), 20)
