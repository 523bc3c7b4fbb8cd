"""What a KMS sends to its webhook, by release, against the recorded requests of the real KMS."""

import json
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from dstack_emu.attest.app_info import BootInfo
from dstack_emu.attest.release import RELEASES
from dstack_emu.kms_emu.auth_api import WebhookAuth
from tests.recorded import golden

RECORDED: list[dict[str, Any]] = [
    row for row in golden("webhook-requests.json")["requests"] if "/bootAuth/" in row["path"]
]


def boot_info(body: str) -> BootInfo:
    """Return the boot info that a recorded body states."""
    sent = json.loads(body)
    return BootInfo(
        mr_aggregated=bytes.fromhex(sent["mrAggregated"]),
        os_image_hash=bytes.fromhex(sent["osImageHash"]),
        mr_system=bytes.fromhex(sent["mrSystem"]),
        app_id=bytes.fromhex(sent["appId"]),
        compose_hash=bytes.fromhex(sent["composeHash"]),
        instance_id=bytes.fromhex(sent["instanceId"]),
        device_id=bytes.fromhex(sent["deviceId"]),
        key_provider_info=bytes.fromhex(sent["keyProviderInfo"]),
        tcb_status=sent["tcbStatus"],
        advisory_ids=tuple(sent["advisoryIds"]),
    )


async def request_of(release: str, body: str, *, is_kms: bool) -> tuple[str, str, str]:
    """Let the KMS's client of a release ask about a recorded boot info; return path, User-Agent and body."""
    received: list[tuple[str, str, str]] = []

    async def answer(request: web.Request) -> web.Response:
        received.append((request.path, request.headers["User-Agent"], await request.text()))
        return web.json_response({"isAllowed": True, "reason": "", "gatewayAppId": ""})

    app = web.Application()
    app.router.add_post("/bootAuth/{caller}", answer)
    async with TestServer(app) as server:
        auth = WebhookAuth(str(server.make_url("")), release=RELEASES[release])
        try:
            assert (await auth.decide(boot_info(body), is_kms=is_kms)).is_allowed
        finally:
            await auth.close()
    return received[0]


@pytest.mark.parametrize("row", RECORDED, ids=lambda row: row["caused_by"])
async def test_request_of_0_6_is_the_recorded_one_to_the_byte(row: dict[str, Any]) -> None:
    sent = await request_of("0.6", row["body"], is_kms=row["path"].endswith("kms"))
    assert sent == (row["path"], dict(row["headers"])["user-agent"], row["body"])


async def test_request_of_0_5_has_the_variant_under_both_names() -> None:
    row = RECORDED[0]
    path, user_agent, body = await request_of("0.5", row["body"], is_kms=row["path"].endswith("kms"))
    assert (path, user_agent) == (row["path"], "dstack-kms/0.5.11")
    recorded = json.loads(row["body"])
    assert json.loads(body) == {**recorded, "attestationMode": recorded["teeVariant"]}
    assert list(json.loads(body))[:2] == ["teeVariant", "attestationMode"]
