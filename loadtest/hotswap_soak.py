"""Two models swapped in and out a thousand times while a third one answers: is every answer that of a fresh process, and does
anything grow?

The engine on its thread, loads as a worker makes them, images; half-way one model gets a new revision. Answers are greedy
and all of one prompt, so that anything of one model that another finds would be seen.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from loadtest.child_process import SideError
from loadtest.engine_models import MissingModel, make_tiny_llama, read_smollm2
from loadtest.hotswap_models import (
    IMAGES_LIMIT_BYTES,
    NOISE_STD,
    TINY_NOISE_STD,
    FineTunes,
    ensure_fine_tunes,
)
from loadtest.hotswap_sides import CONTEXT_TOKENS, MAX_BATCH, PRECISION, HotswapSide
from loadtest.report import Row, print_table, write_json
from services.worker.engine import Engine, EngineConfig, EngineRefusal, Sampling, SequenceRequest, StepReport
from services.worker.engine_thread import EngineThread
from services.worker.held import model_handle
from services.worker.image_store import ImageStore
from services.worker.model_loads import ModelLoads
from shared.messages import ModelRef, WeightsRef

PROMPT, ANSWER_TOKENS = tuple(range(100, 124)), 24
ASKED_AT_ONCE = 2
BACKGROUND_STREAMS = 2
SAMPLES = 25
# The first fifth: pools and allocators fill.
WARM_UP_SAMPLES = 5
MOST_GROWTH = 1.02


class WrongAnswer(RuntimeError):
    """A model answered something else than in a fresh process."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Of this process, without any model but the one that always answers. anonymous_kib: resident, less mapped files."""

    swaps: int
    anonymous_kib: int
    open_files: int
    mapped_images: int


@dataclass
class SwapSoak:
    """expected: each model's answer by its folder in the store."""

    tunes: FineTunes
    expected: Mapping[str, Sequence[int]]
    threads: int = 1
    swap_s: list[float] = field(default_factory=list)
    background_answers: int = 0
    _answers: dict[str, tuple[list[int], asyncio.Future[list[int]]]] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def run(self, swaps: int, show: Callable[[Sample], None] = lambda sample: None) -> list[Sample]:
        """Raises WrongAnswer, ModelUnavailable, RuntimeError for a model that was called damaged."""
        config = EngineConfig(
            precision=PRECISION,
            threads=self.threads,
            max_batch=MAX_BATCH,
            max_context_tokens=CONTEXT_TOKENS,
            kv_tokens=4 * CONTEXT_TOKENS,
        )
        self._thread = EngineThread(Engine(config), self._on_report, self._on_refused)
        images = ImageStore(self.tunes.images, IMAGES_LIMIT_BYTES, config)
        self._loads = ModelLoads(self._thread, self.tunes.store, images, _on_damage)
        self._thread.start()
        steady, first, second, newer = (model.ref for model in self.tunes.models[:4])
        replaced = msgspec.structs.replace(second, revision=2, folder=newer.folder)
        await self._loads.load(steady)
        background = [asyncio.create_task(self._answer_on(steady)) for _ in range(BACKGROUND_STREAMS)]
        samples: list[Sample] = []
        try:
            for number in range(1, swaps + 1):
                ref = first if number % 2 else second if number <= swaps // 2 else replaced
                await self._swap(ref)
                if number % (swaps // SAMPLES) == 0:
                    samples.append(take_sample(number))
                    show(samples[-1])
                for task in background:
                    if task.done():
                        task.result()
        finally:
            for task in background:
                task.cancel()
            await asyncio.wait(background)
            await self._thread.stop()
        return samples

    async def _swap(self, ref: ModelRef) -> None:
        started_s = time.perf_counter()
        await self._loads.load(ref)
        self.swap_s.append(time.perf_counter() - started_s)
        await asyncio.gather(*(self._check(ref) for _ in range(ASKED_AT_ONCE)))
        await self._loads.unload((ref.model_id, ref.revision))

    async def _answer_on(self, ref: ModelRef) -> None:
        while True:
            await self._check(ref)
            self.background_answers += 1

    async def _check(self, ref: ModelRef) -> None:
        answer = await self._ask(ref)
        if answer != list(self.expected[ref.folder]):
            raise WrongAnswer(
                f"{ref.model_id}, revision {ref.revision}, after {len(self.swap_s)} swaps: {answer}"
            )

    async def _ask(self, ref: ModelRef) -> list[int]:
        name = str(next(self._numbers))
        answered: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._answers[name] = ([], answered)
        self._thread.add(
            SequenceRequest(
                sequence_id=name,
                model=model_handle((ref.model_id, ref.revision)),
                isolation_key="loadtest",
                prompt_tokens=PROMPT,
                max_tokens=ANSWER_TOKENS,
                sampling=Sampling(temperature=0.0, ignore_eos=True),
            )
        )
        return await answered

    def _on_report(self, report: StepReport) -> None:
        for delta in report.deltas:
            tokens, answered = self._answers[delta.sequence_id]
            tokens += delta.tokens
            if delta.error is not None:
                answered.set_exception(RuntimeError(delta.error))
            elif delta.finish_reason is not None:
                del self._answers[delta.sequence_id]
                if not answered.cancelled():
                    answered.set_result(tokens)

    def _on_refused(self, sequence_id: str, refusal: EngineRefusal) -> None:
        self._answers[sequence_id][1].set_exception(refusal)


def _on_damage(ref: WeightsRef, reason: str) -> None:
    raise RuntimeError(f"{ref.model_id} was called damaged: {reason}")


def fresh_answers(tunes: FineTunes) -> dict[str, list[int]]:
    """Of each model's folder, without its image, by a process that never had another model. Raises SideError."""
    answers = {}
    for number, model in enumerate(tunes.models):
        with HotswapSide("ours", tunes, 1) as side:
            answers[model.ref.folder] = side.answer_from_folder(number, PROMPT, ANSWER_TOKENS)
    return answers


def take_sample(swaps: int) -> Sample:
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    [anonymous] = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    mapped = {line.split()[-1] for line in maps.splitlines() if ".image" in line}
    return Sample(swaps, int(anonymous), len(os.listdir("/proc/self/fd")), len(mapped))


def judge(samples: Sequence[Sample]) -> list[Row]:
    """From the end of the warm-up to the end, each the least of some readings: memory by MOST_GROWTH; open files and mapped
    images not at all.
    """
    warm, end = samples[WARM_UP_SAMPLES : 2 * WARM_UP_SAMPLES], samples[-WARM_UP_SAMPLES:]

    def row(name: str, unit: str, read: Callable[[Sample], float], most: float) -> Row:
        before, after = min(map(read, warm)), min(map(read, end))
        return Row(name, unit, after, before, most * before / after, 1.0)

    return [
        row("resident memory less mapped files", "MiB", lambda each: each.anonymous_kib / 1024, MOST_GROWTH),
        row("open files", "files", lambda each: each.open_files, 1.0),
        row("mapped images", "files", lambda each: each.mapped_images, 1.0),
    ]


def print_sample(sample: Sample) -> None:
    print(
        f"{sample.swaps:8}{sample.anonymous_kib / 1024:16.1f}{sample.open_files:12}{sample.mapped_images:15}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.hotswap_soak", description=__doc__)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    options = parser.parse_args(arguments)
    if options.swaps < 2 * SAMPLES:
        parser.error(f"--swaps: at least {2 * SAMPLES}")
    try:
        base = make_tiny_llama() if options.model == "tiny" else read_smollm2()
        noise_std = TINY_NOISE_STD if options.model == "tiny" else NOISE_STD
        tunes = ensure_fine_tunes(base, 4, EngineConfig(precision=PRECISION), noise_std)
        expected = fresh_answers(tunes)
        if len(set(map(tuple, expected.values()))) < len(expected):
            raise SideError("two of the models answer alike, and could not be told apart")
        soak = SwapSoak(tunes, expected, options.threads)
    except (MissingModel, SideError) as problem:
        print(f"loadtest.hotswap_soak: {problem}", file=sys.stderr)
        return 2
    print("   swaps   anonymous MiB  open files  mapped images", flush=True)
    started_s = time.monotonic()
    samples = asyncio.run(soak.run(options.swaps, print_sample))
    seconds = time.monotonic() - started_s
    ordered = sorted(soak.swap_s)
    rows = [
        *judge(samples),
        Row("swaps", "1/s", round(options.swaps / seconds, 2)),
        Row("a swap, beside answers (median)", "ms", round(1000 * ordered[len(ordered) // 2], 1)),
        Row("a swap, beside answers (95 %)", "ms", round(1000 * ordered[int(0.95 * len(ordered))], 1)),
        Row("answers of the model that stayed", "answers", soak.background_answers),
    ]
    print_table(rows)
    if options.json is not None:
        write_json(rows, options.json)
    return 1 if any(row.is_below_floor for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
