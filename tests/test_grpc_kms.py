"""gRPC of a KMS from phase to phase: each refusal before there are keys, what is out of reach, health, and Admin."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests import foreign
from tests.commands import serving
from tests.foreign import Guest
from tests.reflected import Outcome, Reflected, reflected
from tests.running import RunningStack, running_kms
from tests.test_webhook_failures import copied_keys, kms_toml
from tests.transports import DENIED, INVALID, UNAUTHENTICATED, UNAVAILABLE, WRONG_PHASE, Both


@pytest.fixture
def stack(ready_stack: RunningStack) -> RunningStack:
    """The stack beside which each KMS stands: its agents, PCCS and webhooks, and keys."""
    return ready_stack


GRPC = """
[emulator.grpc]
enabled = true
port = 0
mtls_port = 0
admin_port = 0
"""


@contextmanager
def kms_process(
    folder: Path, stack: RunningStack, *, webhook: str = "", agent: str = "", change: Callable[[str], str] = str
) -> Iterator[tuple[Both, dict[str, str]]]:
    """Run a KMS of its own beside the stack; yield it as it is before there is TLS, and its ports by their keys."""
    config = kms_toml(folder, stack, webhook or stack.services["auth-dst"])
    config.write_text(change(config.read_text() + GRPC))
    said: dict[str, Any] = {}
    with running_kms(config, agent or stack.services["agent-dst"], said) as url:
        targets: dict[str, str] = said["grpc"]
        yield Both(url, targets["port"], None), targets


# ---- the same refusals: the onboard phase


DOMAINS = {
    "empty": ("", "domain must be a non-empty ASCII DNS name of at most 253 bytes"),
    "not ASCII": ("kms.bücher.test", "domain must be a non-empty ASCII DNS name of at most 253 bytes"),
    "too long": ("a." * 127, "domain must be a non-empty ASCII DNS name of at most 253 bytes"),
    "bad label": ("kms_1.test", "domain contains an invalid DNS label"),
}


def test_fresh_kms_refuses_in_the_same_words(stack: RunningStack, tmp_path: Path) -> None:
    """Every refusal of the onboard phase, on one KMS that has no keys until the end."""
    source: dict[str, Any] = {"source_url": stack.services["kms-src"], "domain": "kms.test"}
    with kms_process(tmp_path, stack) as (kms, _):
        for domain, text in DOMAINS.values():
            assert kms.refused("Onboard.Bootstrap", domain=domain) == (INVALID, text)
            assert kms.refused("Onboard.Onboard", **{**source, "domain": domain}) == (INVALID, text)
        assert kms.refused("Onboard.Onboard", source_url="ftp://kms", domain="kms.test")[0] == UNAVAILABLE
        code, text = kms.refused("Onboard.Onboard", source_url="https://127.0.0.1:1", domain="kms.test")
        assert (code, text.startswith("Failed to onboard: Failed to send request: ")) == (UNAVAILABLE, True)
        with stack.policy_changed("dst", lambda policy: policy["kms"].update(mrAggregated=[])):
            refusal = "boot denied: aggregated MR not allowed"
            assert kms.refused("Onboard.Bootstrap", domain="kms.test") == (
                DENIED,
                f"KMS is not allowed to bootstrap: {refusal}",
            )
            assert kms.refused("Onboard.Onboard", **source) == (
                DENIED,
                f"Failed to onboard: Source KMS is not allowed for onboarding: {refusal}",
            )
        with stack.policy_changed("src", lambda policy: policy["kms"].update(mrAggregated=[])):
            code, text = kms.refused("Onboard.Onboard", **source)
            assert code == DENIED
            assert "KMS self authorization failed: KMS is not allowed: aggregated MR not allowed" in text
        with reflected(kms.grpc_target) as client, pytest.raises(grpc.RpcError) as error:
            client.channel.unary_unary("/kms.KMS/GetAppKey")(b"", timeout=foreign.TIMEOUT)
        assert (error.value.code().name, error.value.details()) == (WRONG_PHASE, "Service not found: KMS.GetAppKey")
        assert not list((tmp_path / "certs").iterdir()), "what is refused leaves nothing"
        with reflected(kms.grpc_target) as client:
            onboarded = client.call("kms.Onboard/Onboard", **source).value
        with foreign.kms(source["source_url"]) as connection:
            assert connection.call("GetMeta").value["k256_pubkey"] == onboarded["k256_pubkey"]
        assert kms.refused("Onboard.Onboard", **source) == (WRONG_PHASE, "KMS has already been onboarded")
        assert kms.refused("Onboard.Bootstrap", domain="kms.test") == (WRONG_PHASE, "KMS has already been bootstrapped")


NOBODY = "http://127.0.0.1:1"


@pytest.mark.parametrize("who", ["webhook", "agent", "PCCS"])
def test_service_out_of_reach_is_unavailable(stack: RunningStack, tmp_path: Path, who: str) -> None:
    pccs = NOBODY if who == "PCCS" else stack.services["pccs"]
    with kms_process(
        tmp_path,
        stack,
        webhook=NOBODY if who == "webhook" else "",
        agent=NOBODY if who == "agent" else "",
        change=lambda text: text.replace(stack.services["pccs"], pccs),
    ) as (kms, _):
        source = stack.services["kms-src"]
        calls: dict[str, dict[str, Any]] = {
            "Onboard.Bootstrap": {"domain": "kms.test"},
            "Onboard.Onboard": {"source_url": source, "domain": "kms.test"},
            "Onboard.GetAttestationInfo": {},
        }
        for method, arguments in calls.items():
            if who == "webhook" and method == "Onboard.GetAttestationInfo":
                continue  # which answers without it
            code, text = kms.refused(method, **arguments)
            assert code == UNAVAILABLE, text
        assert not list((tmp_path / "certs").iterdir())


def test_caller_whose_evidence_cannot_be_judged_is_not_called_unauthenticated(
    stack: RunningStack, tmp_path: Path
) -> None:
    copied_keys(tmp_path, stack)
    identity = Guest.of(stack.services["kms-src"], stack.services["app"]).identity()
    no_pccs = stack.services["auth-src"]
    with kms_process(tmp_path, stack, change=lambda text: text.replace(stack.services["pccs"], no_pccs)) as (kms, _):
        kms = Both(kms.prpc_url, kms.grpc_target, Path(stack.description["kms_ca"]).read_text())
        code, text = kms.refused("KMS.GetAppKey", identity, api_version=1)
        assert code == UNAVAILABLE
        assert text.startswith(f"invalid quote: failed to verify TDX quote: Failed to fetch {no_pccs}/")
        assert text.endswith(": HTTP 404")
        assert kms.refused("KMS.GetTempCaCert")[0] == UNAVAILABLE


# ---- phases and health


def health(client: Reflected, service: str = "", **options: Any) -> str:
    """What the server says of a service's health."""
    stub = health_pb2_grpc.HealthStub(client.channel)
    try:
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=foreign.TIMEOUT, **options)
    except grpc.RpcError as error:
        return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def test_health_follows_the_phase(stack: RunningStack, tmp_path: Path) -> None:
    with kms_process(tmp_path, stack) as (kms, _):
        with reflected(kms.grpc_target) as client:
            assert [health(client, name) for name in ("", "kms.Onboard", "kms.KMS", "kms.Admin")] == [
                "SERVING",
                "SERVING",
                "NOT_SERVING",
                "NOT_FOUND",
            ]
            watched = health_pb2_grpc.HealthStub(client.channel).Watch(
                health_pb2.HealthCheckRequest(service="kms.Onboard"), timeout=foreign.TIMEOUT
            )
            assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
            assert client.call("kms.Onboard/Bootstrap", domain="127.0.0.1").value
            assert client.call("kms.Onboard/Finish").value == {}
            assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.RpcError):
                next(watched)
        root_ca = (tmp_path / "certs" / "root-ca.crt").read_text()
        with reflected(kms.grpc_target, root_ca) as client:
            states = [health(client, name, wait_for_ready=True) for name in ("", "kms.Onboard", "kms.KMS")]
            assert states == ["SERVING", "NOT_SERVING", "SERVING"]


def test_agents_services_are_healthy(stack: RunningStack, tmp_path: Path) -> None:
    with serving("agent", "--grpc", "127.0.0.1:0", "--grpc-sock", str(tmp_path / "grpc.sock")) as agent:
        for target in (agent["grpc_target"], f"unix:{agent['grpc_sock']}"):
            with reflected(target) as client:
                for service in ("", "dstack_guest.DstackGuest", "dstack_guest.Tappd", "dstack_guest.Worker"):
                    assert health(client, service) == "SERVING"
                assert client.call("dstack_guest.DstackGuest/Info").value["app_name"] == "app"
    assert not (tmp_path / "grpc.sock").exists()


# ---- the admin listener


def test_admin_asks_for_its_token(stack: RunningStack, tmp_path: Path) -> None:
    copied_keys(tmp_path, stack)
    cache = tmp_path / "cache"
    (cache / "images" / "ab").mkdir(parents=True)
    admin = f'[core.admin]\nenabled = true\nport = 0\nauth_token = "s3cret"\n[core.image]\ncache_dir = "{cache}"\n'

    def with_admin(text: str) -> str:
        return text.replace("[core.image]\n", admin)

    with (
        kms_process(tmp_path, stack, webhook=stack.services["auth-src"], change=with_admin) as (_, targets),
        reflected(targets["admin_port"]) as client,
    ):
        assert client.methods("kms.Admin") == {"ClearImageCache", "GetKmsKey"}

        def clear(*metadata: tuple[str, str], image_hash: str = "ab") -> Outcome:
            return client.call("kms.Admin/ClearImageCache", metadata=metadata, image_hash=image_hash)

        for wrong in ((), (("authorization", "Bearer guess"),), (("x-admin-token", ""),)):
            refusal = clear(*wrong)
            assert (refusal.code, refusal.text) == (UNAUTHENTICATED, "dstack-kms admin: a token is required")
        assert (cache / "images" / "ab").exists()
        bad = clear(("x-admin-token", "s3cret"), image_hash="../certs")
        assert (bad.code, bad.text) == (INVALID, "failed to clear image cache: invalid cache key")
        assert clear(("authorization", "Bearer s3cret")).value == {}
        assert not (cache / "images" / "ab").exists()


def test_onboarding_asks_for_its_token_over_grpc_too(stack: RunningStack, tmp_path: Path) -> None:
    config = kms_toml(tmp_path, stack, stack.services["auth-dst"])
    config.write_text(config.read_text().replace("[core.onboard]\n", '[core.onboard]\nauth_token = "s3cret"\n') + GRPC)
    said: dict[str, Any] = {}
    with (
        running_kms(config, stack.services["agent-dst"], said, "--release", "0.6"),
        reflected(said["grpc"]["port"]) as client,
    ):

        def measure(*metadata: tuple[str, str]) -> Outcome:
            return client.call("kms.Onboard/GetAttestationInfo", metadata=metadata)

        for wrong in ((), (("authorization", "Bearer guess"),), (("x-admin-token", "s3cret"),)):
            refusal = measure(*wrong)
            assert (refusal.code, refusal.text) == (UNAUTHENTICATED, "dstack-kms onboard: a token is required")
        for right in (("authorization", "Bearer s3cret"), ("x-onboard-token", "s3cret")):
            assert measure(right).value["mr_aggregated"]


def test_admin_hands_the_root_keys_over_by_grpc(stack: RunningStack, tmp_path: Path) -> None:
    copied_keys(tmp_path, stack)
    certs = tmp_path / "certs"
    more = f"""
[core.admin]
enabled = true
port = 0
auth_token = "s3cret"
tls = {{ key = "{certs}/rpc.key", certs = "{certs}/rpc.crt" }}
"""
    config = kms_toml(tmp_path, stack, stack.services["auth-src"])
    handover = "[core.onboard]\npublic_key_handover = false\n"
    config.write_text(config.read_text().replace("[core.onboard]\n", handover) + more + GRPC)
    guest, root = Guest.of(stack.services["kms-src"], stack.services["agent-dst"]), (certs / "root-ca.crt").read_text()
    identity, token = guest.identity(), (("authorization", "Bearer s3cret"),)
    said: dict[str, Any] = {}
    with running_kms(config, stack.services["agent-src"], said, "--release", "0.6"):
        with reflected(said["grpc"]["admin_port"], root, identity) as client:
            keys = client.call("kms.Admin/GetKmsKey", metadata=token).value["keys"]
            assert keys[0]["ca_key"] == (certs / "root-ca.key").read_text()
            assert client.call("kms.Admin/GetKmsKey").code == UNAUTHENTICATED
        with reflected(said["grpc"]["admin_port"], root) as client:
            refusal = client.call("kms.Admin/GetKmsKey", metadata=token)
            assert (refusal.code, refusal.text) == (UNAUTHENTICATED, "No attestation provided")
        with reflected(said["grpc"]["port"], root, identity) as client:
            refusal = client.call("kms.KMS/GetKmsKey")
            disabled = "public KMS key handover is disabled; use the admin listener"
            assert (refusal.code, refusal.text) == (WRONG_PHASE, disabled)
