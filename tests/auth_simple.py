"""A configuration of auth-simple, a boot that it allows, and how auth-simple is asked."""

import json
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from dstack_emu.auth.policy import Contract
from dstack_emu.auth.server import simple_app

Client = TestClient[web.Request, web.Application]

ZERO = "0x0000000000000000000000000000000000000000"
OS_IMAGE = "0x1fbb0cf9cc6cfbf23d6b779776fabad2c5403d643badb9e5e238615e4960a78a"
BOOT_INFO: dict[str, Any] = {
    "mrAggregated": "0xabc123",
    "osImageHash": OS_IMAGE,
    "appId": "0xa0",
    "composeHash": "0xc0",
    "instanceId": "0x10",
    "deviceId": "0xd0",
    "tcbStatus": "UpToDate",
    "advisoryIds": [],
    "mrSystem": "",
}
CONFIG: dict[str, Any] = {
    "osImages": [OS_IMAGE],
    "gatewayAppId": "0x9a",
    "kms": {"mrAggregated": ["0xabc123"], "devices": ["0xd0"], "allowAnyDevice": False},
    "apps": {"0xa0": {"composeHashes": ["0xc0"], "devices": ["0xd0"], "allowAnyDevice": False}},
}
ALLOWED = {"isAllowed": True, "reason": "", "gatewayAppId": "0x9a"}


def denied(reason: str, gateway_app_id: str = "0x9a") -> dict[str, Any]:
    return {"isAllowed": False, "reason": reason, "gatewayAppId": gateway_app_id}


def config_with(**changed: Any) -> dict[str, Any]:
    return {**CONFIG, **changed}


def kms_with(**changed: Any) -> dict[str, Any]:
    return config_with(kms={**CONFIG["kms"], **changed})


def app_with(**changed: Any) -> dict[str, Any]:
    return config_with(apps={"0xa0": {**CONFIG["apps"]["0xa0"], **changed}})


def write(path: Path, document: object) -> Path:
    return write_text(path, json.dumps(document))


def write_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


async def ask(client: Client, caller: str, **changed: Any) -> Any:
    async with client.post(f"/bootAuth/{caller}", json={**BOOT_INFO, **changed}) as response:
        assert response.status == 200
        return await response.json()


async def decide(path: Path, caller: str, contract: Contract = "readme", **changed: Any) -> Any:
    async with TestClient(TestServer(simple_app(path, contract=contract))) as client:
        return await ask(client, caller, **changed)


async def info(path: Path | str) -> Any:
    async with TestClient(TestServer(simple_app(path))) as client, client.get("/") as response:
        assert response.status == 200
        return await response.json()
