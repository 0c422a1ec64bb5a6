"""JSON Schemas of what `/api` answers, for the OpenAPI page, and the shorthand that makes an `/api` route."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from services.gateway.management.bodies import Body
from services.gateway.routes import Handler, RouteSpec, Schema

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
TIME: Schema = {"type": "string", "format": "date-time"}
OPTIONAL_TIME: Schema = {"type": ["string", "null"], "format": "date-time"}
OPTIONAL_TEXT: Schema = {"type": ["string", "null"]}
OPTIONAL_NUMBER: Schema = {"type": ["number", "null"]}
INTEGER: Schema = {"type": "integer"}
USD: Schema = {"type": "string", "pattern": r"^-?[0-9]+\.[0-9]{2,9}$"}


def obj(**properties: Schema) -> Schema:
    """An object with exactly these fields, all there."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def page(items: Schema) -> Schema:
    return obj(data=array(items), next_cursor=OPTIONAL_TEXT)


TEAM = obj(team_id=TEXT, slug=TEXT, name=TEXT, ppt_fallback=FLAG, created_at=TIME)
_KEY_FIELDS = {"key_id": TEXT, "name": TEXT, "prefix": TEXT, "scopes": array(TEXT), "created_at": TIME}
KEY = obj(**_KEY_FIELDS)
KEY_WITH_SECRET = obj(
    **_KEY_FIELDS, secret={"type": ["string", "null"], "description": "Null in a repeated answer."}
)
_QUEUE_FIELDS = {
    "credential_id": TEXT, "name": TEXT, "url": TEXT, "vhost": TEXT, "username": TEXT, "exchange": TEXT,
    "reply_queue": TEXT, "refusals_queue": TEXT, "key_id": TEXT, "created_at": TIME, "rotated_at": OPTIONAL_TIME,
    "ready": {"type": "boolean", "description": "Whether the broker knows it, with its current secret."},
}  # fmt: skip
QUEUE_CREDENTIAL = obj(**_QUEUE_FIELDS)
QUEUE_CREDENTIAL_WITH_SECRET = obj(
    **_QUEUE_FIELDS, secret={"type": ["string", "null"], "description": "Null in a repeated answer."}
)
BASE: Schema = {
    **obj(model_id=TEXT, name=TEXT, revision=COUNT),
    "type": ["object", "null"],
    "description": "The model that an adapter stands on; null for a model with weights of its own.",
}
MODEL = obj(
    model_id=TEXT, name=TEXT, revision=COUNT, model_type=TEXT, signature=TEXT, context_tokens=COUNT, base=BASE,
    url=TEXT, snippet=TEXT,
)  # fmt: skip
UPLOADED_FILE = obj(name=TEXT, size_bytes=COUNT, sha256=TEXT)
UPLOAD = obj(upload_id=TEXT, files=array(UPLOADED_FILE), created_at=TIME, expires_at=TIME)
REVISION = obj(
    revision=COUNT, current=FLAG, context_tokens=COUNT, size_bytes=COUNT, base=BASE, created_at=TIME
)
MODEL_TYPE = obj(name=TEXT, signature=TEXT, architecture=TEXT, parameter_count=COUNT)
OPTION = obj(
    option_id=TEXT, model_type=TEXT, name=TEXT, device_kind=TEXT, precision=TEXT, max_batch=COUNT,
    max_context_tokens=COUNT, kv_tokens=COUNT, hourly_rate_usd=USD, hourly_rate_nanousd=COUNT,
)  # fmt: skip
PRICE = obj(
    price_id=TEXT, model_type=TEXT, work_class=TEXT, prompt_usd_per_million=USD, completion_usd_per_million=USD,
    prompt_nanousd=COUNT, completion_nanousd=COUNT, starts_at=TIME,
)  # fmt: skip
RATE = obj(rate_id=TEXT, option_id=TEXT, hourly_rate_usd=USD, hourly_rate_nanousd=COUNT, starts_at=TIME)
OPTIONAL_COUNT: Schema = {"type": ["integer", "null"], "minimum": 0}
OPTIONAL_USD: Schema = {**USD, "type": ["string", "null"]}
_ACCOUNT_FIELDS = {
    "team": TEXT, "pays": {"enum": ["prepaid", "postpaid"]}, "credit_limit_nanousd": OPTIONAL_COUNT,
    "credit_limit_usd": OPTIONAL_USD, "balance_nanousd": INTEGER, "balance_usd": USD,
    "spendable_nanousd": OPTIONAL_COUNT, "spendable_usd": OPTIONAL_USD,
}  # fmt: skip
ACCOUNT = obj(**_ACCOUNT_FIELDS)
CREDIT = obj(**_ACCOUNT_FIELDS, transaction_id=TEXT, amount_nanousd=COUNT, amount_usd=USD)
TOP_UP = obj(top_up_id=TEXT, url=TEXT, amount_nanousd=COUNT, amount_usd=USD)
DEPOSIT = obj(
    transaction_id=TEXT, kind={"enum": ["credit", "payment", "correction"]}, corrects=OPTIONAL_TEXT, words=TEXT,
    amount_nanousd=INTEGER, amount_usd=USD, created_at=TIME,
)  # fmt: skip
_BUDGET_FIELDS: dict[str, Schema] = {
    "budget_id": TEXT, "scope": TEXT, "scope_id": TEXT, "period": TEXT,
    "period_start": {"type": "string", "format": "date"},
    "limit_usd": USD, "limit_nanousd": COUNT, "spent_usd": USD, "spent_nanousd": INTEGER, "created_at": TIME,
}  # fmt: skip
BUDGET = obj(
    **_BUDGET_FIELDS, alert_percents=array(COUNT), actions=array(TEXT), reserved_usd=USD, reserved_nanousd=COUNT,
    period_end={"type": "string", "format": "date"}, is_spent=FLAG, changed_at=TIME,
)  # fmt: skip
ALERT = obj(**_BUDGET_FIELDS, alert_id=TEXT, percent=COUNT)
PLACE = obj(
    place=COUNT, state=TEXT, phase=TEXT, device=TEXT, node_id=TEXT, worker_id=TEXT, granted_at=OPTIONAL_TIME,
    ready_at=OPTIONAL_TIME,
)  # fmt: skip
QUOTA = obj(places=COUNT, taken=COUNT, own=FLAG)
SCALING_WINDOW = obj(name=TEXT, start=TEXT, duration_minutes=COUNT, time_zone=TEXT, min=COUNT, max=COUNT)
SCALING = obj(
    autoscaling=FLAG, min=COUNT, max=COUNT, idle_timeout_s=COUNT, when_asleep={"enum": ["wake", "refuse"]},
    target_wait_s=COUNT, windows=array(SCALING_WINDOW),
    in_force=obj(min=COUNT, max=COUNT, window=OPTIONAL_TEXT, until=OPTIONAL_TIME),
    wanted_gpus={"type": ["integer", "null"], "description": "Null while the resource is off."}, why=TEXT,
)  # fmt: skip
RESOURCE = obj(
    resource_id=TEXT, name=TEXT, model_type=TEXT, option=OPTION, pool=FLAG, gpus=COUNT,
    wanted={"enum": ["on", "off"]},
    state={"enum": ["off", "starting", "live", "draining", "asleep", "failed"]},
    indicator={"enum": ["grey", "green"]},
    reason=TEXT, expected_live_at=OPTIONAL_TIME, live_gpus=COUNT, places=array(PLACE),
    models=array(obj(model_id=TEXT, name=TEXT, revision=COUNT, url=TEXT, snippet=TEXT)), scaling=SCALING,
    created_at=TIME, changed_at=TIME,
)  # fmt: skip
RESOURCE_MODEL = obj(
    model_id=TEXT, name=TEXT, revision=COUNT,
    pin={"anyOf": [{"type": "null"}, obj(copies={"anyOf": [COUNT, {"const": "all"}]}, pinned_at=TIME)]},
    workers=array(obj(
        place=COUNT, worker_id=TEXT, place_state=TEXT, revision=COUNT,
        state={"enum": ["absent", "loading", "ready", "evicting", "failed"]}, reason=TEXT, pinned=FLAG, preload=FLAG,
        weight_bytes=COUNT, swaps=COUNT, swap_ms_p50=OPTIONAL_NUMBER, swap_ms_p95=OPTIONAL_NUMBER, hits=COUNT, misses=COUNT,
        changed_at=OPTIONAL_TIME,
    )),
)  # fmt: skip
DECISION = obj(decision_id=COUNT, decided_at=TIME, action=TEXT, words=TEXT)
MODEL_ALARM = obj(model_id=TEXT, revision=COUNT, worker_id=TEXT, reason=TEXT, found_at=TIME)
USAGE_ROW = obj(
    group=OPTIONAL_TEXT, requests=COUNT, prompt_tokens=COUNT, completion_tokens=COUNT, tokens_nanousd=INTEGER,
    tokens_usd=USD, minutes=COUNT, minutes_nanousd=INTEGER, minutes_usd=USD,
)  # fmt: skip
USAGE: Schema = {
    "type": "object",
    "properties": {
        "from": TIME, "to": TIME, "group_by": TEXT, "data": array(USAGE_ROW), "balance_nanousd": INTEGER,
        "balance_usd": USD,
    },
    "required": ["from", "to", "group_by", "data", "balance_nanousd", "balance_usd"],
    "additionalProperties": False,
}  # fmt: skip
REQUEST = obj(
    request_id=TEXT, job_id=TEXT, key_id=TEXT, resource_id=TEXT, billing=TEXT, work_class=TEXT, operation=TEXT,
    model=TEXT, model_type=TEXT, revision=COUNT, outcome=TEXT, error_code=OPTIONAL_TEXT, attempts=COUNT,
    prompt_tokens=COUNT, completion_tokens=COUNT, charged_nanousd=INTEGER, charged_usd=USD,
    queue_ms=OPTIONAL_NUMBER, swap_ms=OPTIONAL_NUMBER, prefill_ms=OPTIONAL_NUMBER, decode_ms=OPTIONAL_NUMBER,
    accepted_at=TIME, first_token_at=OPTIONAL_TIME, finished_at=TIME,
)  # fmt: skip
REQUEST_JOBS = obj(request_id=TEXT, jobs=array(REQUEST))


def body_schema(kind: type[Body]) -> Schema:
    """Return the struct's JSON Schema, complete in itself."""
    (_,), components = msgspec.json.schema_components([kind])
    schema: Schema = components[kind.__name__]
    return schema


def route(
    method: str,
    path: str,
    handler: Handler,
    scope: str,
    summary: str,
    body: type[Body] | None = None,
    answers: Mapping[int, Schema | None] | None = None,
    query: Mapping[str, Schema] | None = None,
    max_body_bytes: int | None = None,
) -> RouteSpec:
    """Return an `/api` route."""
    return RouteSpec(
        method=method,
        path=path,
        handler=handler,
        scope=scope,
        summary=summary,
        error_shape="problem",
        request_schema=None if body is None else body_schema(body),
        responses=answers,
        query=query or {},
        max_body_bytes=max_body_bytes,
        tag=path.split("/")[2],
    )
