"""JSON Schemas of inference's good answers, for the OpenAPI page. Bodies' schemas are made from their tables (`parameters`)."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_STRING: Schema = {"type": "string"}
_INTEGER: Schema = {"type": "integer"}
_NUMBER: Schema = {"type": "number"}
_FINISH_REASON: Schema = {"enum": ["stop", "length"]}

MODEL = _object(id=_STRING, object={"const": "model"}, created=_INTEGER, owned_by=_STRING)
MODEL_LIST = _object(object={"const": "list"}, data=_list(MODEL))

_TIMINGS = _object(queue_ms=_NUMBER, swap_ms=_NUMBER, prefill_ms=_NUMBER, decode_ms=_NUMBER)
USAGE = _object(
    prompt_tokens=_INTEGER,
    completion_tokens=_INTEGER,
    total_tokens=_INTEGER,
    roundhouse=_TIMINGS,
)

COMPLETION_LOGPROBS = _object(
    tokens=_list(_STRING),
    token_logprobs=_list(_or_null(_NUMBER)),
    top_logprobs=_list(_or_null({"type": "object", "additionalProperties": _NUMBER})),
    text_offset=_list(_INTEGER),
)
_CHAT_TOKEN = _object(token=_STRING, logprob=_NUMBER, bytes=_list(_INTEGER))
CHAT_LOGPROBS = _object(
    content=_list(
        _object(token=_STRING, logprob=_NUMBER, bytes=_list(_INTEGER), top_logprobs=_list(_CHAT_TOKEN))
    ),
    refusal={"type": "null"},
)

COMPLETION = _object(
    id=_STRING,
    object={"const": "text_completion"},
    created=_INTEGER,
    model=_STRING,
    system_fingerprint=_STRING,
    choices=_list(
        _object(
            index=_INTEGER, text=_STRING, logprobs=_or_null(COMPLETION_LOGPROBS), finish_reason=_FINISH_REASON
        )
    ),
    usage=USAGE,
)
CHAT_COMPLETION = _object(
    id=_STRING,
    object={"const": "chat.completion"},
    created=_INTEGER,
    model=_STRING,
    system_fingerprint=_STRING,
    choices=_list(
        _object(
            index=_INTEGER,
            message=_object(role={"const": "assistant"}, content=_STRING, refusal={"type": "null"}),
            logprobs=_or_null(CHAT_LOGPROBS),
            finish_reason=_FINISH_REASON,
        )
    ),
    usage=USAGE,
)
EMBEDDINGS = _object(
    object={"const": "list"},
    data=_list(
        _object(
            object={"const": "embedding"},
            index=_INTEGER,
            embedding={
                "anyOf": [_list(_NUMBER), _STRING],
                "description": "Of length 1. As text: base64 of little-endian 32-bit floats.",
            },
        )
    ),
    model=_STRING,
    usage=_object(
        prompt_tokens=_INTEGER,
        total_tokens=_INTEGER,
        roundhouse=_TIMINGS,
    ),
)
VENDOR_COMPLETION: Schema = {
    "type": "object",
    "properties": {
        "result": _list(
            {
                "type": "object",
                "properties": {"completion": _STRING, "logprobs": COMPLETION_LOGPROBS},
                "required": ["completion"],
            }
        ),
        "timestamp": _INTEGER,
    },
    "required": ["result", "timestamp"],
}
