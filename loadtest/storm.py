"""`python -m loadtest.storm`: kill -9 of each part in turn during 500 jobs, while a resource is turned off and on all the time.

Wants `make up` (or `--home` of another running set). Most jobs are asked by a new team on the platform's shared pool,
where each token has to be found in the ledger; every fifth by the demo team on its own resource, which a storm turns off
and on, so that minutes have many borders; some of its spans last over a minute. Some clients leave in mid-answer. All on
the pool is under hard caps; a third team's cap is spent in mid-storm, and its clients go on. At given shares of the jobs
a victim is killed. Afterwards the clients' log is audited against records, facts, ledger and intervals, all teams'
months are computed again from raw facts and intervals alone, no cap was passed and no slice of one is left over.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import aiohttp

from infra.local.daemon import build
from infra.local.demo import RESOURCE, TEAM
from infra.local.layout import Layout, main_layout
from infra.local.management_api import ApiError, ManagementApi
from infra.local.state import read_report
from loadtest.audit import settled_audit
from loadtest.audit_checks import Result
from loadtest.audit_snapshot import ClientRecord, Snapshot
from loadtest.chaos import (
    PROMPTS,
    SERVERS,
    SHARED_MODEL,
    VICTIMS,
    payer_on_shared_gpus,
    read_env,
    victim_pids,
)
from loadtest.clients import RecordingClient
from loadtest.report import Row, print_table, write_json
from loadtest.storm_budgets import Capped, Money, cap_team, money_rows
from services.billing.instants import HOUR_US, MINUTE_US, to_unix_us
from services.billing.recompute import compare
from shared.calendar_month import read_month

JOBS = 500
CLIENTS = 16
MAX_TOKENS = 12
DEFAULT_VICTIMS = ("gateway", "worker", "billing", "rabbitmq", "postgres")
OWN_EVERY = 5
"""Each fifth job is for the resource in the storm."""
LEAVE_EVERY = 7
LONG_EVERY = 3
"""Each third time the resource stays on for over a minute, the first time too."""
LONG_SPANS = 2
"""So many live intervals of over a minute a storm has at least."""
SETTLE_LIMIT_S = 120.0
"""Facts of killed parts may wait for a redelivery, and minutes are posted every 20 s."""
RUN_LIMIT_S = 1500.0


@dataclass
class Storm:
    """Clients, the storm and the kills, and what they did."""

    layout: Layout
    pool: RecordingClient
    own: RecordingClient
    own_model: str
    capped: Capped
    demo: ManagementApi
    resource_id: str
    jobs: int
    random: random.Random
    accepted: int = 0
    progress: asyncio.Event = field(default_factory=asyncio.Event)
    asked: int = 0
    switched: int = 0
    switch_errors: int = 0
    long_spans: int = 0
    spanned: asyncio.Event = field(default_factory=asyncio.Event)
    kills: list[tuple[str, float]] = field(default_factory=list)
    """Victim, and seconds from its kill until a job that was asked after it was answered."""
    expected: dict[str, list[str]] = field(default_factory=dict)

    async def run(self, victims: list[str]) -> None:
        """Until all jobs were accepted and all victims killed. Raises `TimeoutError` after `RUN_LIMIT_S`."""
        timeout = aiohttp.ClientTimeout(total=None, connect=5)
        async with (
            asyncio.timeout(RUN_LIMIT_S),
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session,
        ):
            for prompt in PROMPTS:
                self.expected[prompt] = await self.pool.spell(session, SHARED_MODEL, prompt, MAX_TOKENS)
            await self.capped.learn(session)
            async with asyncio.TaskGroup() as group:
                switching = group.create_task(self._switch())
                hammering = group.create_task(self.capped.hammer(session))
                async with asyncio.TaskGroup() as working:
                    for _ in range(CLIENTS):
                        working.create_task(self._ask(session))
                    working.create_task(self._kill(session, victims))
                await self.spanned.wait()
                switching.cancel()
                hammering.cancel()

    async def _ask(self, session: aiohttp.ClientSession) -> None:
        while self.accepted < self.jobs:
            number = self.asked
            self.asked += 1
            own = number % OWN_EVERY == 0
            leaves = not own and number % LEAVE_EVERY == 3
            record = await self._one(session, number, own=own, leaves=leaves)
            if is_job(record):
                self.accepted += 1
                self.progress.set()
            else:
                await asyncio.sleep(0.3)  # refused, or nobody there

    async def _one(
        self, session: aiohttp.ClientSession, number: int, *, own: bool = False, leaves: bool = False
    ) -> ClientRecord:
        prompt = PROMPTS[number % len(PROMPTS)]
        client, model = (self.own, self.own_model) if own else (self.pool, SHARED_MODEL)
        # The two run in different precisions: only the pool's answers are known by token.
        record, _ = await client.complete(
            session, model, prompt, MAX_TOKENS, stream=leaves or number % 2 == 0,
            tokens=() if own else self.expected[prompt], leave_after=4 if leaves else None,
        )  # fmt: skip
        return record

    async def _kill(self, session: aiohttp.ClientSession, victims: list[str]) -> None:
        """Each victim at its share of the jobs, and not before the last one is over."""
        for index, victim in enumerate(victims, start=1):
            await self._accepted(self.jobs * index // (len(victims) + 1))
            for pid in await self._pids(victim):
                os.kill(pid, signal.SIGKILL)
            killed_s = time.monotonic()
            print(f"killed {victim} after {self.accepted} jobs", flush=True)
            await self._answered(session, index)
            self.kills.append((victim, time.monotonic() - killed_s))

    async def _accepted(self, jobs: int) -> None:
        while self.accepted < jobs:
            await self.progress.wait()
            self.progress.clear()

    async def _answered(self, session: aiohttp.ClientSession, number: int) -> None:
        """Return when a new request was answered."""
        while True:
            record = await self._one(session, number)
            if record.outcome == "answered":
                return
            await asyncio.sleep(0.3)

    async def _pids(self, victim: str) -> list[int]:
        """In this storm a worker may be away for a moment: then it is waited for."""
        while True:
            try:
                return victim_pids(self.layout, victim)
            except RuntimeError:
                await asyncio.sleep(0.2)

    async def _switch(self) -> None:
        """Off and on, with one GPU or two, live for a moment or stopped in mid-start, for ever."""
        path = f"/api/resources/{self.resource_id}"
        try:
            for number in itertools.count():
                await self._call(partial(self.demo.post, f"{path}/off"))
                await asyncio.sleep(self.random.uniform(0.5, 4.0))
                await self._scale(path)
                await self._call(partial(self.demo.post, f"{path}/on"))
                if number % LONG_EVERY:
                    await self._live_for(path, self.random.choice((0.0, 30.0)), self.random.uniform(1.0, 8.0))
                else:
                    await self._live_for(path, 60.0, self.random.uniform(35.0, 60.0))
                    await self._scale(path)
                    await asyncio.sleep(self.random.uniform(35.0, 60.0))
                    self.long_spans += 1
                    if self.long_spans > LONG_SPANS:  # one may be cut by a kill
                        self.spanned.set()
        finally:
            await asyncio.shield(self._restore(path))

    async def _scale(self, path: str) -> None:
        await self._call(partial(self.demo.patch, path, {"gpus": self.random.choice((1, 2))}))

    async def _live_for(self, path: str, start_limit_s: float, live_s: float) -> None:
        """Wait until the resource is live, at most so long, and then for `live_s`."""
        deadline_s = time.monotonic() + start_limit_s
        while time.monotonic() < deadline_s:
            try:
                if (await asyncio.to_thread(self.demo.get, path))["state"] == "live":
                    break
            except ApiError:
                self.switch_errors += 1
            await asyncio.sleep(0.5)
        await asyncio.sleep(live_s)

    async def _restore(self, path: str) -> None:
        await self._call(partial(self.demo.patch, path, {"gpus": 1}))
        await self._call(partial(self.demo.post, f"{path}/on"))

    async def _call(self, send: Callable[[], object]) -> None:
        """What killed parts refuse is tried again."""
        while True:
            try:
                await asyncio.to_thread(send)
            except ApiError:
                self.switch_errors += 1
                await asyncio.sleep(0.5)
            else:
                self.switched += 1
                return


def is_job(record: ClientRecord) -> bool:
    """Whether the gateway took the request: it then has a job that must end, and be paid or not. Pure."""
    return record.request_id is not None and record.status == 200


def rows_of(
    storm: Storm,
    snapshot: Snapshot,
    results: list[Result],
    months: dict[str, tuple[int, list[str]]],
    money: Money,
    first: datetime,
) -> list[Row]:
    """What was done, then one row for each check of the audit and for each month that was computed again. Pure.

    first: when the storm began.
    """
    first_us = to_unix_us(first)
    intervals = [
        each
        for each in snapshot.intervals
        if each.resource_id == storm.resource_id and each.started_us >= first_us
    ]
    long = sum(each.proved_us - each.started_us > MINUTE_US for each in intervals)
    minutes = sum(
        posted.minutes
        for key, posted in snapshot.posted_minutes.items()
        if key.resource_id == storm.resource_id and key.hour_us >= first_us // HOUR_US * HOUR_US
    )
    outcomes = [
        record.outcome for client in (storm.pool, storm.own) for record in client.records if is_job(record)
    ]
    rows = [
        Row("jobs", "accepted", len(outcomes), ratio=len(outcomes) / storm.jobs, floor=1),
        *(
            Row(f"jobs: {outcome}", "jobs", outcomes.count(outcome))
            for outcome in ("answered", "cancelled_by_client", "cut", "error")
        ),
        Row("resource turned off or on, or scaled", "times", storm.switched),
        Row("live intervals of its places", "intervals", len(intervals)),
        Row("live intervals of over a minute", "intervals", long, ratio=long / LONG_SPANS, floor=1),
        Row("minutes billed in its hours", "minutes", minutes),
        *(Row(f"kill -9 {victim}: next answer", "s", seconds) for victim, seconds in storm.kills),
    ]
    rows += [
        Row(
            f"audit: {r.name}",
            f"findings in {r.looked_at}",
            len(r.findings),
            ratio=float(not r.findings),
            floor=1,
        )
        for r in results
    ]
    rows += [
        Row(
            f"month of {team} again: {nanousd} nano-USD",
            "differences",
            len(found),
            ratio=float(not found),
            floor=1,
        )
        for team, (nanousd, found) in months.items()
    ]
    return rows + money_rows(money)


async def recomputed(url: str, teams: list[str], first: datetime) -> dict[str, tuple[int, list[str]]]:
    """Each team's months since `first`, computed again: their sum, and in what the books differ."""
    now = datetime.now(UTC)
    names = dict.fromkeys(f"{moment:%Y-%m}" for moment in (first, now))
    months: dict[str, tuple[int, list[str]]] = {}
    for team in teams:
        total, found = 0, []
        for name in names:
            month = read_month(name)
            assert month is not None  # written two lines above
            compared = await compare(url, team, month)
            total += compared.computed.total_nanousd
            found += compared.found
        months[team] = total, found
    return months


async def _run(storm: Storm, victims: list[str], log: Path) -> list[Row]:
    first = datetime.now(UTC)
    await storm.run(victims)
    # Minutes of a live resource grow while they are compared: it is off when the books are looked at.
    await asyncio.to_thread(storm.demo.post, f"/api/resources/{storm.resource_id}/off")
    storm.pool.write_log(log)
    storm.own.write_log(log)
    storm.capped.client.write_log(log)
    url = build(storm.layout, "all", os.environ)[0].database_url
    records = [*storm.pool.records, *storm.own.records, *storm.capped.client.records]
    await settled_audit(url, records, SETTLE_LIMIT_S)
    money = await storm.capped.reckon(url, first)
    # What was let go late may have changed the books: they are looked at when nothing is held any more.
    snapshot, results = await settled_audit(url, records, SETTLE_LIMIT_S)
    months = await recomputed(url, [storm.pool.team, storm.own.team, storm.capped.client.team], first)
    await asyncio.to_thread(storm.demo.post, f"/api/resources/{storm.resource_id}/on")
    for result in results:
        for finding in result.findings[:10]:
            print(f"{result.name}: {finding}")
    for _, found in months.values():
        print(*found[:10], sep="\n", end="\n" if found else "")
    return rows_of(storm, snapshot, results, months, money, first)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.storm", description=__doc__)
    parser.add_argument("--home", type=Path, help="the folder of another running set than .local/")
    parser.add_argument("--jobs", type=int, default=JOBS)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS + SERVERS, default=list(DEFAULT_VICTIMS))
    parser.add_argument("--seed", type=int, default=1, help="of the storm's moments")
    parser.add_argument("--client-log", type=Path, metavar="FILE", help="keep the clients' log there")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    layout = Layout(arguments.home.resolve()) if arguments.home else main_layout()
    if read_report(layout) is None:
        print("storm: nothing runs there: 'make up' first", file=sys.stderr)
        return 2
    log = arguments.client_log or Path(tempfile.mkstemp(prefix="roundhouse-storm-", suffix=".jsonl")[1])
    env = read_env(layout)
    url = env["ROUNDHOUSE_URL"]
    demo = ManagementApi(url, env["ROUNDHOUSE_API_KEY"])
    platform = ManagementApi(url, env["ROUNDHOUSE_ADMIN_KEY"])
    with payer_on_shared_gpus(platform) as payer, payer_on_shared_gpus(platform) as capped:
        cap_team(ManagementApi(url, payer.api_key))
        [resource] = [each for each in demo.list("/api/resources") if each["name"] == RESOURCE]
        storm = Storm(
            layout=layout,
            pool=RecordingClient(url, payer.api_key, payer.slug),
            own=RecordingClient(url, env["ROUNDHOUSE_API_KEY"], TEAM),
            own_model=env["ROUNDHOUSE_MODEL"],
            capped=Capped(
                RecordingClient(url, capped.api_key, capped.slug),
                ManagementApi(url, capped.api_key),
                SHARED_MODEL,
                PROMPTS[0],
                MAX_TOKENS,
            ),
            demo=demo,
            resource_id=str(resource["resource_id"]),
            jobs=arguments.jobs,
            random=random.Random(arguments.seed),
        )
        rows = asyncio.run(_run(storm, arguments.victims, log))
    print_table(rows)
    print(f"the clients' log: {log}")
    if arguments.json:
        write_json(rows, arguments.json)
    return 1 if any(row.is_below_floor for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
