"""`python -m loadtest.path`: what gateway and broker add to a request, with an engine that takes no time.

Everything runs on this machine, the load generator too. Arrivals are open loop (Poisson): a request's latency counts
from when it was due, so a stall is not hidden by the requests that it delayed (a delay below the timer's own
granularity is not counted).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from pathlib import Path

import aiohttp
import uvloop

from loadtest.report import Row, print_table, write_json
from loadtest.stack import Stack, running_stack

OPEN_LOOP_RPS = 100.0
TIMER_SLACK_S = 0.002
"""The event loop's timers count whole milliseconds: a request sent this little after it was due was sent on time."""
LATENCY_P50_LIMIT_MS = 6.0
LATENCY_P99_LIMIT_MS = 25.0
SATURATION_FLOOR_RPS, SATURATION_TARGET_RPS = 250.0, 600.0
STREAM_FLOOR_TOKENS_S, STREAM_TARGET_TOKENS_S = 20_000.0, 40_000.0


def percentile(values: list[float], share: float) -> float:
    """Nearest-rank percentile of a non-empty list."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Client:
    """Completions against one stack; any answer but a right one is an error of the measurement."""

    def __init__(self, stack: Stack, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._url = f"{stack.base_url}/v1/completions"
        self._headers = {"Authorization": f"Bearer {stack.api_key}", "Content-Type": "application/json"}
        self._model = stack.model

    async def complete(self, max_tokens: int) -> None:
        body = {"model": self._model, "prompt": "The path of a request", "max_tokens": max_tokens, "seed": 1}
        async with self._session.post(self._url, data=json.dumps(body), headers=self._headers) as answer:
            payload = await answer.json()
            if answer.status != 200 or payload["usage"]["completion_tokens"] != max_tokens:
                raise RuntimeError(f"{answer.status}: {payload}")

    async def stream(self, max_tokens: int) -> int:
        """Return the number of tokens that the stream's usage names; its text must be whole and in order."""
        body = {
            "model": self._model,
            "prompt": "The path of a request",
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text, tokens = [], 0
        async with self._session.post(self._url, data=json.dumps(body), headers=self._headers) as answer:
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {await answer.text()}")
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                text += [choice["text"] for choice in chunk["choices"]]
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
        if "".join(text) != "".join(f"t{index} " for index in range(max_tokens)):
            raise RuntimeError("the streamed text is not whole")
        return int(tokens)


async def measure_latency(client: Client, rate_rps: float, duration_s: float) -> list[float]:
    """Latencies in ms of Poisson arrivals at `rate_rps`, from each request's due time."""
    rng = random.Random(7)
    latencies: list[float] = []

    async def one(due_s: float) -> None:
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        now_s = time.perf_counter()
        started_s = now_s if now_s - due_s < TIMER_SLACK_S else due_s
        await client.complete(1)
        latencies.append((time.perf_counter() - started_s) * 1000)

    due_s = time.perf_counter() + 0.2
    end_s = due_s + duration_s
    async with asyncio.TaskGroup() as group:
        while due_s < end_s:
            group.create_task(one(due_s))
            due_s += rng.expovariate(rate_rps)
    return latencies


async def measure_saturation(client: Client, concurrency: int, duration_s: float) -> float:
    """Requests per second with `concurrency` requests always in flight."""
    done = 0
    end_s = time.perf_counter() + duration_s

    async def loop() -> None:
        nonlocal done
        while time.perf_counter() < end_s:
            await client.complete(1)
            done += 1

    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(loop())
    return done / (time.perf_counter() - started_s)


async def measure_streams(client: Client, streams: int, tokens: int) -> float:
    """Tokens per second that reach clients, over `streams` at once."""
    started_s = time.perf_counter()
    counts = await asyncio.gather(*(client.stream(tokens) for _ in range(streams)))
    return sum(counts) / (time.perf_counter() - started_s)


async def measure(stack: Stack, *, quick: bool) -> list[Row]:
    rows: list[Row] = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=120)
    ) as session:
        client = Client(stack, session)
        await asyncio.to_thread(stack.start_worker, "worker", step_s=0.0, max_batch=64)
        await measure_latency(client, 50.0, 1.0 if quick else 3.0)  # warm-up
        latencies = await measure_latency(client, OPEN_LOOP_RPS, 3.0 if quick else 20.0)
        p50_ms, p99_ms = statistics.median(latencies), percentile(latencies, 0.99)
        at = f"at {OPEN_LOOP_RPS:.0f}/s"
        rows.append(Row(f"added latency p50 {at}", "ms", p50_ms, None, LATENCY_P50_LIMIT_MS / p50_ms, 1.0))
        rows.append(Row(f"added latency p99 {at}", "ms", p99_ms, None, LATENCY_P99_LIMIT_MS / p99_ms, 1.0))
        rps = await measure_saturation(client, 64, 3.0 if quick else 15.0)
        target = SATURATION_TARGET_RPS / SATURATION_FLOOR_RPS
        rows.append(Row("requests at saturation", "1/s", rps, None, rps / SATURATION_FLOOR_RPS, 1.0, target))
        memory = await asyncio.to_thread(stack.memory_bytes)
        await asyncio.to_thread(stack.stop, "worker")

        await asyncio.to_thread(stack.start_worker, "worker", step_s=0.004, max_batch=512)
        await measure_streams(client, 32, 50)  # warm-up
        tokens_s = await measure_streams(client, 256, 100 if quick else 600)
        target = STREAM_TARGET_TOKENS_S / STREAM_FLOOR_TOKENS_S
        rows.append(
            Row(
                "tokens streamed to clients",
                "1/s",
                tokens_s,
                None,
                tokens_s / STREAM_FLOOR_TOKENS_S,
                1.0,
                target,
            )
        )
        for name, size in (await asyncio.to_thread(stack.memory_bytes)).items():
            rows.append(Row(f"memory of {name}", "MiB", max(size, memory.get(name, 0)) / 2**20))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.path", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--quick", action="store_true", help="a few seconds only: checks that it runs")
    parser.add_argument(
        "--with-billing", action="store_true", help="let billing consume the usage events meanwhile"
    )
    arguments = parser.parse_args()
    with running_stack() as stack:
        if arguments.with_billing:
            stack.start_service("billing")
        rows = uvloop.run(measure(stack, quick=arguments.quick))
    print_table(rows)
    if arguments.json:
        write_json(rows, arguments.json)


if __name__ == "__main__":
    main()
