"""The scaling policy, as a table of its rules and as properties of any load."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.crowds import SeenCrowds
from services.scheduler.scaling_policy import (
    Load,
    Need,
    ScalingDecision,
    ScalingMemory,
    Supply,
    Tuning,
    crowd_terms,
    decide_count,
    utilisation_for,
)

NOW = 10_000.0
TUNING = Tuning(
    utilisation=0.8,
    drain_target_s=10.0,
    drain_starts=1 / 6,
    down_window_s=180.0,
    crowd_room=1.5,
    crowd_share=0.01,
)
CALM = Load(
    ready_messages=0,
    reports_age_s=1.0,
    job_tokens=100.0,
    arriving_tokens_per_s=0.0,
    worker_tokens_per_s=100.0,
)
"""One job is one second of one worker's work."""
ONE = Supply(ready_workers=1, starting_ages_s=[], max_batch=8, start_s=60.0)
NONE = Supply(ready_workers=0, starting_ages_s=[], max_batch=8, start_s=60.0)


def load(**changes: Any) -> Load:
    return msgspec.structs.replace(CALM, **changes)


def supply(**changes: Any) -> Supply:
    return msgspec.structs.replace(ONE, **changes)


def decide(
    load: Load,
    supply: Supply = ONE,
    *,
    wanted: int = 1,
    idle_s: float = 1.0,
    bounds: tuple[int, int] = (0, 8),
    needs: list[Need] | None = None,
    now: float = NOW,
    target_wait_s: float = 10.0,
) -> ScalingDecision:
    memory = ScalingMemory(wanted=wanted, busy_at=now - idle_s, needs=needs or [])
    return decide_count(load, supply, bounds, 300.0, memory, now, TUNING, target_wait_s=target_wait_s)


def crowds(*late: float, requests: float = 1000.0, usual_per_s: float = 0.0) -> SeenCrowds:
    """Ten late requests are worth a worker."""
    return SeenCrowds(at=NOW, requests=requests, usual_per_s=usual_per_s, late=list(late))


FOUR_WORTH = crowds(90.0, 60.0, 30.0)


@pytest.mark.parametrize(
    ("target_wait_s", "utilisation"),
    [(0.5, 0.5), (1.0, 0.5), (4.5, 0.65), (8.0, 0.8), (10.0, 0.8), (3600.0, 0.8)],
)
def test_who_may_wait_less_finds_more_room(target_wait_s: float, utilisation: float) -> None:
    tuning = msgspec.structs.replace(TUNING, short_wait_utilisation=0.5)
    assert utilisation_for(target_wait_s, tuning) == pytest.approx(utilisation)
    # 390 tokens/s, by workers of 100 that are kept so busy.
    wanted = decide(load(arriving_tokens_per_s=390.0), target_wait_s=1.0).wanted
    assert (wanted, decide(load(arriving_tokens_per_s=390.0)).wanted) == (6, 5)


def test_crowds_are_counted_by_what_a_resource_lets_its_requests_wait() -> None:
    tuning = msgspec.structs.replace(TUNING, short_wait_utilisation=0.5, crowd_windows=2.0)
    terms = crowd_terms(4.5, tuning)
    assert terms.utilisation == pytest.approx(0.65)
    assert (terms.wait_s, terms.forget_s) == (4.5, 360.0)


@pytest.mark.parametrize(
    ("decision", "wanted", "words"),
    [
        # Blind
        (decide(load(ready_messages=None), wanted=3), 3, "held"),
        (decide(load(reports_age_s=11.0), wanted=3), 3, "11 s old"),
        (decide(load(ready_messages=None), wanted=9), 8, "cut to the maximum of 8"),
        (decide(load(ready_messages=None), NONE, wanted=0, bounds=(2, 8)), 2, "raised to the minimum of 2"),
        # Throughput is not known
        (decide(load(worker_tokens_per_s=None, ready_messages=9), NONE, wanted=0), 1, "no worker's throughput"),
        (decide(load(worker_tokens_per_s=None, ready_messages=9), wanted=3), 3, "no worker's throughput"),
        (decide(load(worker_tokens_per_s=None), NONE, wanted=0), 0, "nothing was measured"),
        (decide(load(worker_tokens_per_s=None), wanted=1, idle_s=300.0), 0, "nothing to do for 300 s"),
        # Arrivals at 0.8 utilisation: 170 tokens/s are 2.1 workers.
        (decide(load(arriving_tokens_per_s=170.0)), 3, "2.1 workers"),
        (decide(load(arriving_tokens_per_s=160.0)), 2, "2.0 workers"),
        # What runs counts in full batches: two streams with hours to go keep one worker, nine want two.
        (decide(load(running_sequences=2, usually_running=2.0), idle_s=9999.0), 1, "0.2 workers"),
        (decide(load(running_sequences=9, usually_running=9.0), supply(ready_workers=2), wanted=2), 2, "1.1 workers"),
        # That all are full for a moment keeps one.
        (decide(load(running_sequences=16), supply(ready_workers=2), wanted=2), 1, "0.0 workers"),
        # From zero in one step: 300 s of work in 10 s, though nothing is known of arrivals.
        (decide(load(ready_messages=70), NONE, wanted=0), 7, "7.0 for what will still wait in 60 s"),
        (decide(load(ready_messages=1), NONE, wanted=0), 1, ""),
        (decide(load(ready_messages=1, job_tokens=0.0), NONE, wanted=0), 1, ""),
        (decide(load(ready_messages=5_000_000), NONE, wanted=0), 8, "cut to the maximum of 8"),
        # What the workers there will have done before another could be ready wants nobody.
        (decide(load(ready_messages=60)), 1, "0.0 workers"),
        (decide(load(ready_messages=80)), 2, "2.0 for what will still wait"),
        (decide(load(ready_messages=60), supply(start_s=1.0)), 6, "5.9 for what will still wait in 1 s"),
        (decide(load(waiting_jobs=80)), 2, "2.0 for what will still wait"),
        # In ten seconds, or in a sixth of a longer start.
        (decide(load(ready_messages=1120), supply(start_s=120.0)), 8, "50.0 for what will still wait in 120 s"),
        # Those on their way count from when they will be ready: this one has half of its start behind it.
        (decide(load(ready_messages=80), supply(starting_ages_s=[30.0]), wanted=2), 1, ""),
        (decide(load(ready_messages=80), supply(starting_ages_s=[5.0]), wanted=2), 2, "1.5 for"),
        # A swap delays what waits on a worker that is there as on a new one: it starts nobody.
        (decide(load(ready_messages=60, swap_s=30.0)), 1, "0.0 workers"),
        (decide(load(ready_messages=80, swap_s=30.0)), 2, "2.0 for what will still wait in 90 s"),
        # Crowds that four would have been worth want half as many again above what usually comes: now, or in the last minutes.
        (decide(load(crowds=FOUR_WORTH), supply(ready_workers=6), wanted=6), 6, "6 for crowds, as the next may be larger: with 3 the last ones would have kept 30 of 1000"),
        (decide(load(crowds=FOUR_WORTH), wanted=3), 6, "waiting for too long"),
        (decide(load(crowds=FOUR_WORTH, arriving_tokens_per_s=160.0), wanted=3), 5, "2.0 workers; 5 for crowds"),
        (decide(load(crowds=crowds(90.0, 60.0, 30.0, usual_per_s=1.6)), wanted=3), 5, "0.0 workers; 5 for crowds"),
        (decide(load(crowds=crowds(90.0, 60.0, 30.0, usual_per_s=8.0)), wanted=3), 4, "0.0 workers; 4 for crowds"),
        (decide(load(crowds=crowds(90.0), arriving_tokens_per_s=320.0), wanted=1), 4, "4.0 workers"),
        (decide(load(crowds=FOUR_WORTH, arriving_tokens_per_s=400.0), wanted=3), 5, "5.0 workers"),
        (decide(load(crowds=crowds(9.0)), wanted=3), 1, "the last worker is kept"),
        (decide(load(crowds=crowds(90.0, 60.0, 30.0, requests=9000.0)), wanted=3), 1, "the last worker is kept"),
        (decide(load(crowds=crowds(*(900.0 - 11 * n for n in range(64)))), wanted=3), 8, "cut to the maximum of 8"),
        (decide(load(crowds=FOUR_WORTH), wanted=5, idle_s=299.0), 6, "6 for crowds"),
        (decide(load(crowds=FOUR_WORTH), wanted=5, idle_s=300.0), 0, "nothing to do for 300 s"),
        # Batch jobs want one worker, and no more
        (decide(load(batch_messages=10_000), NONE, wanted=0), 1, ""),
        (decide(load(), NONE, wanted=0, idle_s=9999.0), 0, ""),
        # Down slowly
        (decide(load(), needs=[Need(NOW - 179, 4)]), 4, "4 were needed 179 s ago"),
        (decide(load(), needs=[Need(NOW - 181, 4)]), 1, "the last worker is kept"),
        (decide(load(), supply(start_s=300.0), needs=[Need(NOW - 200, 4)]), 4, "4 were needed"),
        # The last worker
        (decide(load(), idle_s=299.0), 1, "nothing to do for 299 s; the last worker is kept for 300 s"),
        (decide(load(), idle_s=300.0), 0, "nothing to do for 300 s"),
        (decide(load(), idle_s=300.0, needs=[Need(NOW - 170, 1)]), 0, "nothing to do"),
        (decide(load(), idle_s=300.0, bounds=(2, 8)), 2, "raised to the minimum of 2"),
    ],
)  # fmt: skip
def test_rules(decision: ScalingDecision, wanted: int, words: str) -> None:
    assert (decision.wanted, decision.memory.wanted) == (wanted, wanted), decision.why
    assert words in decision.why


@pytest.mark.parametrize(
    ("decision", "drain_s"),
    [
        (decide(load(ready_messages=30)), 30.0),
        (decide(load(ready_messages=20, waiting_jobs=10), supply(ready_workers=3)), 10.0),
        (decide(load(ready_messages=30), NONE), 90.0),
        (decide(load(ready_messages=30, swap_s=2.0)), 32.0),
        # Running jobs count by what they may still do at most, or by a mean job each, whichever is less.
        (decide(load(running_sequences=2, remaining_tokens=50)), 0.5),
        (decide(load(running_sequences=2, remaining_tokens=8192)), 2.0),
        (decide(load()), 0.0),
        (decide(load(ready_messages=None)), None),
    ],
)
def test_seconds_to_drain(decision: ScalingDecision, drain_s: float | None) -> None:
    assert decision.drain_s == drain_s


loads = st.builds(
    Load,
    ready_messages=st.none() | st.integers(0, 10_000),
    batch_messages=st.integers(0, 10),
    waiting_jobs=st.integers(0, 100),
    running_sequences=st.integers(0, 100),
    remaining_tokens=st.integers(0, 10**6),
    reports_age_s=st.floats(0, 60),
    job_tokens=st.floats(0, 1e4),
    arriving_tokens_per_s=st.floats(0, 1e4),
    worker_tokens_per_s=st.none() | st.floats(1, 1e4),
    usually_running=st.floats(0, 100),
    crowds=st.none()
    | st.builds(
        SeenCrowds,
        at=st.just(NOW),
        requests=st.floats(0, 1e5),
        usual_per_s=st.floats(0, 100),
        late=st.lists(st.floats(0, 1e4), max_size=64).map(lambda late: sorted(late, reverse=True)),
    ),
    swap_s=st.floats(0, 60),
)
supplies = st.builds(
    Supply,
    ready_workers=st.integers(0, 15),
    starting_ages_s=st.lists(st.floats(0, 500), max_size=5),
    max_batch=st.integers(1, 64),
    start_s=st.floats(0.1, 600),
)
all_bounds = st.integers(0, 5).flatmap(lambda least: st.tuples(st.just(least), st.integers(least, 12)))


@given(loads, supplies, all_bounds, st.integers(0, 15), st.floats(0, 1000))
def test_bounds_hold_whatever_is_measured_and_a_stored_decision_comes_out_the_same(
    load: Load, supply: Supply, bounds: tuple[int, int], wanted: int, idle_s: float
) -> None:
    memory = ScalingMemory(wanted=wanted, busy_at=NOW - idle_s, needs=[Need(NOW - 50, wanted)])
    decision = decide_count(load, supply, bounds, 300.0, memory, NOW, TUNING)
    assert bounds[0] <= decision.wanted <= bounds[1]
    stored = msgspec.json.encode((load, supply, memory))
    again = msgspec.json.decode(stored, type=tuple[Load, Supply, ScalingMemory])
    assert decide_count(again[0], again[1], bounds, 300.0, again[2], NOW, TUNING) == decision


@given(loads, supplies, st.integers(0, 12))
def test_work_never_lets_the_last_worker_go(load: Load, supply: Supply, wanted: int) -> None:
    if not (load.ready_messages or load.running_sequences or load.waiting_jobs or load.batch_messages):
        return
    if load.ready_messages is None or (supply.ready_workers and load.reports_age_s > 10):
        return
    decision = decide(load, supply, wanted=wanted, idle_s=9999.0)
    assert decision.wanted >= 1


@given(loads.filter(lambda each: each.ready_messages is not None), supplies, st.integers(2, 30))
def test_a_constant_load_does_not_flap(load: Load, supply: Supply, looks: int) -> None:
    """The load and the workers stay as they are: from the second look on the count does not change."""
    seen: list[int] = []
    memory = ScalingMemory(wanted=3, busy_at=NOW)
    for look in range(looks):
        decision = decide_count(load, supply, (0, 12), 300.0, memory, NOW + look, TUNING)
        memory = msgspec.structs.replace(decision.memory, busy_at=NOW + look)
        seen.append(decision.wanted)
        assert len(memory.needs) <= 2
    assert len(set(seen[1:])) == 1


def test_the_memory_of_needs_stays_small() -> None:
    memory = ScalingMemory(wanted=1, busy_at=NOW)
    for look in range(1000):
        now = NOW + look
        falling = load(arriving_tokens_per_s=max(80.0 * (50 - look / 4), 0.0), running_sequences=1)
        decision = decide_count(falling, ONE, (0, 64), 300.0, memory, now, TUNING)
        memory = decision.memory
        assert len(memory.needs) <= 64
    assert memory.wanted < 10
