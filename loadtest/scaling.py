"""Autoscaling against KEDA's rule, Ray Serve's and fixed counts, in a model of workers under real and made-up load.

Our side is the scheduler's own code. Every rule is tried with many settings; what is compared is its frontier: the GPU-hours
that it needs for at most a share of requests whose whole answer takes longer than 20 s.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import msgspec

from loadtest.chart import Line, Panel, write_png
from loadtest.report import Row, print_table, write_json
from loadtest.scaling_rules import Fixed, Keda, Ours, RayServe
from loadtest.scaling_simulation import Arrival, Machine, Outcome, Scaler, World
from loadtest.scaling_traces import HOUR_S, TRACES
from services.scheduler.scaling_policy import TUNING

RULES = ("ours", "keda", "ray", "fixed")
LIMIT_S = 20.0
STARTS_S = (60.0, 300.0)
MOST = 16
LEAST = (1, 3, 4, 5, 6, 8)
TARGETS = (
    *(1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5),
    *(6.0, 6.5, 7.0, 7.5, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 16.0),
)
WAITS_S = (1.0, 2.0, 3.0, 4.5, 6.0, 8.0, 12.0, 15.0)
"""A request that waits longer than 17 s is late in any case."""
SHARES_DOWN_S = ((0.03, 100.0), (0.05, 100.0), (0.08, 100.0), (0.15, 100.0), (0.25, 150.0), (0.25, 300.0))
"""(what a worker has to be worth, the time of going down): who keeps few workers for crowds may keep those for longer."""
MISSES = (0.002, 0.01, 0.03)
"""Shares of late requests at which hours are compared."""
SHARES = (0.001, 0.1)
"""Between them hours are compared at every share: below, a handful of requests decides; above, nobody is served."""
FLOOR, TARGET = 1.0, 1.25


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of one rule: what it cost, and how many requests were late."""

    setting: str
    hours: float
    late: float


def settings(rule: str) -> Iterator[tuple[str, Scaler, int]]:
    """All settings of a rule that are tried: (name, the rule, workers at the beginning)."""
    if rule == "fixed":
        yield from ((str(count), Fixed(count), count) for count in range(1, MOST + 1))
        return
    for least in LEAST:
        bounds = (least, MOST)
        match rule:
            case "keda":
                yield from ((f"min {least}, target {t:g}", Keda(bounds, t), least) for t in TARGETS)
            case "ray":
                yield from ((f"min {least}, target {t:g}", RayServe(bounds, t), least) for t in TARGETS)
            case "ours":
                for wait_s, (share, down_s) in itertools.product(WAITS_S, SHARES_DOWN_S):
                    tuning = msgspec.structs.replace(TUNING, crowd_share=share, down_window_s=down_s)
                    name = f"min {least}, wait {wait_s:g} s, share {share:g}, down {down_s:g} s"
                    yield name, Ours(bounds, tuning, wait_s), least
    if rule == "ours":
        # Equal bounds are a fixed number: a setting like any other, and the policy is not even asked.
        yield from ((f"min and max {n}", Fixed(n), n) for n in range(1, MOST + 1))


def work_hours(arrivals: Sequence[Arrival], machine: Machine) -> float:
    """What no rule can be below: all of the work, by workers that are there only for full batches."""
    tokens = sum(each.completion_tokens + each.prompt_tokens * machine.prompt_weight for each in arrivals)
    return tokens * machine.token_s(machine.max_batch) / machine.max_batch / 3600


def play(arrivals: Sequence[Arrival], start_s: float, scaler: Scaler, initially: int) -> Outcome:
    return World(Machine(start_s=start_s), arrivals).run(scaler, initially, HOUR_S)


@cache
def arrivals_of(trace: str, draw: int) -> list[Arrival]:
    return TRACES[trace](draw)


def try_one(trace: str, draw: int, start_s: float, setting: str, scaler: Scaler, initially: int) -> Point:
    outcome = play(arrivals_of(trace, draw), start_s, scaler, initially)
    return Point(setting, outcome.hours, outcome.share_over(LIMIT_S))


def try_all(pool: Executor, trace: str, draw: int, start_s: float) -> dict[str, list[Point]]:
    """Every setting of every rule; each is one process's work."""
    tried = {
        rule: [pool.submit(try_one, trace, draw, start_s, *setting) for setting in settings(rule)]
        for rule in RULES
    }
    return {rule: [each.result() for each in points] for rule, points in tried.items()}


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both, from few late requests to few hours."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.late, p.hours)):
        if not kept or point.hours < kept[-1].hours:
            kept.append(point)
    return kept


def hours_at(points: Sequence[Point], late: float) -> Point | None:
    """The cheapest setting with at most this share of late requests."""
    return min((p for p in points if p.late <= late), key=lambda p: p.hours, default=None)


def compare(name: str, by_rule: dict[str, list[Point]]) -> list[Row]:
    """A row for each share of late requests: our hours beside the least of all other rules."""
    rows = []
    others = [point for rule, points in by_rule.items() if rule != "ours" for point in points]
    for late in MISSES:
        if (theirs := hours_at(others, late)) is not None:
            label = f"{name}, at most {late:.1%} late"
            rows.append(_row(label, hours_at(by_rule["ours"], late), theirs, TARGET))
    if (worst := closest(by_rule["ours"], others)) is not None:
        theirs, ours = worst
        rows.append(_row(f"{name}, where others come closest: {theirs.late:.2%} late", ours, theirs))
    return rows


def _row(label: str, ours: Point | None, theirs: Point, target: float | None = None) -> Row:
    hours = ours.hours if ours is not None else None
    return Row(label, "GPU h", hours, theirs.hours, _ratio(theirs, ours), FLOOR, target)


def _ratio(theirs: Point, ours: Point | None) -> float:
    """Of hours; 0 where no setting of ours is as good, whatever it costs."""
    return theirs.hours / ours.hours if ours is not None else 0.0


def closest(ours: Sequence[Point], others: Sequence[Point]) -> tuple[Point, Point | None] | None:
    """(theirs, ours) where they need the fewest hours beside ours, of all shares of `SHARES`."""
    pairs = [
        (theirs, hours_at(ours, theirs.late))
        for theirs in frontier(others)
        if SHARES[0] <= theirs.late <= SHARES[1]
    ]
    return min(pairs, key=lambda pair: _ratio(*pair), default=None)


def show(case: str, by_rule: dict[str, list[Point]]) -> None:
    for rule, points in by_rule.items():
        best = "  ".join(f"{p.late:.2%}/{p.hours:.2f}h [{p.setting}]" for p in frontier(points)[:6])
        print(f"{case:22s} {rule:6s} {best}", flush=True)


def draw(by_case: dict[str, dict[str, list[Point]]], moving: dict[str, Outcome], path: Path) -> None:
    panels = []
    for case, by_rule in by_case.items():
        lines = [
            Line(rule, [(100 * p.late + 0.01, p.hours) for p in frontier(points)])
            for rule, points in by_rule.items()
        ]
        panels.append(Panel(f"{case}: GPU hours", "late requests, %", lines, is_x_log=True))
    for case, outcome in moving.items():
        replicas = [(at / 60, float(taken)) for at, _, taken, _ in outcome.samples]
        queue = [(at / 60, float(waiting)) for at, _, _, waiting in outcome.samples]
        panels.append(Panel(f"{case}: workers, as we set them", "minutes", [Line("workers", replicas, True)]))
        panels.append(Panel(f"{case}: jobs that wait", "minutes", [Line("waiting", queue, True)]))
    write_png(panels, path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.scaling", description=__doc__)
    parser.add_argument("--traces", nargs="+", choices=sorted(TRACES), default=list(TRACES))
    parser.add_argument("--starts", nargs="+", type=float, default=list(STARTS_S), metavar="SECONDS")
    parser.add_argument("--draw", type=int, default=0, help="another draw of the made-up arrivals")
    parser.add_argument("--png", type=Path, metavar="FILE", help="curves, and workers and queue over time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows: list[Row] = []
    by_case: dict[str, dict[str, list[Point]]] = {}
    moving: dict[str, Outcome] = {}
    with ProcessPoolExecutor() as pool:
        for trace in arguments.traces:
            arrivals = arrivals_of(trace, arguments.draw)
            rows.append(Row(f"{trace}: the work itself", "GPU h", work_hours(arrivals, Machine(start_s=0.0))))
            for start_s in arguments.starts:
                case = f"{trace}, start {start_s:g} s"
                by_case[case] = try_all(pool, trace, arguments.draw, start_s)
                show(case, by_case[case])
                rows += compare(case, by_case[case])
                default = play(arrivals, start_s, Ours((1, MOST), TUNING), 1)
                moving[case] = default
                rows.append(Row(f"{case}, defaults: late", "%", 100 * default.share_over(LIMIT_S)))
                rows.append(Row(f"{case}, defaults: hours", "GPU h", default.hours))
    print_table(rows)
    if arguments.json:
        write_json(rows, arguments.json)
    if arguments.png:
        draw(by_case, moving, arguments.png)
    return 1 if any(row.is_below_floor for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
