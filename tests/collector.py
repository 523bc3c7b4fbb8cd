"""A collector of OpenTelemetry, which reads what it is sent with the classes of OpenTelemetry's own protocol."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

KIND = {Span.SPAN_KIND_INTERNAL: "INTERNAL", Span.SPAN_KIND_SERVER: "SERVER", Span.SPAN_KIND_CLIENT: "CLIENT"}


@dataclass(frozen=True)
class Received:
    """One span that was received, with the attributes of its resource."""

    span: Span
    resource: dict[str, Any]

    @property
    def trace_id(self) -> str:
        return self.span.trace_id.hex()

    @property
    def id(self) -> str:
        return self.span.span_id.hex()

    @property
    def parent(self) -> str:
        return self.span.parent_span_id.hex()

    @property
    def service(self) -> str:
        return str(self.resource["service.name"])

    @property
    def kind(self) -> str:
        return KIND[self.span.kind]

    @property
    def attributes(self) -> dict[str, Any]:
        return {each.key: value_of(each.value) for each in self.span.attributes}

    @property
    def events(self) -> dict[str, dict[str, Any]]:
        return {event.name: {each.key: value_of(each.value) for each in event.attributes} for event in self.span.events}


def value_of(value: AnyValue) -> Any:
    """Return the value of an attribute."""
    kind = value.WhichOneof("value")
    assert kind is not None
    return [value_of(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)


class Collector:
    """Takes spans; answers `status` instead while that is not 200, and nothing while `gate` is not set."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        self.bodies: list[bytes] = []
        self.status = 200
        self.asked = self.refused = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.url = ""
        self._arrived = asyncio.Condition()

    async def take(self, request: web.Request) -> web.Response:
        """Read one request."""
        body = await request.read()
        self.asked += 1
        async with self._arrived:
            self._arrived.notify_all()
        await self.gate.wait()
        async with self._arrived:
            self._arrived.notify_all()
            if self.status != 200:
                self.refused += 1
                return web.Response(status=self.status)
            self.bodies.append(body)
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                resource = {each.key: value_of(each.value) for each in group.resource.attributes}
                self.spans += [Received(span, resource) for scope in group.scope_spans for span in scope.spans]
        content = ExportTraceServiceResponse().SerializeToString()
        return web.Response(body=content, content_type="application/x-protobuf")

    async def until(self, is_there: Callable[[], Any]) -> None:
        """Wait until what has arrived fulfils a condition."""
        async with self._arrived:
            await self._arrived.wait_for(is_there)

    async def trace(self, trace_id: str, root: str) -> list[Received]:
        """Return the spans of a trace once there is one of that name."""
        await self.until(lambda: any(each.trace_id == trace_id and each.span.name == root for each in self.spans))
        return [each for each in self.spans if each.trace_id == trace_id]


@asynccontextmanager
async def running_collector() -> AsyncIterator[Collector]:
    """Run a collector on a free port."""
    collector, app = Collector(), web.Application(client_max_size=2**26)
    app.router.add_post("/v1/traces", collector.take)
    async with TestServer(app) as server:
        collector.url = str(server.make_url("/"))
        yield collector
