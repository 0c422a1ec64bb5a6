"""kill -9 of everything in turn, under load, on the running system; what clients saw is what was charged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from infra.local.layout import ROOT
from infra.local.management_api import ManagementApi
from loadtest.audit import settled_audit
from loadtest.chaos import (
    END_LIMIT_S,
    SERVERS,
    SHARED_MODEL,
    VICTIMS,
    Chaos,
    payer_on_shared_gpus,
    worker_pids,
)
from tests.e2e.conftest import System
from tests.e2e.test_money_and_traces import wait_for

pytestmark = pytest.mark.timeout(300)

MAX_TOKENS = 20
"""Less than `loadtest.chaos` asks for: what has to be over in time here is what a kill costs, not how long a busy machine
takes to generate the answers once more."""


@pytest.fixture(scope="module")
def chaos(system: System) -> Chaos:
    return Chaos(system.layout, system.url, system.api_key, system.model, max_tokens=MAX_TOKENS)


def test_a_stream_survives_its_worker_and_equals_an_unkilled_run(system: System) -> None:
    client = openai.OpenAI(base_url=f"{system.url}/v1", api_key=system.api_key, max_retries=0)
    question = {
        "model": system.model,
        "prompt": "The history of the sea begins",
        "max_tokens": 120,
        "temperature": 0,
    }
    whole = client.completions.create(**question)  # type: ignore[call-overload]
    text, killed = "", False
    for chunk in client.completions.create(**question, stream=True):  # type: ignore[call-overload]
        text += chunk.choices[0].text
        if not killed and len(text) > len(whole.choices[0].text) // 3:
            for pid in worker_pids(system.layout):
                os.kill(pid, signal.SIGKILL)
            killed = True
    assert killed
    assert text == whole.choices[0].text


@pytest.mark.parametrize("victim", VICTIMS)
async def test_fifty_requests_end_and_new_ones_succeed_when_it_is_killed(chaos: Chaos, victim: str) -> None:
    seen = await chaos.kill_under_load(victim, kill_after_s=0.5)
    assert seen.answered + seen.errors + seen.cut == 50
    assert seen.wrong_texts == 0
    assert seen.slowest_end_s < END_LIMIT_S
    assert seen.recovered_s < END_LIMIT_S
    if victim != "gateway":  # its clients' connections end with it
        assert seen.cut == 0


@pytest.mark.parametrize("victim", SERVERS)
async def test_fifty_requests_end_and_new_ones_succeed_when_a_server_is_killed(
    chaos: Chaos, victim: str
) -> None:
    seen = await chaos.kill_under_load(victim, kill_after_s=0.5)
    assert (seen.answered + seen.errors + seen.cut, seen.wrong_texts) == (50, 0), seen
    assert seen.slowest_end_s < END_LIMIT_S, seen
    # A broker needs some ten seconds on two cores to be back, and its clients some more.
    assert seen.recovered_s < (2 * END_LIMIT_S if victim == "rabbitmq" else END_LIMIT_S), seen
    if victim != "rabbitmq":
        assert seen.answered == 50, seen


async def test_what_clients_saw_is_what_was_charged(chaos: Chaos, system: System, tmp_path: Path) -> None:
    assert len(chaos.client.records) > 50 * len(VICTIMS + SERVERS)
    _, results = await settled_audit(system.database_url, chaos.client.records, 40.0)
    assert [(result.name, result.findings[:3]) for result in results if result.findings] == []
    log = tmp_path / "clients.jsonl"
    chaos.client.write_log(log)
    audit = subprocess.run(
        [sys.executable, "-m", "loadtest.audit", "--client-log", str(log)],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": system.database_url},
        capture_output=True,
        text=True,
    )
    assert audit.returncode == 0, audit.stdout + audit.stderr


@contextmanager
def demo_off(system: System) -> Iterator[None]:
    """The demo's own resource is off: as on it, one worker is killed, and starts again with the machine for itself."""
    [resource] = system.team.list("/api/resources")
    path = f"/api/resources/{resource['resource_id']}"
    system.team.post(f"{path}/off")
    wait_for("off", lambda: system.team.get(path)["state"] == "off")
    try:
        yield
    finally:
        system.team.post(f"{path}/on")
        wait_for("live", lambda: system.team.get(path)["indicator"] == "green")


async def test_what_clients_saw_on_shared_gpus_is_what_they_paid(system: System) -> None:
    # Given a team that pays by the token: on the demo's own resource no charge could be wrong.
    with demo_off(system), payer_on_shared_gpus(system.platform) as payer:
        chaos = Chaos(
            system.layout, system.url, payer.api_key, SHARED_MODEL, payer.slug, max_tokens=MAX_TOKENS
        )
        # When those are killed who deliver, count or book
        for victim in ("gateway", "worker", "billing"):
            seen = await chaos.kill_under_load(victim, kill_after_s=0.5)
            assert (seen.answered + seen.errors + seen.cut, seen.wrong_texts) == (50, 0), seen
            assert max(seen.slowest_end_s, seen.recovered_s) < END_LIMIT_S, seen
        # Then each request was paid once, by what its client had of it.
        records = chaos.client.records
        _, results = await settled_audit(system.database_url, records, 40.0)
        assert [(result.name, result.findings[:3]) for result in results if result.findings] == []
        answered = [record for record in records if record.outcome == "answered"]
        # 0.02 and 0.06 USD for a million tokens are 20 and 60 nano-USD for one.
        owed = sum(20 * (r.prompt_tokens or 0) + 60 * (r.completion_tokens or 0) for r in answered)
        usage = ManagementApi(system.url, payer.api_key).get("/api/usage")
        assert owed > 0
        assert -usage["balance_nanousd"] >= owed


def test_a_resource_that_is_turned_off_refuses_and_comes_back(system: System) -> None:
    client = openai.OpenAI(base_url=f"{system.url}/v1", api_key=system.api_key, max_retries=0)
    [resource] = system.team.list("/api/resources")
    path = f"/api/resources/{resource['resource_id']}"
    system.team.post(f"{path}/off")
    wait_for("off", lambda: system.team.get(path)["state"] == "off")
    assert system.team.get(path)["indicator"] == "grey"
    time.sleep(3.0)
    with pytest.raises(openai.ConflictError) as refused:
        client.completions.create(model=system.model, prompt="x")
    assert refused.value.code == "resource_off"
    assert refused.value.response.headers["x-should-retry"] == "false"
    system.team.post(f"{path}/on")
    wait_for("live", lambda: system.team.get(path)["indicator"] == "green")
    wait_for("an answer", lambda: _answers(client, system.model))


def _answers(client: openai.OpenAI, model: str) -> bool:
    try:
        return bool(client.completions.create(model=model, prompt="x", max_tokens=2).choices)
    except openai.APIStatusError as error:
        assert error.status_code in (409, 503)
        return False
