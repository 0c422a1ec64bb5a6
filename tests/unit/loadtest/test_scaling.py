"""The scaling simulator: its model of workers against what is known of queues, and the rules it compares."""

from __future__ import annotations

import itertools
import random
import struct
import zlib
from pathlib import Path

import pytest

from loadtest.chart import HEIGHT, WIDTH, Line, Panel, write_png
from loadtest.scaling import RULES, Point, closest, compare, frontier, hours_at, settings, work_hours
from loadtest.scaling_rules import Fixed, Keda, Ours, RayServe
from loadtest.scaling_simulation import Arrival, Machine, Worker, World
from loadtest.scaling_traces import TRACES, azure
from services.scheduler.scaling_policy import TUNING, crowd_terms


class At:
    """Wants so many workers from each time on."""

    every_s = 1.0

    def __init__(self, *counts: tuple[float, int]) -> None:
        self._counts = counts

    def wanted(self, world: World, now: float) -> int:
        return [count for since, count in self._counts if now >= since][-1]


def test_a_job_alone_takes_its_tokens_times_the_step_and_two_share_the_batch() -> None:
    machine = Machine(start_s=10.0, max_batch=2, base_s=0.1, per_job_s=0.1, prompt_weight=0.5)
    one = World(machine, [Arrival(5.0, 20, 90)]).run(Fixed(1), 1, 60.0)
    assert one.responses_s == pytest.approx([100 * 0.2])
    two = World(machine, [Arrival(0.0, 0, 100), Arrival(0.0, 0, 100), Arrival(0.0, 0, 100)]).run(
        Fixed(1), 1, 60.0
    )
    assert two.responses_s == pytest.approx([30.0, 30.0, 50.0])
    assert two.waits_s == pytest.approx([0.0, 0.0, 30.0])
    assert two.hours == pytest.approx(60.0 / 3600)


def test_a_start_takes_its_time_and_costs_from_the_grant_on() -> None:
    machine = Machine(start_s=10.0, max_batch=1, base_s=0.1, per_job_s=0.0)
    outcome = World(machine, [Arrival(1.0, 0, 10)]).run(At((0.0, 0), (3.0, 1), (20.0, 0)), 0, 100.0)
    assert outcome.waits_s == pytest.approx([12.0])
    assert outcome.hours * 3600 == pytest.approx(17.0)
    assert outcome.starts == 1


def test_a_drained_worker_finishes_its_job_and_takes_no_other() -> None:
    machine = Machine(start_s=1.0, max_batch=1, base_s=0.1, per_job_s=0.0)
    arrivals = [Arrival(0.0, 0, 500), Arrival(6.0, 0, 10)]
    outcome = World(machine, arrivals).run(At((0.0, 1), (5.0, 0), (60.0, 1)), 1, 70.0)
    assert outcome.responses_s == pytest.approx([50.0, 56.0])
    assert outcome.hours * 3600 == pytest.approx(50.0 + 10.0)


def test_the_mean_wait_of_one_server_is_the_known_one() -> None:
    """M/M/1 at 70 % load: rho / (mu - lambda) = 0.7 / 0.3 seconds."""
    rng = random.Random(7)
    at, arrivals = 0.0, []
    for _ in range(40_000):
        at += rng.expovariate(0.7)
        arrivals.append(Arrival(at, 0, max(round(rng.expovariate(0.001)), 1)))
    machine = Machine(start_s=1.0, max_batch=1, base_s=0.001, per_job_s=0.0)
    outcome = World(machine, arrivals).run(Fixed(1), 1, 10.0)
    assert sum(outcome.waits_s) / len(outcome.waits_s) == pytest.approx(0.7 / 0.3, rel=0.1)


def crowd(count: int, at: float = 0.0) -> list[Arrival]:
    return [Arrival(at, 0, 400)] * count


def counts(scaler: Keda | RayServe, arrivals: list[Arrival], times: list[float]) -> list[int]:
    """What the rule wants at each time, of a system in which nothing is ever done."""
    world = World(Machine(start_s=1e9), arrivals)
    world.waiting.extend(range(len(arrivals)))
    wanted = []
    for now in times:
        if now >= 400:
            world.waiting.clear()
        wanted.append(scaler.wanted(world, now))
        world.workers = {number: Worker(number, 0.0, 0.0) for number in range(wanted[-1])}
    return wanted


def test_keda_goes_up_at_a_poll_and_down_after_its_window() -> None:
    assert counts(Keda((1, 8), 10), crowd(35), [0, 30, 390, 420, 660, 690]) == [4, 4, 4, 4, 4, 1]


def test_ray_waits_thirty_seconds_to_go_up_and_six_hundred_to_go_down() -> None:
    times = [float(second) for second in range(1100)]
    wanted = counts(RayServe((1, 8), 10), crowd(35), times)
    assert [wanted[at] for at in (0, 29, 30, 399, 999, 1035)] == [1, 1, 4, 4, 4, 1]


def test_ours_follows_steps_up_at_once_and_down_after_its_window_without_flapping() -> None:
    machine = Machine(start_s=60.0)
    outcome = World(machine, TRACES["steps"](0)).run(Ours((1, 16), TUNING), 1, 3600.0)
    taken = [count for at, _, count, _ in outcome.samples if 1400 <= at < 2400]
    assert min(taken) >= 3, "too few for the busy time"
    forgotten = 2400 + 2 * crowd_terms(10.0, TUNING).forget_s
    ends = [count for at, _, count, _ in outcome.samples if at > forgotten + 120]
    assert max(ends) <= 2, "still as many as in the busy time"
    changes = sum(a != b for a, b in itertools.pairwise(taken[20:]))
    assert changes <= 6, f"{changes} changes at a constant load"


def test_the_work_itself_is_what_full_batches_take() -> None:
    # Eight jobs of 100 tokens, and 400 prompt tokens at a tenth: a token for each of eight every 20 ms.
    arrivals = [Arrival(0.0, 50, 100)] * 8
    assert work_hours(arrivals, Machine(start_s=0.0)) * 3600 == pytest.approx((800 + 40) * 0.02 / 8)


def test_ours_sleeps_and_wakes() -> None:
    arrivals = [Arrival(100.0, 0, 50), Arrival(2000.0, 0, 50)]
    outcome = World(Machine(start_s=60.0), arrivals).run(
        Ours((0, 4), TUNING, idle_timeout_s=300.0), 0, 3600.0
    )
    assert outcome.starts == 2
    assert all(wait == pytest.approx(60.0, abs=2.5) for wait in outcome.waits_s)
    assert outcome.hours * 3600 == pytest.approx(2 * (60 + 300), abs=20)


def test_the_traces_are_those_of_their_papers() -> None:
    conv, code = azure("conv"), azure("code")
    assert (len(conv), len(code)) == (19_366, 8_819)
    assert sum(a.completion_tokens for a in conv) / len(conv) == pytest.approx(211.1, abs=0.1)
    assert sum(a.prompt_tokens for a in code) / len(code) == pytest.approx(2047.8, abs=0.1)
    assert conv[-1].at == pytest.approx(3501.7, abs=0.1)


def test_frontier_and_comparison() -> None:
    points = [Point("a", 5.0, 0.01), Point("b", 4.0, 0.02), Point("c", 6.0, 0.015), Point("d", 9.0, 0.0)]
    assert [p.setting for p in frontier(points)] == ["d", "a", "b"]
    cheapest = hours_at(points, 0.01)
    assert cheapest is not None and cheapest.setting == "a"
    assert hours_at(points[:2], 0.005) is None
    rows = compare("x", {"ours": [Point("o", 4.0, 0.005)], "keda": points, "fixed": [Point("f", 4.4, 0.03)]})
    assert [(row.ours, row.theirs, row.ratio) for row in rows] == [
        (None, 9.0, 0.0),
        (4.0, 5.0, 1.25),
        (4.0, 4.0, 1.0),
        (4.0, 4.0, 1.0),
    ]


def test_others_come_closest_at_whatever_share_that_is() -> None:
    theirs = [Point("a", 9.0, 0.0), Point("b", 5.0, 0.004), Point("c", 4.5, 0.02), Point("d", 1.0, 0.4)]
    ours = [Point("o", 6.0, 0.002), Point("p", 4.0, 0.015)]
    found = closest(ours, theirs)
    assert found is not None and (found[0].setting, found[1]) == ("b", ours[0])
    rows = compare("x", {"ours": ours, "keda": theirs})
    assert rows[-1].name == "x, where others come closest: 0.40% late"
    assert rows[-1].ratio == pytest.approx(5 / 6) and rows[-1].is_below_floor
    assert closest(ours, [Point("a", 9.0, 0.0005)]) is None, "two or three requests decide"
    # Where no setting of ours is as good, whatever it costs, others are ahead.
    rows = compare("x", {"ours": [Point("o", 1.0, 0.5)], "keda": theirs})
    assert rows[-1].ratio == 0 and rows[-1].is_below_floor


def test_both_sides_may_try_as_many_settings() -> None:
    tried = {rule: [name for name, _, _ in settings(rule)] for rule in RULES}
    assert len(tried["ours"]) == sum(len(names) for rule, names in tried.items() if rule != "ours")
    assert all(len(set(names)) == len(names) for names in tried.values())


def test_another_draw_makes_other_arrivals_of_the_same_kind() -> None:
    first, second = TRACES["ramp"](0), TRACES["ramp"](1)
    assert first[0] != second[0] and len(second) == pytest.approx(len(first), rel=0.05)
    assert TRACES["ramp"](0) == first and TRACES["conv"](1) == TRACES["conv"](0)


def test_a_picture_is_a_png_of_the_panels(tmp_path: Path) -> None:
    lines = [
        Line("ours", [(0.1, 5.0), (1.0, 3.0), (10.0, 0.0)]),
        Line("steps", [(0.1, 1.0), (9.0, 2.0)], True),
    ]
    write_png(
        [Panel("A title: 100 %", "late, %", lines, is_x_log=True), Panel("empty", "x", [])],
        tmp_path / "p.png",
    )
    data = (tmp_path / "p.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (WIDTH, 2 * HEIGHT)
    start = data.index(b"IDAT") + 4
    length = struct.unpack(">I", data[start - 8 : start - 4])[0]
    pixels = zlib.decompress(data[start : start + length])
    assert len(pixels) == 2 * HEIGHT * (3 * WIDTH + 1)
    assert bytes((30, 90, 200)) in pixels and bytes((210, 60, 40)) in pixels
