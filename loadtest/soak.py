"""The engine's memory over many requests: does anything grow that should not?

Answers, chats of several turns, embeddings, scored prompts, resumes, cancels and refusals of several teams, in a pool so
small that blocks are found again, evicted and taken away from running sequences. Memory is read while the engine is idle.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loadtest.engine_models import MissingModel, make_tiny_llama, read_smollm2
from loadtest.report import Row, print_table, write_json
from services.worker.engine import (
    Engine,
    EngineConfig,
    EngineRefusal,
    Pooling,
    Sampling,
    SequenceRequest,
    StepReport,
)

HANDLE = "model"
SAMPLES = 20
# Until then the pool's pages and the allocators' caches fill.
WARM_UP_SAMPLES = 5
# A request that left 1 KiB behind would be seen; what the allocators of C and Python keep back and give again is not.
MOST_BYTES_PER_REQUEST = 512
SLACK_MIB = 1.0
MOST_HEAP_BLOCKS_PER_REQUEST = 0.2
SLACK_HEAP_BLOCKS = 1500
# Which rows the last step had differs, and the sampler keeps them until the next.
SLACK_OBJECTS = 20

OUTSTANDING = 24
LONGEST_PROMPT, LONGEST_ANSWER = 160, 48


@dataclass(frozen=True, slots=True)
class Sample:
    """Of an idle engine. heap_blocks: of Python's own allocator. engine_objects: instances of the engine's classes."""

    requests: int
    seconds: float
    resident_mib: float
    heap_blocks: int
    engine_objects: int
    free_kv_tokens: int


@dataclass(slots=True)
class Totals:
    """Of all that ended. cached_tokens: prompt tokens that were found computed; failed: ended by an error."""

    ended: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    drawn_tokens: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0


class Load:
    """Requests from a seed. The last conversations go on, with what was answered."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        self._rng, self._vocab_size = random.Random(seed), vocab_size
        self._talks: deque[tuple[str, tuple[int, ...]]] = deque(maxlen=16)
        self._open: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._count = 0

    def next_request(self) -> SequenceRequest:
        rng, self._count = self._rng, self._count + 1
        name, team, prompt = str(self._count), f"team {rng.randrange(3)}", self._tokens(1, LONGEST_PROMPT)
        if self._talks and rng.random() < 0.5:
            team, talk = rng.choice(self._talks)
            prompt = (*talk, *self._tokens(1, 20))
        if len(prompt) > LONGEST_PROMPT:
            prompt = prompt[:LONGEST_PROMPT]
        kind = rng.random()
        if kind < 0.1:
            pooling: Pooling = "mean" if kind < 0.05 else "last"
            return SequenceRequest(name, HANDLE, team, prompt, 0, Sampling(), pooling=pooling)
        self._open[name] = (team, prompt)
        sampling = Sampling(
            temperature=rng.choice((0.0, 0.8, 1.0)),
            top_p=rng.choice((1.0, 0.9)),
            repetition_penalty=rng.choice((1.0, 1.1)),
            seed=self._count,
            logprobs=rng.choice((None, None, 3)),
            ignore_eos=True,
        )
        answer_tokens = rng.randrange(1, LONGEST_ANSWER + 1)
        return SequenceRequest(
            name,
            HANDLE,
            team,
            prompt,
            answer_tokens,
            sampling,
            stop=("\n\n",) if rng.random() < 0.2 else (),
            prior_tokens=self._tokens(1, answer_tokens) if rng.random() < 0.1 else (),
            echo_logprobs=rng.random() < 0.05,
        )

    def end(self, sequence_id: str, answer: Sequence[int]) -> None:
        talk = self._open.pop(sequence_id, None)
        if talk is not None and answer:
            self._talks.append((talk[0], (*talk[1], *answer)))

    def is_impatient(self) -> bool:
        """Whether someone cancels now."""
        return self._rng.random() < 0.01

    def choose(self, sequence_ids: Sequence[str]) -> str:
        return self._rng.choice(sequence_ids)

    def _tokens(self, least: int, most: int) -> tuple[int, ...]:
        return tuple(self._rng.randrange(3, self._vocab_size) for _ in range(self._rng.randint(least, most)))


class Soak:
    """Drives one engine; `run_until` leaves it idle."""

    def __init__(self, engine: Engine, load: Load) -> None:
        self._engine, self._load = engine, load
        self._answers: dict[str, list[int]] = {}
        self._added = 0
        self.totals = Totals()

    def run_until(self, requests: int) -> None:
        while self._added < requests or self._engine.has_work:
            while self._added < requests and len(self._answers) < OUTSTANDING:
                self._add(self._load.next_request())
            if self._answers and self._load.is_impatient():
                cancelled = self._load.choose(list(self._answers))
                self._engine.cancel(cancelled)
                self._end(cancelled)
                self.totals.cancelled += 1
            self._book(self._engine.step())

    def _add(self, request: SequenceRequest) -> None:
        self._added += 1
        if self._added % 50 == 0:
            self._expect_refusal(request)
        self._engine.add(request)
        self._answers[request.sequence_id] = []

    def _expect_refusal(self, request: SequenceRequest) -> None:
        try:
            self._engine.add(
                SequenceRequest("refused", HANDLE, "team", request.prompt_tokens, 10**6, request.sampling)
            )
        except EngineRefusal:
            self.totals.refused += 1
        else:
            raise AssertionError("a request that is too long was taken")

    def _book(self, report: StepReport) -> None:
        totals = self.totals
        totals.prefill_tokens += report.prefill_tokens
        for delta in report.deltas:
            totals.drawn_tokens += len(delta.tokens)
            self._answers[delta.sequence_id] += delta.tokens
            if delta.finish_reason is not None or delta.error is not None:
                totals.failed += delta.error is not None
                totals.cached_tokens += delta.cached_prompt_tokens
                self._end(delta.sequence_id)

    def _end(self, sequence_id: str) -> None:
        self._load.end(sequence_id, self._answers.pop(sequence_id))
        self.totals.ended += 1


def take_sample(engine: Engine, requests: int, started_s: float) -> Sample:
    gc.collect()
    resident_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return Sample(
        requests=requests,
        seconds=time.monotonic() - started_s,
        resident_mib=resident_pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        heap_blocks=sys.getallocatedblocks(),
        engine_objects=sum(_is_of_engine(each) for each in gc.get_objects()),
        free_kv_tokens=engine.free_kv_tokens,
    )


def _is_of_engine(value: object) -> bool:
    module = type(value).__module__
    return isinstance(module, str) and module.startswith("services.worker.engine")


def soak(
    engine: Engine, load: Load, requests: int, show: Callable[[Sample], None] = lambda sample: None
) -> tuple[list[Sample], Totals]:
    """show: called with each sample as it is taken."""
    driver, started_s = Soak(engine, load), time.monotonic()
    samples: list[Sample] = []
    for number in range(1, SAMPLES + 1):
        count = requests * number // SAMPLES
        driver.run_until(count)
        samples.append(take_sample(engine, count, started_s))
        show(samples[-1])
    return samples, driver.totals


def judge(samples: Sequence[Sample], kv_tokens: int) -> list[Row]:
    """Growth from the end of the warm-up to the end of the run; each reading is the lowest of several, for what is held
    for a moment is no leak.

    1. Resident memory: MOST_BYTES_PER_REQUEST and SLACK_MIB. 2. Python's blocks: likewise.
    3. Objects of the engine while nothing runs: SLACK_OBJECTS. 4. Tokens of the pool that are not free then: none, ever.
    """
    tail = WARM_UP_SAMPLES
    warm, end = samples[tail : 2 * tail], samples[-tail:]
    requests = end[0].requests - warm[0].requests

    def growth(read: Callable[[Sample], float]) -> float:
        return min(map(read, end)) - min(map(read, warm))

    def row(name: str, unit: str, grown: float, most: float) -> Row:
        return Row(name, unit, round(grown, 3), most, 1.0 if grown <= most else 0.0, 1.0)

    return [
        row(
            "resident memory grew",
            "MiB",
            growth(lambda each: each.resident_mib),
            round(SLACK_MIB + requests * MOST_BYTES_PER_REQUEST / 2**20, 3),
        ),
        row(
            "Python's heap grew",
            "blocks",
            growth(lambda each: each.heap_blocks),
            SLACK_HEAP_BLOCKS + requests * MOST_HEAP_BLOCKS_PER_REQUEST,
        ),
        row("objects of the engine grew", "objects", growth(lambda each: each.engine_objects), SLACK_OBJECTS),
        row("KV tokens lost", "tokens", kv_tokens - min(each.free_kv_tokens for each in samples), 0),
    ]


def make_engine(
    folder: Path, precision: str, threads: int, kernels: Literal["auto", "torch", "native"] = "auto"
) -> Engine:
    """A pool of five full-length sequences for sixteen that run."""
    kv_tokens = 64 * (5 * (LONGEST_PROMPT + LONGEST_ANSWER) // 64)
    engine = Engine(
        EngineConfig(
            precision=precision,
            threads=threads,
            kernels=kernels,
            max_batch=16,
            kv_tokens=kv_tokens,
            prefill_chunk_tokens=64,
        )
    )
    engine.load_model(HANDLE, folder)
    return engine


def print_sample(each: Sample) -> None:
    print(
        f"{each.requests:8}{each.seconds:9.1f}{each.resident_mib:14.1f}{each.heap_blocks:15}"
        f"{each.engine_objects:16}{each.free_kv_tokens:16}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), default="bf16")
    parser.add_argument("--kernels", choices=("auto", "native", "torch"), default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.requests < 5 * SAMPLES:
        parser.error(f"--requests: at least {5 * SAMPLES}")
    try:
        model = make_tiny_llama() if options.model == "tiny" else read_smollm2()
    except MissingModel as problem:
        print(f"loadtest.soak: {problem}", file=sys.stderr)
        return 2
    engine = make_engine(model.folder, options.precision, options.threads, options.kernels)
    print("requests  seconds  resident MiB  Python blocks  engine objects  free KV tokens", flush=True)
    samples, totals = soak(engine, Load(1, model.vocab_size), options.requests, print_sample)
    rows = judge(samples, engine.config.kv_tokens)
    found_share = totals.cached_tokens / (totals.cached_tokens + totals.prefill_tokens)
    rows += [
        Row("requests", "1/s", round(totals.ended / samples[-1].seconds, 1)),
        Row("tokens drawn", "tokens", totals.drawn_tokens),
        Row("prompt tokens found computed", "share", round(found_share, 3)),
        Row("cancelled", "requests", totals.cancelled),
        Row("failed", "requests", totals.failed, 0, 1.0 if totals.failed == 0 else 0.0, 1.0),
    ]
    print_table(rows)
    if options.json is not None:
        write_json(rows, options.json)
    return 1 if any(row.is_below_floor for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
