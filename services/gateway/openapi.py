"""The OpenAPI 3.1 description, made from the same route values that make the router: neither can drift. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from services.gateway.routes import ANY_KEY, PUBLIC, ErrorShape, RouteSpec, Schema

_PARAMETER = re.compile(r"\{([a-z_]+)\}")

PROBLEM: Schema = {
    "type": "object",
    "description": "RFC 9457.",
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string"},
        "param": {"type": "string"},
        "request_id": {"type": "string"},
    },
    "required": ["type", "title", "status", "detail", "code", "request_id"],
}
ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_ERRORS: dict[ErrorShape, tuple[str, str]] = {
    "problem": ("application/problem+json", "Problem"),
    "openai": ("application/json", "Error"),
    "vendor": ("application/json", "Error"),
}


def describe(specs: Sequence[RouteSpec], version: str) -> dict[str, Any]:
    """Return the description of these routes."""
    paths: dict[str, dict[str, Any]] = {}
    for spec in specs:
        paths.setdefault(spec.template, {})[spec.method.lower()] = _operation(spec)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Roundhouse",
            "version": version,
            "description": "Hosts language models on GPUs for teams. `/v1` speaks OpenAI's API, `/api` manages.",
        },
        "paths": paths,
        "components": {
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "An API key, `sk-...`."}
            },
            "schemas": {"Problem": PROBLEM, "Error": ERROR},
        },
        "security": [{"key": []}],
    }


def _operation(spec: RouteSpec) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _operation_id(spec),
        "summary": spec.summary,
        "tags": [spec.tag],
        "responses": _responses(spec),
    }
    if spec.scope == PUBLIC:
        operation["security"] = []
    elif spec.scope != ANY_KEY:
        operation["description"] = f"Needs a key with the scope `{spec.scope}`."
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PARAMETER.findall(spec.template)
    ]
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in spec.query.items()
    ]
    if spec.method == "POST" and spec.path.startswith("/api/"):
        schema = {"type": "string", "minLength": 1, "maxLength": 255}
        parameters.append({"name": "Idempotency-Key", "in": "header", "required": False, "schema": schema})
    if parameters:
        operation["parameters"] = parameters
    if spec.request_schema is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {spec.request_content_type: {"schema": spec.request_schema}},
        }
    elif spec.max_body_bytes is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    return operation


def _operation_id(spec: RouteSpec) -> str:
    words = re.findall(r"[a-z0-9]+", spec.template.lower())
    return "_".join([spec.method.lower(), *words]) if words else f"{spec.method.lower()}_root"


def _responses(spec: RouteSpec) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, schema in (spec.responses or {200: None}).items():
        response: dict[str, Any] = {"description": HTTPStatus(status).phrase}
        if schema is not None:
            response["content"] = {"application/json": {"schema": schema}}
        responses[str(status)] = response
    if spec.scope != PUBLIC:
        content_type, name = _ERRORS[spec.error_shape]
        responses["default"] = {
            "description": "A refusal with its code.",
            "content": {content_type: {"schema": {"$ref": f"#/components/schemas/{name}"}}},
        }
    return responses
