"""`python3 -m loadtest.gpu_engine`: our engine beside transformers on one CUDA device, checked first and then measured.

Needs Python 3.11 or newer, torch for CUDA, triton, transformers, tokenizers, safetensors and numpy; no network, no other package. Every measurement
has a time by which it must have ended: what does not fit, or what transformers cannot do, is reported as not run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from loadtest.gpu_checks import list_checks
from loadtest.gpu_models import ModelShape, RandomWeights, gptj_6b, llama_8b, transformers_module
from loadtest.gpu_sides import (
    ContinuousBatching,
    OurEngine,
    Request,
    StaticBatches,
    best_static_batch,
    make_requests,
    output_tokens,
    release_memory,
)
from loadtest.report import Row, print_table, write_json
from services.worker.engine import Engine, EngineConfig
from services.worker.engine.cuda.decoder import CudaDecoder

# Of the 8 minutes that a run may take; the rest is for imports, compilation and the end.
BUDGET_S = 450.0
MOST_PAIRS = 5
MAX_CONTEXT_TOKENS = 2048
MOST_SEQUENCES = 256
# Of the memory that the weights leave; the rest is for transformers' keys and values, and for both sides' passes.
OUR_SHARE = 0.4
EXIT_FAILED_CHECK, EXIT_BELOW_FLOOR, EXIT_UNUSABLE = 1, 2, 3

Lengths = list[tuple[int, int]]


class Side(Protocol):
    def run(self, requests: Sequence[Request]) -> float: ...


@dataclass(frozen=True, slots=True)
class Measurement:
    """until: share of the time for measuring by which it must have ended. opponent: made when its turn comes."""

    name: str
    lengths: Lengths
    opponent: Callable[[], Side]
    floor: float
    target: float
    until: float


class Session:
    """One model on the device, held by both sides."""

    def __init__(self, shape: ModelShape, device: torch.device, ends_s: float) -> None:
        """ends_s: when all measuring must have ended."""
        self.shape, self.device, self._ends_s = shape, device, ends_s
        spec = shape.spec
        decoder = CudaDecoder(
            spec, "bf16", device, MOST_SEQUENCES, min(MAX_CONTEXT_TOKENS, spec.max_positions)
        )
        decoder.arena.fill(RandomWeights(spec, torch.bfloat16, device))
        self.module = transformers_module(shape, decoder.arena, torch.bfloat16, device)
        release_memory()
        self.kv_tokens = self._our_kv_tokens()
        self.engine = Engine(
            EngineConfig(
                device=str(device),
                precision="bf16",
                max_batch=MOST_SEQUENCES,
                max_context_tokens=MAX_CONTEXT_TOKENS,
                kv_tokens=self.kv_tokens,
                prefill_chunk_tokens=1024,
                step_tokens=4096 + MOST_SEQUENCES,
            )
        )
        self.engine.load_decoder("m", decoder)
        self.ours = OurEngine(self.engine)
        self._begins_s = time.monotonic()

    @property
    def vocab_size(self) -> int:
        return self.shape.spec.vocab_size

    def deadline_s(self, until: float) -> float:
        return self._begins_s + until * (self._ends_s - self._begins_s)

    def _our_kv_tokens(self) -> int:
        layers, kv_heads, head_dim = self.shape.spec.kv_shape
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        token_bytes = layers * 2 * kv_heads * head_dim * 2
        most = MOST_SEQUENCES * MAX_CONTEXT_TOKENS
        return min(most, int(free_bytes * OUR_SHARE) // token_bytes) // 16 * 16


def measure(session: Session, measurement: Measurement) -> Row:
    """Pairs of runs, in turns who is first, until the time is up; the ratio is the median of the pairs' ratios."""
    deadline_s = session.deadline_s(measurement.until)
    if time.monotonic() > deadline_s:
        return not_run(measurement, "no time left")
    try:
        theirs = measurement.opponent()
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError, NotImplementedError) as problem:
        return not_run(measurement, f"transformers refuses: {problem}")
    sides: dict[str, Side] = {"ours": session.ours, "theirs": theirs}
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    try:
        session.ours.run(make_requests(measurement.lengths[:8], session.vocab_size))
        while len(rates["theirs"]) < MOST_PAIRS:
            pair_started_s = time.monotonic()
            names = ("ours", "theirs") if len(rates["theirs"]) % 2 == 0 else ("theirs", "ours")
            for name in names:
                requests = make_requests(measurement.lengths, session.vocab_size)
                rates[name].append(output_tokens(requests) / sides[name].run(requests))
                say(f"{measurement.name}: {name} {rates[name][-1]:,.0f} tokens/s")
            # A pair that would not end in time is not begun.
            if 2 * time.monotonic() - pair_started_s > deadline_s:
                break
    except (RuntimeError, torch.OutOfMemoryError) as problem:
        return not_run(measurement, f"{type(problem).__name__}: {problem}")
    finally:
        if isinstance(theirs, ContinuousBatching):
            theirs.stop()
        del theirs, sides
        release_memory()
    ratios = [ours / other for ours, other in zip(rates["ours"], rates["theirs"], strict=True)]
    pairs = f"{len(ratios)} pair{'s' if len(ratios) > 1 else ''}"
    return Row(
        name=f"{session.shape.name} bf16, {measurement.name} ({pairs})",
        unit="output tokens/s",
        ours=statistics.median(rates["ours"]),
        theirs=statistics.median(rates["theirs"]),
        ratio=statistics.median(ratios),
        floor=measurement.floor,
        target=measurement.target,
    )


def not_run(measurement: Measurement, reason: str) -> Row:
    """Without a ratio, and so marked as below its floor only where it has one: this has none."""
    say(f"{measurement.name}: not run: {reason}")
    return Row(f"{measurement.name}: NOT RUN ({reason.splitlines()[0][:80]})", "output tokens/s", None)


def ragged(count: int, low: int, high: int) -> Lengths:
    rng = random.Random(count)
    return [(rng.randint(low, high), rng.randint(low, high)) for _ in range(count)]


def engine_measurements(session: Session) -> list[Measurement]:
    """Half the lengths of the goal's 100 to 1024, so that both sides' runs fit into the time."""
    ragged_lengths = ragged(256, 50, 512)
    uniform_lengths: Lengths = [(128, 128)] * 256
    stream_lengths: Lengths = [(128, 256)]

    def static(lengths: Lengths, until: float) -> Callable[[], Side]:
        def make() -> Side:
            # Finding the best batch may take a fifth of what is left.
            now_s = time.monotonic()
            probing_until_s = now_s + max(0.0, session.deadline_s(until) - now_s) / 5
            batch = best_static_batch(
                session.module, session.device, lengths, session.vocab_size, probing_until_s
            )
            say(f"transformers' best static batch: {batch}")
            return StaticBatches(session.module, session.device, batch)

        return make

    def continuous() -> Side:
        return ContinuousBatching(session.module, session.kv_tokens, MOST_SEQUENCES)

    stream = lambda: StaticBatches(session.module, session.device, 1)  # noqa: E731 - as short as what it says
    return [
        Measurement("one stream, 128 + 256 tokens, vs generate", stream_lengths, stream, 3, 5, 0.15),
        Measurement(
            "256 ragged, 50-512 + 50-512, vs generate",
            ragged_lengths,
            static(ragged_lengths, 0.65),
            2,
            6,
            0.65,
        ),
        Measurement(
            "256 uniform, 128 + 128, vs generate", uniform_lengths, static(uniform_lengths, 0.75), 2, 3, 0.75
        ),
        Measurement("256 ragged, vs continuous batching", ragged_lengths, continuous, 3, 10, 1.0),
    ]


def gptj_measurements(session: Session) -> list[Measurement]:
    lengths: Lengths = [(448, 64)] * 64
    ragged_lengths = ragged(256, 50, 512)

    def static(batch: int) -> Callable[[], Side]:
        return lambda: StaticBatches(session.module, session.device, batch)

    def best() -> Side:
        batch = best_static_batch(
            session.module, session.device, ragged_lengths, session.vocab_size, session.deadline_s(0.55)
        )
        say(f"transformers' best static batch: {batch}")
        return StaticBatches(session.module, session.device, batch)

    def continuous() -> Side:
        return ContinuousBatching(session.module, session.kv_tokens, MOST_SEQUENCES)

    return [
        Measurement("64 of context 512, 448 + 64, vs generate", lengths, static(64), 2, 8, 0.45),
        Measurement("one stream, 128 + 256 tokens, vs generate", [(128, 256)], static(1), 3, 5, 0.6),
        Measurement("256 ragged, 50-512 + 50-512, vs generate", ragged_lengths, best, 2, 6, 0.9),
        Measurement("256 ragged, vs continuous batching", ragged_lengths, continuous, 3, 10, 1.0),
    ]


def measure_idle_share(session: Session, steps: int = 40) -> Row:
    """Of the time from the first kernel of `steps` decoding steps at batch 256 to the last, the share without any kernel."""
    # Short enough that the pool holds all of them at once, so that the batch stays full.
    answer = 4 * steps + 64
    prompt = min(256, session.kv_tokens // MOST_SEQUENCES - answer - 32)
    if prompt < 16:
        return Row("GPU idle at batch 256: NOT RUN (the KV pool is too small)", "%", None)
    requests = make_requests([(prompt, answer)] * MOST_SEQUENCES, session.vocab_size)
    engine = session.engine
    session.ours.enqueue(requests)
    prefilled = 0
    while prefilled < MOST_SEQUENCES:
        prefilled += len(engine.step().prefilled)
    for _ in range(5):
        engine.step()
    torch.cuda.synchronize()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(steps):
                engine.step()
            torch.cuda.synchronize()
    except (RuntimeError, AssertionError) as problem:
        return Row(f"GPU idle at batch 256: NOT RUN ({str(problem)[:80]})", "%", None)
    finally:
        session.ours.finish()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    if not spans:
        return Row("GPU idle at batch 256: NOT RUN (the profiler saw no kernel)", "%", None)
    percent = 100 * idle_share(spans)
    return Row(
        f"{session.shape.name} bf16, GPU idle at batch 256, context {prompt}",
        "%",
        ours=percent,
        ratio=10 / max(percent, 0.01),
        floor=1,
        target=10 / 3,
    )


def idle_share(spans: Sequence[tuple[float, float]]) -> float:
    """spans: (start, end), sorted by start; they may overlap."""
    reached = first = spans[0][0]
    idle = 0.0
    for start, end in spans:
        idle += max(0.0, start - reached)
        reached = max(reached, end)
    return idle / (reached - first) if reached > first else 0.0


def run_checks(device: torch.device, model: str) -> list[str]:
    """What does not hold."""
    failed = []
    for name, check in list_checks(device, model):
        started_s = time.monotonic()
        try:
            check()
        except Exception as problem:  # noqa: BLE001 - every check is heard before the run ends
            failed.append(name)
            say(f"FAILED {name}: {type(problem).__name__}: {str(problem)[:600]}")
        else:
            say(f"holds: {name} ({time.monotonic() - started_s:.1f} s)")
    return failed


def versions(device: torch.device) -> str:
    packages = ("torch", "triton", "transformers")
    listed = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{torch.cuda.get_device_name(device)}, Python {sys.version.split()[0]}, {listed}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=("engine", "gptj"), help="engine: Llama-8B's shape")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--skip-checks", action="store_true", help="measure only")
    arguments = parser.parse_args()
    started_s = time.monotonic()
    if not torch.cuda.is_available():
        say("no CUDA device: nothing to check")
        return EXIT_UNUSABLE
    device = torch.device("cuda", torch.cuda.current_device())
    say(versions(device))
    if not arguments.skip_checks:
        failed = run_checks(device, arguments.model)
        if failed:
            say(f"{len(failed)} checks do not hold: nothing is measured")
            return EXIT_FAILED_CHECK
    shapes: dict[str, tuple[Callable[[], ModelShape], Callable[[Session], list[Measurement]]]] = {
        "engine": (llama_8b, engine_measurements),
        "gptj": (gptj_6b, gptj_measurements),
    }
    make_shape, list_measurements = shapes[arguments.model]
    session = Session(make_shape(), device, started_s + BUDGET_S)
    say(
        f"models are on the device after {time.monotonic() - started_s:.0f} s; {session.kv_tokens:,} tokens of KV memory"
    )
    rows: list[Row] = []
    turns: list[Callable[[], Row]] = [lambda: measure_idle_share(session)]
    turns += [partial(measure, session, measurement) for measurement in list_measurements(session)]
    for turn in turns:
        rows.append(turn())
        if arguments.json is not None:
            write_json(rows, arguments.json)  # after each: a run that is cut off leaves what it has
    print(versions(device))
    print_table(rows)
    return EXIT_BELOW_FLOOR if any(row.is_below_floor for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
