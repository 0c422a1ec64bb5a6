"""Versions of prices and rates: set, withdrawn and listed, on a real database and through the gateway."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from services.billing.commands import ACTIONS
from services.billing.price_list import apply
from services.billing.price_list_file import read_price_list
from services.billing.price_versions import database_now_unix_ms
from services.billing.rounds import MinutesRound
from shared import topology
from shared.messages import Command, CommandResult, SetRate, WithdrawPrice
from tests.conftest import ROOT, Vhost
from tests.gateway_harness import Gateway, running_gateway
from tests.integration.billing_stand import Stand, insert_interval, open_stand, running_commands
from tests.integration.test_billing_credit import add_model
from tests.unit.billing.builders import COMMAND, make_set_price, make_usage

MINUTE = 10**9
HOUR_MS = 3_600_000


async def carry_out(stand: Stand, command: Command) -> CommandResult:
    async with stand.database.transaction() as connection:
        return await ACTIONS[type(command)](connection, command)


async def now_ms(stand: Stand) -> int:
    return await database_now_unix_ms(stand.admin)


async def count_versions(stand: Stand) -> tuple[int, int]:
    row = await stand.admin.fetchrow(
        "SELECT (SELECT count(*) FROM billing.prices) AS p, (SELECT count(*) FROM billing.rates) AS r"
    )
    assert row is not None
    return row["p"], row["r"]


async def test_an_option_s_first_rate_is_what_it_was_made_with_and_needs_no_message(database: str) -> None:
    async with open_stand(database) as stand:
        hour = await stand.admin.fetchval("SELECT date_trunc('hour', now(), 'UTC') - interval '1 hour'")
        await insert_interval(stand.admin, "inc_1", hour, hour + timedelta(minutes=3))
        await MinutesRound(stand.database, stand.instruments, 48).once()
        rates = await stand.admin.fetch("SELECT option_id, hourly_rate_nanousd FROM billing_api.rates_v1")
        assert [tuple(rate) for rate in rates] == [("opt_a", 60 * MINUTE)]
        posted = await stand.admin.fetchval("SELECT sum(posted_nanousd) FROM billing.minute_charges")
        assert posted == 3 * MINUTE


async def test_a_rate_that_is_set_counts_from_its_start_and_what_was_posted_stays(database: str) -> None:
    async with open_stand(database) as stand:
        # Given minutes that were posted at the first rate
        hour = await stand.admin.fetchval("SELECT date_trunc('hour', now(), 'UTC') - interval '1 hour'")
        await insert_interval(stand.admin, "inc_1", hour, hour + timedelta(minutes=3))
        minutes = MinutesRound(stand.database, stand.instruments, 48)
        await minutes.once()
        # When a rate is set for later
        start_ms = await now_ms(stand) + HOUR_MS
        command = SetRate(**COMMAND, option_id="opt_a", hourly_rate_nanousd=1, starts_unix_ms=start_ms)
        assert (await carry_out(stand, command)).ok
        await minutes.once()
        # Then nothing of the past moves
        rows = await stand.admin.fetch("SELECT minutes, posted_nanousd, postings FROM billing.minute_charges")
        assert [tuple(row) for row in rows] == [(3, 3 * MINUTE, 1)]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"option_id": "opt_none"}, "option_not_found"),
        ({"hourly_rate_nanousd": -1}, "invalid_rate"),
        ({"hourly_rate_nanousd": 10**15 + 1}, "invalid_rate"),
        ({"starts_unix_ms": 5}, "rate_starts_in_past"),
        ({"starts_unix_ms": -5}, "invalid_rate"),
    ],
)
async def test_a_refused_rate_changes_nothing(database: str, change: dict[str, object], code: str) -> None:
    async with open_stand(database, priced=False) as stand:
        hour = await stand.admin.fetchval("SELECT now() - interval '1 hour'")
        await insert_interval(stand.admin, "inc_1", hour, hour)
        values = {"option_id": "opt_a", "hourly_rate_nanousd": 1, "starts_unix_ms": 4_000_000_000_000}
        result = await carry_out(stand, SetRate(**COMMAND, **(values | change)))  # type: ignore[arg-type]
        assert (result.ok, result.code) == (False, code)
        assert await count_versions(stand) == (0, 1)


async def test_of_racing_rates_for_one_moment_one_is_set(database: str) -> None:
    async with open_stand(database) as stand:
        hour = await stand.admin.fetchval("SELECT now() - interval '1 hour'")
        await insert_interval(stand.admin, "inc_1", hour, hour)
        start_ms = await now_ms(stand) + HOUR_MS
        commands = [
            SetRate(**COMMAND, option_id="opt_a", hourly_rate_nanousd=n, starts_unix_ms=start_ms)
            for n in range(4)
        ]
        results = await asyncio.gather(*(carry_out(stand, command) for command in commands))
        assert sorted(result.code for result in results) == ["ok"] + ["rate_overlaps"] * 3


async def test_a_withdrawn_price_never_counts_and_one_in_force_stays(database: str) -> None:
    async with open_stand(database) as stand:
        later = make_set_price(
            command_id="cmd_later", prompt_nanousd=1000, starts_unix_ms=await now_ms(stand) + HOUR_MS
        )
        price_id = (await carry_out(stand, later)).body["price_id"]
        withdraw = WithdrawPrice(**COMMAND, version_id=price_id)
        assert (await carry_out(stand, withdraw)).ok
        # What is accepted after its start is charged by the price before it
        await stand.record(make_usage(accepted_unix_ms=later.starts_unix_ms + 1))
        assert await stand.admin.fetchval("SELECT price_id FROM billing.requests") == "price_1"
        assert (await carry_out(stand, withdraw)).code == "not_found"
        in_force = await carry_out(stand, WithdrawPrice(**COMMAND, version_id="price_1"))
        assert (in_force.ok, in_force.code) == (False, "price_in_force")
        row = await stand.admin.fetchrow(
            "SELECT withdrawn_by, actor FROM billing.prices WHERE price_id = $1", price_id
        )
        assert row is not None and tuple(row) == ("key_admin", "key_admin")
        # And its moment is free again
        assert (await carry_out(stand, later)).ok


# ---- the price list

LIST = """currency = "USD"
[[tokens]]
model_type = "tiny"
work_class = "live"
prompt_usd_per_million = "1.5"
completion_usd_per_million = "2"
[[tokens]]
model_type = "tiny"
work_class = "live"
prompt_usd_per_million = "1"
completion_usd_per_million = "2"
starts_at = 2900-01-01T00:00:00Z
[[rates]]
model_type = "tiny"
option = "bf16"
hourly_rate_usd = "0.70"
"""


async def insert_tiny(stand: Stand) -> None:
    await stand.admin.execute("INSERT INTO gateway.model_types VALUES ('0123456789abcdef', 'tiny', 'x', 1)")
    await stand.admin.execute(
        "INSERT INTO scheduler.performance_options VALUES "
        "('opt_t', 'tiny', 'bf16', 'cpu', 'bf16', 8, 2048, 4096, 600000000)"
    )


async def run_list(database: str, what: str, file: Path) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.billing.price_list", what, str(file), cwd=ROOT,
        env=os.environ | {"DATABASE_URL": database}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, out.decode(), err.decode()


async def test_a_price_list_is_told_applied_and_then_true(database: str, tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(LIST)
    async with open_stand(database, priced=False) as stand:
        await insert_tiny(stand)
        status, said, _ = await run_list(database, "diff", file)
        assert (status, said.splitlines()) == (
            0,
            [
                "tiny, live: no price -> 1.50 / 2.00 USD for a million prompt / completion tokens, from now on",
                "tiny, live: 1.00 / 2.00 USD for a million prompt / completion tokens, from 2900-01-01 00:00:00 UTC",
                "tiny on bf16: 0.60 USD an hour -> 0.70 USD an hour, from now on",
                "3 to change",
            ],
        )
        assert await count_versions(stand) == (0, 0)
        status, said, _ = await run_list(database, "apply", file)
        assert (status, said.splitlines()[-1]) == (0, "3 changed")
        assert await count_versions(stand) == (2, 2)
        for what in ("diff", "apply"):
            assert await run_list(database, what, file) == (0, "everything is as the list says\n", "")
        assert await count_versions(stand) == (2, 2)
        # A planned price that is another one now replaces the plan
        file.write_text(LIST.replace('"1"', '"0.5"'))
        assert (await run_list(database, "apply", file))[1].endswith("1 changed\n")
        planned = await stand.admin.fetch(
            "SELECT prompt_nanousd, withdrawn_by FROM billing.prices WHERE starts_at > now() ORDER BY created_at"
        )
        assert [tuple(row) for row in planned] == [(1000, "price list prices.toml"), (500, None)]
        # What follows a price that holds begins when it is known: no job is charged by the one that it replaces
        file.write_text(LIST.replace('"1.5"', '"3"'))
        assert (await run_list(database, "apply", file))[0] == 0
        committed_before_it_begins = await stand.admin.fetchval(
            "SELECT starts_at > created_at + interval '4 s' FROM billing.prices WHERE prompt_nanousd = 3000"
        )
        assert committed_before_it_begins is True


async def test_a_list_with_a_problem_changes_nothing_of_it(database: str, tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(LIST.replace('option = "bf16"', 'option = "none"'))
    async with open_stand(database, priced=False) as stand:
        await insert_tiny(stand)
        status, said, error = await run_list(database, "apply", file)
        assert (status, said) == (1, "")
        assert "line 13: 'tiny' has no performance option 'none'" in error and "nothing was changed" in error
        assert (await count_versions(stand))[0] == 0


async def test_racing_lists_make_each_version_once(database: str) -> None:
    async with open_stand(database, priced=False) as stand:
        await insert_tiny(stand)
        wanted = read_price_list(LIST.encode())

        async def once(number: int) -> int:
            async with stand.database.transaction() as connection:
                return len((await apply(connection, wanted, f"list {number}")).words)

        assert sorted(await asyncio.gather(*(once(n) for n in range(4)))) == [0, 0, 0, 3]
        assert await count_versions(stand) == (2, 2)


# ---- through the gateway


@pytest.fixture
async def stand(database: str, vhost: Vhost) -> AsyncIterator[Stand]:
    async with open_stand(database, priced=False) as opened, running_commands(vhost, opened):
        yield opened


@pytest.fixture
async def gateway(stand: Stand, database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(
        database, vhost.amqp_url, tmp_path, stand_ins=(topology.SCHEDULER_COMMANDS,)
    ) as running:
        yield running


async def test_prices_and_rates_are_planned_listed_and_withdrawn(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    await add_model(gateway)
    option = await gateway.make_option("tiny")
    price = {"model_type": "tiny", "work_class": "live", "prompt_usd_per_million": "1",
             "completion_usd_per_million": "2"}  # fmt: skip
    rate = {"option_id": option["option_id"], "hourly_rate_usd": "0.90"}
    planned = {"starts_at": "2900-01-01T00:00:00Z"}

    assert (await gateway.call("PUT", "/api/prices", price)).status == 200
    for path, body, name in (("/api/prices", price, "price_id"), ("/api/rates", rate, "rate_id")):
        made = await gateway.call("PUT", path, body | planned)
        assert (made.status, made.json["starts_at"]) == (200, "2900-01-01T00:00:00.000Z"), made.body
        twice = await gateway.call("PUT", path, body | planned)
        assert (twice.status, twice.code) == (409, f"{name[:-3]}_overlaps")
        listed = (await gateway.call("GET", path, key=key)).json["data"]
        assert made.json in listed and len(listed) == 2
        one = f"{path}/{made.json[name]}"
        assert (await gateway.call("DELETE", one, key=key)).status == 403
        assert (await gateway.call("DELETE", one)).status == 204
        assert (await gateway.call("DELETE", one)).status == 404
        left = (await gateway.call("GET", path, key=key)).json["data"]
        assert len(left) == 1
        begun = await gateway.call("DELETE", f"{path}/{left[0][name]}")
        assert (begun.status, begun.code) == (409, "price_in_force")
        assert (await gateway.call("DELETE", f"{path}/nothing")).status == 404


async def test_what_is_only_planned_does_not_hold_yet_and_can_be_set_for_now(gateway: Gateway) -> None:
    await add_model(gateway)
    option = await gateway.make_option("tiny")
    price = {"model_type": "tiny", "work_class": "live", "completion_usd_per_million": "2"}
    for path, body, field in (
        ("/api/prices", price, "prompt_usd_per_million"),
        ("/api/rates", {"option_id": option["option_id"]}, "hourly_rate_usd"),
    ):
        assert (await gateway.call("PUT", path, body | {field: "1.00"})).status == 200
        planned = {field: "9.00", "starts_at": "2900-01-01T00:00:00Z"}
        assert (await gateway.call("PUT", path, body | planned)).status == 200
        now = await gateway.call("PUT", path, body | {field: "9.00"})
        assert now.status == 200 and now.json["starts_at"] < "2800", now.body
        again = await gateway.call("PUT", path, body | {field: "9.00"})
        assert again.json == now.json, "it holds by the time that another one could"


async def test_a_rate_that_holds_is_shown_with_its_option_and_resource(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    await add_model(gateway)
    option = await gateway.make_option("tiny")
    body = {"name": "main", "model_type": "tiny", "option": "bf16"}
    path = (
        f"/api/resources/{(await gateway.call('POST', '/api/resources', body, key=key)).json['resource_id']}"
    )
    rate = {"option_id": option["option_id"], "hourly_rate_usd": "0.90"}
    same = await gateway.call("PUT", "/api/rates", rate | {"hourly_rate_usd": "0.60"})
    assert same.status == 200
    first = (await gateway.call("GET", "/api/rates", key=key)).json["data"]
    made = await gateway.call("PUT", "/api/rates", rate)
    assert made.status == 200, made.body
    again = await gateway.call("PUT", "/api/rates", rate)
    assert (again.status, again.json["rate_id"]) == (200, made.json["rate_id"])
    assert len(first) >= 1

    async def shown() -> tuple[str, str]:
        options = (await gateway.call("GET", "/api/options?model_type=tiny", key=key)).json["data"]
        resource = (await gateway.call("GET", path, key=key)).json
        return options[0]["hourly_rate_usd"], resource["option"]["hourly_rate_usd"]

    assert await shown() == ("0.60", "0.60")
    async with asyncio.timeout(15):
        while await shown() != ("0.90", "0.90"):
            await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"option_id": "opt_" + "0" * 32}, (400, "option_not_found")),
        ({"option_id": "x"}, (400, "invalid_value")),
        ({"hourly_rate_usd": "-1"}, (400, "invalid_money")),
        ({"hourly_rate_usd": "0.0000000001"}, (400, "invalid_money")),
        ({"hourly_rate_usd": 0.1}, (400, "invalid_type")),
        ({"starts_at": "2020-01-01T00:00:00Z"}, (400, "rate_starts_in_past")),
        ({"starts_at": "tomorrow"}, (400, "invalid_value")),
        ({"starts_at": "2030-01-01T00:00:00"}, (400, "invalid_value")),
        ({"currency": "EUR"}, (400, "unknown_parameter")),
    ],
)
async def test_a_bad_rate_is_refused_by_a_code(
    gateway: Gateway, stand: Stand, change: dict[str, object], refusal: tuple[int, str]
) -> None:
    await add_model(gateway)
    option = await gateway.make_option("tiny")
    body = {"option_id": option["option_id"], "hourly_rate_usd": "0.90"} | change
    reply = await gateway.call("PUT", "/api/rates", body)
    assert (reply.status, reply.code) == refusal
    assert await stand.admin.fetchval("SELECT count(*) FROM billing.rates WHERE actor <> 'option'") == 0
