"""`python -m loadtest.engine`: our generation engine against Hugging Face's transformers and llama.cpp, on this CPU.

Both sides answer the same requests in one run, pair by pair: ours and theirs one right after the other, in turns who is
first, each in a process of its own while all others are stopped. A ratio is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from infra.local.demo_model import DemoModelError
from loadtest.child_process import SideError
from loadtest.engine_comparisons import (
    QUICK_SHAPES,
    SHAPES,
    Comparison,
    Field,
    Opponent,
    Rates,
    list_gptj_comparisons,
    list_llamacpp_comparisons,
    list_smollm2_comparisons,
    make_ratio_row,
    rates_of,
    withhold_ratio,
)
from loadtest.engine_machine import OthersShare, describe_machine
from loadtest.engine_models import (
    LLAMACPP_PACKAGES,
    BenchModel,
    MissingModel,
    ensure_ggufs,
    make_gptj,
    make_tiny_llama,
    read_smollm2,
)
from loadtest.engine_quality import list_quality_rows, measure_cold_starts, measure_quality
from loadtest.engine_sides import Sides, SideSpec
from loadtest.engine_workloads import ALL_AT_ONCE, ONE_BY_ONE, Plan, Request, group_requests, make_requests
from loadtest.report import Row, print_table, write_json

SMOLLM2_ROWS = ("static-bf16", "one-by-one", "int8-fp32", "int8-bf16", "continuous", "stream")
LLAMACPP_ROWS = ("stream-llamacpp", "ragged-llamacpp")
ROWS = (*SMOLLM2_ROWS, *LLAMACPP_ROWS, "gptj", "quality", "cold-start")
PAIRS, COLD_STARTS = 5, 3
QUICK_TEXT_TOKENS = 600
EXIT_BELOW_FLOOR = 1
EXIT_UNUSABLE = 2

Say = Callable[[str], None]


@dataclass(slots=True)
class Measurement:
    """runs: every run of every side gets a number of its own, and with it prompts that nobody has seen before."""

    sides: Sides
    pairs: int
    say: Say
    runs: Iterator[int] = field(default_factory=itertools.count)
    chosen: dict[tuple[Opponent, ...], list[tuple[Opponent, Plan]]] = field(default_factory=dict)

    def compare(self, comparison: Comparison) -> list[Row]:
        ours_plan = ONE_BY_ONE if comparison.shape.is_one_by_one else ALL_AT_ONCE
        self._run(comparison, comparison.ours, ours_plan)  # warm-up
        ranking = self._rank(comparison)
        rows = self._measure_pairs(comparison, ours_plan, *ranking[0])
        if comparison.is_each_shown:
            for opponent, plan in ranking[1:]:
                slower = replace(
                    comparison, name=f"{comparison.name}, the slower file", floor=None, target=None
                )
                rows += self._measure_pairs(slower, ours_plan, opponent, plan)
        return rows

    def _rank(self, comparison: Comparison) -> list[tuple[Opponent, Plan]]:
        """Each opponent with its best plan, the fastest first, by one run each; after it, all are warm."""
        if comparison.opponents not in self.chosen:
            for opponent in comparison.opponents:
                self._run(comparison, opponent.spec, opponent.plans[0], most_groups=2)  # warm-up
            candidates = [(opponent, plan) for opponent in comparison.opponents for plan in opponent.plans]
            rates = {candidate: 0.0 for candidate in candidates}
            if len(candidates) > 1:
                for opponent, plan in candidates:
                    rates[opponent, plan] = self._run(comparison, opponent.spec, plan).end_to_end
                    self.say(f"calibration: {opponent.label}, {plan}: {rates[opponent, plan]:.1f} tokens/s")
            candidates.sort(key=lambda candidate: -rates[candidate])
            best = {opponent: plan for opponent, plan in reversed(candidates)}
            self.chosen[comparison.opponents] = [
                (opponent, plan) for opponent, plan in candidates if best[opponent] == plan
            ]
        return self.chosen[comparison.opponents]

    def _measure_pairs(
        self, comparison: Comparison, ours_plan: Plan, opponent: Opponent, plan: Plan
    ) -> list[Row]:
        pairs: list[tuple[Rates, Rates]] = []
        turns = [(comparison.ours, ours_plan), (opponent.spec, plan)]
        for number in range(self.pairs):
            rates = {}
            # The same requests for both; who is first alternates.
            requests = self._requests(comparison)
            for spec, its_plan in turns if number % 2 == 0 else reversed(turns):
                rates[spec] = self._run(comparison, spec, its_plan, requests)
            pairs.append((rates[comparison.ours], rates[opponent.spec]))
        ratios = sorted(ours.end_to_end / theirs.end_to_end for ours, theirs in pairs)
        self.say(
            f"{comparison.name}: against {opponent.label}, {plan}: ratios {', '.join(f'{each:.2f}' for each in ratios)}"
        )
        rows = [
            make_ratio_row(
                comparison.name,
                [(ours.end_to_end, theirs.end_to_end) for ours, theirs in pairs],
                comparison.floor,
                comparison.target,
            )
        ]
        decoding = [(a.decoding, b.decoding) for a, b in pairs if a.decoding and b.decoding]
        if decoding:
            rows.append(make_ratio_row(f"{comparison.name}, decoding alone", decoding, None, None))
        return rows

    def _requests(self, comparison: Comparison) -> list[Request]:
        model = comparison.model
        return make_requests(comparison.shape, model.text, model.vocab_size, next(self.runs))

    def _run(
        self,
        comparison: Comparison,
        spec: SideSpec,
        plan: Plan,
        requests: list[Request] | None = None,
        most_groups: int | None = None,
    ) -> Rates:
        requests = requests or self._requests(comparison)
        groups = group_requests(requests, plan)[:most_groups]
        asked = [requests[index] for group in groups for index in group]
        return rates_of(asked, self.sides.get(spec).run(requests, groups))


def list_comparisons(
    arguments: argparse.Namespace, smollm2: BenchModel, settings: Field
) -> tuple[list[Comparison], list[Row]]:
    """What can be measured here, and a row without a number for what cannot."""
    comparisons = list_smollm2_comparisons(settings, smollm2)
    not_run: list[Row] = []
    if not arguments.quick and set(LLAMACPP_ROWS) & set(arguments.rows):
        try:
            comparisons += list_llamacpp_comparisons(settings, smollm2, ensure_ggufs())
        except (MissingModel, DemoModelError) as error:
            not_run = [
                Row(f"{key} (not run: {error})", "tokens/s", None)
                for key in LLAMACPP_ROWS
                if key in arguments.rows
            ]
    if "gptj" in arguments.rows:
        comparisons += list_gptj_comparisons(settings, make_gptj(tiny=arguments.quick))
    return [each for each in comparisons if each.key in arguments.rows], not_run


def measure(arguments: argparse.Namespace, sides: Sides, say: Say) -> list[Row]:
    quick, threads = arguments.quick, arguments.threads
    smollm2 = make_tiny_llama() if quick else read_smollm2()
    settings = Field(threads, QUICK_SHAPES if quick else SHAPES)
    comparisons, not_run = list_comparisons(arguments, smollm2, settings)
    quality = None
    if "quality" in arguments.rows or any(each.is_quality_bound for each in comparisons):
        say("measuring the quality")
        quality = measure_quality(smollm2, sides, threads, QUICK_TEXT_TOKENS if quick else None)
    measurement = Measurement(sides, 1 if quick else arguments.pairs, say)
    rows: list[Row] = []
    for number, comparison in enumerate(comparisons):
        sides.keep_only([spec for each in comparisons[number:] for spec in each.specs])
        if quick:
            # Floors are for real models and a quiet machine.
            comparison = replace(comparison, floor=None, target=None)
        measured = measurement.compare(comparison)
        if comparison.is_quality_bound and quality is not None:
            measured = [withhold_ratio(row, quality.int8_perplexity_ratio) for row in measured]
        rows += measured
    rows += not_run
    sides.keep_only(())
    if quality is not None:
        rows += list_quality_rows(quality)
    if "cold-start" in arguments.rows:
        rows += measure_cold_starts(smollm2, sides, threads, 1 if quick else COLD_STARTS)
    return rows


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.engine", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models, one pair, no llama.cpp: only checks that it runs"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="NAME", help=" ".join(ROWS))
    parser.add_argument("--pairs", type=int, default=PAIRS, metavar="N")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of each side (default: 2)")
    parsed = parser.parse_args(arguments)
    if parsed.pairs < 1 or parsed.threads < 1:
        parser.error("--pairs and --threads are at least 1")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    print(describe_machine(), flush=True)
    others = OthersShare()
    try:
        with Sides(LLAMACPP_PACKAGES) as sides:
            rows = measure(parsed, sides, lambda line: print(line, file=sys.stderr, flush=True))
    except (MissingModel, SideError) as error:
        print(f"engine: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    rows.append(Row("other processes meanwhile", "% of the CPUs", others.percent()))
    print_table(rows)
    if parsed.json:
        write_json(rows, parsed.json)
    return EXIT_BELOW_FLOOR if any(row.is_below_floor for row in rows) and not parsed.quick else 0


if __name__ == "__main__":
    sys.exit(main())
