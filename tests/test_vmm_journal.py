"""What the journal records of a VMM and of its machines, by the control API and by `ctl`, and what it must not."""

import json
import urllib.request
from typing import Any

from dstack_emu.testing import LiveStack
from tests.commands import run_command
from tests.vmm import COMPOSE, VmmClient, allow, app_id_of, sealed

SECRET, USER_CONFIG = "a value that nobody else may read", "the file of the user"
APP = json.dumps(json.loads(COMPOSE) | {"allowed_envs": ["TOKEN"]})
DENIED = json.dumps(json.loads(COMPOSE) | {"name": "denied"})


def test_journal_has_the_calls_of_a_vmm_and_of_its_machines_and_no_secret(vmm: VmmClient, vmm_stack: LiveStack) -> None:
    allow(vmm_stack, APP)
    control = vmm_stack.services["control"]
    with urllib.request.urlopen(f"{control}/journal", timeout=60) as answer:
        position = json.load(answer)["position"]
    key = vmm.rpc("GetAppEnvEncryptPubKey", app_id=app_id_of(APP))["public_key"]
    blob = sealed({"TOKEN": SECRET}, bytes.fromhex(key))
    allowed = vmm.deploy(compose_file=APP, encrypted_env=blob, user_config=USER_CONFIG)
    assert vmm.booted(allowed)["boot_progress"] == "done"
    denied = vmm.deploy(compose_file=DENIED, name="denied", encrypted_env=blob)
    assert "app not registered" in vmm.booted(denied)["boot_error"]
    broken = blob[:-2] + ("00" if blob[-2:] != "00" else "01")
    vmm.rpc("UpgradeApp", id=allowed, encrypted_env=broken)
    vmm.rpc("StopVm", id=allowed)
    vmm.rpc("StartVm", id=allowed)
    assert "Failed to decrypt env file" in vmm.booted(allowed)["boot_error"]
    assert vmm.refused("StopVm", id="absent") == "Failed to stop VM: VM not found"
    assert vmm.ask("/guest/Info?json", "-d", json.dumps({"id": denied}))[0] == 400

    with urllib.request.urlopen(f"{control}/journal?since={position}", timeout=60) as answer:
        records: list[dict[str, Any]] = json.load(answer)["records"]
    by_ctl = run_command("ctl", "--url", control, "journal", "find", f"since={position}").stdout
    found_by_ctl = {record["id"]: record for record in json.loads(by_ctl)}  # inner calls stand for themselves, too
    assert [found_by_ctl[record["id"]] for record in records] == records

    def found(service: str, *calls: str) -> list[dict[str, Any]]:
        return [record for record in records if record["service"] == service and record["call"] in calls]

    shown = [
        (record["call"], record["caller"], record["status"], record.get("error"))
        for record in records
        if record["service"] == "vmm" and record["call"] not in ("GetInfo", "/logs")
    ]
    assert shown == [
        ("GetAppEnvEncryptPubKey", "outside", 200, None),
        ("CreateVm", "outside", 200, None),
        ("CreateVm", "outside", 200, None),
        ("UpgradeApp", "outside", 200, None),
        ("StopVm", "outside", 200, None),
        ("StartVm", "outside", 200, None),
        ("StopVm", "outside", 400, "Failed to stop VM: VM not found"),
        ("/guest/Info", "outside", 400, f"vm {denied} is not running"),
    ]
    got, refused, got_again = found("kms-src", "GetAppKey")
    assert (got["caller"], got["released"]["fields"]) == ("app1", ["disk_crypt_key", "env_crypt_key", "k256_key"])
    assert got["released"]["to"]["app_id"] == got_again["released"]["to"]["app_id"] == app_id_of(APP)
    assert (refused["caller"], refused["error"]) == ("denied", "App not allowed: Boot denied: app not registered")
    assert "released" not in refused
    decisions = [inner["decision"] for inner in refused["inner"] if inner.get("call") == "/bootAuth/app"]
    assert [(each["allowed"], each["reason"]) for each in decisions] == [(False, "app not registered")]
    for secret in (SECRET, USER_CONFIG, blob, blob[:64], broken):
        assert secret.encode() not in by_ctl
