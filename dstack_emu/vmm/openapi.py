"""The OpenAPI document of a VMM: one path for each RPC and page, made from the tables that serve them."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from dstack_emu.transport.service import ServiceTable

_TYPES: Final[Mapping[int, dict[str, Any]]] = {
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "format": "hex"},
    FieldDescriptor.TYPE_STRING: {"type": "string"},
}
_REFUSED: Final = {
    "application/json": {"schema": {"$ref": "#/components/schemas/Error"}},
    "application/octet-stream": {},
}
_ERROR: Final = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}


def openapi(version: str, tables: Mapping[str, ServiceTable[None]], pages: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Build the document of the services by their mounts, and of pages (path, summary)."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {}
    for mount, table in tables.items():
        for rpc in table.rpcs.values():
            request, answer = rpc.request_type.DESCRIPTOR, rpc.response_type.DESCRIPTOR
            _add_schema(schemas, request)
            _add_schema(schemas, answer)
            paths[f"{mount}/{rpc.name}"] = {
                "post": {
                    "operationId": f"{table.prefix}{rpc.name}".replace(".", "_"),
                    "tags": [table.prefix.rstrip(".")],
                    "parameters": [{"name": "json", "in": "query", "allowEmptyValue": True, "schema": {}}],
                    "requestBody": {"content": _content(request)},
                    "responses": {
                        "200": {"description": "Done", "content": _content(answer)},
                        "400": {"description": "Refused", "content": _REFUSED},
                    },
                }
            }
    for path, summary in pages:
        responses = {"200": {"description": "Found"}, "4XX": {"description": "Refused, or not found"}}
        paths[path] = {"get": {"summary": summary, "responses": responses}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "VMM (EMULATED)", "version": version},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _reference(message: Descriptor) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{message.name}"}


def _content(message: Descriptor) -> dict[str, Any]:
    return {**_json(_reference(message)), "application/octet-stream": {}}


def _add_schema(schemas: dict[str, Any], message: Descriptor) -> None:
    if message.name in schemas:
        return
    properties: dict[str, Any] = {}
    schemas[message.name] = {"type": "object", "properties": properties}
    for field in message.fields:
        if field.message_type is None:
            schema = _TYPES.get(field.type, {"type": "integer"})
        else:
            schema = _reference(field.message_type)
            _add_schema(schemas, field.message_type)
        if field.is_repeated:
            schema = {"type": "array", "items": schema}
        elif field.has_presence:
            schema = {"anyOf": [schema, {"type": "null"}]}
        properties[field.name] = schema
