"""OpenAI's file and batch objects: as JSON, as JSON Schema, and the body that makes a batch. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, cast

from services.gateway.batches.tables import FileRow
from shared.completion_window import WORDS, window_s
from shared.inference.errors import bad_request
from shared.inference.rules import (
    Field,
    IntegerIn,
    Metadata,
    ObjectOf,
    OneOf,
    Schema,
    Text,
    by_name,
    invalid_value,
    object_schema,
    parse_fields,
)
from shared.messages import OwnResource
from shared.usd import format_usd

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
MIN_KEEP_S, MAX_KEEP_S = 3600, 30 * 24 * 3600

_BATCH_FIELDS = by_name(
    Field("input_file_id", Text(1, 64), required=True),
    Field("endpoint", OneOf(ENDPOINTS), required=True),
    Field("completion_window", Text(2, 8), required=True),
    Field("metadata", Metadata()),
    Field(
        "output_expires_after",
        ObjectOf(
            (
                Field("anchor", OneOf(("created_at",)), required=True),
                Field("seconds", IntegerIn(MIN_KEEP_S, MAX_KEEP_S), required=True),
            )
        ),
    ),
    Field(
        "own_resource",
        ObjectOf(
            (
                Field("option", Text(1, 63)),
                Field("max_gpus", IntegerIn(1, 64)),
                Field("quote_id", Text(1, 64)),
            )
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class NewBatch:
    input_file_id: str
    endpoint: Endpoint
    completion_window: str
    completion_window_s: int
    metadata: Mapping[str, str]
    output_expires_after_s: int | None
    own_resource: OwnResource | None = None
    """GPUs for this batch alone; None: it runs where live requests do."""


def create_batch_schema() -> Schema:
    return object_schema(_BATCH_FIELDS.values())


def parse_batch(body: Mapping[str, Any]) -> NewBatch:
    """Read the body of `POST /v1/batches`. Raises ApiError 400."""
    values = parse_fields(body, _BATCH_FIELDS)
    completion_window_s = read_window(values["completion_window"])
    keep = values["output_expires_after"]
    metadata = body.get("metadata") or {}  # the rule has checked it
    if any("\x00" in key or "\x00" in value for key, value in metadata.items()):
        raise bad_request("invalid_metadata", "metadata may hold no null characters.", "metadata")
    return NewBatch(
        input_file_id=values["input_file_id"],
        endpoint=cast(Endpoint, values["endpoint"]),
        completion_window=values["completion_window"],
        completion_window_s=completion_window_s,
        metadata=metadata,
        output_expires_after_s=keep["seconds"] if keep else None,
        own_resource=_own_resource(values["own_resource"]),
    )


def _own_resource(found: Mapping[str, Any] | None) -> OwnResource | None:
    if found is None:
        return None
    return OwnResource(
        option=found.get("option"), max_gpus=found.get("max_gpus"), quote_id=found.get("quote_id")
    )


def read_window(text: str) -> int:
    """Return a completion window in seconds. Raises ApiError 400."""
    found = window_s(text)
    if found is None:
        raise invalid_value("completion_window", WORDS)
    return found


def file_json(file: FileRow) -> dict[str, Any]:
    shown = {
        "id": file.file_id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": unix_s(file.created_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }
    return shown | ({"expires_at": unix_s(file.expires_at)} if file.expires_at else {})


def batch_json(row: Mapping[str, Any], now_unix_s: float) -> dict[str, Any]:
    errors = json.loads(row["errors"])
    moments = ("created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at",
               "expired_at", "cancelling_at", "cancelled_at")  # fmt: skip
    prompt, completion = row["prompt_tokens"], row["completion_tokens"]
    return {
        "id": row["batch_id"],
        "object": "batch",
        "endpoint": row["endpoint"],
        "model": row["model_name"],
        "errors": {"object": "list", "data": errors} if errors else None,
        # None for one whose lines came through the queue.
        "input_file_id": row["input_file_id"] or None,
        "completion_window": row["completion_window"],
        "status": row["state"],
        "output_file_id": row["output_file_id"],
        "error_file_id": row["error_file_id"],
        **{name: unix_s(row[name]) for name in moments},
        "request_counts": {"total": row["total"], "completed": row["completed"], "failed": row["failed"]},
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + completion,
        },
        "metadata": json.loads(row["metadata"]) or None,
        "roundhouse": _progress(row, now_unix_s),
    }


def _progress(row: Mapping[str, Any], now_unix_s: float) -> dict[str, Any]:
    """How fast it goes, when it should be over, and what it waits for. Expected at the pace of the last seconds."""
    runs = row["state"] == "in_progress"
    pace = float(row["lines_per_s"]) if runs else 0.0
    left = row["total"] - row["completed"] - row["failed"]
    return {
        "lines_per_s": round(pace, 2),
        "tokens_per_s": round(float(row["tokens_per_s"]), 1) if runs else 0.0,
        "expected_finish_at": round(now_unix_s + left / pace) if pace > 0 else None,
        "waiting_for": (row["waiting_for"] or None) if runs else None,
        "own_resource": None if row["own_state"] is None else _own_json(row),
    }


def _own_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a batch that has a resource for itself was quoted, and what it came to. Minutes are posted as they go by."""
    quoted = None if row["own_quoted"] is None else json.loads(row["own_quoted"])
    offer: dict[str, Any] = {}
    if quoted is not None:
        offer = next(each for each in quoted["offers"] if each["gpus"] == quoted["gpus"])
    ended = next((row[name] for name in ("completed_at", "expired_at", "cancelled_at") if row[name]), None)
    return {
        "state": row["own_state"],
        "resource_id": row["own_resource_id"],
        "option": None if quoted is None else quoted["option"],
        "gpus": row["own_gpus"],
        "quoted": None
        if quoted is None
        else {
            "gpus": quoted["gpus"],
            "finish_s": offer["finish_s"],
            "minutes": offer["minutes"],
            "cost_nanousd": offer["cost_nanousd"],
            "cost_usd": offer["cost_usd"],
        },
        "real": {
            "finish_s": None if ended is None else round((ended - row["created_at"]).total_seconds()),
            "minutes": row["own_minutes"],
            "cost_nanousd": row["own_cost_nanousd"],
            "cost_usd": format_usd(row["own_cost_nanousd"]),
        },
    }


def unix_s(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


# ---- JSON Schema of the answers

_TEXT, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
_MAYBE_TEXT, _MAYBE_COUNT = {"type": ["string", "null"]}, {"type": ["integer", "null"]}
FILE: Schema = {
    "type": "object",
    "properties": {
        "id": _TEXT,
        "object": {"const": "file"},
        "bytes": _COUNT,
        "created_at": _COUNT,
        "expires_at": _COUNT,
        "filename": _TEXT,
        "purpose": {"enum": ["batch", "batch_output"]},
        "status": {"const": "processed"},
    },
    "required": ["id", "object", "bytes", "created_at", "filename", "purpose", "status"],
}
DELETED: Schema = {
    "type": "object",
    "properties": {"id": _TEXT, "object": {"const": "file"}, "deleted": {"const": True}},
    "required": ["id", "object", "deleted"],
}
BATCH: Schema = {
    "type": "object",
    "properties": {
        "id": _TEXT,
        "object": {"const": "batch"},
        "endpoint": {"enum": list(ENDPOINTS)},
        "model": _MAYBE_TEXT,
        "errors": {"type": ["object", "null"]},
        "input_file_id": _MAYBE_TEXT,
        "completion_window": _TEXT,
        "status": _TEXT,
        "output_file_id": _MAYBE_TEXT,
        "error_file_id": _MAYBE_TEXT,
        "created_at": _COUNT,
        "expires_at": _COUNT,
        **{
            name: _MAYBE_COUNT
            for name in ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at",
                         "cancelled_at")
        },
        "request_counts": {
            "type": "object",
            "properties": {"total": _COUNT, "completed": _COUNT, "failed": _COUNT},
            "required": ["total", "completed", "failed"],
        },
        "usage": {"type": "object"},
        "metadata": {"type": ["object", "null"]},
        "roundhouse": {"type": "object"},
    },
    "required": ["id", "object", "endpoint", "input_file_id", "completion_window", "status", "request_counts"],
}  # fmt: skip


def list_of(schema: Schema) -> Schema:
    return {
        "type": "object",
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": schema},
            "first_id": _MAYBE_TEXT,
            "last_id": _MAYBE_TEXT,
            "has_more": {"type": "boolean"},
        },
        "required": ["object", "data", "has_more"],
    }
