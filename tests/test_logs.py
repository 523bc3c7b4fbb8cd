"""Logs: one line an event, as text or as JSON, with what an operator needs and without what nobody may see."""

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.cli import logs
from dstack_emu.transport.events import Event, EventLog
from tests.commands import serving, usage_error
from tests.kms_process import World, ends, running, variables

MOMENT = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def lines(form: logs.Form, *messages: Any) -> list[str]:
    """How messages look in one of the forms; a tuple is a message with arguments, an exception is logged as one."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logs.JsonFormatter() if form == "json" else logs.TextFormatter())
    logger = logging.Logger("part")
    logger.addHandler(handler)
    for message in messages:
        if isinstance(message, Exception):
            try:
                raise message
            except Exception:
                logger.exception("failed")
        else:
            logger.warning(*(message if isinstance(message, tuple) else (message,)))
    return out.getvalue().split("\n")[:-1]


def test_text_has_time_level_logger_name_and_fields() -> None:
    event = Event("refused", rpc="GetAppKey", reason="Boot denied: no", has_keys=False, count=3, empty="")
    (line,) = lines("text", event)
    fields = 'refused rpc=GetAppKey reason="Boot denied: no" has_keys=false count=3 empty=""'
    assert re.fullmatch(f"{MOMENT} warn part: {re.escape(fields)}", line)


def test_json_has_the_same_as_members() -> None:
    (line,) = lines("json", Event("refused", reason="Boot denied: no", has_keys=False, count=3, path=Path("/a")))
    said = json.loads(line)
    assert re.fullmatch(MOMENT, said.pop("time"))
    assert said == {
        "level": "warn",
        "logger": "part",
        "event": "refused",
        "reason": "Boot denied: no",
        "has_keys": False,
        "count": 3,
        "path": "/a",
    }


LONG = 'status=400, error={\n  "error": "Boot denied"\n}'


@pytest.mark.parametrize("form", ["text", "json"])
def test_every_event_is_one_line(form: logs.Form) -> None:
    messages = (LONG, ("said %s", LONG), Event("a\r\nb", reason=LONG), "\x1b[31m\u2028\x85\x00", ValueError(LONG))
    found = lines(form, *messages)
    assert len(found) == len(messages)
    for line in found:
        assert line.isprintable()
        assert len(line.splitlines()) == 1
    assert 'error={ \\"error\\": \\"Boot denied\\" }' in found[2]
    if form == "json":
        events = [json.loads(line) for line in found]
        assert events[0]["event"] == 'status=400, error={ "error": "Boot denied" }'
        assert "Traceback" in events[4]["exception"]
    else:
        assert found[0].endswith('part: status=400, error={ "error": "Boot denied" }')
        assert 'part: failed exception="Traceback' in found[4]


@pytest.mark.parametrize("form", ["text", "json"])
def test_passwords_in_urls_and_private_keys_are_cut_out(form: logs.Form) -> None:
    key = "-----BEGIN PRIVATE KEY-----\nSECRET\n-----END PRIVATE KEY-----"
    url = "for url (http://user:SECRET@host:1/path)"
    events = Event("refused", reason=url), Event("a", key=key)
    found = lines(form, url, *events, f"{key} tail", f"half {key[:40]}", ValueError(key))
    assert not any("SECRET" in line for line in found)
    assert "http://…@host:1/path" in found[0].encode().decode("unicode_escape" if form == "json" else "utf-8")
    assert "(a private key) tail" in found[3]


@pytest.mark.parametrize(
    ("verbosity", "level", "heard"),
    [
        (0, None, ("warning", "info")),
        (1, None, ("info", "debug")),
        (2, None, ("debug", "debug")),
        (0, "error", ("error", "error")),
        (0, "debug", ("debug", "debug")),
        (1, "error", ("info", "debug")),
    ],
)
def test_verbosity_says_how_much_is_heard(verbosity: int, level: str | None, heard: tuple[str, str]) -> None:
    root, talkative = logging.getLogger(), logging.getLogger("dstack_emu.talkative")
    before = root.level, root.handlers[:]
    try:
        logs.set_up(verbosity, "text", ("talkative",), level)
        found = tuple(logging.getLevelName(logger.getEffectiveLevel()).lower() for logger in (root, talkative))
        assert found == heard
    finally:
        root.level, root.handlers[:] = before
        talkative.setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("", None),
        ("debug", "debug"),
        ("WARN", "warn"),
        ("dstack_kms=trace", None),
        ("rocket=off, info", "info"),
        ("x", None),
    ],
)
def test_rust_log_is_read_as_far_as_it_goes(text: str, level: str | None) -> None:
    assert logs.level_of(text) == level


def test_events_that_nobody_hears_are_not_made(caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog("tests.events", site="here")
    with caplog.at_level(logging.INFO, "tests.events"):
        assert not log.is_debug()
        log.debug("answered", rpc="GetMeta")
        log.info("onboarded", source="https://other")
    assert caplog.messages == ["onboarded site=here source=https://other"]


# ---- what a KMS says


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One agent with its PCCS."""
    with serving("agent") as description:
        yield World.of(description)


def test_kms_logs_what_was_done_and_what_was_refused(world: World, tmp_path: Path) -> None:
    with running(tmp_path, world, "--log-format", "json", **variables({"core.site_name": "a site"})) as kms:
        kms.rpc("Onboard.Bootstrap", {"domain": "-"})
        public = kms.bootstrapped("kms.example.test")["k256_pubkey"]
        kms.rpc("KMS.GetAppKey", {"api_version": 1})
        kms.rpc("KMS.GetTempCaCert")
        _, _, said = kms.end()
    (greeting,) = (line for line in said if not line.startswith("{"))
    assert greeting.startswith("KMS (onboard phase) at ")
    events = [json.loads(line) for line in said if line.startswith("{")]
    assert {(event.pop("logger"), event.pop("site")) for event in events} == {("kms_emu", "a site")}
    for event in events:
        assert re.fullmatch(MOMENT, event.pop("time"))
    refused = {"level": "info", "event": "refused"}
    first = {**refused, "rpc": "Bootstrap", "kind": "InvalidRequest", "reason": "domain contains an invalid DNS label"}
    second = {**refused, "rpc": "GetAppKey", "kind": "NotAttested"}
    second["reason"] = "App not allowed: No attestation provided"
    for setting in ('core.auth_api.type = "dev"', "core.image.verify = false"):
        weakened = events.pop(0)
        assert (weakened["level"], weakened["event"], weakened["setting"]) == ("warn", "weakened", setting)
    assert events == [
        {"level": "info", "event": "onboard phase", "url": kms.url},
        first,
        {"level": "info", "event": "bootstrapped", "domain": "kms.example.test", "k256_pubkey": public},
        {"level": "info", "event": "finish", "has_keys": True},
        {"level": "info", "event": "runtime phase", "url": kms.runtime_url, "domain": "kms.example.test"},
        second,
    ]


def test_kms_logs_a_webhook_that_does_not_answer_as_a_warning(world: World, tmp_path: Path) -> None:
    keys = {"core.auth_api.type": "webhook", "core.auth_api.webhook.url": "http://user:SECRET@127.0.0.1:1"}
    with running(tmp_path, world, **variables(keys)) as kms:
        status, refusal = kms.rpc("Onboard.Bootstrap", {"domain": "kms.example.test"})
        assert (status, "Connection refused" in refusal["error"]) == (400, True)
        kms.rpc("Onboard.GetAttestationInfo")
        said = "\n".join(kms.log())
    assert " warn kms_emu: refused rpc=Bootstrap kind=Unavailable reason=" in said
    assert ' warn kms_emu: "failed to get auth api info" ' not in said
    assert " warn kms_emu: failed to get auth api info reason=" in said
    assert "error sending request for url (http://127.0.0.1:1/bootAuth/kms)" in said
    assert "SECRET" not in said


@pytest.mark.parametrize(
    ("arguments", "environment", "answered", "phases"),
    [
        ((), {}, False, True),
        (("-v",), {}, True, True),
        ((), {"RUST_LOG": "warn"}, False, False),
        ((), {"RUST_LOG": "debug"}, True, True),
    ],
)
def test_kms_says_more_or_less_when_asked(
    world: World, tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str], answered: bool, phases: bool
) -> None:
    domain = variables({"core.onboard.auto_bootstrap_domain": "kms.example.test"})
    with running(tmp_path, world, *arguments, **environment, **domain) as kms:
        answer = kms.rpc("KMS.GetTempCaCert")[1]
        said = "\n".join(kms.log())
    assert ("answered rpc=GetTempCaCert" in said) == answered
    assert ("kms_emu: runtime phase" in said) == phases
    assert answer["temp_ca_key"].splitlines()[1] not in said


def test_kms_that_cannot_go_on_says_why_on_its_last_line(world: World, tmp_path: Path) -> None:
    said = ends(tmp_path, world, "--log-format", "json", **variables({"core.onboard.auto_bootstrap_domain": "."}))
    assert said == (1, "Error: domain contains an invalid DNS label")


def test_unknown_log_format_is_a_usage_error() -> None:
    assert "--log-format" in usage_error("kms", "-c", "kms.toml", "--log-format", "xml")
