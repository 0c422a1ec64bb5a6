"""`python3 -m loadtest.gpu_hotswap`: models of Llama-8B's shape that come and go in two slots of one CUDA device.

Checked first: a model in a slot that another one left answers as in a slot of its own, with the graphs that were captured
for the other. Then measured, each row's sides in turns. Needs what `loadtest.gpu_engine` needs.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from loadtest.gpu_engine import EXIT_BELOW_FLOOR, EXIT_FAILED_CHECK, EXIT_UNUSABLE, say, versions
from loadtest.gpu_models import RandomWeights, llama_8b
from loadtest.report import Row, print_table, write_json
from services.worker.engine import Engine, EngineConfig, Sampling, SequenceRequest
from services.worker.engine.cuda.arena import Arena
from services.worker.engine.cuda.decoder import CudaDecoder
from services.worker.engine.cuda.slots import Slots, content_sum
from services.worker.engine.spec import DecoderSpec

BUDGET_S = 400.0
MAX_BATCH, MAX_CONTEXT_TOKENS, KV_TOKENS = 32, 1024, 16_384
PAIRS, FLIPS, WINDOWS = 5, 60, 6
WINDOW_S = 2.0
FLIP_GOAL_MS = 30.0
PROMPT = tuple(range(100, 116))


class Bench:
    """Three models in pinned host memory, two slots, one engine. A stays in the first slot; B and C share the second."""

    def __init__(self, spec: DecoderSpec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.contents = {name: _pinned(spec, device, seed) for seed, name in enumerate("abc")}
        self.sums = {name: content_sum(content) for name, content in self.contents.items()}
        self.slots = Slots(device, self._make)
        self.engine = Engine(
            EngineConfig(
                device=str(device),
                precision="bf16",
                max_batch=MAX_BATCH,
                max_context_tokens=MAX_CONTEXT_TOKENS,
                kv_tokens=KV_TOKENS,
            )
        )
        self.decoders: dict[str, CudaDecoder] = {}
        self._asked = 0

    def load(self, name: str) -> None:
        """Until it could answer: copied, summed, its graphs there."""
        decoder = self.slots.place(self.spec, self.contents[name])
        if content_sum(decoder.arena.memory) != self.sums[name]:
            raise AssertionError(f"what arrived of {name} is not what was sent")
        self.engine.load_decoder(name, decoder)
        self.decoders[name] = decoder

    def unload(self, name: str) -> None:
        self.engine.unload_model(name)
        self.slots.leave(self.decoders.pop(name))

    def ask(self, name: str, tokens: int) -> list[int]:
        """A greedy answer of exactly so many tokens."""
        self._asked += 1
        sampling = Sampling(temperature=0, ignore_eos=True)
        # A team of its own, so that nothing is found computed.
        self.engine.add(
            SequenceRequest(str(self._asked), name, f"team{self._asked}", PROMPT, tokens, sampling)
        )
        answer: list[int] = []
        while self.engine.has_work:
            for delta in self.engine.step().deltas:
                answer += delta.tokens
        return answer

    def _make(self, spec: DecoderSpec) -> CudaDecoder:
        return CudaDecoder(spec, "bf16", self.device, MAX_BATCH, MAX_CONTEXT_TOKENS)


def _pinned(spec: DecoderSpec, device: torch.device, seed: int) -> torch.Tensor:
    arena = Arena(spec, torch.bfloat16, device)
    arena.memory.zero_()
    arena.fill(RandomWeights(spec, torch.bfloat16, device, seed))
    content = torch.empty(arena.memory.shape, dtype=torch.uint8, pin_memory=True)
    content.copy_(arena.memory)
    return content


def check_swaps(bench: Bench) -> None:
    """B and C in the second slot in turn, A answering in between. Raises AssertionError."""
    bench.load("a")
    fresh: dict[str, list[int]] = {"a": bench.ask("a", 48)}
    for name in "bc":
        bench.load(name)
        fresh[name] = bench.ask(name, 48)
        bench.unload(name)
    if len({tuple(answer) for answer in fresh.values()}) != len(fresh):
        raise AssertionError("the models answer alike: nothing is proven")
    for name in "bcbccb":
        bench.load(name)
        for asked in (name, "a"):
            if bench.ask(asked, 48) != fresh[asked]:
                raise AssertionError(f"{asked} answers otherwise after a swap")
        bench.unload(name)


def measure_load(bench: Bench) -> Row:
    """A load against the bare copy of the same bytes from the same pinned memory into the same kind of memory."""
    scratch = torch.empty_like(bench.contents["b"], device=bench.device)
    bare_s, load_s = [], []
    for number in range(PAIRS):
        name = "bc"[number % 2]
        torch.cuda.synchronize()
        bare_s.append(_timed(partial(_bare_copy, scratch, bench.contents[name])))
        load_s.append(_timed(partial(bench.load, name)))
        bench.unload(name)
    size_gb = scratch.nbytes / 1e9
    return Row(
        name=f"{size_gb:.1f} GB, pinned host memory -> ready, against the bare copy",
        unit="GB/s",
        ours=size_gb / statistics.median(load_s),
        theirs=size_gb / statistics.median(bare_s),
        ratio=statistics.median(bare / load for bare, load in zip(bare_s, load_s, strict=True)),
        floor=0.80,
        target=0.92,
    )


def _bare_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()


def measure_flip(bench: Bench) -> Row:
    """From a request for the other resident model to its first token, prompt of 16 tokens included."""
    bench.load("b")
    times_ms = [1000 * _timed(partial(bench.ask, "ab"[n % 2], 1)) for n in range(FLIPS)]
    bench.unload("b")
    flip_ms = statistics.median(times_ms[4:])
    return Row(
        "flip between resident models, to the first token", "ms", flip_ms, FLIP_GOAL_MS, FLIP_GOAL_MS / flip_ms, 1.0, 3.75
    )  # fmt: skip


def measure_beside(bench: Bench) -> Row:
    """A's decoding while B and C are loaded into the other slot without a break, against A alone, in turns."""
    alone, beside = [], []
    for _ in range(WINDOWS):
        alone.append(_decode_rate(bench, lambda: None))
        loads = _EndlessLoads(bench)
        beside.append(_decode_rate(bench, loads.look))
        loads.end()
    return Row(
        "decoding of A while others are loaded, against A alone",
        "tokens/s",
        statistics.median(beside),
        statistics.median(alone),
        statistics.median(two / one for one, two in zip(alone, beside, strict=True)),
        0.85,
        0.95,
    )


class _EndlessLoads:
    """One load after another on a thread; what was loaded goes again between two steps, as in a worker."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._turn = bench, 0
        self._begin()

    def look(self) -> None:
        if not self._thread.is_alive():
            self.end()
            self._begin()

    def end(self) -> None:
        self._thread.join()
        self._bench.unload(self._name)

    def _begin(self) -> None:
        self._name = "bc"[self._turn % 2]
        self._turn += 1
        self._thread = threading.Thread(target=self._bench.load, args=(self._name,))
        self._thread.start()


def _decode_rate(bench: Bench, between: Callable[[], None]) -> float:
    tokens, started_s = 0, time.perf_counter()
    while time.perf_counter() - started_s < WINDOW_S:
        tokens += len(bench.ask("a", 16))
        between()
    return tokens / (time.perf_counter() - started_s)


def _timed(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows there too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        say("no CUDA device: nothing to check")
        return EXIT_UNUSABLE
    device = torch.device("cuda", torch.cuda.current_device())
    started_s = time.monotonic()
    bench = Bench(llama_8b().spec, device)
    say(f"{versions(device)}; models are in host memory after {time.monotonic() - started_s:.0f} s")
    try:
        check_swaps(bench)
    except AssertionError as problem:
        say(f"FAILED: {problem}")
        return EXIT_FAILED_CHECK
    say("holds: models in a slot that others left answer as before")
    rows: list[Row] = []
    for measure in (measure_load, measure_flip, measure_beside):
        if time.monotonic() - started_s > BUDGET_S:
            rows.append(Row(f"{measure.__name__}: NOT RUN (no time left)", "", None))
        else:
            rows.append(measure(bench))
        if arguments.json is not None:
            write_json(rows, arguments.json)  # after each: a run that is cut off leaves what it has
    print(versions(device))
    print_table(rows)
    return EXIT_BELOW_FLOOR if any(row.is_below_floor for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
