"""`python -m loadtest.hotswap`: many fine-tunes in the memory of a few, ours against `from_pretrained` at each switch and
against our own engine in order of arrival; how soon a model is there, and what a load takes from those that answer.

On this CPU, both sides in one run. `loadtest/README.md` says how each number is made.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop

from infra.local.scratch import scratch_vhost
from infra.local.testservers import running_servers
from loadtest.child_process import SideError
from loadtest.engine_comparisons import make_ratio_row
from loadtest.engine_machine import OthersShare, describe_machine
from loadtest.engine_models import MissingModel, make_tiny_llama, read_smollm2
from loadtest.hotswap_climb import Climb, Replay, climb
from loadtest.hotswap_models import FineTunes, ensure_fine_tunes, read_into_page_cache
from loadtest.hotswap_sides import PRECISION, HotswapSide
from loadtest.hotswap_slots import measure_slots
from loadtest.hotswap_worker import WorkerSide, running_worker
from loadtest.report import Row, print_table, write_json
from services.worker.engine import EngineConfig

ROWS = ("first-token", "decode", "goodput", "slots")
FINE_TUNES, SLOTS = 20, 3
FIRST_TOKEN_PAIRS = 9
DECODE_PAIRS, DECODE_WINDOW_S, DECODE_STREAMS = 7, 2.0, (1, 8)
TRACE_S, REPEATS = 16.0, 3
WORKER, FIFO, HUGGINGFACE = "a worker", "our engine, FIFO", "from_pretrained, FIFO"
RATES_PER_S = {
    WORKER: (2.0, 4.0, 6.0, 8.0, 11.0, 15.0, 20.0),
    FIFO: (2.0, 4.0, 6.0, 8.0, 11.0, 15.0, 20.0),
    HUGGINGFACE: (0.25, 0.5, 1.0, 2.0, 4.0, 6.0),
}
EXIT_BELOW_FLOOR, EXIT_UNUSABLE = 1, 2

Say = Callable[[str], None]


def measure_first_token(ours: HotswapSide, theirs: HotswapSide, models: int, pairs: int) -> list[Row]:
    """Each pair loads another model than the one before, all in turns who is first."""
    times: dict[str, list[float]] = {"image": [], "canary": [], "model": [], "tokenizer": []}
    asks: list[tuple[str, HotswapSide, bool]] = [
        ("image", ours, False),
        ("model", theirs, False),
        ("tokenizer", theirs, True),
        ("canary", ours, True),
    ]
    for number in range(-1, pairs):  # the first round is warm-up
        for name, side, in_full in asks if number % 2 == 0 else reversed(asks):
            seconds = side.first_token_s(number % models, in_full=in_full)
            if number >= 0:
                times[name].append(seconds)

    def row(name: str, mine: str, other: str, floor: float | None, target: float | None) -> Row:
        rates = [(1 / a, 1 / b) for a, b in zip(times[mine], times[other], strict=True)]
        return make_ratio_row(name, rates, floor, target, unit="1/s")

    return [
        row("image to first token | from_pretrained", "image", "model", 5.0, 15.0),
        row("image to first token | from_pretrained and its tokenizer", "image", "tokenizer", 5.0, 15.0),
        row(
            "image to first token at its first use (canary) | from_pretrained", "canary", "model", None, None
        ),
    ]


def measure_decode(ours: HotswapSide, pairs: int, window_s: float, say: Say) -> list[Row]:
    rows = []
    for streams in DECODE_STREAMS:
        rates, loads = [], 0
        ours.decode_rate(window_s, beside_loads=True, streams=streams)  # warm-up
        for number in range(pairs):
            found = {}
            for beside_loads in (False, True) if number % 2 else (True, False):
                found[beside_loads], count = ours.decode_rate(
                    window_s, beside_loads=beside_loads, streams=streams
                )
                loads += count
            rates.append((found[True], found[False]))
        say(f"decoding {streams}: {loads} loads meanwhile")
        rows.append(make_ratio_row(f"A decodes {streams} while B loads | A alone", rates, 0.85, 0.95))
    return rows


def list_goodput_rows(found: dict[str, Climb]) -> list[Row]:
    def row(name: str, other: str, floor: float, target: float) -> Row:
        pairs = list(zip(found[WORKER].at_best, found[other].at_best, strict=True))
        if not all(theirs for _, theirs in pairs):
            return Row(
                f"{name} (no ratio: nothing came in time there)", "1/s in 10 s", None, None, None, floor
            )
        return make_ratio_row(name, pairs, floor, target, unit="1/s in 10 s")

    about = f"{FINE_TUNES} fine-tunes, memory for {SLOTS}: a worker |"
    rows = [
        row(f"{about} {HUGGINGFACE}", HUGGINGFACE, 3.0, 6.0),
        row(f"{about} {FIFO}", FIFO, 1.3, 2.0),
    ]
    for name, climbed in found.items():
        rows += [
            Row(f"{name}: in time of {rate:g} arrivals/s", "1/s", round(value, 2))
            for rate, value in sorted(climbed.curve.items())
        ]
    return rows


async def measure_goodput(
    worker: WorkerSide, ours: HotswapSide, theirs: HotswapSide, tunes: FineTunes, quick: bool, say: Say
) -> list[Row]:
    sides: dict[str, Replay] = {
        WORKER: worker.replay,
        FIFO: lambda trace: asyncio.to_thread(ours.replay, trace, SLOTS),
        HUGGINGFACE: lambda trace: asyncio.to_thread(theirs.replay, trace, 1),
    }
    rates = {name: (2.0, 4.0) for name in sides} if quick else RATES_PER_S
    found = await climb(
        sides,
        rates,
        trace_s=2.0 if quick else TRACE_S,
        repeats=1 if quick else REPEATS,
        models=len(tunes.models),
        vocab_size=tunes.vocab_size,
        say=say,
    )
    return list_goodput_rows(found)


@asynccontextmanager
async def fresh_worker(tunes: FineTunes, threads: int) -> AsyncIterator[WorkerSide]:
    with running_servers(os.environ) as servers, tempfile.TemporaryDirectory() as folder:
        if servers.amqp_management_url is None:
            raise SystemExit("loadtest: AMQP_URL is set without AMQP_MANAGEMENT_URL")
        log = Path(folder) / "worker.log"
        with scratch_vhost(servers.amqp_url, servers.amqp_management_url, "hotswap") as amqp_url:
            try:
                async with running_worker(amqp_url, tunes, slots=SLOTS, threads=threads, log=log) as worker:
                    yield worker
            except BaseException:
                print(log.read_text(encoding="utf-8")[-2000:] if log.exists() else "", file=sys.stderr)
                raise


async def measure(arguments: argparse.Namespace, tunes: FineTunes, say: Say) -> list[Row]:
    quick, threads, rows = arguments.quick, arguments.threads, []
    with HotswapSide("ours", tunes, threads) as ours, HotswapSide("huggingface", tunes, threads) as theirs:
        if "first-token" in arguments.rows:
            pairs = 1 if quick else FIRST_TOKEN_PAIRS
            rows += measure_first_token(ours, theirs, len(tunes.models), pairs)
        if "decode" in arguments.rows:
            pairs, window_s = (1, 0.2) if quick else (DECODE_PAIRS, DECODE_WINDOW_S)
            rows += measure_decode(ours, pairs, window_s, say)
        if {"goodput", "slots"} & set(arguments.rows):
            async with fresh_worker(tunes, threads) as worker:
                if "slots" in arguments.rows:
                    rows += await measure_slots(worker, SLOTS, 0.5 if quick else None)
                if "goodput" in arguments.rows:
                    rows += await measure_goodput(worker, ours, theirs, tunes, quick, say)
    return rows


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.hotswap", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--quick", action="store_true", help="tiny models: only checks that it runs")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="NAME", help=" ".join(ROWS))
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of each side (default: 2)")
    parsed = parser.parse_args(arguments)
    if parsed.threads < 1:
        parser.error("--threads is at least 1")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    print(describe_machine(), flush=True)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        base = make_tiny_llama() if parsed.quick else read_smollm2()
        say("making the fine-tunes and their images, where they are not there yet")
        tunes = ensure_fine_tunes(base, FINE_TUNES, EngineConfig(precision=PRECISION))
        read_into_page_cache(tunes)
        others = OthersShare()
        rows = uvloop.run(measure(parsed, tunes, say))
    except (MissingModel, SideError) as error:
        print(f"hotswap: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    rows.append(Row("other processes meanwhile", "% of the CPUs", others.percent()))
    if parsed.quick:
        # Floors are for real models and a quiet machine.
        rows = [dataclasses.replace(row, floor=None, target=None) for row in rows]
    print_table(rows)
    if parsed.json:
        write_json(rows, parsed.json)
    return EXIT_BELOW_FLOOR if any(row.is_below_floor for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
