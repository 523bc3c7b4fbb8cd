"""A stack that is stopped and started again: what its state folder keeps, and what it refuses."""

import asyncio
import itertools
import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from dstack_emu import Stack, StackConfig
from dstack_emu.cli.stack_summary import summary
from dstack_emu.deployment import policy_files
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.policy_files import AppRule
from dstack_emu.simulator.trust_domain import AppCompose
from tests.commands import run_command
from tests.own_stack import own_stack
from tests.running import running_stack

EARLY = r"the clock of this machine is at \S+Z, before the vendor's documents, which are of 2090-01-01T00:00:00Z"


def _up_fails(*arguments: str) -> str:
    done = run_command("up", "--json", "--free-ports", *arguments)
    assert (done.returncode, done.stdout) == (2, b"")
    lines = done.stderr.decode().splitlines()
    assert sum("Error: " in line for line in lines) == 1
    return lines[-1].removeprefix("Error: ")


def test_resumed_stack_has_the_same_keys_measurements_and_app(tmp_path: Path) -> None:
    with running_stack("--state", str(tmp_path)) as stack:
        first = stack.description
        meta = stack.rpc("kms-src", "KMS.GetMeta")[1]
    with running_stack("--state", str(tmp_path)) as stack:
        assert stack.rpc("kms-src", "KMS.GetMeta")[1] == meta
        assert stack.rpc("kms-dst", "KMS.GetMeta")[1]["k256_pubkey"] == meta["k256_pubkey"]
        assert {key: stack.description[key] for key in ("kms", "app")} == {key: first[key] for key in ("kms", "app")}
    # As on a machine whose clock was set back, where the documents are of a time to come.
    with running_stack("--state", str(tmp_path), "--collateral-issued", "2090-01-01") as stack:
        assert re.search(f"the app has no keys, because {EARLY}; everything else runs\n", stack.said())


def test_new_stack_whose_clock_is_before_the_documents_names_the_clock() -> None:
    text = _up_fails("--collateral-issued", "2090-01-01")
    assert re.search(rf"TCBInfo issue date is in the future\. The reason is that {EARLY}$", text), text


def test_fresh_stack_that_was_half_set_up_by_hand_is_completed(tmp_path: Path) -> None:
    with running_stack("--fresh", "--state", str(tmp_path)) as stack:
        info = stack.description["kms"]["src"]
        policy = json.loads(stack.policies["src"].read_text())
        policy["osImages"] = [f"0x{info['os_image_hash']}"]
        policy["kms"]["mrAggregated"] = [f"0x{info['mr_aggregated']}"]
        stack.policies["src"].write_text(json.dumps(policy))
        status, answer = stack.rpc("kms-src", "Onboard.Bootstrap", {"domain": "127.0.0.1"})
        assert status == 200
    # The policy is the operator's own by now: it stays, and it does not allow the destination.
    assert "Boot denied: aggregated MR not allowed" in _up_fails("--state", str(tmp_path))
    assert json.loads((tmp_path / "policies" / "auth-src.json").read_text()) == policy
    (tmp_path / "policies" / "auth-src.json").unlink()
    with running_stack("--state", str(tmp_path)) as stack:
        assert stack.rpc("kms-dst", "KMS.GetMeta")[1]["k256_pubkey"] == answer["k256_pubkey"]


def test_resumed_stack_whose_policy_denies_comes_up_without_keys_for_the_app(tmp_path: Path) -> None:
    with running_stack("--state", str(tmp_path)) as stack:
        policy = json.loads(stack.policies["src"].read_text())
        stack.policies["src"].write_text(json.dumps({**policy, "apps": {}}))
    with running_stack("--state", str(tmp_path)) as stack:
        status, answer = stack.curl(f"{stack.services['app']}/GetKey?path=a")
        assert (status, "has no keys yet" in answer) == (400, True)
        assert stack.rpc("kms-src", "KMS.GetTempCaCert")[0] == 200


def test_state_of_another_seed_is_refused_by_name(tmp_path: Path) -> None:
    with running_stack("--fresh", "--seed", "one", "--state", str(tmp_path)):
        pass
    text = _up_fails("--seed", "two", "--state", str(tmp_path))
    assert text == f"{tmp_path} was made with the seed 'one', not 'two': give that seed, or another --state folder"


@pytest.mark.parametrize("name", ["root-ca.pem", "stack.json"])
def test_state_folder_that_cannot_be_written_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / f".{name}.new").mkdir()  # where it is written first: root ignores permissions
    how = "make room, or let this user write to its folder, or name another one by --state"
    text = _up_fails("--state", str(tmp_path))
    assert text == f"{tmp_path / name} cannot be written: Is a directory: {how}"
    assert not (tmp_path / name).exists()


def test_state_of_another_release_is_refused_by_name(tmp_path: Path) -> None:
    with running_stack("--fresh", "--release", "0.5", "--state", str(tmp_path)):
        pass
    text = _up_fails("--release", "0.6", "--state", str(tmp_path))
    assert (
        text == f"{tmp_path} was made with the release '0.5', not '0.6': give that release, or another --state folder"
    )
    with running_stack("--fresh", "--release", "0.5", "--state", str(tmp_path)) as stack:
        assert stack.description["release"] == "0.5"


def test_policies_that_are_there_are_used_as_they_are(tmp_path: Path) -> None:
    policies = tmp_path / "policies"
    policies.mkdir()
    own = '{"osImages": [], "kms": {"mrAggregated": []}, "apps": {"0x00": {}}}'
    (policies / "auth-src.json").write_text(own)
    refusal = "KMS is not allowed to bootstrap: boot denied: OS image is not allowed"
    assert refusal in _up_fails("--policies", str(policies))
    assert (policies / "auth-src.json").read_text() == own


@pytest.mark.parametrize("content", ["", "[", "\0"])
def test_state_whose_description_is_broken_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "stack.json").write_text(content)
    assert f"{tmp_path / 'stack.json'} cannot be read" in _up_fails("--state", str(tmp_path))


async def test_policies_of_another_seed_are_refused_before_they_deny(tmp_path: Path) -> None:
    async with own_stack(seed="one", policies=tmp_path) as stack:
        path, other = stack.policies.values()
    before = [path.read_bytes(), other.read_bytes()]
    said: list[str] = []
    with pytest.raises(StackError) as caught:
        async with Stack(StackConfig.on_free_ports(seed="two", policies=tmp_path), said.append):
            pass
    assert re.fullmatch(
        rf"{path} was written for another seed, release or OS image: osImages lists 0x\w{{64}}, but not \w{{64}}, "
        "which is measured here. Delete the file, so that it is written anew, or use the seed, release and OS image "
        "of before",
        str(caught.value),
    )
    assert [path.read_bytes(), other.read_bytes()] == before
    # Without keys it starts, because the policies are the user's to write; but it is said.
    async with Stack(StackConfig.on_free_ports(seed="two", policies=tmp_path, fresh=True), said.append):
        assert [text for text in said if text.startswith(f"{other} was written for another seed")]
    path.unlink()
    other.unlink()
    async with own_stack(seed="two", policies=tmp_path) as stack:
        assert stack.app.agent.keys is not None


async def test_policy_that_lists_nothing_or_something_present_is_left_to_the_webhook(tmp_path: Path) -> None:
    async with own_stack(policies=tmp_path) as stack:
        domain = stack.app.domain
        app = {AppRule(domain.app_id.hex(), domain.compose_hash.hex()): domain.image.os_image_hash.hex()}
        infos = list(stack.kms_info.values())
    file = tmp_path / "auth-src.json"
    policy = json.loads(file.read_text())
    left: list[Any] = [
        {},
        {**policy, "osImages": [*policy["osImages"], "0xAA"]},
        {**policy, "osImages": [policy["osImages"][0].upper().replace("0X", "")]},
        {**policy, "kms": {"mrAggregated": []}},
        {**policy, "kms": "none"},
        {**policy, "osImages": [5]},
        [],
    ]
    for changed in left:
        file.write_text(json.dumps(changed))
        assert policy_files.of_other_stacks([file], infos, app) == [], changed
    for member, changed in (
        ("kms.mrAggregated", {**policy, "kms": {"mrAggregated": ["0xAA"]}}),
        ("osImages", {**policy, "osImages": ["0xAA"]}),
    ):
        file.write_text(json.dumps(changed))
        (text,) = policy_files.of_other_stacks([file], infos, app)
        assert f": {member} lists 0xAA, but not " in text


async def test_parts_that_were_added_come_back_with_their_identity_and_keys(
    short_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compose = AppCompose.named("wallet").text
    async with own_stack(state=short_folder) as stack:
        control = stack.control
        await control.add_kms("third")
        control.allow("src", "kms-third")
        control.allow("third", "kms-src")
        control.allow("third", "kms-third")
        await control.onboard_kms("third")
        await control.add_guest("wallet", compose=compose, platform="another host", instance="one")
        control.allow("third", "wallet")
        await control.boot_guest("wallet", "third")
        await control.add_guest("waiting")
        await control.add_guest("removed")
        await control.remove_guest("removed")
        before = {name: measured_of(control.guest(name)) for name in ("wallet", "waiting", "kms-third")}
        key, root = stack.guests["wallet"].agent.keys.k256_key, stack.kms["third"].capture().files["root-ca.key"]
    records = short_folder / "added"
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in records.iterdir()} == {
        "000001-kms-third.json": 0o600,
        "000002-wallet.json": 0o600,
        "000003-waiting.json": 0o600,
    }

    async with own_stack(state=short_folder) as stack:
        assert {name: measured_of(stack.control.guest(name)) for name in before} == before
        assert (stack.guests["wallet"].agent.keys.k256_key, stack.guests["wallet"].source) == (key, "third")
        assert stack.kms["third"].capture().files["root-ca.key"] == root
        assert {"third", "src"} <= stack.kms_info.keys()
        assert "removed" not in stack.guests
        shown = re.findall(r"^  (\S+) +https?://\S+ +(.+)", summary(stack.description(), 1.0), re.MULTILINE)
        assert (
            dict(shown).items()
            >= {
                "auth-src": "auth webhook of kms-src",
                "agent-third": "guest agent of kms-third",
                "kms-third": "KMS third",
                "wallet": "guest agent of a trust domain",
            }.items()
        )
        stack.control.deny("third", "wallet")

    async with own_stack(state=short_folder) as stack:  # the policy decides again
        assert not stack.control.guest("wallet")["has_keys"]
        assert any("wallet has no keys now: Failed to request app keys: " in message for message in caplog.messages)
        await stack.control.remove_kms("third")
        await stack.control.remove_guest("waiting")

    async with own_stack(state=short_folder) as stack:
        assert stack.guests.keys() == {"kms-src", "kms-dst", "app", "wallet"}
        assert not (short_folder / "kms-third" / "certs").exists()
        assert [path.name for path in records.iterdir()] == ["000002-wallet.json"]


def measured_of(guest: dict[str, object]) -> dict[str, object]:
    """What a trust domain is and has; its port is another one in each run."""
    return {name: value for name, value in guest.items() if name != "url"}


async def test_a_change_of_one_added_part_writes_the_record_of_no_other(short_folder: Path) -> None:
    def written() -> dict[str, int]:
        """Return the inode of each record, which is another one after it was replaced."""
        return {path.stem.partition("-")[2]: path.stat().st_ino for path in (short_folder / "added").iterdir()}

    async with own_stack(state=short_folder) as stack:
        control = stack.control
        for name in ("one", "two", "three"):
            await control.add_guest(name)
            control.allow("src", name)
        before = written()
        await control.boot_guest("two")
        assert {name for name, inode in written().items() if before[name] != inode} == {"two"}
        before = written()
        await control.add_guest("four")
        await control.remove_guest("one")
        await control.boot_guest("three")
        await control.boot_guest("two")  # from the same KMS as before: its record says the same
        after = written()
        assert after.keys() == {"two", "three", "four"}
        assert after["two"] == before["two"]
    assert written() == after


async def test_record_of_added_parts_that_cannot_be_used_is_named(short_folder: Path) -> None:
    async with own_stack(state=short_folder, fresh=True) as stack:
        await stack.control.add_guest("wallet")
    (record,) = (short_folder / "added").iterdir()
    advice = f"delete {record} to start without this part"
    text = record.read_text()
    for content, words in (
        ("{", f"{record}: "),
        (text.replace('"wallet"', '"app"'), "there is a trust domain app already"),
        (text.replace('"compose": null', '"compose": "{}"'), "trust domain wallet: app-compose: "),
    ):
        record.write_text(content)
        with pytest.raises(StackError) as caught:
            async with own_stack(state=short_folder, fresh=True):
                pass
        assert str(caught.value).startswith(words)
        assert str(caught.value).endswith(advice)
        assert record.read_text() == content
    record.write_text(text)
    async with own_stack(state=short_folder, fresh=True) as stack:
        assert "wallet" in stack.guests


async def test_fresh_says_which_kms_has_no_keys_and_how_it_gets_them(short_folder: Path) -> None:
    async def paste_calls(shown: str) -> None:
        lines = re.findall(r"^  (?:# )?(curl .*?)(?:   \(.*)?$", shown, re.MULTILINE)
        shell = await asyncio.create_subprocess_exec("bash", "-ec", "\n".join(lines), stdout=asyncio.subprocess.PIPE)
        assert '"error"' not in (await shell.communicate())[0].decode()
        assert shell.returncode == 0

    for state in (
        "ready, without keys: both KMS are in the onboard phase, and nobody is allowed",
        "ready: kms-dst has no keys",
        "ready: both KMS have the keys of an earlier run",
    ):
        async with own_stack(state=short_folder, fresh=True) as stack:
            shown = summary(stack.description(), 1.0)
            assert f"dstack-emu is {state}" in shown
            assert f"\n  export DSTACK_EMU_STATE={short_folder}\n" in shown
            for of, name in itertools.product(("src", "dst"), ("kms-src", "kms-dst")):
                stack.control.allow(of, name)
            await paste_calls(shown)
