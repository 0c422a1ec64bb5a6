"""The demo: a team, its key, three models of one type, options, prices, a live resource, and a first answer.

Everything goes through the public HTTP API, with the platform's key; each step looks first, so that it may be repeated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from infra.local.demo_model import BASE_NAME
from infra.local.failures import SetupFailed
from infra.local.management_api import ApiError, ManagementApi
from infra.local.progress import done_line, say, step

TEAM = "demo"
PLATFORM_TEAM = "platform"
KEY_NAME = "demo"
KEY_SCOPES = ("inference", "manage")
MODEL_TYPE = "smollm2-135m"
RESOURCE = "demo"
POOL_RESOURCE = "smollm2 pool"

MAX_BATCH = 16
MAX_CONTEXT_TOKENS = 2048
KV_TOKENS = MAX_BATCH * MAX_CONTEXT_TOKENS  # every sequence of a full batch may grow to the whole context
HOURLY_RATES_USD = {"bf16": "0.60", "int8": "0.45"}
RESOURCE_PRECISION = "bf16"
POOL_PRECISION = {"cpu": "int8", "cuda": "bf16"}
"""int8 runs on processors only."""
# USD per million tokens; batch work costs half.
PRICES_USD = {"live": ("0.02", "0.06"), "batch": ("0.01", "0.03")}

LIVE_LIMIT_S = 150.0
POLL_S = 0.3
QUESTION = "What is the capital of France?"
ANSWER_TOKENS = 32
ANSWER_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Demo:
    """What the user is told at the end."""

    key: str = field(repr=False)
    model: str
    answer: str


def ensure_demo(
    platform: ManagementApi, known_key: str, model_folders: Sequence[str], device_kind: str
) -> Demo:
    """Make what is missing, wait until the resource is live, ask a first question.

    known_key: the demo team's from an earlier run, or empty. model_folders: names below the import folder; one of them
    is `BASE_NAME`. Raises SetupFailed.
    """
    try:
        _ensure_team(platform)
        key = _ensure_key(platform, known_key)
        with step("demo models registered"):
            for folder in model_folders:
                _ensure_model(platform, TEAM, folder)
            _ensure_model(platform, PLATFORM_TEAM, BASE_NAME)
        for precision in sorted({RESOURCE_PRECISION, POOL_PRECISION[device_kind]}):
            _ensure_option(platform, precision, HOURLY_RATES_USD[precision], device_kind)
        for work_class, (prompt, completion) in PRICES_USD.items():
            _ensure_price(platform, work_class, prompt, completion)
        pool_option = POOL_PRECISION[device_kind]
        _ensure_resource(platform, PLATFORM_TEAM, POOL_RESOURCE, option=pool_option, pool=True)
        resource = _ensure_resource(platform, TEAM, RESOURCE, option=RESOURCE_PRECISION, pool=False)
        _turn_on(platform, resource)
        _wait_until_live(lambda: platform.get(f"/api/resources/{resource['resource_id']}", team=TEAM))
        model = f"{TEAM}/{BASE_NAME}"
        with step("first answer"):
            answer = first_answer(ManagementApi(platform.base_url, key, timeout_s=ANSWER_LIMIT_S), model)
        return Demo(key, model, answer)
    except ApiError as error:
        raise SetupFailed(
            f"the demo could not be set up: {error}; 'make status' and 'make logs' tell more, 'make up' tries again"
        ) from error


def first_answer(api: ManagementApi, model: str) -> str:
    answer = api.post(
        "/v1/chat/completions",
        {
            "model": model,
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
        },
    )
    text = answer["choices"][0]["message"]["content"]
    if not isinstance(text, str) or not text.strip():
        raise SetupFailed("the demo model answered with an empty text: see 'make logs'")
    return text.strip()


def _ensure_team(platform: ManagementApi) -> None:
    if not any(team["slug"] == TEAM for team in platform.list("/api/teams")):
        platform.post("/api/teams", {"slug": TEAM, "name": "Demo"})


def _ensure_key(platform: ManagementApi, known_key: str) -> str:
    """The key of an earlier run if it still opens the door; else a new one (secrets can be read only once)."""
    if known_key:
        try:
            ManagementApi(platform.base_url, known_key).get("/v1/models")
            return known_key
        except ApiError as error:
            if error.status != 401:
                raise
    made = platform.post("/api/keys", {"name": KEY_NAME, "scopes": list(KEY_SCOPES)}, team=TEAM)
    return str(made["secret"])


def _ensure_model(platform: ManagementApi, team: str, folder: str) -> None:
    if any(model["name"] == f"{team}/{folder}" for model in platform.list("/api/models", team=team)):
        return
    platform.post("/api/models", {"name": folder, "path": folder, "model_type": MODEL_TYPE}, team=team)


def _ensure_option(platform: ManagementApi, precision: str, rate_usd: str, device_kind: str) -> None:
    if any(option["name"] == precision for option in platform.list("/api/options", model_type=MODEL_TYPE)):
        return
    platform.post(
        "/api/options",
        {
            "model_type": MODEL_TYPE,
            "name": precision,
            "device_kind": device_kind,
            "precision": precision,
            "max_batch": MAX_BATCH,
            "max_context_tokens": MAX_CONTEXT_TOKENS,
            "kv_tokens": KV_TOKENS,
            "hourly_rate_usd": rate_usd,
        },
    )


def _ensure_price(platform: ManagementApi, work_class: str, prompt_usd: str, completion_usd: str) -> None:
    """A price that someone changed since stays as it is."""
    for price in platform.list("/api/prices"):
        if price["model_type"] == MODEL_TYPE and price["work_class"] == work_class:
            return
    platform.put(
        "/api/prices",
        {
            "model_type": MODEL_TYPE,
            "work_class": work_class,
            "prompt_usd_per_million": prompt_usd,
            "completion_usd_per_million": completion_usd,
        },
    )


def _ensure_resource(
    platform: ManagementApi, team: str, name: str, *, option: str, pool: bool
) -> dict[str, Any]:
    for resource in platform.list("/api/resources", team=team):
        if resource["name"] == name:
            return resource
    body = {"name": name, "model_type": MODEL_TYPE, "option": option, "gpus": 1}
    return platform.post("/api/resources", {**body, **({"pool": True} if pool else {})}, team=team)


def _turn_on(platform: ManagementApi, resource: dict[str, Any]) -> None:
    if resource["wanted"] != "on":
        platform.post(f"/api/resources/{resource['resource_id']}/on", team=TEAM)


def _wait_until_live(look: Callable[[], dict[str, Any]]) -> None:
    """Until the resource is live, saying each change. A failed one is given the whole time: the scheduler tries again."""
    started_s = time.monotonic()
    said = ""
    while True:
        resource = look()
        words = str(resource["state"]) + (f": {resource['reason']}" if resource.get("reason") else "")
        elapsed_s = time.monotonic() - started_s
        if resource["state"] == "live":
            say(done_line("demo resource is live (green)", elapsed_s))
            return
        if words != said:
            say(f"    demo resource: {words}")
            said = words
        if elapsed_s > LIVE_LIMIT_S:
            raise SetupFailed(
                f"the demo resource is not live after {LIVE_LIMIT_S:g} s ({words}): 'make logs NAMES=\"scheduler agent\"' "
                "tells why; 'make up' goes on waiting"
            )
        time.sleep(POLL_S)
