"""A request on shared GPUs: its charge in the ledger, one trace over all of it, and no text where none belongs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import asyncpg
import openai
import pytest

from infra.local.management_api import ManagementApi
from loadtest.audit import settled_audit
from loadtest.audit_snapshot import ClientRecord
from tests.e2e.conftest import SeenSpan, System

pytestmark = pytest.mark.timeout(300)

CANARY = "Xylophone-canary-7731"


def wait_for(what: str, look: Callable[[], Any], limit_s: float = 60.0) -> Any:
    """Return the first true answer of `look`. Raises after `limit_s`."""
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        if found := look():
            return found
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {limit_s} s")


@pytest.fixture(scope="module")
def pool_team(system: System) -> Iterator[ManagementApi]:
    """A team without a resource, while the platform's shared GPUs are on."""
    platform = system.platform
    [pool] = [each for each in platform.list("/api/resources", team="platform") if each["pool"]]
    platform.post(f"/api/resources/{pool['resource_id']}/on", {}, team="platform")
    path = f"/api/resources/{pool['resource_id']}"
    wait_for("the pool is live", lambda: platform.get(path, team="platform")["state"] == "live")
    platform.post("/api/teams", {"slug": "payers", "name": "Payers"})
    key = platform.post("/api/keys", {"name": "k", "scopes": ["inference", "manage"]}, team="payers")
    yield ManagementApi(system.url, key["secret"])
    platform.post(f"{path}/off", {}, team="platform")  # its worker needs a core that other tests want
    wait_for("the pool is off", lambda: platform.get(path, team="platform")["state"] == "off")


def ledger(system: System, job_id: str) -> list[asyncpg.Record]:
    async def read() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(system.database_url)
        try:
            await connection.execute("SET ROLE roundhouse_audit")
            return await connection.fetch("SELECT * FROM billing_api.ledger_v1 WHERE job_id = $1", job_id)
        finally:
            await connection.close()

    return asyncio.run(read())


def test_a_request_on_shared_gpus_is_charged_once_and_traced_from_door_to_ledger(
    system: System, pool_team: ManagementApi
) -> None:
    client = openai.OpenAI(base_url=f"{system.url}/v1", api_key=pool_team.key, max_retries=0)
    answer = client.completions.with_raw_response.create(
        model="platform/smollm2-135m-instruct", prompt=f"{CANARY} says", max_tokens=7, temperature=0
    )
    request_id = answer.headers["x-request-id"]
    completion = answer.parse()
    assert completion.usage is not None
    prompt_tokens = completion.usage.prompt_tokens

    def found() -> dict[str, Any] | None:
        return next((r for r in pool_team.list("/api/requests") if r["request_id"] == request_id), None)

    record = wait_for("the request record", found)
    # 0.02 and 0.06 USD for a million tokens are 20 and 60 nano-USD for one.
    owed = prompt_tokens * 20 + 7 * 60
    assert (record["outcome"], record["prompt_tokens"], record["completion_tokens"]) == (
        "succeeded",
        prompt_tokens,
        7,
    )
    assert (record["billing"], record["charged_nanousd"]) == ("ppt", owed)
    rows = ledger(system, record["job_id"])
    assert sorted(row["amount_nanousd"] for row in rows) == [-owed, owed]
    assert len({row["transaction_id"] for row in rows}) == 1
    assert pool_team.get("/api/usage")["balance_nanousd"] == -owed

    trace_id = rows[0]["trace_id"]
    expected = {
        ("roundhouse-gateway", "POST /v1/completions"),
        ("roundhouse-worker", "queue_wait"),
        ("roundhouse-worker", "swap"),
        ("roundhouse-worker", "prefill"),
        ("roundhouse-worker", "decode"),
        ("roundhouse-billing", "ledger.post"),
    }

    def whole_trace() -> list[SeenSpan] | None:
        spans = [span for span in system.spans.spans if span.trace_id == trace_id]
        return spans if expected <= {(span.service, span.name) for span in spans} else None

    spans = wait_for(f"the spans {expected}", whole_trace, 20)
    names = {span.name for span in spans}
    assert any(name.startswith("send jobs.v1.") for name in names)
    assert any(name.startswith("process jobs.v1.") for name in names)
    # One tree: every span but the first has its parent among the others.
    ids = {span.span_id for span in spans}
    assert [span.name for span in spans if span.parent_id not in ids] == ["POST /v1/completions"]


def test_embeddings_are_charged_for_their_prompts_alone(system: System, pool_team: ManagementApi) -> None:
    client = openai.OpenAI(base_url=f"{system.url}/v1", api_key=pool_team.key, max_retries=0)
    answer = client.embeddings.with_raw_response.create(
        model="platform/smollm2-135m-instruct", input=[f"{CANARY} one", f"{CANARY} two", "three"]
    )
    request_id, tokens = answer.headers["x-request-id"], answer.parse().usage.prompt_tokens
    assert tokens > 10

    def found() -> dict[str, Any] | None:
        return next((r for r in pool_team.list("/api/requests") if r["request_id"] == request_id), None)

    record = wait_for("the request record", found)
    assert (record["operation"], record["outcome"]) == ("embeddings", "succeeded")
    assert (record["prompt_tokens"], record["completion_tokens"]) == (tokens, 0)
    assert record["charged_nanousd"] == tokens * 20
    rows = ledger(system, record["job_id"])
    assert sorted(row["amount_nanousd"] for row in rows) == [-tokens * 20, tokens * 20]
    seen = ClientRecord(
        request_id=request_id,
        team="payers",
        model="platform/smollm2-135m-instruct",
        stream=False,
        started_unix_ms=0,
        ended_unix_ms=1,
        status=200,
        outcome="answered",
        prompt_tokens=tokens,
        completion_tokens=0,
    )
    _, results = asyncio.run(settled_audit(system.database_url, [seen], 40.0))
    assert [(result.name, result.findings) for result in results if result.findings] == []


def test_a_cancelled_stream_pays_for_the_prompt_and_what_it_was_sent(
    system: System, pool_team: ManagementApi
) -> None:
    client = openai.OpenAI(base_url=f"{system.url}/v1", api_key=pool_team.key, max_retries=0)
    seen = 0
    with client.completions.with_streaming_response.create(
        model="platform/smollm2-135m-instruct", prompt="Count:", max_tokens=1000, stream=True
    ) as response:
        request_id = response.headers["x-request-id"]
        for line in response.iter_lines():
            seen += line.startswith("data: {")
            if seen >= 5:
                break

    def found() -> dict[str, Any] | None:
        return next((r for r in pool_team.list("/api/requests") if r["request_id"] == request_id), None)

    record = wait_for("the request record", found)
    assert record["outcome"] == "cancelled"
    delivered = record["completion_tokens"]
    assert 5 <= delivered < 500
    assert record["charged_nanousd"] == record["prompt_tokens"] * 20 + delivered * 60


def test_n_answers_an_echo_and_a_prompt_that_a_cache_had_cost_their_tokens(
    system: System, pool_team: ManagementApi
) -> None:
    client = openai.OpenAI(base_url=f"{system.url}/v1", api_key=pool_team.key, max_retries=0)
    # A prompt of many cache blocks, so that what is asked after the first finds most of it computed
    prompt = " ".join(f"{number} bottles of beer on the wall," for number in range(99, 59, -1))
    charged = {}
    variants: dict[str, dict[str, Any]] = {
        "first": {},
        "cached": {},
        "three answers": {"n": 3, "temperature": 1.0, "seed": 1},
        "echoed": {"echo": True},
    }
    for name, asked in variants.items():
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": 8, "temperature": 0} | asked
        answer = client.completions.with_raw_response.create(model="platform/smollm2-135m-instruct", **body)
        request_id, usage = answer.headers["x-request-id"], answer.parse().usage
        assert usage is not None and usage.prompt_tokens > 200

        def found(request_id: str = request_id) -> dict[str, Any] | None:
            return next((r for r in pool_team.list("/api/requests") if r["request_id"] == request_id), None)

        record = wait_for("the request record", found)
        owed = usage.prompt_tokens * 20 + usage.completion_tokens * 60
        assert record["charged_nanousd"] == owed, name
        assert sorted(row["amount_nanousd"] for row in ledger(system, record["job_id"])) == [-owed, owed]
        charged[name] = (usage.prompt_tokens, usage.completion_tokens)
    assert charged["cached"] == charged["first"] == charged["echoed"]
    assert charged["three answers"][0] == charged["first"][0]
    assert charged["three answers"][1] > charged["first"][1]


def test_minutes_of_the_live_resource_are_posted(system: System) -> None:
    usage = wait_for(
        "posted minutes",
        lambda: (u := system.team.get("/api/usage")) and any(row["minutes"] > 0 for row in u["data"]) and u,
        90,
    )
    minutes = sum(row["minutes"] for row in usage["data"])
    # 0.60 USD an hour is 0.01 USD a minute; the demo team pays for nothing else.
    assert usage["balance_nanousd"] == -minutes * 10_000_000


def test_no_text_of_prompts_or_answers_and_no_key_is_in_logs_or_spans(
    system: System, pool_team: ManagementApi
) -> None:
    client = openai.OpenAI(base_url=f"{system.url}/v1", api_key=system.api_key, max_retries=0)
    answer = client.chat.completions.create(
        model=system.model,
        messages=[{"role": "user", "content": f"Repeat this word and nothing else: {CANARY}"}],
        max_tokens=30,
    )
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=system.model, prompt=CANARY, max_tokens=1, logit_bias={CANARY: 1})
    time.sleep(1.0)
    secrets = [CANARY, system.api_key, system.admin_key, pool_team.key]
    text = (answer.choices[0].message.content or "").strip()
    if len(text) > 12:
        secrets.append(text)
    # PostgreSQL logs statements of its own failures; it is looked at as well.
    for log in system.layout.logs.rglob("*.log"):
        content = log.read_text(errors="replace")
        assert [secret for secret in secrets if secret in content] == [], log.name
    for span in system.spans.spans:
        assert [secret for secret in secrets if secret in f"{span.name}{span.attributes}"] == [], span.name
