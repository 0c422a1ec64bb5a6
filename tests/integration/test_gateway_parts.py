"""The gateway's parts that hold on to PostgreSQL and RabbitMQ: outbox and route table."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from shared import topology
from shared.broker import Broker, Delivery
from shared.inference.errors import ApiError
from shared.inference.principal import Principal
from shared.messages import JobVoided, UsageEvent
from shared.outcomes import Done, Outcome, Unavailable
from tests.conftest import Vhost
from tests.gateway_harness import ADMIN_KEY, Gateway, running_gateway
from tests.model_folders import make_folder


@pytest.fixture
async def gateway(database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(database, vhost.amqp_url, tmp_path) as running:
        yield running


# ---- outbox


def make_fact(index: int) -> JobVoided:
    return JobVoided(
        event_id=f"void_{index}", job_id=f"job_{index}", request_id="req_1", team_id="team_1", key_id="key_1",
        resource_id="res_1", billing="ppt", work_class="live", operation="chat", model_type="t", model_id="mod_1",
        model_name="acme/tiny", revision=1, reason="client_gone", prompt_tokens=3, delivered_tokens=index,
        accepted_unix_ms=1, voided_unix_ms=2,
    )  # fmt: skip


TRACE = {"traceparent": "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"}


class Billing:
    """Reads what billing would."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.got: list[tuple[Any, dict[str, Any]]] = []

    async def read(self, count: int) -> list[str]:
        task = asyncio.ensure_future(self._broker.consume(topology.BILLING_EVENTS, UsageEvent, self._take))
        try:
            async with asyncio.timeout(10):
                while len(self.got) < count:
                    await asyncio.sleep(0.02)
        finally:
            task.cancel()
        return [fact.event_id for fact, _ in self.got]

    async def _take(self, delivery: Delivery) -> Outcome:
        self.got.append((delivery.message, dict(delivery.headers)))
        return Done()


async def test_facts_reach_billing_with_their_trace_and_are_sent_once(gateway: Gateway) -> None:
    for index in range(250):
        await gateway.outbox.add(make_fact(index), TRACE)
    await gateway.outbox.add(make_fact(0), TRACE)
    while await gateway.outbox.relay_once():
        pass
    billing = Billing(gateway.broker)
    assert sorted(await billing.read(250)) == sorted(f"void_{index}" for index in range(250))
    assert all(TRACE["traceparent"].split("-")[1] in headers["traceparent"] for _, headers in billing.got)
    assert await gateway.sql.fetchval("SELECT count(*) FROM gateway.outbox WHERE sent_at IS NULL") == 0


async def test_two_relays_do_not_send_a_fact_twice(gateway: Gateway) -> None:
    for index in range(150):
        await gateway.outbox.add(make_fact(index), {})
    await asyncio.gather(*(gateway.outbox.relay_once() for _ in range(3)))
    while await gateway.outbox.relay_once():
        pass
    ids = await Billing(gateway.broker).read(150)
    assert len(ids) == len(set(ids)) == 150


async def test_facts_outlive_a_database_that_is_away(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_args: Any, **_kwargs: Any) -> Any:
        raise Unavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(gateway.database, "bounded", away)
        await gateway.outbox.add(make_fact(1), TRACE)
    assert gateway.outbox.in_memory == 1
    await gateway.outbox.relay_once()
    assert gateway.outbox.in_memory == 0
    async with asyncio.timeout(1):
        await gateway.outbox.flushed()
    assert await Billing(gateway.broker).read(1) == ["void_1"]


async def test_a_fact_the_broker_did_not_take_stays(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    async def refuse_second(fact: JobVoided, **_kwargs: Any) -> None:
        if len(taken) == 1:
            raise Unavailable("away")
        taken.append(fact.event_id)

    monkeypatch.setattr("services.gateway.outbox.IDLE_S", 0.01)
    monkeypatch.setattr(gateway.broker, "publish_event", refuse_second)
    for index in range(3):
        await gateway.outbox.add(make_fact(index), {})
    await gateway.outbox.relay_once()
    unsent = await gateway.sql.fetch("SELECT event_id FROM gateway.outbox WHERE sent_at IS NULL")
    assert len(taken) == 1
    assert {row["event_id"] for row in unsent} == {f"void_{index}" for index in range(3)} - set(taken)


# ---- route table


async def principal(gateway: Gateway, key: str) -> Principal:
    found = await gateway.key_cache.principal_for(key)
    assert found is not None
    return found


async def test_names_of_models_mean_own_and_platform_models_only(gateway: Gateway) -> None:
    acme, rival = await gateway.make_team("acme"), await gateway.make_team("rival")
    make_folder(gateway.import_dir / "tiny")
    for key, name in ((acme, "mine"), (rival, "theirs"), (ADMIN_KEY, "shared")):
        sent = {"name": name, "path": "tiny"}
        reply = await gateway.call("POST", "/api/models", sent, key=key)
        assert reply.status == 201, reply.body
    who = await principal(gateway, acme)
    found = [
        gateway.routes.find_model(who, name).full_name for name in ("mine", "acme/mine", "platform/shared")
    ]
    assert found == ["acme/mine", "acme/mine", "platform/shared"]
    assert [m.full_name for m in gateway.routes.list_models(who)] == ["acme/mine", "platform/shared"]
    refusals = set()
    for name in (
        "rival/theirs",
        "rival/nothing",
        "theirs",
        "shared",
        "",
        "/",
        "a" * 300,
        "../../etc",
        "mine\u0430",
        "//mine",
    ):
        with pytest.raises(ApiError) as caught:
            gateway.routes.find_model(who, name)
        refusals.add((caught.value.status, caught.value.code, caught.value.message, caught.value.param))
    assert len(refusals) == 1 and refusals.pop()[:2] == (404, "model_not_found")


async def test_routes_outlive_the_database_and_turning_off_ends_what_waits(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await gateway.make_team("acme")
    make_folder(gateway.import_dir / "tiny")
    model = (await gateway.call("POST", "/api/models", {"name": "tiny", "path": "tiny"}, key=key)).json
    await gateway.make_option(model["model_type"])
    body = {"name": "main", "model_type": model["model_type"], "option": "bf16"}
    resource = (await gateway.call("POST", "/api/resources", body, key=key)).json
    who = await principal(gateway, key)
    with pytest.raises(ApiError) as caught:
        gateway.routes.resolve(who, "tiny")
    assert caught.value.code == "resource_off"

    path = f"/api/resources/{resource['resource_id']}"
    await gateway.call("POST", f"{path}/on", key=key)
    await gateway.sql.execute("UPDATE scheduler.resources SET state = 'live'")
    await gateway.routes.refresh()
    view, route = gateway.routes.resolve(who, "acme/tiny")
    assert (view.model_id, route.resource.resource_id, route.billing) == (
        model["model_id"],
        resource["resource_id"],
        "resource",
    )
    assert (view.eos_token_ids, view.vocab_size) == ((257, 256), 258)

    async def away(*_args: Any, **_kwargs: Any) -> Any:
        raise Unavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(gateway.database, "bounded", away)
        with pytest.raises(Unavailable):
            await gateway.routes.refresh()
        assert gateway.routes.resolve(who, "tiny")[1] == route

    await gateway.call("POST", f"{path}/off", key=key)
    with pytest.raises(ApiError):
        gateway.routes.resolve(who, "tiny")
    async with asyncio.timeout(20):
        while not gateway.turned_off:
            await asyncio.sleep(0.02)
    assert gateway.turned_off == [f"{resource['resource_id']} resource_off"]


async def test_an_unknown_resource_is_refused_before_anyone_is_asked(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    reply = await gateway.call("POST", f"/api/resources/res_{'0' * 32}/on", key=key)
    assert (reply.status, reply.code, reply.json["title"]) == (404, "not_found", "Not Found")
    assert gateway.commands == []


async def test_a_command_sent_again_under_one_key_has_one_id(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    make_folder(gateway.import_dir / "tiny")
    model = (await gateway.call("POST", "/api/models", {"name": "tiny", "path": "tiny"}, key=key)).json
    await gateway.make_option(model["model_type"])
    body = {"name": "main", "model_type": model["model_type"], "option": "bf16"}
    for _ in range(2):
        headers = {"Idempotency-Key": "lost-answer"}
        assert (await gateway.call("POST", "/api/resources", body, key=key, headers=headers)).status in (
            201,
            409,
        )
        # As if the gateway had died before it noted the answer.
        await gateway.sql.execute("DELETE FROM gateway.idempotency_keys")
    first, second = (command.command_id for command in gateway.commands[-2:])
    assert first == second
    assert (
        await gateway.call("POST", "/api/resources", body | {"name": "two"}, key=key, headers=headers)
    ).status == 201
    assert gateway.commands[-1].command_id != first
