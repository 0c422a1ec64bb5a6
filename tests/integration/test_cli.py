"""The `roundhouse` command as a process of its own, against a real gateway."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loadtest.stack import Stack, running_stack
from tests.conftest import ROOT, Servers, Vhost
from tests.gateway_harness import ADMIN_KEY, Gateway, running_gateway
from tests.model_folders import make_folder


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)

    def refused(self) -> str:
        """What was said of the failure: one line, whatever went wrong."""
        assert (self.code, self.out) == (1, ""), self
        assert self.err.count("\n") == 1 and self.err.startswith("roundhouse: "), self.err
        return self.err.removeprefix("roundhouse: ").strip()


async def roundhouse(url: str, key: str, *arguments: str, stdin: bytes = b"") -> Ran:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ROUNDHOUSE_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.cli", *arguments,
        cwd=ROOT,
        env=environment | {"ROUNDHOUSE_URL": url, "ROUNDHOUSE_API_KEY": key},
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate(stdin)
    return Ran(process.returncode or 0, out.decode(), err.decode())


@pytest.fixture
async def gateway(database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(database, vhost.amqp_url, tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def stack(servers: Servers) -> Iterator[Stack]:
    with running_stack() as running:
        running.start_worker("worker", step_s=0.005, max_batch=8)
        yield running


async def test_from_a_model_s_folder_to_a_resource_that_is_scaled_and_turned_off(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    make_folder(gateway.import_dir / "tiny")

    # When a model is registered, it is listed
    model = (await roundhouse(gateway.base, key, "models", "register", "tiny", "tiny", "--json")).json
    assert (model["name"], model["revision"]) == ("acme/tiny", 1)
    listed = await roundhouse(gateway.base, key, "models", "list")
    assert listed.code == 0 and "acme/tiny" in listed.out and model["model_id"] in listed.out
    assert [
        m["model_id"] for m in (await roundhouse(gateway.base, key, "models", "list", "--json")).json
    ] == [model["model_id"]]

    # Given a resource, it is found by its name and by its id
    await gateway.make_option(model["model_type"])
    body = {"name": "main", "model_type": model["model_type"], "option": "bf16"}
    resource = (await gateway.call("POST", "/api/resources", body, key=key)).json
    by_id = (await roundhouse(gateway.base, key, "resources", "get", resource["resource_id"], "--json")).json
    by_name = await roundhouse(gateway.base, key, "resources", "get", "main")
    assert by_id == resource and resource["resource_id"] in by_name.out and "acme/tiny" in by_name.out
    rows = (await roundhouse(gateway.base, key, "resources", "list")).out
    assert "main" in rows and "0.60" in rows and "off" in rows

    # When it is turned on, scaled, turned off, the server says so
    on = (await roundhouse(gateway.base, key, "resources", "on", "main", "--json")).json
    assert (on["wanted"], on["state"]) == ("on", "starting")
    assert (await roundhouse(gateway.base, key, "resources", "scale", "main", "3", "--json")).json[
        "gpus"
    ] == 3
    bounds = ("--min", "1", "--max", "4")
    between = (await roundhouse(gateway.base, key, "resources", "autoscale", "main", *bounds, "--json")).json
    assert (between["scaling"]["autoscaling"], between["scaling"]["max"]) == (True, 4)
    assert "1 to 4; " in (await roundhouse(gateway.base, key, "resources", "get", "main")).out
    assert " 1 to 4 " in (await roundhouse(gateway.base, key, "resources", "list")).out
    for action, words in (("turned_on", "turned on by x"), ("scaled", "between 1 and 4 by x")):
        await gateway.sql.execute(
            "INSERT INTO scheduler.decisions (resource_id, action, words, inputs) VALUES ($1, $2, $3, '{}')",
            resource["resource_id"],
            action,
            words,
        )
    decided = (await roundhouse(gateway.base, key, "resources", "decisions", "main", "--count", "1")).out
    assert "scaled" in decided and "between 1 and 4 by x" in decided and "turned on" not in decided
    off = (await roundhouse(gateway.base, key, "resources", "off", "main", "--json")).json
    assert (off["wanted"], off["state"], off["gpus"]) == ("off", "off", 3)

    # A platform's key acts for the team
    for_team = await roundhouse(gateway.base, ADMIN_KEY, "--team", "acme", "resources", "list", "--json")
    assert [each["name"] for each in for_team.json] == ["main"]
    assert (await roundhouse(gateway.base, ADMIN_KEY, "resources", "list", "--json")).json == []


async def test_lists_are_read_to_their_end(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    await gateway.sql.execute(
        "INSERT INTO scheduler.performance_options VALUES"
        " ('opt_a', 'some-type', 'bf16', 'cpu', 'bf16', 4, 64, 256, 600000000)"
    )
    team_id = await gateway.sql.fetchval("SELECT team_id FROM gateway.teams WHERE slug = 'acme'")
    await gateway.sql.execute(
        "INSERT INTO scheduler.resources (resource_id, team_id, name, model_type, option_id, fixed_count)"
        " SELECT 'res_' || lpad(to_hex(i), 32, '0'), $1, 'r' || i, 'some-type', option_id, 1"
        " FROM generate_series(1, 230) i, scheduler.performance_options",
        team_id,
    )
    rows = (await roundhouse(gateway.base, key, "resources", "list", "--json")).json
    assert [row["name"] for row in rows] == [f"r{i}" for i in range(1, 231)]


async def test_refusals_are_the_api_s_own_words_in_one_line(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    run = [
        (("sk-rh-" + "x" * 43, "resources", "list"), "The API key is not valid. (invalid_api_key)"),
        ((key, "--team", "other", "usage"), "This key acts for its own team only. (insufficient_scope)"),
        ((key, "resources", "get", "res_" + "0" * 32), "There is no such thing. (not_found)"),
        ((key, "resources", "get", "nothing"), "nothing is called 'nothing'"),
        ((key, "usage", "--group-by", "moon"), "group_by must be one of team, key, model, resource. (invalid_value)"),
    ]  # fmt: skip
    for (used_key, *arguments), words in run:
        said = (await roundhouse(gateway.base, used_key, *arguments)).refused()
        assert said == words
    closed = await roundhouse("http://127.0.0.1:9", key, "usage")
    assert "cannot be reached" in closed.refused()
    for url in ("gopher://x", "http://", "http://127.0.0.1:99999999"):
        assert "not an address" in (await roundhouse(url, key, "usage")).refused()
    assert "no key has" in (await roundhouse(gateway.base, "sk-\nInjected: header", "usage")).refused()


async def test_usage_says_what_was_used_and_what_it_cost(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    team_id = await gateway.sql.fetchval("SELECT team_id FROM gateway.teams WHERE slug = 'acme'")
    await gateway.sql.execute(
        "INSERT INTO billing.minute_charges VALUES ('res_a', 0, date_trunc('hour', now(), 'UTC'), 600000000, $1, 7, 70000000, 1)",
        team_id,
    )
    rows = (await roundhouse(gateway.base, key, "usage", "--json")).json
    assert [(row["group"], row["gpu_minutes"], row["cost_nanousd"]) for row in rows] == [
        (None, 7, 70_000_000)
    ]
    shown = await roundhouse(gateway.base, key, "usage", "--group-by", "resource", "--bucket", "hour")
    assert shown.code == 0 and "res_a" in shown.out and "in all  0.07 USD" in shown.out, shown.out


@pytest.mark.timeout(180)
async def test_chat_prints_the_answer_as_it_comes(stack: Stack) -> None:
    # Nothing names the model: it is the only one
    whole = (
        await roundhouse(stack.base_url, stack.api_key, "chat", "hello", "--max-tokens", "5", "--json")
    ).json
    assert whole["model"] == stack.model and whole["content"] and whole["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 5
    plain = await roundhouse(stack.base_url, stack.api_key, "chat", "hello", "--max-tokens", "5")
    assert (plain.code, plain.out) == (0, whole["content"] + "\n"), plain.err
    piped = await roundhouse(
        stack.base_url, stack.api_key, "chat", "-m", stack.model, "--max-tokens", "5", stdin=b"hello"
    )
    assert piped.out == plain.out
    bad = await roundhouse(stack.base_url, stack.api_key, "chat", "hello", "--temperature", "99")
    assert "temperature" in bad.refused()
    unknown = await roundhouse(stack.base_url, stack.api_key, "chat", "hello", "-m", "no/such")
    assert unknown.refused().endswith("(model_not_found)")


@pytest.mark.timeout(180)
async def test_a_stream_whose_server_dies_ends_with_one_line_and_exit_code_1(stack: Stack) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.cli", "chat", "hello", "--max-tokens", "1500",
        cwd=ROOT,
        env=os.environ | {"ROUNDHOUSE_URL": stack.base_url, "ROUNDHOUSE_API_KEY": stack.api_key},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert await process.stdout.read(1)  # it has begun, and is shown before the end
    stack.processes["gateway"].kill()
    _, err = await process.communicate()
    assert process.returncode == 1
    assert err.decode().startswith("roundhouse: ") and err.count(b"\n") == 1, err
