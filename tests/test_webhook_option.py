"""A stack whose KMS asks a webhook of somebody's own: the flow, and what the stack then has no policy for."""

import asyncio
import json
import re
from typing import Any

import pytest

from dstack_emu import Stack, StackConfig
from dstack_emu.cli.main import main
from dstack_emu.cli.stack_summary import summary
from dstack_emu.control.schemas import ControlError
from dstack_emu.deployment.environment import environment
from dstack_emu.deployment.errors import StackError
from dstack_emu.runbook.target import Target, TargetError
from dstack_emu.testing import LiveStack, Refused
from tests.commands import run_command
from tests.their_webhook import TheirWebhook, their_webhook


def with_password(webhook: TheirWebhook) -> str:
    return webhook.url.replace("://", "://kms:secret@")


def test_kms_asks_a_webhook_of_ones_own() -> None:
    with their_webhook("*") as webhook, LiveStack(webhooks={"src": with_password(webhook)}) as stack:
        assert {path for path, _ in webhook.asked} == {"/bootAuth/kms", "/bootAuth/app"}
        assert webhook.credentials == {"Basic a21zOnNlY3JldA=="}
        webhook.allowed = {stack.kms("src").trust_domain.info["mr_aggregated"]}
        with pytest.raises(Refused, match="App not allowed: Boot denied: not on their list"):
            stack.boot()
        (call,) = stack.journal.find(call="/bootAuth/app", outcome="denied")[-1:]
        assert (call["service"], call["caller"]) == ("webhook", "kms-src")
        explained = run_command("ctl", "--url", stack.services["control"], "why").stdout.decode()
        assert explained.startswith(
            f"{call['id']}: webhook denied /bootAuth/app: not on their list\n"
            f"  kms-src asks the webhook {webhook.url}: change its policy there, the stack has none for it\n"
            f"  It was asked about:\n    appId {stack.app().app_id}\n    composeHash {stack.app().compose_hash}\n"
        )
        webhook.allowed.add(stack.app().info["app_id"])
        assert stack.boot().has_keys
        webhook.allowed = {"*"}
        stack.reset()
        assert stack.boot("app", kms="dst").has_keys


def test_policy_that_is_not_the_stacks_is_named_with_its_webhook() -> None:
    with their_webhook("*") as webhook, LiveStack(webhooks={"src": with_password(webhook)}) as stack:
        expected = re.escape(
            f"kms-src asks the webhook {webhook.url}: change its policy there, the stack has none for it"
        )
        for attempt in (
            lambda: stack.policy("src"),
            lambda: stack.control.policy("src"),
            lambda: stack.control.set_policy("src", {}),
            lambda: stack.control.allow("src", "app"),
            lambda: stack.control.deny("src", "app"),
        ):
            with pytest.raises(ControlError, match=expected):
                attempt()
        stack.policy("dst").deny("app")
        assert stack.policy("dst").content["apps"] == {}

        description = stack.description
        assert description["webhooks"] == {"src": webhook.url}
        assert list(description["policies"]) == ["dst"]
        assert "auth-src" not in description["services"]
        assert "secret" not in json.dumps([description, stack.control.describe(), stack.control.all_kms()])
        assert set(stack.control.health().values()) == {"ok"}
        shown = summary(description, 1.0)
        assert re.search(rf"auth-src +{webhook.url} +your auth webhook of kms-src", shown)
        assert "auth-src.json" not in shown
        variables = environment(description)
        assert variables["DSTACK_EMU_AUTH_SRC"] == webhook.url
        assert variables["DSTACK_EMU_POLICY_SRC"] == ""
        assert variables["DSTACK_EMU_POLICY_DST"].endswith("auth-dst.json")


def test_summary_names_the_webhook_and_the_runbook_says_that_it_needs_a_policy_to_write() -> None:
    with their_webhook("*") as webhook, LiveStack(webhooks={"dst": webhook.url}, fresh=True) as stack:
        document = stack.description
        shown = summary(document, 1.0)
        assert "your webhook of kms-dst decides; the other allows nobody before its policy says so (1.0 s)" in shown
        assert "# Bootstrap is refused until the policy of kms-src allows it" in shown
        folder = stack.in_thread(lambda running: running.state)
        with pytest.raises(
            TargetError, match=f"the stack: kms-dst asks the webhook {webhook.url}, whose policy the runb"
        ):
            Target.of(document, "the stack", folder)
        services = {**document["services"], "auth-dst": webhook.url}
        completed = {**document, "services": services, "policies": {**document["policies"], "dst": "their.json"}}
        target = Target.of(completed, "the stack", folder)
        assert (target.kms["dst"].auth, target.kms["dst"].policy) == (webhook.url, folder / "their.json")


@pytest.mark.parametrize("side", ["src", "dst"])
def test_denial_names_the_webhook_and_what_it_has_to_allow(side: str) -> None:
    said: list[str] = []

    async def start(webhook: TheirWebhook, **settings: Any) -> dict[str, Any]:
        config = StackConfig.on_free_ports(webhooks={side: with_password(webhook)}, **settings)
        async with Stack(config, progress=said.append) as stack:
            return {name: guest.agent.app_info() for name, guest in stack.guests.items()}

    with their_webhook() as webhook:
        with pytest.raises(StackError) as refused:
            asyncio.run(start(webhook))
        path, asked = webhook.asked[-1]
        text, announced = str(refused.value), "\n".join(said)
        assert re.match(rf"kms-{side}: \w+: .*boot denied: not on their list", text, re.DOTALL)
        assert f"kms-{side} asked your webhook {webhook.url}{path} about mrAggregated {asked['mrAggregated']}" in text
        assert f"appId {asked['appId']}, composeHash {asked['composeHash']}. Allow that there, or use --fresh" in text
        assert f"kms-{side} asks {webhook.url}, whose policy is yours. All of these must be allowed:" in announced
        for name, part in asyncio.run(start(webhook, fresh=True)).items():
            identity = f"mrAggregated {part.mr_aggregated.hex()}, osImageHash {part.os_image_hash.hex()}"
            assert f"  {'the app' if name == 'app' else name}: {identity}" in announced
        webhook.allowed = {"*"}
        assert set(asyncio.run(start(webhook))) == {"kms-src", "kms-dst", "app"}


def test_state_of_another_webhook_is_refused() -> None:
    with their_webhook("*") as webhook:
        with LiveStack(webhooks={"src": with_password(webhook)}) as theirs:
            saved = theirs.control.save()
            theirs.control.load(saved)
        with LiveStack() as ours:
            expected = f"the state is of a stack in which the webhook of kms-src is '{webhook.url}', not 'own'"
            with pytest.raises(ControlError, match=re.escape(expected)):
                ours.control.load(saved)
            assert ours.boot().has_keys


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--webhook", "app=http://127.0.0.1:1"], "src=… or dst=… expected, got 'app=http://127.0.0.1:1'"),
        (["--webhook", "http://user:pw@127.0.0.1:1"], "src=… or dst=… expected, got 'http://127.0.0.1:1'"),
        (["--webhook", "src=localhost:3000"], "webhook of src: http(s)://host:port expected, got 'localhost:3000'"),
        (["--webhook", "src=http://u:pw@"], "webhook of src: http(s)://host:port expected, got 'http://'"),
        (["--kms", "src=kms -c kms.toml"], "the command 'kms -c kms.toml' has no {config}"),
        (["--kms", "dst=http://127.0.0.1:1/prpc"], "kms dst: http(s)://host:port expected"),
        (["--kms-wait", "0"], "kms_wait: a number of seconds above 0 expected, got 0.0"),
    ],
)
def test_wrong_option_is_refused_before_anything_starts(
    options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: int | str | None = main(["up", "--free-ports", *options])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert expected in capsys.readouterr().err


def test_settings_name_src_or_dst() -> None:
    async def start(config: StackConfig) -> None:
        async with Stack(config):
            pass

    with pytest.raises(StackError, match="kms: src or dst expected, got 'third'"):
        asyncio.run(start(StackConfig.on_free_ports(kms={"third": "external"})))
