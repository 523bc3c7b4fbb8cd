"""The answer of `GET /openapi.json`: the webhook's interface, for readers and client generators.

Upstream has such a file beside auth-mock, and does not serve it. It only describes the interface; `boot_info` and
`allowlist` validate requests.
"""

from typing import Any, Final

_TEXT: Final = {"type": "string"}

_SCHEMAS: Final[dict[str, Any]] = {
    "BootInfo": {
        "type": "object",
        "description": "What the KMS verified about the machine; hex with or without 0x, in any case.",
        "required": ["mrAggregated", "osImageHash", "appId", "composeHash", "instanceId", "deviceId"],
        "properties": {
            "mrAggregated": _TEXT,
            "osImageHash": _TEXT,
            "appId": _TEXT,
            "composeHash": _TEXT,
            "instanceId": _TEXT,
            "deviceId": _TEXT,
            "tcbStatus": {**_TEXT, "default": ""},
            "advisoryIds": {"type": "array", "items": _TEXT, "default": []},
            "mrSystem": {**_TEXT, "default": ""},
        },
    },
    "Decision": {
        "type": "object",
        "required": ["isAllowed", "reason", "gatewayAppId"],
        "properties": {"isAllowed": {"type": "boolean"}, "reason": _TEXT, "gatewayAppId": _TEXT},
    },
    "Info": {
        "type": "object",
        "description": "The fields a KMS reads; a webhook may add others.",
        "required": ["status", "kmsContractAddr", "gatewayAppId", "chainId", "appImplementation"],
        "properties": {
            "status": _TEXT,
            "kmsContractAddr": _TEXT,
            "gatewayAppId": _TEXT,
            "chainId": {"type": "integer"},
            "appImplementation": _TEXT,
        },
    },
    "Health": {"type": "object", "required": ["status"], "properties": {"status": _TEXT}},
    "Refusal": {
        "type": "object",
        "required": ["success", "error"],
        "properties": {
            "success": {"type": "boolean"},
            "error": {
                "type": "object",
                "required": ["issues", "name"],
                "properties": {"issues": {"type": "array", "items": {"type": "object"}}, "name": _TEXT},
            },
        },
    },
}


_ALLOWLIST_BOOT_INFO: Final[dict[str, Any]] = {
    "type": "object",
    "description": "What the KMS verified about the machine; hex with or without 0x, in any case.",
    "properties": dict.fromkeys(("mrAggregated", "osImageHash", "appId", "composeHash", "deviceId"), _TEXT),
}


def document(title: str) -> dict[str, object]:
    """Build the OpenAPI 3.0.3 document of auth-simple or auth-mock, under this title."""
    malformed = {**_json("Refusal"), "text/plain": {"schema": _TEXT}}
    refusals = {
        "400": {"description": "No boot info (JSON) or not JSON (text)", "content": malformed},
        "413": {"description": "The body is too large", "content": {"text/plain": {"schema": _TEXT}}},
    }
    return _document(title, _SCHEMAS, refusals)


def eth_document(title: str, *, bounds_request: bool) -> dict[str, object]:
    """Build the OpenAPI 3.0.3 document of auth-eth-bun, under this title; `bounds_request` as next has it."""
    info = {**_SCHEMAS["Info"], "description": "What the contract says of itself, in the latest state."}
    info["required"] = ["status", "kmsContractAddr", "ethRpcUrl", *info["required"][2:], "appAuthImplementation"]
    info["properties"] = {**info["properties"], "ethRpcUrl": _TEXT, "appAuthImplementation": _TEXT}
    failure = {"type": "object", "required": ["status", "message"], "properties": {"status": _TEXT, "message": _TEXT}}
    schemas = _SCHEMAS | {"Info": info, "Failure": failure}
    refusal = "Decision" if bounds_request else "Refusal"
    refusals = {
        "400": {
            "description": "No boot info (JSON) or not JSON (text)",
            "content": {**_json(refusal), "text/plain": {"schema": _TEXT}},
        },
        "413": {"description": "The body is too large", "content": {"text/plain": {"schema": _TEXT}}},
    }
    document = _document(title, schemas, refusals)
    unavailable = {"description": "The chain gives no answer", "content": _json("Failure")}
    document["paths"]["/"]["get"]["responses"]["500"] = unavailable
    return document


def allowlist_document(title: str) -> dict[str, object]:
    """Build the OpenAPI 3.0.3 document of dstack-auth, under this title."""
    schemas = {name: schema for name, schema in _SCHEMAS.items() if name != "Refusal"}
    reasons = {"400": "Not JSON", "413": "The body is too large", "422": "JSON that is not a boot info"}
    page = {"text/html": {"schema": _TEXT}}
    refusals = {status: {"description": reason, "content": page} for status, reason in reasons.items()}
    return _document(title, schemas | {"BootInfo": _ALLOWLIST_BOOT_INFO}, refusals)


def _document(title: str, schemas: dict[str, Any], refusals: dict[str, Any]) -> dict[str, Any]:
    return {
        "openapi": "3.0.3",
        "info": {"title": title, "version": "1.0.0"},
        "paths": {
            "/": {"get": _get("Describe the webhook", "Info")},
            "/bootAuth/app": {"post": _boot_auth("Decide whether an app is allowed to boot", refusals)},
            "/bootAuth/kms": {"post": _boot_auth("Decide whether a KMS is allowed to boot", refusals)},
            "/health": {"get": _get("Report that the webhook answers", "Health")},
        },
        "components": {"schemas": schemas},
    }


def _get(summary: str, schema: str) -> dict[str, object]:
    return {"summary": summary, "responses": {"200": {"description": schema, "content": _json(schema)}}}


def _boot_auth(summary: str, refusals: dict[str, Any]) -> dict[str, object]:
    decision = {"description": "The decision; a denial has status 200, too", "content": _json("Decision")}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _json("BootInfo")},
        "responses": {"200": decision, **refusals},
    }


def _json(schema: str) -> dict[str, object]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
