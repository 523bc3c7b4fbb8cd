"""Evidence over the control API: the same as the commands say, with the stack's root and PCCS, and nothing is kept."""

import base64
import hashlib
import json
import ssl
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote as quoted

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from dstack_emu.attest.certificate import OID_ATTESTATION
from dstack_emu.control.server import MAX_BODY
from dstack_emu.inspection.identify import MAX_INPUT_SIZE
from tests.commands import ask, run_inside
from tests.evidence_samples import certificates, signing_request, with_extensions, world
from tests.hardware import INTEL_QUOTE, LITE_GET_QUOTE
from tests.recorded import external_path
from tests.running import RunningStack

COMPOSE: Final = '{"manifest_version": 2, "name": "mine", "runner": "docker-compose", "docker_compose_file": "a: b"}\n'
KEY: Final = "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n"


def post(stack: RunningStack, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    return ask(stack.services["control"], path, body)


def answered(stack: RunningStack, path: str, **body: Any) -> dict[str, Any]:
    status, answer = post(stack, path, body)
    assert status == 200, answer
    return answer  # type: ignore[no-any-return]


def given(content: bytes) -> dict[str, str]:
    return {"data": base64.b64encode(content).decode()}


def get(stack: RunningStack, path: str) -> tuple[int, Any]:
    return ask(stack.services["control"], path)


def evidence_of(stack: RunningStack, guest: str) -> str:
    status, answer = get(stack, f"/guests/{guest}/evidence")
    assert status == 200, answer
    return json.dumps(answer)


def options(stack: RunningStack) -> tuple[str, ...]:
    return ("--root", str(Path(stack.description["state"], "root-ca.pem")), "--pccs", stack.services["pccs"], "--json")


# ---- as the commands


def inputs() -> dict[str, bytes]:
    w = world()
    return {
        "quote": w.evidence.quote,
        "hex": w.evidence.quote.hex().encode(),
        "base64": base64.b64encode(w.evidence.encode()),
        "attestation": w.evidence.encode(),
        "request": signing_request().encoded,
        "certificates": b"".join(certificates()),
        "PEM": w.intel.root_pem.encode(),
        "app-compose": COMPOSE.encode(),
    }


@pytest.mark.parametrize("kind", list(inputs()))
def test_content_is_what_the_command_inspect_shows(ready_stack: RunningStack, tmp_path: Path, kind: str) -> None:
    content = inputs()[kind]
    file = tmp_path / "file"
    file.write_bytes(content)
    _, shown, _ = run_inside("inspect", str(file), "--json")
    assert answered(ready_stack, "/inspect", **given(content)) == json.loads(shown)
    if content.isascii():
        assert answered(ready_stack, "/inspect", text=content.decode()) == json.loads(shown)


def test_checks_are_those_of_the_command_verify(ready_stack: RunningStack, tmp_path: Path) -> None:
    file = tmp_path / "file"
    broken = bytearray(base64.b16decode(json.loads(evidence_of(ready_stack, "app"))["attestation"], casefold=True))
    broken[700] ^= 1
    for content, holds in ((evidence_of(ready_stack, "app").encode(), True), (bytes(broken).hex().encode(), False)):
        file.write_bytes(content)
        answer = answered(ready_stack, "/verify", **given(content))
        status, shown, _ = run_inside("verify", str(file), "--time", str(answer["time"]), *options(ready_stack))
        root = f"the root in {options(ready_stack)[1]}"
        said = json.loads(json.dumps(answer["checks"]).replace(answer["root"], root))
        assert (answer["ok"], status, said) == (holds, 0 if holds else 1, json.loads(shown)["checks"])
        assert answer["collateral"] == ready_stack.services["pccs"]
        assert answer["other_root"] is None


@pytest.mark.parametrize(("guest", "caller"), [("app", "app"), ("kms-dst", "kms"), ("app", "kms")])
def test_decisions_are_those_of_the_command_why(
    ready_stack: RunningStack, tmp_path: Path, guest: str, caller: str
) -> None:
    file = tmp_path / "file"
    file.write_text(evidence_of(ready_stack, guest))
    found = answered(ready_stack, "/admit", text=file.read_text(), caller=caller)
    assert list(found["kms"]) == ["src", "dst"]
    for name, decided in found["kms"].items():
        when = str(decided["evidence"]["verification"]["time"])
        _, shown, _ = run_inside(
            "why", str(file), "--policy", str(ready_stack.policies[name]), "--as", caller, "--time", when,
            *options(ready_stack),
        )  # fmt: skip
        expected = json.loads(shown)
        for key in ("verdict", "sentence", "decision", "boot_info", "next_steps", "release", "no_change_because"):
            assert decided[key] == expected[key], key
        for key, value in expected["change"].items() if expected["change"] else ():
            assert decided["change"][key] == value
        assert [refusal["rule"] for refusal in decided["refusals"]] == [r["rule"] for r in expected["refusals"]]


def test_app_that_a_policy_denies_is_admitted_by_the_change_that_is_shown(ready_stack: RunningStack) -> None:
    text = evidence_of(ready_stack, "app")
    with ready_stack.policy_changed("src", lambda policy: policy.update(apps={})):
        found = answered(ready_stack, "/admit", text=text)["kms"]
        assert (found["src"]["verdict"], found["dst"]["verdict"]) == ("denied", "allowed")
        (refusal, *_) = found["src"]["refusals"]
        line = ready_stack.policies["src"].read_text().splitlines()[refusal["line"] - 1]
        assert (refusal["rule"], refusal["line_text"] in line) == ("app_registered", True)
        change = found["src"]["change"]
        assert change["before"] == json.loads(ready_stack.policies["src"].read_text())
        ready_stack.policies["src"].write_text(json.dumps(change["after"]))
        assert answered(ready_stack, "/admit", text=text)["kms"]["src"]["verdict"] == "allowed"


def test_status_of_the_platform_counts_as_the_pccs_tells_it(ready_stack: RunningStack) -> None:
    control = ready_stack.services["control"] + "/platforms/host%20of%20app"
    body = ("-X", "PATCH", "-H", "Content-Type: application/json", "-d")
    assert ready_stack.curl(control, *body, '{"tcb_status": "OutOfDate"}')[0] == 200
    text = evidence_of(ready_stack, "app")
    try:
        assert answered(ready_stack, "/verify", text=text)["ok"]
        strict = answered(ready_stack, "/verify", text=text, strict=True)
        assert [check["name"] for check in strict["checks"] if check["ok"] is False] == ["tcb_status"]
        decided = answered(ready_stack, "/admit", text=text)["kms"]["src"]
        assert (decided["verdict"], decided["decision"]["rule"]) == ("denied", "tcb_status")
    finally:
        ready_stack.reset()
    wrong = answered(ready_stack, "/verify", text=text, report_data="0x01")
    assert [check["name"] for check in wrong["checks"] if check["ok"] is False] == ["report_data_expected"]


# ---- what is not the stack's


def test_evidence_of_another_root_is_not_trusted_and_it_is_said_why(ready_stack: RunningStack) -> None:
    w = world()
    answer = answered(ready_stack, "/verify", **given(w.evidence.encode()))
    assert (answer["ok"], "leads to another root, " in answer["other_root"]) == (False, True)
    assert w.intel.root.subject.rfc4514_string() in answer["other_root"]
    decided = answered(ready_stack, "/admit", **given(w.evidence.encode()))["kms"]["src"]
    assert (decided["verdict"], decided["decision"]) == ("refused", None)


def test_evidence_of_hardware_is_not_trusted_and_it_is_said_where_it_can_be_verified(ready_stack: RunningStack) -> None:
    answer = answered(ready_stack, "/verify", **given(external_path(INTEL_QUOTE).read_bytes()))
    assert (answer["ok"], "`dstack-emu verify --intel" in answer["other_root"]) == (False, True)
    content = external_path(LITE_GET_QUOTE).read_bytes()
    for decided in answered(ready_stack, "/admit", **given(content))["kms"].values():
        assert (decided["verdict"], "no collateral: " in decided["sentence"]) == ("refused", True)


def test_pccs_that_fails_is_named_and_nothing_is_taken_for_valid(ready_stack: RunningStack) -> None:
    assert post(ready_stack, "/faults", {"service": "pccs", "kind": "status", "status": 503})[0] == 200
    text = evidence_of(ready_stack, "app")
    try:
        answer = answered(ready_stack, "/verify", text=text)
        (check, *_) = answer["checks"]
        assert (answer["ok"], check["name"], check["ok"], "HTTP 503" in check["got"]) == (
            False, "collateral", False, True,
        )  # fmt: skip
        assert answered(ready_stack, "/admit", text=text)["kms"]["src"]["verdict"] == "refused"
    finally:
        ready_stack.reset()


# ---- claims


def test_app_compose_is_decided_about_by_the_hash_of_its_bytes(ready_stack: RunningStack) -> None:
    digest = hashlib.sha256(COMPOSE.encode()).hexdigest()
    app_id = ready_stack.description["app"]["app_id"]
    denied = answered(ready_stack, "/admit", text=COMPOSE)["kms"]["src"]
    assert (denied["decision"]["rule"], denied["boot_info"]["composeHash"]) == ("app_registered", digest)
    assert denied["boot_info"]["appId"] == digest[:40]
    other = answered(ready_stack, "/admit", text=COMPOSE, app_id=f"0x{app_id}")["kms"]["src"]
    assert (other["decision"]["rule"], other["boot_info"]["appId"]) == ("app_compose_hash", app_id)
    allow = {"app_id": app_id, "compose_hash": digest}
    assert post(ready_stack, "/policies/src/allow", allow)[0] == 200
    try:
        allowed = answered(ready_stack, "/admit", text=COMPOSE, app_id=app_id)["kms"]
        assert [each["verdict"] for each in allowed.values()] == ["allowed", "denied"]
        assert allowed["src"]["evidence"]["verifies"] is None  # a claim
    finally:
        ready_stack.reset()


def test_boot_info_is_a_claim_that_is_decided_about(ready_stack: RunningStack) -> None:
    boot_info = answered(ready_stack, "/admit", text=evidence_of(ready_stack, "app"))["kms"]["src"]["boot_info"]
    shown = answered(ready_stack, "/inspect", text=json.dumps(boot_info))
    assert (shown["what"], shown["boot_info"]) == ("boot info", boot_info)
    decided = answered(ready_stack, "/admit", text=json.dumps(boot_info))["kms"]["src"]
    assert (decided["verdict"], decided["evidence"]["verifies"]) == ("allowed", None)
    wrong = json.dumps(boot_info | {"appId": "no hex"})
    status, answer = post(ready_stack, "/admit", {"text": wrong})
    assert (status, answer["error"]) == (400, "boot info: appId: hex expected, got 'no hex'")


# ---- refusals


@pytest.mark.parametrize(
    ("path", "body", "status", "problem"),
    [
        ("/inspect", {}, 400, "one of text and data expected"),
        ("/inspect", {"text": "", "data": ""}, 400, "one of text and data expected"),
        ("/inspect", {"data": "?"}, 400, "data: base64 expected"),
        ("/admit", {"data": "\u00dd"}, 400, "data: base64 expected"),
        ("/inspect", {"text": "\ud800"}, 400, "unknown input"),
        ("/inspect", {"text": "1", "strict": True}, 400, "strict: unknown key"),
        ("/inspect", {"text": KEY}, 400, "PEM of certificates or a CRL expected, got PRIVATE KEY"),
        ("/verify", {"text": COMPOSE}, 400, "app-compose: no evidence in it"),
        ("/verify", {"text": "00"}, 400, "unknown input"),
        ("/verify", {"text": "00", "report_data": "xx"}, 400, "report_data: "),
        ("/admit", {"text": "[]"}, 400, "unknown input"),
        ("/admit", {"text": "00", "caller": "me"}, 400, "caller: Input should be 'app' or 'kms'"),
        ("/admit", {"text": "00", "app_id": "00" * 20}, 400, "app_id is that of an app-compose"),
    ],
)
def test_wrong_question_is_refused_with_the_reason(
    ready_stack: RunningStack, path: str, body: dict[str, Any], status: int, problem: str
) -> None:
    seen, answer = post(ready_stack, path, body)
    assert (seen, problem in answer["error"]) == (status, True), answer


def test_problem_is_that_of_the_command(ready_stack: RunningStack, tmp_path: Path) -> None:
    file = tmp_path / "file"
    cut = world().evidence.quote[:100]
    for content in (cut, b"hello", b'{"quote": 1}', world().intel.root_pem[:90].encode()):
        file.write_bytes(content)
        _, _, error = run_inside("inspect", str(file))
        status, answer = post(ready_stack, "/inspect", given(content))
        assert (status, f"Error: {file}: {answer['error']}\n") == (400, error)


def test_too_much_is_refused_as_such(ready_stack: RunningStack, tmp_path: Path) -> None:
    status, answer = post(ready_stack, "/inspect", {"text": "0" * (MAX_INPUT_SIZE + 1)})
    expected = f"input of at most {MAX_INPUT_SIZE} bytes expected, got {MAX_INPUT_SIZE + 1}"
    assert (status, answer["error"]) == (413, expected)
    body = tmp_path / "body"
    with body.open("wb") as file:
        file.truncate(MAX_BODY + 1)
    json_type = ("-H", "Content-Type: application/json", "--data-binary", f"@{body}")
    status, text = ready_stack.curl(f"{ready_stack.services['control']}/inspect", *json_type)
    assert (status, json.loads(text)["error"]) == (413, f"the body: at most {MAX_BODY} bytes expected, got more")


def test_quote_without_a_log_is_verified_but_nobody_can_decide(ready_stack: RunningStack) -> None:
    for decided in answered(ready_stack, "/admit", **given(world().evidence.quote))["kms"].values():
        assert (decided["verdict"], "a quote without its event log" in decided["problem"]) == (None, True)


# ---- what the stack has, and what it keeps


def test_certificates_are_those_that_the_kms_serves_and_no_key(ready_stack: RunningStack) -> None:
    url = ready_stack.services["kms-src"]
    host, port = url.rpartition("/")[2].split(":")
    served = ssl.get_server_certificate((host, int(port)))
    _, answer = get(ready_stack, "/kms/src/certificates/rpc.crt")
    assert answer["pem"].startswith(served)
    assert answered(ready_stack, "/verify", text=answer["pem"])["ok"]
    for name in ("root-ca.key", "..%2fcerts%2frpc.key", "rpc.key"):
        status, refused = get(ready_stack, f"/kms/src/certificates/{name}")
        assert (status, "there is no certificate" in refused["error"]) == (404, True)
    root = x509.load_pem_x509_certificate(get(ready_stack, "/certificates/root-ca.pem")[1]["pem"].encode())
    assert root == x509.load_pem_x509_certificate(Path(ready_stack.description["state"], "root-ca.pem").read_bytes())
    assert get(ready_stack, f"/guests/{quoted('nobody')}/evidence")[0] == 404


def test_nothing_that_is_given_is_kept_or_changes_anything(ready_stack: RunningStack) -> None:
    state = get(ready_stack, "/state")[1]
    marked = {"manifest_version": 2, "name": "kept-nowhere", "runner": "docker-compose"}
    hidden = with_extensions({OID_ATTESTATION: b"kept-nowhere"}).public_bytes(Encoding.PEM).decode() + KEY
    for path in ("/inspect", "/admit"):
        answered(ready_stack, path, text=json.dumps(marked))
    shown = answered(ready_stack, "/inspect", text=hidden)
    assert shown["not_shown"] == ["PRIVATE KEY"]
    assert "c2VjcmV0" not in json.dumps(shown)
    assert get(ready_stack, "/state")[1] | {"journal": 0} == state | {"journal": 0}  # the number of calls
    kept = [each for each in Path(ready_stack.description["state"]).rglob("*") if each.is_file()]
    assert not [each for each in kept if b"kept-nowhere" in each.read_bytes()]
    records = get(ready_stack, "/journal")[1]["records"]
    assert "kept-nowhere" not in json.dumps(records)
    answered(ready_stack, "/verify", text=evidence_of(ready_stack, "app"))
    (verified,) = get(ready_stack, "/journal?call=Verify&limit=1")[1]["records"]
    inner = {(each["caller"], each["service"]) for each in verified["inner"]}
    assert (verified["service"], verified["caller"], inner) == ("control", "outside", {("control", "pccs")})
    assert "kept-nowhere" not in ready_stack.said()
