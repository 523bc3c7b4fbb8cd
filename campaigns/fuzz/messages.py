"""Targets: pRPC messages, the bodies that webhooks, KMS, verifier and control take, and stored documents."""

import inspect
import json
from collections.abc import Iterable, Iterator
from typing import Final, cast

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from campaigns.fuzz.target import Target, Tried, selected, table, text_of
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.proto import (
    dstack_guest_pb2,
    dstack_guest_v1_pb2,
    gateway_pb2,
    guest_api_pb2,
    kms_pb2,
    kms_v05_pb2,
    prpc_pb2,
    vmm_pb2,
    vmm_v05_pb2,
)
from dstack_emu.attest.prpc.binary import decode_binary, encode_binary
from dstack_emu.attest.prpc.encoding import require_few_pairs, wants_json
from dstack_emu.attest.prpc.ignored import Ignored
from dstack_emu.attest.prpc.json import decode_json, encode_json
from dstack_emu.attest.prpc.query import decode_query
from dstack_emu.attest.release import RELEASES
from dstack_emu.auth.allowlist import parse_allowlist, parse_allowlist_boot_info
from dstack_emu.auth.boot_info import parse_body, parse_boot_info
from dstack_emu.auth.contract_abi import encode_question
from dstack_emu.auth.errors import AuthError
from dstack_emu.auth.eth_request import contract_question, parse_bounded_boot_info
from dstack_emu.auth.simple import parse_policy
from dstack_emu.control import schemas
from dstack_emu.control.schemas import ControlError, RequestBody, checked
from dstack_emu.control.snapshots import StackState
from dstack_emu.deployment.compose_file import ComposeFile
from dstack_emu.gateway.domains import normalized_domain, require_peer_url
from dstack_emu.gateway.errors import GatewayError
from dstack_emu.gateway.policies import policy_of
from dstack_emu.inspection.description import as_json
from dstack_emu.inspection.identify import inspect_input
from dstack_emu.simulator.errors import GuestError
from dstack_emu.verifier.service import (
    InputError,
    RequestSyntaxError,
    RequestTooLargeError,
    RequestTypeError,
    VerificationRequest,
)
from dstack_emu.vmm.checks import parse_compose
from dstack_emu.vmm.compose_file import key_provider_of, needs_swtpm, requested_volumes
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.manifest import Manifest
from dstack_emu.vmm.registry import Repository, require_tag
from tests import evidence_samples as samples
from tests.evidence_samples import world

_MODULES: Final = (
    dstack_guest_pb2,
    dstack_guest_v1_pb2,
    gateway_pb2,
    guest_api_pb2,
    kms_pb2,
    kms_v05_pb2,
    prpc_pb2,
    vmm_pb2,
    vmm_v05_pb2,
)
MESSAGES: Final[tuple[type[Message], ...]] = tuple(
    kind
    for module in _MODULES
    for _, kind in sorted(inspect.getmembers(module, lambda each: isinstance(each, type) and issubclass(each, Message)))
)


def _filled(kind: type[Message], depth: int = 0) -> Message:
    """Return a message with a value in each field."""
    message = kind()
    for each in kind.DESCRIPTOR.fields:
        if each.message_type is not None and not (each.message_type.GetOptions().map_entry):
            if depth < 3:
                inner = _filled(GetMessageClass(cast(Descriptor, each.message_type)), depth + 1)
                held = getattr(message, each.name)
                (held.add() if each.is_repeated else held).MergeFrom(inner)
            continue
        by_type = {each.TYPE_STRING: "text", each.TYPE_BYTES: b"\1\2", each.TYPE_BOOL: True}
        if each.message_type is None:
            value = by_type.get(each.type, 7)
            if each.is_repeated:
                getattr(message, each.name).append(value)
            else:
                setattr(message, each.name, value)
    return message


def _kinds() -> Iterator[tuple[bytes, Message]]:
    for number, kind in enumerate(MESSAGES):
        yield number.to_bytes(2, "big"), _filled(kind)


def _kind_of(data: bytes) -> tuple[type[Message], bytes]:
    return MESSAGES[int.from_bytes(data[:2], "big") % len(MESSAGES)], data[2:]


def _binary(data: bytes) -> object:
    kind, body = _kind_of(data)
    message = decode_binary(kind, body)
    return encode_binary(message), encode_json(message)


def _json(data: bytes) -> object:
    kind, body = _kind_of(data)
    ignored: Ignored = []
    message = decode_json(kind, body, ignored)
    return encode_binary(message), encode_json(message), encode_json(message, old_spellings=True), ignored


def _query(data: bytes) -> object:
    kind, body = _kind_of(data)
    tried, text = Tried((FormatError,)), text_of(body)
    ignored: Ignored = []
    tried(lambda: encode_json(decode_query(kind, text, ignored)))
    tried(lambda: require_few_pairs(text))
    tried(lambda: wants_json("GET", text, text))
    return tried, ignored


def _queries() -> Iterator[bytes]:
    for head, message in _kinds():
        pairs = []
        for each, value in message.ListFields():
            if each.message_type is None:
                pairs.append(f"{each.name}[0]={value[0]}" if each.is_repeated else f"{each.name}={value}")
        yield head + "&".join([*pairs, "json"]).encode()


def _boot_info(data: bytes) -> object:
    tried = Tried((AuthError,))
    tried(lambda: parse_boot_info(parse_body(data)))
    tried(lambda: parse_boot_info(parse_body(data), checks_tee_variant=True))
    tried(lambda: parse_allowlist_boot_info(data))
    tried(lambda: encode_question(bytes(4), contract_question(parse_bounded_boot_info(parse_body(data)))))
    tried(lambda: encode_question(bytes(4), contract_question(parse_boot_info(parse_body(data)))))
    return tried


def _boot_infos() -> list[bytes]:
    names = ("mrAggregated", "osImageHash", "appId", "composeHash", "instanceId", "deviceId", "mrSystem")
    sizes = (32, 32, 20, 32, 20, 32, 32)
    document: dict[str, object] = {name: "0x" + "ab" * size for name, size in zip(names, sizes, strict=True)}
    return [json.dumps(document | {"tcbStatus": "UpToDate", "advisoryIds": ["INTEL-SA-00001"]}).encode()]


def _policies(data: bytes) -> object:
    tried = Tried((AuthError,))
    tried(lambda: parse_policy(data, "policy.json"))
    tried(lambda: parse_allowlist(data))
    return tried


_POLICY: Final = {
    "osImages": ["0x" + "11" * 32],
    "gatewayAppId": "any",
    "allowedTcbStatuses": ["UpToDate"],
    "allowedAdvisoryIds": ["INTEL-SA-00001"],
    "kms": {"mrAggregated": ["22" * 32], "devices": ["33" * 32], "allowAnyDevice": True},
    "apps": {"44" * 20: {"composeHashes": ["55" * 32], "devices": [], "allowAnyDevice": False}},
}


def _verification(data: bytes) -> object:
    request = VerificationRequest.parse(data, takes_log_as_list=True)
    evidence, config = request.evidence()
    return request.size, repr(evidence), config


def _verifications() -> list[bytes]:
    evidence = world().evidence
    log = [each.to_json() for each in evidence.event_log]
    first = {"attestation": evidence.encode().hex(), "debug": True}
    second = {"quote": evidence.quote.hex(), "event_log": json.dumps(log), "vm_config": "{}"}
    return [json.dumps(each).encode() for each in (first, second, {"quote": "00", "event_log": log})]


_REQUESTS: Final = tuple(
    kind
    for _, kind in sorted(inspect.getmembers(schemas, lambda each: isinstance(each, type)))
    if issubclass(kind, RequestBody) and kind is not RequestBody
)


def _control(data: bytes) -> object:
    which, body = selected(data, len(_REQUESTS))
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return "not JSON"
    return checked(_REQUESTS[which], document) if isinstance(document, dict) else "not an object"


def _controls() -> Iterator[bytes]:
    values: tuple[object, ...] = ({}, "x", 1, "2026-06-01", "1h", True, ["x"], {"x": 1}, None)
    for number, kind in enumerate(_REQUESTS):
        for value in values:
            yield bytes([number]) + json.dumps(dict.fromkeys(kind.model_fields, value)).encode()


def _snapshot(data: bytes) -> object:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return "not JSON"
    return repr(StackState.read(document))


def _inspected(data: bytes) -> object:
    found = inspect_input(data)
    return found.what, found.sure, found.form, found.obstacle, repr(as_json(found.description))


def _inspections() -> Iterable[bytes]:
    import base64

    quote = world().evidence.quote
    yield from (*samples.quotes(), *samples.attestations(), *samples.certificates(), *_verifications())
    yield from (quote.hex().encode(), base64.b64encode(quote.hex().encode()), samples.signing_request().encoded)
    yield world().collateral.to_json().encode() if hasattr(world().collateral, "to_json") else b"{}"


_COMPOSE: Final = b"""services:
  web: &web
    image: ${IMAGE:-nginx}
    command: ["a", "$$b"]
    entrypoint: sh -c 'x y'
    environment: {A: "1", B: "${C-d}"}
    ports: ["80:80/tcp", "127.0.0.1:81-82:81-82/udp", {target: 90, published: 91}]
    volumes: ["/a:/b:ro", {type: bind, source: /c, target: /d}]
    configs: [{source: one, target: /one}]
    network_mode: host
    restart: always
  other: {<<: *web}
configs:
  one: {content: "x"}
"""


def _compose_file(data: bytes) -> object:
    tried = Tried((GuestError,))
    found = ComposeFile.parse(text_of(data), {"IMAGE": "x"})
    for name in list(found.services)[:4]:
        tried(lambda name=name: found.service(name))  # type: ignore[misc]
    return tried


def _machine(data: bytes) -> object:
    tried, text = Tried((VmmError,)), text_of(data)
    tried(lambda: Manifest.parse(data, "vm-manifest.json").encode())
    tried(lambda: key_provider_of(text))
    tried(lambda: needs_swtpm(text, None))
    tried(lambda: requested_volumes(text, "/volumes"))
    for release in RELEASES.values():
        tried(lambda release=release: parse_compose(text, release).name)  # type: ignore[misc]
    tried(lambda: Repository.parse(text))
    tried(lambda: require_tag(text))
    return tried


def _machines() -> list[bytes]:
    manifest = {
        "id": "x",
        "name": "x",
        "app_id": "00" * 20,
        "vcpu": 1,
        "memory": 1024,
        "disk_size": 20,
        "image": "dstack-0.6.0",
        "port_map": [{"address": "127.0.0.1", "protocol": "tcp", "from": 1, "to": 2}],
        "created_at_ms": 1,
        "hugepages": False,
        "pin_numa": False,
        "gpus": None,
        "networking": {"mode": "user"},
    }
    volumes = {"manifest_version": "3", "verity_volumes": [{"source": "a", "target": "/a", "verity_root": "00" * 32}]}
    return [json.dumps(each).encode() for each in (manifest, volumes, {"key_provider": "tpm"})] + [b"a.example/b/c"]


def _gateway(data: bytes) -> object:
    tried, text = Tried((GatewayError,)), text_of(data)
    tried(lambda: policy_of(text))
    tried(lambda: require_peer_url(text))
    for release in RELEASES.values():
        tried(lambda release=release: normalized_domain(text, release))  # type: ignore[misc]
    return tried


def _gateways() -> list[bytes]:
    compose = {"port_policy": {"ports": [{"port": 80, "pp": True}], "restrict_mode": True}}
    return [json.dumps({"app_compose": json.dumps(compose)}).encode(), b"*.A.example.", b"https://[::1]:443/x"]


TARGETS: Final = table(
    Target(
        "prpc-binary", _binary, lambda: [head + message.SerializeToString() for head, message in _kinds()], weight=3
    ),
    Target("prpc-json", _json, lambda: [head + encode_json(message) for head, message in _kinds()], weight=3),
    Target("prpc-query", _query, _queries),
    Target("boot-info", _boot_info, _boot_infos, (AuthError,), weight=2),
    Target("policy", _policies, lambda: [json.dumps(_POLICY).encode()], (AuthError,), weight=2),
    Target(
        "verification-request",
        _verification,
        _verifications,
        (RequestSyntaxError, RequestTypeError, RequestTooLargeError, InputError),
    ),
    Target("control-request", _control, _controls, (ControlError,)),
    Target("snapshot", _snapshot, lambda: _snapshots(), (ControlError,), weight=0.3),
    Target("inspect", _inspected, _inspections, (FormatError,), weight=0.5, growth=1024),
    Target("compose-file", _compose_file, lambda: [_COMPOSE], (GuestError,), weight=0.5, growth=1024),
    Target("machine", _machine, _machines, (VmmError,)),
    Target("gateway-texts", _gateway, _gateways, (GatewayError,)),
)


def _snapshots() -> list[bytes]:
    head = {"format": "dstack-emu state", "version": 1, "seed": "s", "release": "0.6"}
    rest = {"clock": {}, "vendor": {}, "platforms": {}, "policies": {}, "faults": [], "fault_count": 0}
    return [json.dumps(head | rest | {"guests": {}, "kms": {}, "journal": 0, "chain": []}).encode()]
