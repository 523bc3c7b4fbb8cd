"""check-webhook's decisions: webhooks that fail open are named, and dstack's own rules pass under each contract."""

import hashlib
import json
import os
import subprocess
import xml.dom.minidom
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.testing import LiveStack
from dstack_emu.webhook_check.allowed import CONTRACTS, SIDES, Contract, Side, from_document
from dstack_emu.webhook_check.changes import Change, changes_of
from dstack_emu.webhook_check.expected import expected
from dstack_emu.webhook_check.safety import list_requests
from dstack_emu.webhook_check.sample_requests import SampleError, SampleRequests
from tests.commands import run_command, serving, usage_error
from tests.json_rpc_server import CONTRACT, Fault, abi_decision, running_chain
from tests.processes import forked_by_anyone
from tests.recorded import golden

SAMPLES = SampleRequests.of_seed("dstack-emu")

WEBHOOK = """
import http.server, json, os, sys, time

policy = json.load(open(sys.argv[1]))
kms, apps, images = policy["kms"], policy["apps"], policy["osImages"]


def known(path, q):
    if path.endswith("/kms"):
        return q["osImageHash"] in images and q["mrAggregated"] in kms["mrAggregated"]
    app = apps.get(q["appId"])
    return q["osImageHash"] in images and app is not None and q["composeHash"] in app["composeHashes"]


def decide(path, q):
{rule}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, dict(status="ok", kmsContractAddr="", gatewayAppId="", chainId=0, appImplementation=""))

    def do_POST(self):
        try:
            allowed = decide(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        except Exception as error:
            return self.answer(500, repr(error))
        self.answer(200, dict(isAllowed=bool(allowed), reason="" if allowed else "not allowed", gatewayAppId=""))

    def answer(self, status, document):
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


class Server(http.server.HTTPServer):  # a thread for each connection would cost more than the request
    request_queue_size = 64


server = Server(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""

RIGHT = 'return known(path, q) and q["tcbStatus"] == "UpToDate" and not q["advisoryIds"]'
IF_PRESENT = 'return known(path, q) and q.get("tcbStatus", "UpToDate") == "UpToDate" and not q.get("advisoryIds")'
OUT_OF_DATE_ALONE = 'return known(path, q) and q["tcbStatus"] != "OutOfDate" and not q["advisoryIds"]'
IMAGE_ALONE = 'return q["osImageHash"] in images and q["tcbStatus"] == "UpToDate" and not q["advisoryIds"]'
NO_TCB = 'return known(path, q) and not q["advisoryIds"]'
ENDS = 'isinstance(q["instanceId"], str) or os._exit(1)\n' + RIGHT


def policy(*, on_devices: Collection[Side] = ()) -> dict[str, Any]:
    """Allow the sample KMS and the sample app, those named on their devices alone."""
    kms, app = SAMPLES.kms, SAMPLES.app

    def devices(side: Side, boot_info: Any) -> dict[str, Any]:
        is_listed = side in on_devices
        return {"devices": [boot_info.device_id.hex()] if is_listed else [], "allowAnyDevice": not is_listed}

    return {
        "osImages": [kms.os_image_hash.hex()],
        "gatewayAppId": "any",
        "kms": {"mrAggregated": [kms.mr_aggregated.hex()], **devices("kms", kms)},
        "apps": {app.app_id.hex(): {"composeHashes": [app.compose_hash.hex()], **devices("app", app)}},
    }


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy()))
    return path


@contextmanager
def webhook(rule: str, policy_file: Path) -> Iterator[str]:
    """Run a webhook of a few lines in a process of its own, and yield its URL."""
    text = WEBHOOK.replace("{rule}", "\n".join(f"    {line}" for line in rule.splitlines()))
    command = forked_by_anyone(text, str(policy_file), module="tests.program")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()


def checked(rule: str, policy_file: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Check such a webhook by the command, and return its exit status and what it reports."""
    with webhook(rule, policy_file) as url:
        done = run_command("check-webhook", url, "--allowed", str(policy_file), "--json", *options)
    assert done.stderr == b""
    return done.returncode, json.loads(done.stdout)


def names(report: dict[str, Any], level: str) -> list[str]:
    return [each["name"] for each in report["requests"] if each["level"] == level]


# ---- webhooks that fail open


def test_webhook_that_checks_everything_passes(policy_file: Path) -> None:
    status, report = checked(RIGHT, policy_file)
    assert (status, report["ok"], report["summary"]) == (0, True, [])
    assert {each["outcome"] for each in report["requests"]} == {"allowed", "denied", "error"}
    assert all(each["seconds"] > 0 for each in report["requests"])


def test_webhook_that_denies_only_where_the_tcb_status_is_present_fails(tmp_path: Path, policy_file: Path) -> None:
    junit = tmp_path / "result.xml"
    status, report = checked(IF_PRESENT, policy_file, "--junit", str(junit))
    missing = ["absent", "named tcb_status", "named TCBSTATUS"]
    assert status == 1
    assert names(report, "unsafe") == [f"{side} tcbStatus {how}" for side in ("kms", "app") for how in missing]
    assert report["summary"] == [
        f"{side}: tcbStatus: still allowed: absent, named tcb_status, named TCBSTATUS" for side in ("kms", "app")
    ]
    (suite,) = xml.dom.minidom.parse(os.fspath(junit)).getElementsByTagName("testsuite")
    cases = suite.getElementsByTagName("testcase")
    assert len(cases) == int(suite.getAttribute("tests")) == len(report["checks"]) + len(report["requests"])
    failed = [case.getAttribute("name") for case in cases if case.getElementsByTagName("failure")]
    assert failed == names(report, "unsafe")
    assert all(float(case.getAttribute("time")) >= 0 for case in cases)


def test_webhook_that_denies_out_of_date_alone_fails(policy_file: Path) -> None:
    status, report = checked(OUT_OF_DATE_ALONE, policy_file)
    unsafe = names(report, "unsafe")
    assert status == 1
    for side in ("kms", "app"):
        assert f"{side} tcbStatus OutOfDate" not in unsafe
        assert {f"{side} tcbStatus {other}" for other in OTHER_STATUSES} <= set(unsafe)
    assert {name.split()[1] for name in unsafe} == {"tcbStatus"}


OTHER_STATUSES = (
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDateConfigurationNeeded",
    "Revoked",
)


def test_webhook_that_looks_at_the_os_image_alone_fails(policy_file: Path) -> None:
    status, report = checked(IMAGE_ALONE, policy_file)
    assert status == 1
    assert report["summary"] == [
        "kms: mrAggregated is not looked at: allowed with any value",
        "kms: path: still allowed: of the other kind",
        "app: appId is not looked at: allowed with any value",
        "app: composeHash is not looked at: allowed with any value",
        "app: path: still allowed: of the other kind",
    ]
    assert {"kms mrAggregated absent", "app appId null", "app composeHash as a number"} <= set(names(report, "unsafe"))


def test_auth_mock_fails_because_it_allows_everyone() -> None:
    with serving("auth", "mock", "--listen", "127.0.0.1:0") as mock:
        done = run_command("check-webhook", mock["url"])
    assert done.returncode == 1
    shown = done.stdout.decode()
    assert "\nkms: mrAggregated is not looked at: allowed with any value\n" in shown
    assert "unsafe      allowed " in shown
    assert "still allowed: dstack's servers deny it (mock KMS always allowed)" in shown
    assert "requests failed: --expect FILE changes what is expected.\n" in shown


# ---- webhooks that prove nothing


def test_webhook_that_allows_nobody_proves_nothing(policy_file: Path) -> None:
    status, report = checked("return False", policy_file)
    assert (status, [each["name"] for each in report["requests"]]) == (1, ["kms unchanged", "app unchanged"])
    for each in report["requests"]:
        assert (each["level"], each["outcome"]) == ("unproven", "denied")
        assert "give one that it allows by --allowed FILE, or let it allow this one: mrAggregated " in each["said"]
    rule = json.loads(policy_file.read_text())
    kms, app = (each["said"] for each in report["requests"])
    assert f"mrAggregated {rule['kms']['mrAggregated'][0].removeprefix('0x')}, osImageHash " in kms
    for app_id, entry in rule["apps"].items():
        assert app.endswith(f"appId {app_id}, composeHash {entry['composeHashes'][0]}".replace("0x", ""))


def test_webhook_that_ends_at_a_malformed_request_does_not_pass(policy_file: Path) -> None:
    status, report = checked(ENDS, policy_file)
    (unproven,) = [each for each in report["requests"] if each["name"] == "kms unchanged, after instanceId null"]
    assert (status, unproven["level"], unproven["outcome"]) == (1, "unproven", "error")
    assert "after a request without an answer the allowed one fails, too: " in unproven["said"]
    assert "app unchanged" in names(report, "unproven")


def test_policy_that_admits_nobody_names_the_member(tmp_path: Path, policy_file: Path) -> None:
    allowed = policy() | {"apps": {}, "kms": {"mrAggregated": [SAMPLES.kms.mr_aggregated.hex()]}}
    policy_file.write_text(json.dumps(allowed))
    status, report = checked(RIGHT, policy_file)
    said = {each["name"]: each["said"].partition(": give")[0] for each in report["requests"]}
    assert (status, said) == (
        1,
        {
            "kms unchanged": "kms.devices is empty, and allowAnyDevice is not true: it admits no device",
            "app unchanged": "no entry of apps has composeHashes: it admits no app",
        },
    )


def test_error_for_what_a_kms_can_send_breaks_it_and_slow_requests_are_named(policy_file: Path) -> None:
    slow = 'if q["appId"] == "": time.sleep(1.1)\n'
    status, report = checked(slow + 'if q["tcbStatus"] == "OutOfDate": raise ValueError\n' + RIGHT, policy_file)
    assert (status, names(report, "broken")) == (1, ["kms tcbStatus OutOfDate", "app tcbStatus OutOfDate"])
    assert {"kms appId empty", "app appId empty"} <= set(report["slow"])


# ---- dstack's own rules


def test_every_contract_is_compared() -> None:
    assert {contract for contract, _ in COMPARED} == set(CONTRACTS) - {"eth"}


COMPARED: tuple[tuple[Contract, Side], ...] = (
    *(("file", "kms"), ("file", "app")),
    *(("readme", "kms"), ("upstream", "app"), ("next", "kms"), ("0.6", "app")),
)
"""Each contract with the side whose device is listed; the other side is allowed on any. auth-simple has one rule."""


@pytest.mark.parametrize(("contract", "on_device"), COMPARED)
def test_emulated_server_answers_as_the_table_says(contract: Contract, on_device: Side, tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(policy(on_devices=[on_device])))
    is_file, shared = contract == "file", ["--listen", "127.0.0.1:0"]
    variables = {"AUTH_CONFIG_PATH": str(file), "AUTH_SIMPLE_COMPAT": "" if is_file else contract}
    server = ["auth", "file", "--config", str(file)] if is_file else ["auth", "simple"]
    with serving(*server, *shared, environment=variables, log=tmp_path / "log") as served:
        options = ("--allowed", str(file), "--contract", contract, "--json")
        done = run_command("check-webhook", served["url"], *options)
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"]) == (0, True)
    others = {each["name"] for each in report["requests"] if each["expected"] != each["outcome"]}
    # A repeated member that dstack-auth does not read is refused: docs/fidelity.md.
    assert all(contract == "file" and ", the " in name and name.split()[2] == "twice," for name in others), others


def test_emulated_webhook_of_a_contract_answers_as_the_table_says(tmp_path: Path) -> None:
    file, listed = tmp_path / "policy.json", policy(on_devices=SIDES)
    file.write_text(json.dumps(listed))
    with running_chain() as chain:
        chain.fault = contract_of(listed)
        options = ("--listen", "127.0.0.1:0", "--eth-rpc-url", chain.url, "--kms-contract", CONTRACT)
        with serving("auth", "eth", *options, log=tmp_path / "log") as served:
            done = run_command("check-webhook", served["url"], "--allowed", str(file), "--contract", "eth", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"]) == (0, True)
    others = {each["name"] for each in report["requests"] if each["expected"] not in ("any", each["outcome"])}
    assert others == set()
    open_ones = [each for each in report["requests"] if each["expected"] == "any"]
    assert all(each["name"].startswith("app tcbStatus ") for each in open_ones)
    assert {each["outcome"] for each in open_ones} == {"denied"}  # this app's contract requires the status


def contract_of(listed: dict[str, Any]) -> Fault:
    """The rules of DstackKms and DstackApp over a policy, of the words that a call has."""

    def decide(name: str, request: dict[str, Any]) -> Any:
        if name not in ("isAppAllowed", "isKmsAllowed"):
            return None
        data = bytes.fromhex(request["params"][0]["data"][2:])[4 + 32 :]
        words = [data[at : at + 32].hex() for at in range(0, 9 * 32, 32)]
        size = int.from_bytes(data[int(words[7], 16) :][:32])
        status = data[int(words[7], 16) + 32 :][:size]
        reason = _reason(name, words, status == b"UpToDate")
        return abi_decision(not reason, reason)

    def _reason(name: str, words: list[str], is_up_to_date: bool) -> str:
        app_id, compose, device, aggregated, image = words[0][24:], words[1], words[3], words[4], words[6]
        if name == "isKmsAllowed":
            checks = [
                (is_up_to_date, "TCB status is not up to date"),
                (image in listed["osImages"], "OS image is not allowed"),
                (aggregated in listed["kms"]["mrAggregated"], "Aggregated MR not allowed"),
                (device in listed["kms"]["devices"], "KMS is not allowed to boot on this device"),
            ]
        else:
            app = listed["apps"].get(app_id, {"composeHashes": (), "devices": (), "allowAnyDevice": False})
            checks = [
                (app_id in listed["apps"], "App not registered"),
                (image in listed["osImages"], "OS image is not allowed"),
                (is_up_to_date, "TCB status is not up to date"),
                (compose in app["composeHashes"], "Compose hash not allowed"),
                (app["allowAnyDevice"] or device in app["devices"], "Device not allowed"),
            ]
        return next((reason for is_met, reason in checks if not is_met), "")

    return decide


def test_policy_of_a_running_stack_is_found(dstack_stack: LiveStack) -> None:
    url, control = dstack_stack.services["auth-src"], dstack_stack.services["control"]
    done = run_command("check-webhook", url, "--json", environment={"DSTACK_EMU_CONTROL": control})
    report = json.loads(done.stdout)
    assert (done.returncode, report["allowed"]) == (
        0,
        f"the policy of the source KMS at {control}, contract {report['contract']}",
    )
    state = dstack_stack.description["state"]
    by_control, by_folder = (
        run_command("check-webhook", "--list", environment=found).stdout
        for found in ({"DSTACK_EMU_CONTROL": control}, {"DSTACK_EMU_STATE": state})
    )
    assert by_control == by_folder != run_command("check-webhook", "--list", "--seed", "another").stdout
    dstack_stack.policy("src").deny("app")
    done = run_command("check-webhook", url, "--control", control, "--json")
    assert done.returncode == 1
    unproven = [each for each in json.loads(done.stdout)["requests"] if each["level"] == "unproven"]
    assert [each["said"].partition(":")[0] for each in unproven] == ["no entry of apps has composeHashes"]


def test_folder_without_a_stack_is_wrong_use_and_not_the_stack_of_a_seed(tmp_path: Path) -> None:
    said = usage_error("check-webhook", "--list", environment={"DSTACK_EMU_STATE": str(tmp_path)})
    assert said.startswith(f"no stack is ready in {tmp_path}: ")
    assert said.endswith("; --allowed, --control or --seed name what is allowed otherwise")


def test_webhook_of_a_stack_that_looks_at_no_tcb_fails_for_its_kms_and_its_app(
    tmp_path: Path, policy_file: Path
) -> None:
    compose = tmp_path / "app-compose.json"
    compose.write_text('{"manifest_version": 2, "name": "wallet", "runner": "bash", "bash_script": "true"}')
    digest = hashlib.sha256(compose.read_bytes()).hexdigest()
    app = {"composeHashes": [digest], "devices": [], "allowAnyDevice": True}
    listed = policy() | {"apps": {digest[:40]: app}}
    policy_file.write_text(json.dumps(listed))
    no_tcb = [f"{side}: tcbStatus is not looked at: allowed with any value" for side in ("kms", "app")]
    with (
        webhook(NO_TCB, policy_file) as url,
        LiveStack(webhooks={"src": url}, app_compose=compose, fresh=True) as stack,
    ):
        assert stack.check_webhook_safety(url, expect={"* tcbStatus *": "any"}).ok
        stack.policy("dst").allow("kms-src", "app")
        assert stack.check_webhook_safety(stack.services["auth-dst"]).ok
        of_app = stack.check_webhook_safety(url, allowed=listed | {"kms": {}})
        assert of_app.failures[0].said.startswith("kms.mrAggregated is empty: it admits no KMS")
        assert list(of_app.summary()) == no_tcb[1:]
        with pytest.raises(SampleError, match="did you mean 'app tcbStatus OutOfDate'"):
            stack.check_webhook_safety(url, expect={"app tcbStatus OutOfDat": "denied"})

        done = run_command("check-webhook", url, "--control", stack.services["control"], "--json")
        report = json.loads(done.stdout)
        source = f"the source KMS and the app of the stack at {stack.services['control']}"
        assert (done.returncode, report["allowed"], report["summary"]) == (1, source, no_tcb)
        assert {"kms tcbStatus null", "app tcbStatus in a list"} <= set(names(report, "unsafe"))


def test_table_has_the_recorded_answers_of_dstack_auth() -> None:
    recorded = {row["name"]: row for row in golden("wire.json") if row["component"] == "verifier-or-auth"}
    app = json.loads(recorded["app_allowed"]["request"]["body"])
    allowed = from_document({"osImages": ["00"], "apps": {}}, SAMPLES, "file", "").app.facts
    changes = {each.name: each for each in changes_of(app, {})}

    def outcome(name: str) -> str:
        answer = recorded[name]["response"]
        if answer["status"] != 200:
            return "error"
        return "allowed" if json.loads(answer["body"])["isAllowed"] else "denied"

    def table(change: Change) -> str:
        return expected(change, "app", "file", allowed)

    pairs = {
        "app_unregistered": "appId last byte changed",
        "app_os_denied": "osImageHash last byte changed",
        "app_compose_denied": "composeHash last byte changed",
        "app_norm_and_tcb": "tcbStatus OutOfDate",
        "empty_obj": "body an object without members",
        "badjson": "body cut off",
        "wrongtype": "appId as a number",
    }
    assert {name: outcome(name) for name in pairs} == {name: table(changes[how]) for name, how in pairs.items()}


# ---- policies and expectations


def test_allowed_statuses_and_advisories_of_a_policy_are_expected(policy_file: Path) -> None:
    chosen = {"allowedTcbStatuses": ["SWHardeningNeeded"], "allowedAdvisoryIds": ["INTEL-SA-00837"]}
    allowed = from_document(policy() | chosen, SAMPLES, "0.6", "")
    assert allowed.kms.boot_info.tcb_status == "SWHardeningNeeded"
    answers = list_requests(allowed, "0.6")
    assert answers["app tcbStatus UpToDate"] == answers["app advisoryIds one that is unknown"] == "denied"
    assert answers["app advisoryIds one more"] == "allowed"
    assert list_requests(allowed, "readme")["app advisoryIds one that is unknown"] == "allowed"


def test_contract_is_expected_to_list_the_device_of_a_kms_and_not_to_need_that_of_an_app() -> None:
    named = policy()
    allowed = from_document(named, SAMPLES, "eth", "")
    assert allowed.kms.missing.startswith("kms.devices is empty, and a contract cannot admit a KMS on any device")
    named["kms"]["devices"] = [SAMPLES.kms.device_id.hex()]
    answers = list_requests(from_document(named, SAMPLES, "eth", ""), "eth")
    assert answers["kms deviceId last byte changed"] == answers["kms tcbStatus OutOfDate"] == "denied"
    assert answers["app deviceId last byte changed"] == answers["app advisoryIds one more"] == "allowed"
    assert answers["app tcbStatus OutOfDate"] == "any"
    assert answers["app composeHash padded with a zero byte"] == "error"
    assert list_requests(from_document({}, SAMPLES, "eth", ""), "eth")["app deviceId last byte changed"] == "any"


def test_device_is_expected_as_the_policy_says() -> None:
    name = "app deviceId last byte changed"

    def answer(document: Any, contract: Contract) -> str:
        return list_requests(from_document(document, SAMPLES, contract, ""), contract)[name]

    assert answer(policy(on_devices=SIDES), "0.6") == "denied"
    assert answer(policy(), "0.6") == "allowed"
    assert answer({}, "0.6") == "any"  # a boot info does not say


def test_expectations_turn_requests_into_what_is_expected(tmp_path: Path, policy_file: Path) -> None:
    file = tmp_path / "expected.json"
    file.write_text(json.dumps({"* tcbStatus *": "any", "app instanceId last byte changed": "denied"}))
    status, report = checked(NO_TCB, policy_file, "--expect", str(file))
    assert (status, names(report, "unsafe")) == (1, [])
    assert names(report, "unexpected") == ["app instanceId last byte changed"]


def test_list_is_an_expectations_file_that_changes_nothing(tmp_path: Path, policy_file: Path) -> None:
    listed, file = run_command("check-webhook", "--list", "--allowed", str(policy_file)), tmp_path / "expected.json"
    file.write_bytes(listed.stdout)
    with serving(
        "auth", "simple", "--listen", "127.0.0.1:0", environment={"AUTH_CONFIG_PATH": str(policy_file)}
    ) as served:
        again = run_command("check-webhook", served["url"], "--allowed", str(policy_file), "--expect", str(file))
    assert (listed.returncode, again.returncode) == (0, 0)
    assert b"Nothing is allowed that dstack's servers deny, of 509 requests." in again.stdout


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"app tcbStatus OutOfDat": "denied"}, "did you mean 'app tcbStatus OutOfDate'? --list prints all names"),
        ({"app tcbStatus *": "no"}, "app tcbStatus *: allowed, denied, error, refused, any expected, got 'no'"),
        ([], "an object expected, got list"),
    ],
)
def test_expectations_that_cannot_be_used_are_refused(document: Any, text: str, tmp_path: Path) -> None:
    file = tmp_path / "expected.json"
    file.write_text(json.dumps(document))
    assert text in usage_error("check-webhook", "http://127.0.0.1:1", "--expect", str(file))


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"osImages": ["xyz"], "apps": {}}, "hex of whole bytes expected, got '0xxyz'"),
        ({"osImages": "00"}, "a policy of auth-simple expected: osImages: "),
    ],
)
def test_policy_that_cannot_be_used_is_refused(document: Any, text: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(document))
    assert text in usage_error("check-webhook", "http://127.0.0.1:1", "--allowed", str(file))
