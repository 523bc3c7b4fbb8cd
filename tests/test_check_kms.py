"""`dstack-emu check-kms`: the emulator's own KMS does what it must, and each check that is switched off fails by name.

The KMS is a process of its own. Those with a check switched off are `tests.broken_kms`.
"""

import asyncio
import json
import os
import re
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from dstack_emu.attest.release import release
from dstack_emu.kms_check.case import Case
from dstack_emu.kms_check.catalogue import CASES, select
from dstack_emu.kms_check.runner import Result, Settings, check_kms, run_cases
from dstack_emu.kms_check.world import surroundings
from tests.broken_kms import DEFECTS
from tests.commands import run_command, usage_error
from tests.processes import Command, forked_by_anyone, start
from tests.running import running_kms


def kms(*arguments: str) -> str:
    """Return the command line of a `tests.broken_kms`."""
    return f"{shlex.join(forked_by_anyone(*arguments, module='tests.broken_kms'))} -c {{config}}"


WHOLE = os.environ.get("DSTACK_EMU_CHECK_KMS", "")
"""Set to `all` to run every case in both releases, as .ci/run does."""

QUICK = (
    *(
        "bootstrap/pck-revoked",
        "bootstrap/pccs-500",
        "certificate/*",
        "request/*",
        *("tcb/OutOfDate", "tcb/a*", "tcb/kms"),
        "sign-cert/v*",
        "keys/*",
        "handover/*",
        "onboard/allowed",
    ),
    *("self-check/denied-SignCert", "self-check/denied-then*", "caller/denied-GetAppKey", "policy/app-denied*"),
    *("evidence/event-identity", "evidence/event-removed", "image/kernel"),
    *("revocation/pck", "collateral/tcb-info-expired", "pccs/500"),
)
"""Cases of each group, and all those that differ between the releases; .ci/run puts every case."""

BROKEN: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "skips_self_check": (
        ("self-check/denied-*", "self-check/webhook-500-*", "keys/again"),
        (
            *(f"self-check/denied-{rpc}" for rpc in ("GetTempCaCert", "GetAppKey", "GetKmsKey", "SignCert")),
            "self-check/webhook-500-GetTempCaCert",
        ),
    ),
    "trusts_claimed_image": (
        ("image/kernel", "image/firmware", "image/kms", "image/vm-config-of-another", "keys/again"),
        ("image/kernel", "image/firmware", "image/kms", "image/vm-config-of-another"),
    ),
    "caches_decisions": (
        ("policy/app-denied-after-allowed", "policy/app-flips-under-load", "self-check/each-call", "keys/again"),
        ("policy/app-denied-after-allowed", "policy/app-flips-under-load", "self-check/each-call"),
    ),
    "fails_open_on_500": (
        ("bootstrap/webhook-500*", "self-check/webhook-500-*", "caller/webhook-500-*", "keys/again"),
        (
            "bootstrap/webhook-500",
            "self-check/webhook-500-GetTempCaCert",
            "caller/webhook-500-GetAppKey",
            "caller/webhook-500-GetKmsKey",
        ),
    ),
    "ignores_tcb_status": (
        ("tcb/OutOfDate", "tcb/kms", "tcb/module-OutOfDate", "keys/again"),
        ("tcb/OutOfDate", "tcb/kms", "tcb/module-OutOfDate"),
    ),
    "binds_no_key": (
        ("evidence/another-key", "evidence/untagged-key", "evidence/kms-key-forged", "keys/again"),
        ("evidence/another-key", "evidence/untagged-key", "evidence/kms-key-forged"),
    ),
    "has_one_key_for_all": (
        ("keys/*",),
        ("keys/another-instance", "keys/another-app", "keys/environment", "keys/root"),
    ),
}
"""For each defect the cases that are run, and those of them that must fail; `keys/again` must pass."""


CACHING = "keeps_an_answer_about_itself"
OF_CACHING = ("self-check/denied-GetTempCaCert", "self-check/each-call", "self-check/request")
"""A KMS without a defect that uses an answer about itself for a second, and the cases that are run."""


RUNS = {name: (name, patterns) for name, (patterns, _) in BROKEN.items()} | {
    CACHING: ("none --auth-api-cache", OF_CACHING)
}
"""For each KMS of the fixture the arguments of `tests.broken_kms`, and the cases that are run."""


def selected(*patterns: str) -> list[Case]:
    return select(patterns, release("0.6"))


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, Result]]:
    """The results of each KMS with a defect, by the names of the cases; all are checked in the same surroundings."""

    async def check() -> dict[str, dict[str, Result]]:
        found = {}
        async with surroundings(release("0.6"), lambda _: None, patience=20, self_check_cache=0) as world:
            for name, (arguments, patterns) in RUNS.items():
                command = kms(*arguments.split())
                folder = tmp_path_factory.mktemp("kms")
                world.self_check_cache = 1 if name == CACHING else 0
                settings = Settings(command=command, release=release("0.6"), folder=folder, patience=20)
                results = await run_cases(world, settings, selected(*patterns), lambda *_: None, lambda _: None)
                found[name] = {result.case.name: result for result in results}
        return found

    return asyncio.run(check())


def test_every_defect_is_tried() -> None:
    assert BROKEN.keys() == DEFECTS.keys() - {"none"}


@pytest.mark.parametrize("defect", BROKEN)
def test_check_that_is_switched_off_fails_by_name(checked: Mapping[str, Mapping[str, Result]], defect: str) -> None:
    failed = {name for name, result in checked[defect].items() if result.outcome == "FAIL"}
    assert failed >= set(BROKEN[defect][1])
    assert checked[defect]["keys/again"].outcome == "pass"
    unclear = {name: result.said for name, result in checked[defect].items() if result.outcome == "warning"}
    assert unclear == {}


def test_kms_that_keeps_an_answer_about_itself_is_given_the_time(
    checked: Mapping[str, Mapping[str, Result]],
) -> None:
    found = {name: result.outcome for name, result in checked[CACHING].items()}
    assert found == dict.fromkeys(OF_CACHING, "pass")


@pytest.mark.parametrize("name", ["0.5", "0.6"])
def test_own_kms_does_what_it_must(tmp_path: Path, name: str) -> None:
    used, some = release(name), () if WHOLE == "all" else QUICK
    settings = Settings(command=kms("none", "--release", name), release=used, folder=tmp_path, patience=20)
    results = asyncio.run(check_kms(settings, select(some, used), lambda *_: None, lambda _: None))
    assert {result.case.name: result.said for result in results if result.outcome != "pass"} == {}
    assert {result.case.group for result in results} == {case.group for case in CASES}


# ---- the command


@pytest.fixture(scope="module")
def one_key() -> str:
    return kms("has_one_key_for_all")


def test_failure_is_shown_with_what_runs_it_again_and_may_be_allowed(tmp_path: Path, one_key: str) -> None:
    junit, allowed, folder = tmp_path / "check-kms.xml", tmp_path / "allowed", tmp_path / "kept"
    allowed.write_text("# known\nkeys/another-app  each app has the same key\nkeys/again  passes\n")
    some = ("--only", "keys/a*", "--only", "keys/signature", "--folder", str(folder))
    done = run_command(
        *("check-kms", "--kms", one_key, *some, "--allow", str(allowed), "--junit", str(junit)),
    )
    text = done.stdout.decode()
    assert done.returncode == 1, done
    assert "FAIL     keys/another-instance: another instance of an app shares the app's keys" in text
    assert "got:      equal values" in text
    assert "expected: different values" in text
    assert f"again:    dstack-emu check-kms --kms '{one_key}' --release 0.6 --only keys/another-instance\n" in text
    assert "allowed  keys/another-app: " in text
    assert "keys/again is on the allow list, and passes: remove it there.\n" in text
    assert text.splitlines()[-1].startswith("2 failed, of 4 of 4 cases in ")
    head, row = (line.split() for line in text.splitlines() if line.startswith(("group", "keys ")))
    assert (head[1:], row[1:]) == (["pass", "warning", "FAIL", "allowed", "skipped"], ["1", "-", "2", "1", "-"])
    suite = ET.fromstring(junit.read_text())
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "2", "1")
    assert [case.get("name") for case in suite if case.find("failure") is not None] == ["another-instance", "signature"]
    assert "[4/4] " in done.stderr.decode()
    assert (folder / "kms-1" / "kms.toml").exists()
    again = usage_error("check-kms", "--kms", one_key, *some)
    assert again == f"--folder: {folder}/kms-1 is there already, and a fresh KMS is needed: name another folder"


def test_kms_that_does_not_start_is_unusable(tmp_path: Path) -> None:
    done = run_command("check-kms", "--kms", "sh -c 'echo no such option; exit 3' {config}")
    said = done.stderr.decode()
    assert (done.returncode, done.stdout) == (2, b"")
    assert "ended with status 3 before it answered; the last lines in " in said
    assert said.endswith("no such option\n")


def test_kms_that_somebody_else_starts_is_waited_for(tmp_path: Path) -> None:
    some = ("--only", "bootstrap/measurements", "--only", "keys/again", "--only", "handover/from-source")
    options = ("check-kms", "--external", "--folder", str(tmp_path / "check"), "--json", *some)
    with (tmp_path / "stderr").open("w+") as errors:
        command = start(*options, stderr=errors)
        try:
            line = next(line for line in lines_of(tmp_path / "stderr", command) if "is yours to start" in line)
            config, agent = re.findall(r"kms.toml is (\S+), its agent is DSTACK_AGENT_ADDRESS=(\S+)$", line)[0]
            with running_kms(Path(config), agent):
                report = json.loads(command.rest(60))
        finally:
            command.end()
    assert command.returncode == 0
    found = {case["name"]: case["outcome"] for case in report["cases"]}
    assert found == {"bootstrap/measurements": "pass", "keys/again": "pass", "handover/from-source": "skipped"}


def lines_of(path: Path, command: Command) -> Iterator[str]:
    """Yield the lines that a command writes to a file, until it ends."""
    with path.open() as written:
        while command.poll(within=0.05) is None:
            yield from iter(written.readline, "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "either --kms 'COMMAND {config}' or --external expected: which KMS is to be checked"),
        (("--kms", "x {config}", "--external"), "either --kms 'COMMAND {config}' or --external expected"),
        (("--only", "keys/agian"), "no case of release 0.6 is named 'keys/agian': did you mean 'keys/again'? --list"),
        (("--kms", "x {config}", "--allow", "/none"), "/none cannot be read: No such file or directory"),
        (("--kms", "x {config}", "--patience", "no"), "argument --patience: seconds, up to 3600, expected, got 'no'"),
    ],
)
def test_arguments_that_cannot_be_used_are_told(options: tuple[str, ...], words: str) -> None:
    done = run_command("check-kms", *options)
    assert (done.returncode, done.stdout) == (2, b"")
    assert words in done.stderr.decode()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keys/agian  known", "no case of release 0.6 is named 'keys/agian': did you mean 'keys/again'?"),
        ("keys/again", "keys/again: a reason expected: why this KMS may depart from it"),
        ('{"keys/again": 1}', "keys/again: a text, the reason, expected, got 1"),
        ('{"keys/again": ', "JSON cannot be read from it: "),
    ],
)
def test_allow_list_that_cannot_be_used_is_told(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "allowed"
    path.write_text(text)
    assert usage_error("check-kms", "--kms", kms("none"), "--allow", str(path)).startswith(f"{path}: {words}")


def test_list_names_each_case_once_with_what_it_proves() -> None:
    listed = json.loads(run_command("check-kms", "--list", "--json", "--release", "0.6").stdout)
    names = [each["name"] for each in listed]
    assert len(names) == len(set(names)) == len(selected())
    assert all(each["about"] for each in listed)
    of_0_5 = run_command("check-kms", "--list", "--only", "request/*", "--release", "0.5").stdout.decode()
    assert "request/vm-config-empty-object  an empty VM config" in of_0_5
    assert "request/vm-config-other" in names
    assert "request/vm-config-other" not in of_0_5
