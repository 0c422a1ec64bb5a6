"""`python -m loadtest.chaos`: kill -9 of each process in turn under 50 concurrent requests, on the running system.

Wants `make up` (or `--home` of another running set). For each victim: 50 requests begin, the victim is killed, each
of the 50 must end within 20 s (whole answer, resumed stream or error), a new request must succeed within 20 s, and no
client may have seen a text that differs from a run without faults. At the end the clients' own log is audited against
request records, events and ledger.

By default the demo team asks, on its dedicated resource, where no request is charged by the token. With
`--shared-gpus` a new team asks on the platform's shared pool, where every token has to be found in the ledger.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import secrets
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from infra.local.daemon import build
from infra.local.demo import LIVE_LIMIT_S, PLATFORM_TEAM, TEAM
from infra.local.demo_model import BASE_NAME
from infra.local.layout import Layout, main_layout
from infra.local.leftovers import find_processes
from infra.local.management_api import ApiError, ManagementApi
from infra.local.state import read_report
from loadtest.audit import settled_audit
from loadtest.audit_checks import Result
from loadtest.audit_snapshot import ClientRecord
from loadtest.clients import RecordingClient
from loadtest.report import Row, print_table, write_json

REQUESTS = 50
END_LIMIT_S = 20.0
MAX_TOKENS = 32
SHARED_MODEL = f"{PLATFORM_TEAM}/{BASE_NAME}"
PROMPTS = (
    "The captain looked at the sea and",
    "Bread is made of",
    "In the morning the train",
    "A letter to the king:",
    "The three rules of the library are",
)
VICTIMS = ("worker", "gateway", "scheduler", "billing", "agent")
SERVERS = ("rabbitmq", "postgres", "redis")


@dataclass(frozen=True, slots=True)
class Round:
    """What one kill did. Times are seconds from the kill."""

    victim: str
    answered: int
    errors: int
    cut: int
    slowest_end_s: float
    recovered_s: float
    wrong_texts: int


def worker_pids(layout: Layout) -> list[int]:
    """Workers are found by the marker in their environment, and by being what the agent started."""
    found = []
    for process in find_processes(layout.marker):
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
        if b"services.worker" in command:
            found.append(process.pid)
    return found


def victim_pids(layout: Layout, victim: str) -> list[int]:
    """The pids to kill for a victim's name. Raises `RuntimeError` when it does not run."""
    if victim == "worker":
        pids = worker_pids(layout)
    else:
        report = read_report(layout)
        processes = report.processes if report else ()
        pids = [each.pid for each in processes if each.name == victim and each.pid is not None]
        if victim == "postgres":
            pids += [each.pid for each in find_processes(layout.marker) if each.parent_pid in pids]
    if not pids:
        raise RuntimeError(f"no process of {victim} runs")
    return pids


@dataclass(frozen=True, slots=True)
class Payer:
    """A team that pays by the token."""

    slug: str
    api_key: str


@contextmanager
def payer_on_shared_gpus(platform: ManagementApi) -> Iterator[Payer]:
    """A new team without a resource, while the platform's pool is live; a pool that was off is turned off again."""
    [pool] = [each for each in platform.list("/api/resources", team=PLATFORM_TEAM) if each["pool"]]
    path = f"/api/resources/{pool['resource_id']}"
    platform.post(f"{path}/on", team=PLATFORM_TEAM)
    try:
        deadline_s = time.monotonic() + LIVE_LIMIT_S
        while platform.get(path, team=PLATFORM_TEAM)["state"] != "live":
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the shared pool is not live within {LIVE_LIMIT_S:g} s")
            time.sleep(0.3)
        slug = f"chaos-{secrets.token_hex(4)}"
        platform.post("/api/teams", {"slug": slug, "name": "Chaos"})
        scopes = ["inference", "manage"]
        key = platform.post("/api/keys", {"name": "chaos", "scopes": scopes}, team=slug)
        yield Payer(slug, str(key["secret"]))
    finally:
        if pool["wanted"] == "off":
            try:
                platform.post(f"{path}/off", team=PLATFORM_TEAM)
            except ApiError as error:  # must not hide what went wrong before
                print(f"chaos: the shared pool stays on: {error}", file=sys.stderr)


class Chaos:
    """One system under test and its clients."""

    def __init__(
        self,
        layout: Layout,
        base_url: str,
        api_key: str,
        model: str,
        team: str = TEAM,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        """team: the slug of the key's team, by which the audit knows whose the requests are. max_tokens: of each answer."""
        self.layout = layout
        self.model = model
        self._max_tokens = max_tokens
        self.client = RecordingClient(base_url, api_key, team)
        self._expected: dict[str, list[str]] = {}
        """The tokens of each prompt's whole answer."""

    async def learn(self, session: aiohttp.ClientSession) -> None:
        """The whole greedy answers, from a run without faults."""
        for prompt in PROMPTS:
            self._expected[prompt] = await self.client.spell(session, self.model, prompt, self._max_tokens)

    async def kill_under_load(self, victim: str, kill_after_s: float) -> Round:
        """Begin the requests, kill the victim, and wait for everything to end and to work again."""
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None, connect=5)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            if not self._expected:
                await self.learn(session)
            requests = [
                asyncio.create_task(
                    self._one(session, PROMPTS[number % len(PROMPTS)], stream=number % 2 == 0)
                )
                for number in range(REQUESTS)
            ]
            await asyncio.sleep(kill_after_s)
            if all(request.done() for request in requests):
                raise RuntimeError(
                    f"all requests had ended before {victim} was to be killed: nothing is proved"
                )
            killed_s = time.monotonic()
            killed_unix_ms = time.time_ns() // 1_000_000
            for pid in victim_pids(self.layout, victim):
                os.kill(pid, signal.SIGKILL)
            recovered_s = await self._recover(session, killed_s)
            results = await asyncio.gather(*requests)
        records = [record for record, _ in results]
        return Round(
            victim=victim,
            answered=sum(record.outcome == "answered" for record in records),
            errors=sum(record.outcome == "error" for record in records),
            cut=sum(record.outcome == "cut" for record in records),
            slowest_end_s=max(record.ended_unix_ms - killed_unix_ms for record in records) / 1000,
            recovered_s=recovered_s,
            wrong_texts=sum(not right for _, right in results),
        )

    async def _one(
        self, session: aiohttp.ClientSession, prompt: str, *, stream: bool
    ) -> tuple[ClientRecord, bool]:
        tokens = self._expected[prompt]
        record, text = await self.client.complete(
            session, self.model, prompt, self._max_tokens, stream=stream, tokens=tokens
        )
        whole = "".join(tokens)
        return record, text == whole if record.outcome == "answered" else whole.startswith(text)

    async def _recover(self, session: aiohttp.ClientSession, killed_s: float) -> float:
        """Seconds until a new request was answered rightly; infinity after three times the limit."""
        while time.monotonic() - killed_s < 3 * END_LIMIT_S:
            record, right = await self._one(session, PROMPTS[0], stream=True)
            if record.outcome == "answered" and right:
                return time.monotonic() - killed_s
            await asyncio.sleep(0.3)
        return float("inf")


def rows_of(rounds: list[Round], results: list[Result]) -> list[Row]:
    """Three rows per victim, and one per check of the audit."""
    rows = []
    for each in rounds:
        name = f"kill -9 {each.victim}: {each.answered} answered, {each.errors} errors, {each.cut} cut"
        last_end_s = max(
            each.slowest_end_s, 0.001
        )  # by the clock of milliseconds it may be at the kill itself
        rows.append(Row(f"{name}; last end", "s", last_end_s, None, END_LIMIT_S / last_end_s, 1.0))
        recovered_s = None if math.isinf(each.recovered_s) else each.recovered_s
        ratio = END_LIMIT_S / each.recovered_s  # 0 when no new request ever succeeded
        rows.append(Row(f"kill -9 {each.victim}: new request", "s", recovered_s, None, ratio, 1.0))
        rows.append(
            Row(
                f"kill -9 {each.victim}: wrong texts",
                "",
                each.wrong_texts,
                None,
                float(each.wrong_texts == 0),
                1.0,
            )
        )
    rows += [
        Row(
            f"audit: {r.name}",
            f"findings in {r.looked_at}",
            len(r.findings),
            None,
            float(not r.findings),
            1.0,
        )
        for r in results
    ]
    return rows


def read_env(layout: Layout) -> dict[str, str]:
    """`.local/env` as values."""
    pairs = (line.partition("=") for line in layout.env_file.read_text().splitlines() if "=" in line)
    return {name.removeprefix("export ").strip(): "".join(shlex.split(value)) for name, _, value in pairs}


async def _run(chaos: Chaos, victims: list[str], log: Path) -> tuple[list[Round], list[Result]]:
    rounds = []
    for victim in victims:
        rounds.append(await chaos.kill_under_load(victim, kill_after_s=1.5))
        print(f"{rounds[-1]}", flush=True)
    chaos.client.write_log(log)
    database_url = build(chaos.layout, "all", os.environ)[0].database_url
    _, results = await settled_audit(database_url, chaos.client.records, 30.0)
    return rounds, results


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.chaos", description=__doc__)
    parser.add_argument("--home", type=Path, help="the folder of another running set than .local/")
    parser.add_argument("--victims", nargs="+", choices=VICTIMS + SERVERS, default=list(VICTIMS))
    parser.add_argument("--shared-gpus", action="store_true", help="ask as a team that pays by the token")
    parser.add_argument("--client-log", type=Path, metavar="FILE", help="keep the clients' log there")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    layout = Layout(arguments.home.resolve()) if arguments.home else main_layout()
    if read_report(layout) is None:
        print("chaos: nothing runs there: 'make up' first", file=sys.stderr)
        return 2
    log = arguments.client_log or Path(tempfile.mkstemp(prefix="roundhouse-chaos-", suffix=".jsonl")[1])
    env = read_env(layout)
    url = env["ROUNDHOUSE_URL"]
    platform = ManagementApi(url, env["ROUNDHOUSE_ADMIN_KEY"])
    with payer_on_shared_gpus(platform) if arguments.shared_gpus else nullcontext() as payer:
        if payer is None:
            chaos = Chaos(layout, url, env["ROUNDHOUSE_API_KEY"], env["ROUNDHOUSE_MODEL"])
        else:
            chaos = Chaos(layout, url, payer.api_key, SHARED_MODEL, payer.slug)
        rounds, results = asyncio.run(_run(chaos, arguments.victims, log))
    rows = rows_of(rounds, results)
    print_table(rows)
    for result in results:
        for finding in result.findings[:10]:
            print(f"{result.name}: {finding}")
    print(f"the clients' log: {log}")
    if arguments.json:
        write_json(rows, arguments.json)
    return 1 if any(row.is_below_floor for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
