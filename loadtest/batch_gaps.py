"""`python -m loadtest.batch_gaps`: what a batch on a live resource costs live requests, and what they leave it.

A real worker with the real model. In each round: live requests alone; a batch alone; the same live requests beside the same
batch. Live requests come at random moments, the same ones each time, whether earlier ones are answered or not, at a rate at which
one after the other would keep the worker busy for `--load` of the time. Ratios are of one run on one machine.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from openai import AsyncOpenAI, OpenAI

from loadtest.report import Row, print_table, write_json
from loadtest.stack import Stack, running_stack

ENDPOINT = "/v1/chat/completions"
TOKENS = 32
LINES = 5000
P95_LIMIT, SHARE_FLOOR = 1.25, 0.30
WARM_UP = 8
RAMP_S = 8.0
"""The worker's batch is full and its pace steady by then."""


@dataclass
class Seen:
    """Over all rounds. Latencies in seconds; batch throughput in tokens a second, one value for each round."""

    alone_s: list[float] = field(default_factory=list)
    beside_s: list[float] = field(default_factory=list)
    batch_alone: list[float] = field(default_factory=list)
    batch_beside: list[float] = field(default_factory=list)


def body(stack: Stack, text: str) -> dict[str, object]:
    """Answers of one length, so that the batch's throughput is not that of its luck with short ones."""
    messages = [{"role": "user", "content": text}]
    return {
        "model": stack.model,
        "messages": messages,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "temperature": 0,
    }


class Gaps:
    def __init__(self, stack: Stack, load: float, phase_s: float, seed: int) -> None:
        self._stack, self._load, self._phase_s, self._seed = stack, load, phase_s, seed
        self._client = OpenAI(base_url=f"{stack.base_url}/v1", api_key=stack.api_key, max_retries=0)
        self._one_s = 0.0

    def warm_up(self) -> None:
        """Load the model, and learn how long one request takes by itself."""
        took = [asyncio.run(self._requests([0.0]))[0] for _ in range(WARM_UP)]
        self._one_s = sorted(took)[WARM_UP // 2]

    @property
    def one_s(self) -> float:
        return self._one_s

    def live(self) -> list[float]:
        """Send the phase's requests, each at its moment; return how long each took."""
        moments, at_s, chance = [], 0.0, random.Random(self._seed)
        while (at_s := at_s + chance.expovariate(self._load / self._one_s)) < self._phase_s:
            moments.append(at_s)
        return asyncio.run(self._requests(moments))

    async def _requests(self, moments: list[float]) -> list[float]:
        started_s = time.monotonic()
        async with AsyncOpenAI(
            base_url=f"{self._stack.base_url}/v1", api_key=self._stack.api_key, max_retries=0, timeout=300
        ) as client:

            async def one(index: int, at_s: float) -> float:
                await asyncio.sleep(max(0.0, started_s + at_s - time.monotonic()))
                begun_s = time.monotonic()
                wanted = body(self._stack, f"Tell me about the number {index}.")
                await client.post(ENDPOINT.removeprefix("/v1"), body=wanted, cast_to=object)
                return time.monotonic() - begun_s

            return list(await asyncio.gather(*(one(index, at_s) for index, at_s in enumerate(moments))))

    def start_batch(self) -> str:
        lines = [
            json.dumps({"custom_id": f"line-{index}", "method": "POST", "url": ENDPOINT,
                        "body": body(self._stack, f"Say something about {index}.")})
            for index in range(LINES)
        ]  # fmt: skip
        file = self._client.files.create(
            file=("lines.jsonl", io.BytesIO("\n".join(lines).encode())), purpose="batch"
        )
        batch = self._client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        return batch.id

    def tokens(self, batch_id: str) -> int:
        """Answer tokens of the batch's lines that are done."""
        batch = self._client.batches.retrieve(batch_id)
        if batch.status not in ("validating", "in_progress"):
            raise RuntimeError(f"the batch is {batch.status}: it has to last for the whole phase")
        return batch.usage.output_tokens if batch.usage else 0

    def stop_batch(self, batch_id: str) -> None:
        self._client.batches.cancel(batch_id)
        while self._client.batches.retrieve(batch_id).status != "cancelled":
            time.sleep(0.2)

    def round(self, seen: Seen) -> None:
        seen.alone_s += self.live()
        batch_id = self.start_batch()
        while not self.tokens(batch_id):
            time.sleep(0.1)
        time.sleep(RAMP_S)
        seen.batch_alone.append(self._pace(batch_id, lambda: time.sleep(self._phase_s)))
        seen.batch_beside.append(self._pace(batch_id, lambda: seen.beside_s.extend(self.live())))
        self.stop_batch(batch_id)

    def _pace(self, batch_id: str, meanwhile: object) -> float:
        assert callable(meanwhile)
        before, started_s = self.tokens(batch_id), time.monotonic()
        meanwhile()
        return (self.tokens(batch_id) - before) / (time.monotonic() - started_s)


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(parsed: argparse.Namespace) -> list[Row]:
    seen = Seen()
    with running_stack() as stack:
        stack.start_service("batch")
        stack.start_service("billing")
        stack.start_real_worker("worker")
        gaps = Gaps(stack, parsed.load, parsed.phase, parsed.seed)
        gaps.warm_up()
        for number in range(parsed.rounds):
            gaps.round(seen)
            print(f"round {number + 1} of {parsed.rounds}", file=sys.stderr)
    alone, beside = quantile(seen.alone_s, 0.95), quantile(seen.beside_s, 0.95)
    batch_alone, batch_beside = sum(seen.batch_alone), sum(seen.batch_beside)
    share = batch_beside / batch_alone
    return [
        Row("one live request by itself", "ms", round(gaps.one_s * 1000, 1)),
        Row("live requests", "in each phase", len(seen.alone_s) // parsed.rounds),
        Row("live p50 alone", "ms", round(quantile(seen.alone_s, 0.5) * 1000, 1)),
        Row("live p50 beside a batch", "ms", round(quantile(seen.beside_s, 0.5) * 1000, 1)),
        Row("live p95 alone", "ms", round(alone * 1000, 1)),
        Row("live p95 beside a batch", "ms", round(beside * 1000, 1), ratio=round(P95_LIMIT * alone / beside, 2), floor=1),
        Row("batch alone", "tokens/s", round(batch_alone / parsed.rounds, 1)),
        Row("batch beside live", "tokens/s", round(batch_beside / parsed.rounds, 1), ratio=round(share / SHARE_FLOOR, 2), floor=1),
    ]  # fmt: skip


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.batch_gaps", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument(
        "--load", type=float, default=0.4, help="share of the time that live requests ask for"
    )
    parser.add_argument("--phase", type=float, default=60.0, metavar="S", help="seconds of each phase")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round of 10 s: only shows that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parsed = parser.parse_args(arguments)
    if parsed.quick:
        parsed.phase, parsed.rounds = 10.0, 1
    return parsed


def main(arguments: list[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    rows = measure(parsed)
    print_table(rows)
    if parsed.json:
        write_json(rows, parsed.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
