"""gRPC beside pRPC: the same answers, the same refusals in the same words, and a status that says what kind they are.

The gRPC client is `tests.reflected`, the pRPC one `tests.foreign`; neither has anything of ours.
"""

import json
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message_factory import GetMessageClass

from dstack_emu.attest.proto import dstack_guest_pb2
from dstack_emu.kms_emu.grpc_server import STATUSES as KMS_STATUSES
from dstack_emu.simulator.agent_grpc import STATUSES as AGENT_STATUSES
from dstack_emu.transport.grpc_server import ATTEST_STATUSES
from dstack_emu.transport.ports import GRPC_PORTS
from dstack_emu.transport.stubs.dstack_guest_pb2_grpc import DstackGuestStub
from dstack_emu.transport.stubs.kms_pb2_grpc import KMSStub
from tests import foreign
from tests.commands import run_command, usage_error
from tests.documents import blocks, code, rows
from tests.foreign import Guest, Identity
from tests.reflected import reflected, shown
from tests.repository import ROOT
from tests.running import RunningStack, running_stack
from tests.test_foreign_client import POLICIES, root_keys
from tests.transports import DENIED, INVALID, UNAUTHENTICATED, UNAVAILABLE, WRONG_PHASE, Both

if TYPE_CHECKING:
    from dstack_emu.transport.stubs.dstack_guest_pb2_grpc import DstackGuestAsyncStub


@pytest.fixture(scope="module")
def stack() -> Iterator[RunningStack]:
    """A ready stack with gRPC; a test that changes a policy puts it back."""
    with running_stack("--grpc") as running:
        yield running


@pytest.fixture(scope="module")
def guest(stack: RunningStack) -> Guest:
    """A guest with the app's agent, before the source KMS."""
    return Guest.of(stack.services["kms-src"], stack.description["app"]["dstack_sock"])


@pytest.fixture(scope="module")
def identity(guest: Guest) -> Identity:
    """An attested key of the app, with a certificate."""
    return guest.identity()


def kms_of(stack: RunningStack, identity: Identity | None) -> Both:
    """The source KMS, where a caller with or without a certificate asks it."""
    return Both.of(stack, certificate=identity is not None)


# ---- the way of a KMS, by reflection alone


def test_client_of_reflection_alone_walks_from_a_denied_bootstrap_to_the_keys() -> None:
    with running_stack("--grpc", "--fresh") as stack:
        target = stack.description["grpc"]["kms-src-grpc"]
        with reflected(target) as fresh:
            assert "kms.Onboard" in fresh.services()
            assert "kms.KMS" not in fresh.services()
            denied = fresh.call("kms.Onboard/Bootstrap", domain="127.0.0.1")
            assert denied.code == DENIED
            assert denied.text == "KMS is not allowed to bootstrap: boot denied: OS image is not allowed"
            info = fresh.call("kms.Onboard/GetAttestationInfo").value
            app = stack.description["app"]
            allow_app = {f"0x{app['app_id']}": {"composeHashes": [f"0x{app['compose_hash']}"], "allowAnyDevice": True}}
            policy = {
                "osImages": [f"0x{info['os_image_hash']}"],
                "gatewayAppId": "any",
                "kms": {"mrAggregated": [f"0x{info['mr_aggregated']}"], "allowAnyDevice": True},
                "apps": allow_app,
            }
            stack.policies["src"].write_text(json.dumps(policy))
            keys = fresh.call("kms.Onboard/Bootstrap", domain="127.0.0.1").value
            again = fresh.call("kms.Onboard/Bootstrap", domain="127.0.0.1")
            assert (again.code, again.text) == (WRONG_PHASE, "KMS has already been bootstrapped")
            assert fresh.call("kms.Onboard/Finish").value == {}
        # The root is what the operator has; the rest a client asks for.
        root_ca = Path(stack.description["kms_ca"]).read_text()
        with reflected(target, root_ca, waiting=True) as kms:
            meta = kms.call("kms.KMS/GetMeta").value
            assert meta["bootstrap_info"] == keys
            temp = kms.call("kms.KMS/GetTempCaCert").value
        guest = Guest.of(stack.services["kms-src"].replace("http://", "https://"), app["dstack_sock"])
        assert temp["ca_cert"] == guest.root_ca == root_ca
        with reflected(stack.description["grpc"]["kms-src-grpc-mtls"], root_ca, guest.identity()) as kms:
            answer = kms.call("kms.KMS/GetAppKey", api_version=1).value
        expected = root_keys(stack, "src").app_keys(bytes.fromhex(app["app_id"]), bytes.fromhex(app["instance_id"]))
        assert {name: answer[name] for name in expected} == expected
        assert guest.get_app_key().value == answer


# ---- the same answers


def test_keys_are_the_same_over_both(stack: RunningStack, guest: Guest, identity: Identity) -> None:
    keys = kms_of(stack, identity).value("KMS.GetAppKey", identity, api_version=1)
    app = stack.description["app"]
    expected = root_keys(stack, "src").app_keys(bytes.fromhex(app["app_id"]), bytes.fromhex(app["instance_id"]))
    assert {name: keys[name] for name in expected} == expected
    assert kms_of(stack, None).value("KMS.GetTempCaCert")["ca_cert"] == guest.root_ca
    meta = kms_of(stack, None).value("KMS.GetMeta")
    assert meta["chain_id"] == 0
    assert meta["bootstrap_info"]["k256_pubkey"] == meta["k256_pubkey"]
    receiver = Guest.of(guest.kms_url, stack.services["agent-dst"]).identity()
    root = kms_of(stack, receiver).value("KMS.GetKmsKey", receiver)
    assert root["keys"][0]["k256_key"] == root_keys(stack, "src").k256.hex()
    answer, outcome = kms_of(stack, None).call("KMS.GetAppEnvEncryptPubKey", app_id=app["app_id"])
    assert {outcome.value[name] for name in ("public_key", "signature")} == {
        answer.value[name] for name in ("public_key", "signature")
    }


def test_certificate_may_be_shown_where_none_is_needed(stack: RunningStack, identity: Identity) -> None:
    assert Both.of(stack).value("KMS.GetAppKey", identity, api_version=1)["gateway_app_id"] == "any"


@pytest.mark.parametrize("where", ["grpc_sock", "app-grpc"])
def test_agent_answers_the_same_over_both(stack: RunningStack, where: str) -> None:
    app = stack.description["app"]
    target = f"unix:{app['grpc_sock']}" if where == "grpc_sock" else stack.description["grpc"][where]
    calls: dict[str, dict[str, Any]] = {
        "DstackGuest/GetKey": {"path": "wallet", "purpose": "demo"},
        "DstackGuest/Info": {},
        "DstackGuest/GetQuote": {"report_data": "c0ffee"},
        "DstackGuest/Sign": {"algorithm": "ed25519", "data": "00ff"},
        "Tappd/DeriveK256Key": {"path": "wallet"},
        "Tappd/Info": {},
        "Worker/Version": {},
        "Worker/GetAttestationForAppKey": {"algorithm": "ed25519"},
    }
    with reflected(target) as client:
        ours = {f"dstack_guest.{name}" for name in ("DstackGuest", "Tappd", "Worker")}
        assert ours <= client.services()
        for name, arguments in calls.items():
            service, _, method = name.partition("/")
            path = method if service == "DstackGuest" else f"prpc/{service}.{method}"
            by_prpc = foreign.ask_agent(stack.services["app"], path, arguments)
            by_grpc = client.call(f"dstack_guest.{name}", **arguments).value
            given = {field: value for field, value in by_grpc.items() if field in by_prpc or value}
            assert given == {field: value for field, value in by_prpc.items() if field in by_grpc}, name
        connection = foreign.KmsConnection(stack.services["app"])
        refusal = foreign.ask(connection._http, "/EmitEvent", {"event": "demo", "payload": "00"}).error
        connection.close()
        outcome = client.call("dstack_guest.DstackGuest/EmitEvent", event="demo", payload="00")
        assert (outcome.code, outcome.text) == (WRONG_PHASE, refusal)
        assert refusal.startswith("EmitEvent was removed in dstack 0.6.0; ")


AGENT_REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "algorithm": ("DstackGuest.Sign", {"algorithm": "rot13", "data": "00"}, INVALID),
    "digest": ("DstackGuest.Sign", {"algorithm": "secp256k1_prehashed", "data": "00"}, INVALID),
    "key": ("DstackGuest.Verify", {"algorithm": "ed25519", "public_key": "00"}, INVALID),
    "report data": ("DstackGuest.GetQuote", {"report_data": "00" * 65}, INVALID),
    "raw report data": ("Tappd.RawQuote", {"report_data": "00"}, INVALID),
    "dates": ("DstackGuest.GetTlsKey", {"not_before": 2, "not_after": 1}, INVALID),
    "attested key": ("Worker.GetAttestationForAppKey", {"algorithm": "rsa"}, INVALID),
}


def agent_refusal(prpc_url: str, target: str, method: str, arguments: dict[str, Any]) -> tuple[str, str]:
    """Status and text of an agent's refusal, whose text both transports have."""
    service, _, name = method.partition(".")
    connection = foreign.KmsConnection(prpc_url)
    path = f"/{name}" if service == "DstackGuest" else f"/prpc/{method}"
    answer = foreign.ask(connection._http, path, arguments)
    connection.close()
    with reflected(target) as client:
        outcome = client.call(f"dstack_guest.{service}/{name}", **arguments)
    assert outcome.text == answer.error
    return outcome.code, outcome.text


@pytest.mark.parametrize("name", AGENT_REFUSALS)
def test_agent_refuses_in_the_same_words(stack: RunningStack, name: str) -> None:
    method, arguments, code = AGENT_REFUSALS[name]
    target = f"unix:{stack.description['app']['grpc_sock']}"
    assert agent_refusal(stack.services["app"], target, method, arguments)[0] == code


def test_agent_refuses_what_its_kms_refuses(stack: RunningStack) -> None:
    target = stack.description["grpc"]["app-grpc"]
    with stack.policy_changed("src", lambda policy: policy["apps"].clear()):
        code, text = agent_refusal(stack.services["app"], target, "DstackGuest.GetTlsKey", {"subject": "demo"})
    assert code == DENIED
    assert text.startswith("Failed to sign the CSR: Request failed with status=400 Bad Request, error={\n")
    assert "Boot denied: app not registered" in text


def test_agent_without_keys_is_in_no_state_to_answer() -> None:
    with running_stack("--grpc", "--fresh") as stack:
        target = stack.description["grpc"]["app-grpc"]
        code, text = agent_refusal(stack.services["app"], target, "DstackGuest.GetKey", {"path": "x"})
        assert (code, text.startswith("this trust domain has no keys yet")) == (WRONG_PHASE, True)
        code, text = agent_refusal(stack.services["app"], target, "DstackGuest.GetTlsKey", {"subject": "x"})
        assert (code, text.startswith("Failed to sign the CSR: this trust domain has no keys")) == (WRONG_PHASE, True)


# ---- the same refusals: the runtime phase


def without_attestation(guest: Guest) -> Identity:
    return guest.temp_ca.issue(foreign.new_key(), None)


def stolen(guest: Guest) -> Identity:
    return guest.temp_ca.issue(foreign.new_key(), foreign.attest(guest.agent, foreign.spki_of(foreign.new_key())))


def rubbish(guest: Guest) -> Identity:
    return guest.temp_ca.issue(foreign.new_key(), b"\x17 no attestation")


def forged(guest: Guest) -> Identity:
    key = foreign.new_key()
    evidence = bytearray(foreign.attest(guest.agent, foreign.spki_of(key)))
    evidence[foreign.quote_of(bytes(evidence))[0] + 520] ^= 1
    return guest.temp_ca.issue(key, bytes(evidence))


def broken(guest: Guest) -> Identity:
    key = foreign.new_key()
    return guest.temp_ca.issue(key, foreign.attest(guest.agent, foreign.spki_of(key))[:3000])


IDENTITIES: dict[str, tuple[Callable[[Guest], Identity | None], str, str]] = {
    "none": (lambda guest: None, "KMS.GetAppKey", "App not allowed: No attestation provided"),
    "none, as a KMS": (lambda guest: None, "KMS.GetKmsKey", "No attestation provided"),
    "another key's": (stolen, "KMS.GetAppKey", "invalid quote: report data mismatch"),
    "another key's, where nobody asks for one": (stolen, "KMS.GetMeta", "invalid quote: report data mismatch"),
    "a changed quote": (forged, "KMS.GetAppKey", "invalid quote: failed to verify TDX quote: ISV enclave report sig"),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_bad_evidence_is_refused_as_unauthenticated(stack: RunningStack, guest: Guest, name: str) -> None:
    make, method, text = IDENTITIES[name]
    shown = make(guest)
    code, said = kms_of(stack, shown).refused(method, shown)
    assert code == UNAUTHENTICATED
    assert said.startswith(text)


@pytest.mark.parametrize("make", [without_attestation, rubbish, broken])
def test_certificate_without_readable_evidence_ends_the_handshake(
    stack: RunningStack, guest: Guest, make: Callable[[Guest], Identity]
) -> None:
    kms, shown = kms_of(stack, make(guest)), make(guest)
    ended = pytest.raises(ssl.SSLError, match="ALERT_HANDSHAKE_FAILURE")
    with foreign.kms(kms.prpc_url, identity=shown, root_ca=kms.root_ca) as connection, ended:
        connection.call("GetMeta")
    with reflected(kms.grpc_target, kms.root_ca, shown) as client, pytest.raises(grpc.RpcError) as error:
        client.channel.unary_unary("/kms.KMS/GetMeta")(b"", timeout=foreign.TIMEOUT)
    assert error.value.code().name == UNAVAILABLE


def test_bad_evidence_is_refused_by_a_kms_of_0_5_in_its_words() -> None:
    decoding = "Failed to decode attestation from cert extension: "
    with running_stack("--grpc", "--release", "0.5") as stack:
        guest = Guest.of(stack.services["kms-src"], stack.description["app"]["dstack_sock"])
        for make, method, text in (
            (without_attestation, "KMS.GetAppKey", "App not allowed: No attestation provided"),
            (rubbish, "KMS.GetMeta", f"{decoding}Unknown attestation"),
            (broken, "KMS.GetAppKey", decoding),
        ):
            shown = make(guest)
            code, said = kms_of(stack, shown).refused(method, shown)
            assert (code, said.startswith(text)) == (UNAUTHENTICATED, True)
        with reflected(stack.description["grpc"]["app-grpc"]) as client:
            assert client.call("dstack_guest.DstackGuest/EmitEvent", event="demo", payload="00").value == {}
            assert client.call("dstack_guest.DstackGuest/GetQuote", report_data="00").value["attestation"]


@pytest.mark.parametrize("name", POLICIES)
def test_policy_is_followed_as_permission_denied(
    stack: RunningStack, guest: Guest, identity: Identity, name: str
) -> None:
    change, text = POLICIES[name]
    with stack.policy_changed("src", lambda policy: change(stack, policy)):
        assert kms_of(stack, identity).refused("KMS.GetAppKey", identity, api_version=1) == (DENIED, text)
    assert kms_of(stack, identity).value("KMS.GetAppKey", identity, api_version=1)


@pytest.mark.parametrize("method", ["GetTempCaCert", "GetAppEnvEncryptPubKey", "GetAppKey", "GetKmsKey", "SignCert"])
def test_kms_that_may_not_run_gives_nothing(stack: RunningStack, method: str) -> None:
    with stack.policy_changed("src", lambda policy: policy["kms"].update(mrAggregated=[])):
        refusal = "KMS self authorization failed: KMS is not allowed: aggregated MR not allowed"
        assert Both.of(stack).refused(f"KMS.{method}") == (DENIED, refusal)
        assert Both.of(stack).value("KMS.GetMeta")


def test_root_keys_are_denied_to_an_app(stack: RunningStack, identity: Identity) -> None:
    refusal = kms_of(stack, identity).refused("KMS.GetKmsKey", identity)
    assert refusal == (DENIED, "Boot denied: aggregated MR not allowed")


def test_missing_policy_is_a_denial(stack: RunningStack) -> None:
    path = stack.policies["src"]
    away = path.rename(path.with_suffix(".away"))
    try:
        code, text = Both.of(stack).refused("KMS.GetTempCaCert")
    finally:
        away.rename(path)
    assert (code, text.endswith(f"config file not found: {path}")) == (DENIED, True)


ARGUMENTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "version of GetAppKey": ("KMS.GetAppKey", {"api_version": 2}, "Unsupported API version: 2"),
    "version of SignCert": ("KMS.SignCert", {"api_version": 3}, "Unsupported API version: 3"),
    "signing request": ("KMS.SignCert", {"api_version": 2, "csr": "00"}, "Failed to parse csr: "),
    "app id": ("KMS.GetAppEnvEncryptPubKey", {"app_id": "00"}, "app_id must be 20 bytes"),
    "no app id": ("KMS.GetAppEnvEncryptPubKey", {}, "app_id must be 20 bytes"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_argument_is_refused_as_such(stack: RunningStack, name: str) -> None:
    method, arguments, text = ARGUMENTS[name]
    code, said = Both.of(stack).refused(method, **arguments)
    assert (code, said.startswith(text)) == (INVALID, True)


def test_bad_vm_config_is_a_bad_argument(stack: RunningStack, guest: Guest, identity: Identity) -> None:
    other = kms_of(stack, identity).refused("KMS.GetAppKey", identity, api_version=1, vm_config="{")
    assert other == (INVALID, "App not allowed: vm_config of the request does not match the one in the attestation")
    old = guest.identity_without_vm_config()
    code, text = kms_of(stack, old).refused("KMS.GetAppKey", old, api_version=1, vm_config="{")
    assert code == INVALID
    assert text.startswith("App not allowed: decode app info: Failed to decode os image hash: ")


def test_signing_request_is_judged_by_what_is_wrong_with_it(stack: RunningStack, guest: Guest) -> None:
    key, other = foreign.new_key(), foreign.new_key()
    evidence = foreign.attest(guest.agent, foreign.spki_of(key))
    request = foreign.signing_request(key, evidence, "grpc.example.test")
    of_another = foreign.signing_request(other, evidence, "grpc.example.test")
    kms = Both.of(stack)
    assert kms.refused("KMS.SignCert", **of_another) == (
        UNAUTHENTICATED,
        "Quote verification failed: report data mismatch",
    )
    code, text = kms.refused("KMS.SignCert", **{**request, "signature": of_another["signature"]})
    assert (code, text.startswith("Failed to verify csr signature: ")) == (INVALID, True)
    with stack.policy_changed("src", lambda policy: policy["apps"].clear()):
        assert kms.refused("KMS.SignCert", **request) == (DENIED, "Boot denied: app not registered")
    answer, outcome = kms.call("KMS.SignCert", **request)
    assert len(outcome.value["certificate_chain"]) == len(answer.value["certificate_chain"]) == 3


def test_message_that_is_none_is_refused_in_the_words_of_prpc(stack: RunningStack, guest: Guest) -> None:
    for body in (b"\xff", b"\x08", b"\x0a\x05ab"):  # a tag, a number, a text, each cut off or of another type
        with foreign.kms(guest.kms_url, root_ca=guest.root_ca) as connection:
            connection._http.request("POST", "/prpc/KMS.GetAppKey", body)
            answer = connection._http.getresponse().read()
        with reflected(stack.description["grpc"]["kms-src-grpc"], guest.root_ca) as client:
            call = client.channel.unary_unary("/kms.KMS/GetAppKey")
            with pytest.raises(grpc.RpcError) as refusal:
                call(body, timeout=foreign.TIMEOUT)
        assert refusal.value.code().name == INVALID
        assert refusal.value.details().startswith("failed to decode Protobuf message: ")
        assert answer.endswith(refusal.value.details().encode())


def test_rpc_of_the_other_phase_is_refused_as_such(stack: RunningStack) -> None:
    for method in ("Bootstrap", "Onboard", "GetAttestationInfo", "Finish"):
        refusal = (WRONG_PHASE, f"Service not found: Onboard.{method}")
        kms = Both.of(stack)
        with foreign.kms(kms.prpc_url) as connection:
            connection._service = "Onboard"
            assert connection.call(method) == foreign.Answer(404, {"error": refusal[1]})
        # Reflection does not offer it, so the client has to know.
        with reflected(kms.grpc_target, kms.root_ca) as client:
            with pytest.raises(grpc.RpcError) as error:
                client.channel.unary_unary(f"/kms.Onboard/{method}")(b"", timeout=foreign.TIMEOUT)
            assert (error.value.code().name, error.value.details()) == refusal


def test_unknown_method_is_unimplemented(stack: RunningStack) -> None:
    with reflected(stack.description["grpc"]["app-grpc"]) as client:
        for path in ("/dstack_guest.DstackGuest/NoSuch", "/no.Such/Thing"):
            with pytest.raises(grpc.RpcError) as error:
                client.channel.unary_unary(path)(b"", timeout=foreign.TIMEOUT)
            assert error.value.code().name == "UNIMPLEMENTED"


def test_handshake_without_a_certificate_is_refused_where_one_is_needed(stack: RunningStack, guest: Guest) -> None:
    target = stack.description["grpc"]["kms-src-grpc-mtls"]
    stranger = foreign.Authority.invent("Dstack Client Temp CA").issue(foreign.new_key(), None)
    for identity in (None, stranger):
        with reflected(target, guest.root_ca, identity) as client, pytest.raises(grpc.RpcError) as error:
            client.channel.unary_unary("/kms.KMS/GetMeta")(b"", timeout=foreign.TIMEOUT)
        assert error.value.code().name == UNAVAILABLE
    with reflected(target, guest.root_ca, guest.identity()) as client:
        assert client.call("kms.KMS/GetMeta").value


# ---- clients made from the .proto files


def test_written_proto_files_make_a_client(stack: RunningStack, guest: Guest, tmp_path: Path) -> None:
    written = run_command("proto", str(tmp_path / "proto"))
    names = sorted(path.name for path in (ROOT / "dstack_emu" / "attest" / "proto").glob("*.proto"))
    assert written.stdout.decode().split() == [str(tmp_path / "proto" / name) for name in names], written
    compiler = [sys.executable, "-m", "grpc_tools.protoc", f"-I{tmp_path / 'proto'}", "--include_imports"]
    compiled = tmp_path / "set"
    subprocess.run([*compiler, f"--descriptor_set_out={compiled}", *names], check=True, timeout=60)
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString(compiled.read_bytes()).file:
        pool.Add(file)
    answer = GetMessageClass(pool.FindMessageTypeByName("kms.GetMetaResponse"))
    with reflected(stack.description["grpc"]["kms-src-grpc"], guest.root_ca) as client:
        call = client.channel.unary_unary("/kms.KMS/GetMeta", response_deserializer=answer.FromString)
        assert shown(call(b"", timeout=foreign.TIMEOUT)) == client.call("kms.KMS/GetMeta").value


def test_proto_files_that_are_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kms.proto").write_text("mine")
    assert usage_error("proto", str(tmp_path)) == (
        f"{tmp_path / 'kms.proto'} exists already with other contents: name another folder"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["kms.proto"]


def test_shipped_stubs_call_every_service(stack: RunningStack, guest: Guest) -> None:
    with reflected(stack.description["grpc"]["kms-src-grpc"], guest.root_ca) as client:
        kms: KMSStub = KMSStub(client.channel)
        assert kms.GetMeta(Empty()).ca_cert == guest.root_ca
    with reflected(stack.description["grpc"]["app-grpc"]) as client:
        agent: DstackGuestStub = DstackGuestStub(client.channel)
        assert agent.GetKey(dstack_guest_pb2.GetKeyArgs(path="wallet"), timeout=foreign.TIMEOUT).key


async def test_shipped_stubs_work_on_a_channel_of_asyncio(stack: RunningStack) -> None:
    async with grpc.aio.insecure_channel(stack.description["grpc"]["app-grpc"]) as channel:
        agent = cast("DstackGuestAsyncStub", DstackGuestStub(channel))
        assert (await agent.Info(Empty(), timeout=foreign.TIMEOUT)).app_name == "app"


# ---- the document


def page() -> str:
    return (ROOT / "docs" / "grpc.md").read_text()


def test_statuses_of_the_document_are_the_programs() -> None:
    table = rows(page(), "refusal")
    documented = {name: code(status)[0] for _, names, status in table for name in code(names)}
    statuses = {**ATTEST_STATUSES, **KMS_STATUSES, **AGENT_STATUSES}
    assert documented == {kind.__name__: status.name for kind, status in statuses.items()}


def test_ports_of_the_document_are_the_stacks() -> None:
    assert {code(name)[0]: int(port) for name, port, _ in rows(page(), "name")} == dict(GRPC_PORTS)


def test_clients_of_the_document_work(stack: RunningStack) -> None:
    state, ports = stack.description["state"], stack.description["grpc"]
    examples = [block.text for block in blocks(page()) if block.language in ("python", "text")]
    assert len(examples) == 4
    for script, expected in zip(examples[::2], examples[1::2], strict=True):
        here = script.replace("/tmp/emu", state).replace("127.0.0.1:9311", ports["kms-src-grpc"])
        command = [sys.executable, "-c", here]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout == expected, done.stderr
