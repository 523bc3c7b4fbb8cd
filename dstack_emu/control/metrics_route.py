"""The route of the metrics: the only call of the control API whose answer is no JSON."""

import asyncio
import importlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from dstack_emu.deployment.deployment import Deployment

if TYPE_CHECKING:
    from dstack_emu.control.metrics import Exposition

METRICS: Final = "/metrics"

DESCRIBED: Final[dict[str, Any]] = {
    "get": {
        "summary": "The metrics of the stack, for Prometheus",
        "operationId": "get_metrics",
        "responses": {"200": {"description": "In the format that Accept asks for", "content": {"text/plain": {}}}},
    }
}
"""What the OpenAPI document says of it."""


def metrics_handler(deployment: Deployment) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Make the handler, which imports the library of the formats when it is first asked."""
    expositions: list[Exposition] = []

    async def handle(request: web.Request) -> web.Response:
        module = await asyncio.to_thread(importlib.import_module, "dstack_emu.control.metrics")
        if not expositions:
            expositions.append(module.Exposition(deployment))
        text, content_type = expositions[0].text(request.headers.get("Accept", ""))
        return web.Response(body=text, headers={"Content-Type": content_type})

    return handle
