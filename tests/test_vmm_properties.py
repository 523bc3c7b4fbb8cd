"""Any request to a VMM is answered, or refused with a reason in the form of its encoding, and then changes nothing."""

import http.client
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dstack_emu.attest.proto import guest_api_pb2, vmm_pb2
from dstack_emu.attest.proto.prpc_pb2 import PrpcError
from dstack_emu.testing import LiveStack
from tests.vmm import COMPOSE, VmmClient, allow, configuration

RPCS = vmm_pb2.DESCRIPTOR.services_by_name["Vmm"].methods_by_name
GUEST_RPCS = guest_api_pb2.DESCRIPTOR.services_by_name["ProxiedGuestApi"].methods_by_name
ENDS_THE_STATE = ("StartVm", "RemoveVm")
"""After them a machine changes by itself."""
FEW = settings(  # each asks a server three times
    max_examples=int(os.environ.get("DSTACK_EMU_EXAMPLES", "20")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

TEXTS = st.sampled_from(
    [
        "",
        "a",
        "..",
        "../x",
        "/",
        "\0",
        "a" * 300,
        "é\u2028",
        "0x",
        "user",
        "bridge",
        "all",
        "tcp",
        "127.0.0.1",
        "::",
        "{}",
    ]
) | st.text(max_size=12)
NUMBERS = st.sampled_from([0, 1, 2, 1024, 2048, 65535, 65536, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
COMPOSE_FILES = st.builds(
    lambda changed: json.dumps(json.loads(COMPOSE) | changed),
    st.dictionaries(st.sampled_from([*json.loads(COMPOSE), "key_provider", "init_script"]), JSON_VALUES, max_size=2),
)


class Caller:
    """Calls a VMM over one connection, and knows what its machines are."""

    def __init__(self, stack: LiveStack) -> None:
        url = urlsplit(stack.services["vmm"])
        self.vmm = VmmClient(stack.services["vmm"])
        self.folder = Path(stack.description["state"]) / "vms"
        self.connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=60)

    def ask(self, verb: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        self.connection.request(verb, path, body)
        answer = self.connection.getresponse()
        return answer.status, answer.read()

    def state(self) -> tuple[Any, dict[str, bytes]]:
        """What is told of the machines, and what is stored of them."""
        vms = json.loads(self.ask("POST", "/prpc/Status?json", b"{}")[1])["vms"]
        told = [{name: vm[name] for name in vm if name not in ("uptime", "exited_at")} for vm in vms]
        stored = {str(path): path.read_bytes() for path in self.folder.rglob("*.json")}
        return told, stored


@pytest.fixture
def caller(vmm: VmmClient, vmm_stack: LiveStack) -> Iterator[Caller]:
    """A VMM with a machine that was created stopped."""
    allow(vmm_stack)
    vmm.deploy(name="kept", stopped=True)
    made = Caller(vmm_stack)
    yield made
    made.connection.close()


def value_of(field: Any) -> st.SearchStrategy[Any]:
    """Any value of a field, which its descriptor describes."""
    by_type: Mapping[int, st.SearchStrategy[Any]] = {
        FieldDescriptor.TYPE_STRING: COMPOSE_FILES | TEXTS if field.name == "compose_file" else TEXTS,
        FieldDescriptor.TYPE_BYTES: st.binary(max_size=60),
        FieldDescriptor.TYPE_BOOL: st.booleans(),
        FieldDescriptor.TYPE_UINT32: NUMBERS,
    }
    nested = field.message_type
    one = by_type[field.type] if nested is None else messages(GetMessageClass(nested))
    return st.lists(one, max_size=3) if field.is_repeated else one


def messages(kind: type[Message]) -> st.SearchStrategy[Message]:
    """Any message of a type, with few of its fields."""
    fields = kind.DESCRIPTOR.fields_by_name
    if not fields:
        return st.just(kind())
    some = st.lists(st.sampled_from(sorted(fields)), max_size=3, unique=True)
    given = some.flatmap(lambda names: st.fixed_dictionaries({name: value_of(fields[name]) for name in names}))
    return given.map(lambda members: kind(**members))


def members_of(message: Message) -> dict[str, Any]:
    """A message as JSON of pRPC: names as in the .proto file, bytes in hex."""

    def shown(value: Any) -> Any:
        if isinstance(value, Message):
            return members_of(value)
        return value.hex() if isinstance(value, bytes) else value

    return {
        field.name: [shown(each) for each in value] if field.is_repeated else shown(value)
        for field, value in message.ListFields()
    }


def valid(kind: type[Message], vm_id: str) -> Message:
    """A request that is not refused, or would not be if it were not for its image."""
    message = kind()
    if isinstance(message, vmm_pb2.VmConfiguration):
        given = {name: value for name, value in configuration().items() if value is not None and name != "swap_size"}
        return vmm_pb2.VmConfiguration(**given | {"stopped": True})
    if "id" in message.DESCRIPTOR.fields_by_name:
        return kind(id=vm_id)
    return message


def check(caller: Caller, before: Any, status: int, answer: bytes, *, is_json: bool) -> None:
    """Check a refusal."""
    if status == 200:
        return
    assert status == 400
    text = json.loads(answer)["error"] if is_json else PrpcError.FromString(answer).message
    assert text
    assert not re.search("Error:|Traceback|Exception", text), text
    assert caller.state() == before


def test_any_message_of_any_rpc_is_answered_or_refused_and_then_changes_nothing(caller: Caller) -> None:
    kept = caller.vmm.rpc("Status")["vms"][0]["id"]
    paths = [f"/prpc/{name}" for name in RPCS] + [f"/guest/{name}" for name in GUEST_RPCS]

    @given(st.sampled_from(paths), st.data(), st.booleans())
    @FEW
    def ask(path: str, data: st.DataObject, is_json: bool) -> None:
        mount, name = path[1:].split("/")
        rpc = (RPCS if mount == "prpc" else GUEST_RPCS)[name]
        kind = GetMessageClass(rpc.input_type)
        message = valid(kind, "absent" if name in ENDS_THE_STATE else kept)
        changed = data.draw(messages(kind))
        for field, _ in changed.ListFields():
            message.ClearField(field.name)
        message.MergeFrom(changed)
        before = caller.state()
        body = json.dumps(members_of(message)).encode() if is_json else message.SerializeToString()
        status, answer = caller.ask("POST", f"{path}?json" if is_json else path, body)
        check(caller, before, status, answer, is_json=is_json)

    ask()


def test_any_body_of_any_rpc_is_answered_or_refused_and_then_changes_nothing(caller: Caller) -> None:
    paths = [f"/prpc/{name}" for name in RPCS] + [f"/guest/{name}" for name in GUEST_RPCS]
    names = st.sampled_from(["id", "name", "image", "compose_file", "ports", "gpus", "tag", "ids", "memory"]) | st.text(
        max_size=4
    )
    as_json = st.dictionaries(names, JSON_VALUES, max_size=4) | JSON_VALUES
    bodies = st.binary(max_size=40) | as_json.map(lambda value: json.dumps(value).encode())

    @given(st.sampled_from(paths), bodies, st.sampled_from(["POST", "POST?json", "GET?json"]))
    @FEW
    def ask(path: str, body: bytes, how: str) -> None:
        before = caller.state()
        verb, _, query = how.partition("?")
        is_json = query == "json"
        if verb == "GET":
            status, answer = caller.ask(verb, f"{path}?json&{quote(body, safe='&=')}")
        else:
            status, answer = caller.ask(verb, f"{path}?json" if is_json else path, body)
        check(caller, before, status, answer, is_json=is_json)

    ask()


def test_any_query_of_logs_is_answered_or_refused(caller: Caller) -> None:
    kept = caller.vmm.rpc("Status")["vms"][0]["id"]
    ids = st.sampled_from([kept, kept.upper(), f"../vms/{kept}", ""]) | TEXTS
    lines = st.integers().map(str) | st.sampled_from(["", "1_0", "\u0661", " 1", "+1", "9" * 5000]) | TEXTS
    query = st.fixed_dictionaries(
        {},
        optional={
            "id": ids,
            "lines": lines,
            "follow": st.sampled_from(["false", "no", "off", "x", "0"]),
            "ansi": st.sampled_from(["true", "", "x"]),
            "ch": st.sampled_from(["serial", "stdout", "stderr"]) | TEXTS,
        },
    )

    @given(query)
    @FEW
    def ask(given: dict[str, str]) -> None:
        status, _ = caller.ask("GET", f"/logs?{urlencode(given)}")
        lines = given.get("lines", "1")
        is_number = re.fullmatch(r"\+?[0-9]+", lines) is not None and int(lines[:4000]) < 1 << 64
        is_routed = is_number and given.get("follow") not in ("x", "0") and given.get("ansi") != "x"
        expected = 200 if given.get("ch", "serial") in ("serial", "stdout", "stderr") else 400
        assert status == (expected if is_routed and given.get("id") == kept else 404)

    ask()
