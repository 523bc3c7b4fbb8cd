"""`dstack-emu why`: incidents under every contract, each form of evidence, the change that admits, and exit codes."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from dstack_emu.attest import der, eventlog
from dstack_emu.attest.app_info import decode_app_info
from dstack_emu.attest.certificate import OID_ATTESTATION
from dstack_emu.auth.allowlist import ALLOWLIST_RULES
from dstack_emu.auth.boot_info import parse_boot_info
from dstack_emu.auth.file import FileAuth
from dstack_emu.auth.policy import CONTRACTS, RULES, Contract, parse_contract
from dstack_emu.auth.simple import SimpleAuth
from dstack_emu.inspection.policy_change import smallest_change
from dstack_emu.inspection.policy_file import Kind, PolicyFile
from tests.commands import run_inside, serving
from tests.evidence_samples import NOW, issued, legacy_certificate, signing_request, with_extensions, world
from tests.json_rpc_server import CONTRACT, Chain, running_chain
from tests.repository import ROOT

OFFLINE: Final = ("--offline", "--seed", "properties", "--time", str(NOW))
APP_ID, DEVICE, IMAGE = "ab" * 20, "d1" * 32, "05" * 32
BOOT: Final[dict[str, Any]] = {
    "teeVariant": "dstack-tdx",
    "mrAggregated": "a9" * 32,
    "osImageHash": IMAGE,
    "mrSystem": "55" * 32,
    "appId": APP_ID,
    "composeHash": "c0" * 32,
    "instanceId": "11" * 20,
    "deviceId": DEVICE,
    "keyProviderInfo": "",
    "tcbStatus": "UpToDate",
    "advisoryIds": [],
}
APP: Final = f"0x{APP_ID.upper()}"
"""The file's spelling of the app id."""
ADMITTING: Final[dict[str, Any]] = {
    "osImages": [f"0x{IMAGE}"],
    "futureMember": {"kept": True},
    "kms": {"mrAggregated": [f"0x{BOOT['mrAggregated']}"], "devices": [f"0x{DEVICE}"]},
    "apps": {APP: {"composeHashes": [f"0x{BOOT['composeHash']}"], "devices": [f"0x{DEVICE}"]}},
}
OTHER: Final = "0x" + "ee" * 32


# ---- independent tools: JSON Patch, JSON Schema


def patched(document: Any, patch: list[dict[str, Any]]) -> Any:
    """Apply the `add` operations of a JSON Patch, as RFC 6902 says."""
    document = copy.deepcopy(document)
    for operation in patch:
        assert operation["op"] == "add"
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        target = document
        for part in parents:
            target = target[int(part)] if isinstance(target, list) else target[part]
        if isinstance(target, list):
            target.insert(len(target) if last == "-" else int(last), operation["value"])
        else:
            target[last] = operation["value"]
    return document


_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "null": (type(None),),
}


def require_valid(value: Any, schema: Mapping[str, Any], place: str = "$") -> None:
    """Require a value to be valid by the keywords of JSON Schema that the document uses."""
    known = {"$schema", "title", "description", "type", "enum", "properties", "required", "items"}
    assert schema.keys() <= known | {"additionalProperties"}, place
    if "enum" in schema:
        assert value in schema["enum"], place
    if "type" in schema:
        names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        assert any(type(value) in _TYPES[name] for name in names), (place, value)
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        assert set(schema.get("required", ())) <= value.keys(), place
        assert schema.get("additionalProperties", True) or value.keys() <= properties.keys(), place
        for key, member in value.items():
            require_valid(member, properties.get(key, {}), f"{place}.{key}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            require_valid(item, schema.get("items", {}), f"{place}[{index}]")


SCHEMA: Final = json.loads((ROOT / "docs/why.schema.json").read_text())


def why(*arguments: str, status: int) -> dict[str, Any]:
    """Run the command with --json; require its exit status, and the object to be valid."""
    code, out, err = run_inside("why", *arguments, "--json")
    assert (code, err) == (status, ""), err
    document: dict[str, Any] = json.loads(out)
    require_valid(document, SCHEMA)
    return document


def refused(*arguments: str) -> str:
    """Run the command, which must end with status 2 and one line."""
    code, out, err = run_inside("why", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err.removeprefix("Error: ").rstrip("\n")


def write(path: Path, document: Any) -> str:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return str(path)


# ---- incidents


def _without_app(policy: dict[str, Any]) -> None:
    policy["apps"] = {OTHER[:42]: {}}


Breaks = tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str, str | None]
INCIDENTS: Final[dict[str, Breaks]] = {
    "tcb_status": (lambda policy, boot: boot.update(tcbStatus="OutOfDate"), "tcbStatus", "/allowedTcbStatuses"),
    "advisory_ids": (
        lambda policy, boot: boot.update(advisoryIds=["INTEL-SA-1", "INTEL-SA-2"]),
        "advisoryIds",
        "/allowedAdvisoryIds",
    ),
    "os_image": (lambda policy, boot: policy.update(osImages=[OTHER]), "osImageHash", "/osImages"),
    "kms_mr_aggregated": (lambda policy, boot: policy.pop("kms"), "mrAggregated", "/kms/mrAggregated"),
    "kms_device": (lambda policy, boot: policy["kms"].update(devices=[OTHER]), "deviceId", "/kms/devices"),
    "app_registered": (lambda policy, boot: _without_app(policy), "appId", "/apps"),
    "app_compose_hash": (
        lambda policy, boot: policy["apps"][APP].update(composeHashes=[OTHER]),
        "composeHash",
        f"/apps/0x{APP_ID}/composeHashes",
    ),
    "app_device": (
        lambda policy, boot: policy["apps"][APP].update(devices=[OTHER]),
        "deviceId",
        f"/apps/0x{APP_ID}/devices",
    ),
}
"""For each rule: how a boot that is admitted comes to be refused by it, and the member and place that it names."""


def cases() -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    for contract in (*CONTRACTS, "allowlist"):
        for rule in ALLOWLIST_RULES if contract == "allowlist" else RULES:
            if rule != "allowed" and not (rule == "advisory_ids" and contract in ("readme", "upstream")):
                callers = ("app",) if rule.startswith("app") else ("kms",) if rule.startswith("kms") else ("app", "kms")
                found += [(contract, rule, caller) for caller in callers]
    found.remove(("allowlist", "os_image", "kms"))  # dstack-auth does not check a KMS's image
    return found


def decide(contract: str, policy: str, boot: dict[str, Any], caller: str) -> bool:
    """Decide by the webhook's service, which reads the file."""
    auth = FileAuth(policy) if contract == "allowlist" else SimpleAuth(policy, contract=parse_contract(contract))
    return auth.decide(parse_boot_info(boot), caller == "kms").is_allowed


@pytest.mark.parametrize(("contract", "rule", "caller"), cases())
def test_incident_is_explained_by_its_rule_and_the_change_admits_it(
    contract: Contract | str, rule: str, caller: str, tmp_path: Path
) -> None:
    policy, boot = copy.deepcopy(ADMITTING), copy.deepcopy(BOOT)
    by = ("--allowlist",) if contract == "allowlist" else ("--contract", contract, "--policy")
    question = [write(tmp_path / "boot.json", boot), "--as", caller, *by, write(tmp_path / "policy.json", policy)]
    assert why(*question, status=0)["refusals"] == []

    breaks, member, place = INCIDENTS[rule]
    breaks(policy, boot)
    write(tmp_path / "boot.json", boot)
    path = write(tmp_path / "policy.json", policy)
    found = why(*question, status=1)
    assert (found["verdict"], found["decision"]["rule"]) == ("denied", rule)
    first = found["refusals"][0]
    values = boot[member] if isinstance(boot[member], list) else [boot[member]]
    assert (first["rule"], first["member"], first["got"]) == (rule, member, values)
    assert not decide(contract, path, boot, caller)
    if rule == "tcb_status" and contract in ("readme", "upstream"):
        assert (first["place"], first["wanted"], found["change"]) == (None, ["UpToDate"], None)
        assert "accepts the tcbStatus UpToDate alone" in found["no_change_because"]
        return
    assert first["place"] == (place if contract != "allowlist" else place and place.replace("0x", ""))
    changed = patched(policy, found["change"]["patch"])
    assert changed["futureMember"] == {"kept": True}
    assert decide(contract, write(tmp_path / "policy.json", changed), boot, caller)
    assert why(*question, status=0)["change"] is None


def test_change_of_an_empty_policy_admits_this_boot_alone(tmp_path: Path) -> None:
    policy, request = write(tmp_path / "p.json", {}), write(tmp_path / "b.json", BOOT)
    for contract in CONTRACTS:
        for caller in ("app", "kms"):
            found = why(request, "--as", caller, "--policy", policy, "--contract", contract, status=1)
            changed = write(tmp_path / "changed.json", patched({}, found["change"]["patch"]))
            assert decide(contract, changed, BOOT, caller)
            for name in ("osImageHash", "deviceId", "composeHash" if caller == "app" else "mrAggregated"):
                assert not decide(contract, changed, BOOT | {name: "77" * 32}, caller), (contract, caller, name)


def test_default_of_an_absent_list_is_kept_in_the_change(tmp_path: Path) -> None:
    boot = BOOT | {"tcbStatus": "SWHardeningNeeded"}
    question = (write(tmp_path / "b.json", boot), "--policy", write(tmp_path / "p.json", ADMITTING))
    (operation,) = why(*question, status=1)["change"]["patch"]
    assert operation == {"op": "add", "path": "/allowedTcbStatuses", "value": ["UpToDate", "SWHardeningNeeded"]}


def test_empty_value_is_never_allowed_by_a_change(tmp_path: Path) -> None:
    question = (write(tmp_path / "b.json", BOOT | {"osImageHash": ""}), "--policy", write(tmp_path / "p.json", {}))
    found = why(*question, status=1)
    assert (found["change"], found["refusals"][0]["rule"]) == (None, "os_image")
    assert found["no_change_because"].startswith("the request has no osImageHash")


def test_change_is_made_where_the_first_spelling_of_an_app_id_is(tmp_path: Path) -> None:
    first = {"composeHashes": [OTHER], "devices": [f"0x{DEVICE}"]}
    policy = ADMITTING | {"apps": {APP: first, f"0x{APP_ID}": {}, APP_ID: {}}}
    question = (write(tmp_path / "b.json", BOOT), "--policy", write(tmp_path / "p.json", policy))
    (operation,) = why(*question, status=1)["change"]["patch"]
    assert operation == {"op": "add", "path": f"/apps/{APP}/composeHashes/-", "value": f"0x{BOOT['composeHash']}"}


HEX: Final = st.sampled_from(["05" * 32, "0x" + "05" * 32, "A9" * 32, "0xC0" + "c0" * 31, "d1" * 32])
LISTS: Final = {name: st.lists(HEX, max_size=2) for name in ("devices", "composeHashes", "mrAggregated", "osImages")}
SECTION: Final = {"devices": LISTS["devices"], "allowAnyDevice": st.booleans()}
POLICIES: Final = st.fixed_dictionaries(
    {},
    optional={
        "osImages": LISTS["osImages"],
        "allowedTcbStatuses": st.lists(st.sampled_from(["UpToDate", "OutOfDate"]), max_size=1),
        "kms": st.fixed_dictionaries({}, optional=SECTION | {"mrAggregated": LISTS["mrAggregated"]}),
        "apps": st.dictionaries(
            st.sampled_from([APP, OTHER[:42]]),
            st.fixed_dictionaries({}, optional=SECTION | {"composeHashes": LISTS["composeHashes"]}),
        ),
    },
)


@given(
    POLICIES,
    st.sampled_from((*CONTRACTS, None)),
    st.booleans(),
    st.sampled_from(["UpToDate", "OutOfDate"]),
    st.lists(st.sampled_from(["INTEL-SA-1", "INTEL-SA-2"]), unique=True),
)
def test_change_admits_the_boot_under_any_policy_and_only_adds(
    document: dict[str, Any], contract: Contract | None, is_kms: bool, status: str, advisories: list[str]
) -> None:
    kind: Kind = "dstack-auth" if contract is None else "auth-simple"
    policy = PolicyFile(kind, "policy.json", json.dumps(document).encode(), contract)
    body = json.dumps(BOOT | {"tcbStatus": status, "advisoryIds": advisories}).encode()
    before = policy.decide(body, is_kms=is_kms)
    change = smallest_change(policy, body, is_kms=is_kms)
    assert before.is_allowed == (not change.refusals)
    if change.obstacle:
        assert (contract in ("readme", "upstream"), status) == (True, "OutOfDate")
        return
    changed = patched(document, change.patch)
    assert policy.with_document(changed).decide(body, is_kms=is_kms).is_allowed
    assert bool(change.patch) == (changed != document)
    if change.patch:
        for without in range(len(change.patch)):
            less = [each for number, each in enumerate(change.patch) if number != without]
            assert not policy.with_document(patched(document, less)).decide(body, is_kms=is_kms).is_allowed


# ---- forms of evidence


def forms() -> dict[str, bytes]:
    w = world()
    quote_answer = {
        "quote": w.evidence.quote.hex(),
        "event_log": eventlog.log_to_json(w.evidence.event_log),
        "vm_config": w.evidence.config,
    }
    return {
        "attestation": w.evidence.encode(),
        "attestation V1 in hex": w.evidence.as_v1().encode().hex().encode(),
        "certificate": issued().public_bytes(Encoding.PEM),
        "signing request": signing_request().encoded,
        "GetQuote answer": json.dumps(quote_answer).encode(),
        "verifier request": json.dumps({"attestation": w.evidence.encode().hex(), "debug": False}).encode(),
    }


@pytest.mark.parametrize("form", forms())
def test_every_form_of_evidence_is_verified_and_decided(form: str, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    evidence.write_bytes(forms()[form])
    question = (str(evidence), "--policy", str(tmp_path / "p.json"), *OFFLINE)
    write(tmp_path / "p.json", {})
    for caller in ("app", "kms"):
        denied = why(*question, "--as", caller, status=1)
        assert denied["evidence"]["verifies"]
        assert denied["boot_info"]["osImageHash"] in json.dumps(denied["change"]["patch"])
        write(tmp_path / "p.json", patched({}, denied["change"]["patch"]))
        assert why(*question, "--as", caller, status=0)["verdict"] == "allowed"
        write(tmp_path / "p.json", {})


def test_signing_request_is_decided_by_the_measurements_of_boot_time(tmp_path: Path) -> None:
    evidence, policy = tmp_path / "evidence", write(tmp_path / "p.json", {})
    question = (str(evidence), "--policy", policy, *OFFLINE)
    for data, boot_time in ((signing_request().encoded, True), (world().evidence.encode(), False)):
        evidence.write_bytes(data)
        expected = decode_app_info(world().evidence, boot_time=boot_time)
        asked = why(*question, status=1)["boot_info"]
        assert (asked["mrAggregated"], asked["keyProviderInfo"]) == (
            expected.mr_aggregated.hex(),
            expected.key_provider_info.hex(),
        )
        assert bool(asked["keyProviderInfo"]) is not boot_time


def test_certificate_whose_evidence_binds_another_key_is_refused(tmp_path: Path) -> None:
    evidence, policy = tmp_path / "evidence", write(tmp_path / "p.json", {})
    question = (str(evidence), "--policy", policy, *OFFLINE)
    stolen = world().domain.attest(bytes(64)).encode()
    certificate = with_extensions({OID_ATTESTATION: der.octet_string(stolen)})
    evidence.write_bytes(certificate.public_bytes(Encoding.DER))
    found = why(*question, status=1)
    assert (found["verdict"], found["evidence"]["verifies"]) == ("refused", False)
    assert found["evidence"]["problem"].startswith("binding: got ")
    evidence.write_bytes(issued().public_bytes(Encoding.DER))
    assert why(*question, status=1)["verdict"] == "denied"


def test_evidence_without_what_a_boot_info_needs_is_unusable(tmp_path: Path) -> None:
    evidence, policy = tmp_path / "evidence", write(tmp_path / "p.json", {})
    question = (str(evidence), "--policy", policy, *OFFLINE)
    evidence.write_bytes(world().evidence.quote)
    assert "a quote without its event log" in refused(*question)
    evidence.write_bytes(legacy_certificate().public_bytes(Encoding.DER))
    assert "--vm-config FILE" in refused(*question)
    config = write(tmp_path / "vm_config", world().evidence.config)
    assert why(*question, "--vm-config", config, status=1)["decision"]["rule"] == "os_image"
    evidence.write_bytes(b"no evidence")
    assert "unknown input" in refused(*question)


def test_evidence_that_does_not_verify_is_refused_before_any_policy(tmp_path: Path) -> None:
    evidence, policy = tmp_path / "evidence", write(tmp_path / "p.json", {})
    evidence.write_bytes(world().evidence.encode())
    question = (str(evidence), "--policy", policy, *OFFLINE[:3])
    found = why(*question, "--time", "2200-01-01", status=1)
    assert (found["verdict"], found["decision"], found["change"]) == ("refused", None, None)
    assert "CrlExpired" in found["sentence"]
    assert [each["name"] for each in found["evidence"]["checks"] if each["ok"] is False] == ["quote"]
    assert why(*question, "--time", str(NOW), status=1)["verdict"] == "denied"


def test_what_cannot_be_used_ends_with_status_2(tmp_path: Path) -> None:
    request = write(tmp_path / "b.json", BOOT)
    missing = str(tmp_path / "none.json")
    assert refused(request, "--policy", missing) == f"config file not found: {missing}"
    broken = write(tmp_path / "broken.json", '{"osImages": 7}')
    assert "osImages" in refused(request, "--policy", broken)
    assert "osImages" in refused(request, "--allowlist", broken)
    assert "--policy FILE expected" in refused(request, "--allowlist", broken, "--contract", "0.6")
    assert "no decision" in refused(request, "--webhook", "http://127.0.0.1:1")
    policy = write(tmp_path / "p.json", {})
    damaged = write(tmp_path / "damaged.json", BOOT | {"appId": 7})
    assert "appId: hex expected, got 7" in refused(damaged, "--policy", policy)
    (tmp_path / "evidence").write_bytes(world().evidence.encode())
    unreachable = (str(tmp_path / "evidence"), "--policy", policy, "--pccs", "http://127.0.0.1:1")
    assert "no collateral" in refused(*unreachable)
    assert why(request, "--policy", policy, status=1)["verdict"] == "denied"


# ---- as text


def test_text_shows_got_and_wanted_below_each_other_and_marks_the_difference(tmp_path: Path) -> None:
    listed = IMAGE[:16] + "ff" + IMAGE[18:]
    policy = write(tmp_path / "p.json", ADMITTING | {"osImages": [OTHER, f"0x{listed}"]})
    code, out, _ = run_inside("why", write(tmp_path / "b.json", BOOT), "--policy", policy)
    lines = out.splitlines()
    assert (code, lines[0].split(":")[0]) == (1, "DENIED")
    assert lines[1] == "The OS image (osImageHash) is not among the 2 that the policy lists."
    at = lines.index("osImageHash  (/osImages)")
    got, wanted, marks = lines[at + 1 : at + 4]
    assert got.split()[1:] == [IMAGE[i : i + 8] for i in range(0, 64, 8)]
    assert "".join(wanted.split()[1:]) == listed
    assert [column for column, mark in enumerate(marks) if mark == "^"] == [wanted.index("ff"), wanted.index("ff") + 1]
    assert f'+    "0x{IMAGE}"' in out
    assert "JSON Patch" in out
    assert f"  composeHash       {BOOT['composeHash']}" in lines[lines.index("Request   POST /bootAuth/app") :]
    assert lines[lines.index("Next") + 1].startswith("  1. ")


# ---- misspelt keys, and webhooks


MISSPELT: Final[dict[str, Any]] = {
    "osImage": [f"0x{IMAGE}"],
    "_comment": "not read, on purpose",
    "rootEpochs": [],
    "kms": {"mrAgregated": []},
    "apps": {APP: {"compose_hashes": []}},
}
WARNINGS: Final = [
    "osImage: nothing reads this key, did you mean osImages?",
    "rootEpochs: nothing reads this key",
    "kms.mrAgregated: nothing reads this key, did you mean mrAggregated?",
    f"apps.{APP}.compose_hashes: nothing reads this key, did you mean composeHashes?",
]


def test_misspelt_keys_of_a_policy_are_named_with_the_nearest(tmp_path: Path) -> None:
    request = write(tmp_path / "b.json", BOOT)
    policy = write(tmp_path / "p.json", MISSPELT)
    assert why(request, "--policy", policy, status=1)["warnings"] == WARNINGS
    assert why(request, "--allowlist", policy, status=1)["warnings"] == WARNINGS
    assert f"Note      {WARNINGS[0]}" in run_inside("why", request, "--policy", policy)[1]
    assert why(request, "--policy", write(policy_path := tmp_path / "q.json", ADMITTING), status=0)["warnings"] == [
        "futureMember: nothing reads this key"
    ]
    assert policy_path.exists()


@pytest.mark.parametrize("kind", ["simple", "file"])
def test_webhook_logs_misspelt_keys_once_for_each_version_of_its_file(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = tmp_path / "p.json"

    def logged() -> list[str]:
        auth = service.decide(parse_boot_info(BOOT), False)
        found = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
        caplog.clear()
        assert not auth.is_allowed
        return found

    write(policy, MISSPELT)
    service = SimpleAuth(policy) if kind == "simple" else FileAuth(policy)
    assert logged() == [f"{policy}: {warning}" for warning in WARNINGS]
    assert logged() == []
    write(policy, {"osImagess": []})
    assert logged() == [f"{policy}: osImagess: nothing reads this key, did you mean osImages?"]


@pytest.mark.parametrize(
    ("caller", "reason", "rule", "step"),
    [
        (
            "kms",
            "TCB status is not up to date",
            "tcb_status",
            "If the webhook asks a DstackKms contract: no transaction",
        ),
        (
            "kms",
            "OS image is not allowed",
            "os_image",
            "contract: its owner allows the image by addOsImageHash(0x{os})",
        ),
        (
            "kms",
            "Aggregated MR not allowed",
            "kms_mr_aggregated",
            "a contract's reason: its owner allows the KMS by addKms",
        ),
        ("kms", "KMS is not allowed to boot on this device", "kms_device", "the device by addKmsDevice(0x{device})"),
        ("app", "App not registered", "app_registered", "anyone registers the app by registerApp(0x{app})"),
        ("app", "App not deployed or invalid address", "app_deployed", "no contract is at its address 0x{app}"),
        ("app", "TCB status is not up to date", "tcb_status", "setRequireTcbUpToDate(false) of DstackApp 0x{app}"),
        ("app", "Compose hash not allowed", "app_compose_hash", "by addComposeHash(0x{compose}) of DstackApp 0x{app}"),
        (
            "app",
            "Device not allowed",
            "app_device",
            "by addDevice(0x{device}), or every device by setAllowAnyDevice(true)",
        ),
        ("kms", "Compose hash not allowed", None, "What the webhook compares is not known here"),
        ("app", "aggregated MR not allowed", None, "What the webhook compares is not known here"),
    ],
)
def test_reason_of_a_contract_is_known_with_the_transaction_that_admits_it(
    caller: str, reason: str, rule: str | None, step: str, tmp_path: Path, asking: tuple[Chain, str]
) -> None:
    request, (chain, url) = write(tmp_path / "b.json", BOOT), asking
    chain.decision = False, reason
    found = why(request, "--webhook", url, "--as", caller, status=1)
    assert (found["decision"]["rule"], found["decision"]["reason"]) == (rule, reason)
    names = {"os": "osImageHash", "app": "appId", "compose": "composeHash", "device": "deviceId"}
    assert step.format(**{name: BOOT[member] for name, member in names.items()}) in found["next_steps"][0]
    change = found["contract_change"]
    assert (change is None) == (rule in (None, "app_deployed") or (caller, rule) == ("kms", "tcb_status"))
    if change:
        assert change["call"].partition("(")[0] in found["next_steps"][0]
        assert change["diff"].splitlines()[0] == f"@@ {change['list']} of {change['contract']} @@"
        assert change["diff"].splitlines()[-1] == f"+{change['value']}"
    if rule in ("app_device", None):
        shown = run_inside("why", request, "--webhook", url, "--as", caller)[1].splitlines()
        assert f'Rule      {f"{rule}: " if rule else ""}"{reason}"' in shown
        assert (f"  +0x{BOOT['deviceId']}" in shown) == (rule is not None)


def test_chain_without_a_decision_is_told_from_a_denial(tmp_path: Path, asking: tuple[Chain, str]) -> None:
    request, (chain, url) = write(tmp_path / "b.json", BOOT), asking
    chain.chain_id = 1
    found = why(request, "--webhook", url, status=1)
    chain.chain_id = 1337
    assert found["decision"]["rule"] is None
    assert found["next_steps"][0].startswith("This is auth-eth: its chain gave no decision.")


@pytest.fixture(scope="module")
def asking() -> Iterator[tuple[Chain, str]]:
    """A chain, and the webhook that asks it."""
    with running_chain() as chain:
        options = ("--eth-rpc-url", chain.url, "--kms-contract", CONTRACT, "--eth-chain-id", "1337")
        with serving("auth", "eth", "--listen", "127.0.0.1:0", *options) as webhook:
            yield chain, webhook["url"]


def test_webhook_is_asked_as_a_kms_asks_and_its_answer_is_shown(tmp_path: Path) -> None:
    policy, request = tmp_path / "p.json", write(tmp_path / "b.json", BOOT)
    write(policy, {})
    with serving("auth", "simple", "--listen", "127.0.0.1:0", "--config", str(policy)) as webhook:
        question = (request, "--webhook", webhook["url"])
        found = why(*question, "--as", "kms", status=1)
        assert found["decider"] == {"kind": "webhook", "where": webhook["url"], "contract": None}
        assert (found["decision"]["reason"], found["change"]) == ("OS image is not allowed", None)
        code, out, _ = run_inside("why", *question, "--as", "kms")
        assert code == 1
        assert f"Request   POST {webhook['url']}/bootAuth/kms" in out
        assert f"  osImageHash       {IMAGE}" in out
        assert "  reason            OS image is not allowed" in out
        write(policy, ADMITTING)
        assert why(*question, status=0)["decision"]["is_allowed"]
