"""The scaling policy, as a table of its rules and as properties of any load."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.scaling_policy import (
    BatchWork,
    Bounds,
    LoadSnapshot,
    Need,
    ScalingDecision,
    wanted_count,
    weighted_tokens,
)

NOW_S = 10_000.0
BOUNDS = Bounds(min_count=0, max_count=8, idle_timeout_s=300.0)
CALM = LoadSnapshot(
    bounds=BOUNDS,
    wanted_now=1,
    ready_workers=1,
    ready_messages=0,
    oldest_report_age_s=1.0,
    mean_job_tokens=100.0,
    remaining_tokens=0.0,
    arriving_tokens_per_s=0.0,
    throughput_tokens_per_s=100.0,
    start_s=60.0,
    last_busy_at_s=NOW_S - 1,
)
"""One job is one second of one worker's work."""


def but(snapshot: LoadSnapshot = CALM, /, **changes: object) -> LoadSnapshot:
    return msgspec.structs.replace(snapshot, **changes)


def bounds(**changes: object) -> Bounds:
    return msgspec.structs.replace(BOUNDS, **changes)


ASLEEP = but(wanted_now=0, ready_workers=0, oldest_report_age_s=0.0)
FAR = BatchWork(tokens=10_000.0, deadline_at_s=NOW_S + 86_400)
NEARING = BatchWork(tokens=10_000.0, deadline_at_s=NOW_S + 300)
NEAR = BatchWork(tokens=10_000.0, deadline_at_s=NOW_S + 110)


@pytest.mark.parametrize(
    ("snapshot", "wanted", "words"),
    [
        pytest.param(but(ready_messages=None, wanted_now=3), 3, "broker", id="blind: the broker"),
        pytest.param(but(oldest_report_age_s=11.0, wanted_now=3), 3, "11 s old", id="blind: reports"),
        pytest.param(
            but(ready_messages=None, wanted_now=9), 8, "maximum", id="blind obeys a lowered maximum"
        ),
        pytest.param(but(ASLEEP, ready_messages=45), 5, "5 needed", id="from zero in one step"),
        pytest.param(but(ASLEEP, ready_messages=1), 1, "1 needed", id="one job wakes"),
        pytest.param(
            but(ASLEEP, ready_messages=1, mean_job_tokens=0.0),
            1,
            "1 needed",
            id="a job of unknown size wakes",
        ),
        pytest.param(
            but(ASLEEP, ready_messages=9, throughput_tokens_per_s=None), 1, "not measured", id="unmeasured"
        ),
        pytest.param(but(ASLEEP), 0, "0 needed", id="asleep stays asleep"),
        pytest.param(but(ready_messages=500), 8, "maximum of 8", id="cut to the maximum"),
        pytest.param(but(remaining_tokens=2_500.0), 3, "3 needed", id="running work counts"),
        pytest.param(but(arriving_tokens_per_s=170.0), 3, "3 needed", id="arrivals at 0.8 utilisation"),
        pytest.param(but(ready_messages=5, swap_s=90.0), 1, "1 needed", id="a swap is no need"),
        pytest.param(but(last_busy_at_s=NOW_S - 299), 1, "299 s of 300 s", id="idle, not long enough"),
        pytest.param(but(last_busy_at_s=NOW_S - 300), 0, "idle for 300 s", id="idle: asleep"),
        pytest.param(
            but(last_busy_at_s=NOW_S - 300, bounds=bounds(min_count=2)), 2, "minimum of 2", id="minimum"
        ),
        pytest.param(but(recent_needs=(Need(NOW_S - 179, 4),)), 4, "window", id="down slowly"),
        pytest.param(but(recent_needs=(Need(NOW_S - 181, 4),)), 1, "idle", id="down after the window"),
        pytest.param(
            but(recent_needs=(Need(NOW_S - 200, 4),), start_s=300.0), 4, "window", id="kept a start time long"
        ),
        pytest.param(but(ASLEEP, batch=FAR), 0, "0 needed", id="batch with time does not wake"),
        pytest.param(but(ASLEEP, batch=NEARING), 1, "1 needed", id="batch for one worker, in good time"),
        pytest.param(but(ASLEEP, batch=NEAR), 2, "2 needed", id="batch whose deadline needs it"),
        pytest.param(but(ready_messages=45, scale_up_blocked="budget"), 1, "budget", id="blocked"),
        pytest.param(
            but(ASLEEP, bounds=bounds(min_count=2), scale_up_blocked="budget"),
            0,
            "budget",
            id="blocked below the minimum",
        ),
        pytest.param(
            but(last_busy_at_s=NOW_S - 300, scale_up_blocked="budget"), 0, "idle", id="blocked goes down"
        ),
    ],
)
def test_wanted_count_follows_its_rules(snapshot: LoadSnapshot, wanted: int, words: str) -> None:
    decision = wanted_count(snapshot, NOW_S)
    assert decision.wanted == wanted
    assert words in decision.words


@pytest.mark.parametrize(
    ("snapshot", "drain_s"),
    [
        pytest.param(but(ready_messages=30), 30.0, id="one worker"),
        pytest.param(but(ready_messages=30, ready_workers=3), 10.0, id="three workers"),
        pytest.param(but(ASLEEP, ready_messages=30), 90.0, id="a start comes before"),
        pytest.param(but(ready_messages=30, swap_s=5.0), 35.0, id="a swap comes before"),
        pytest.param(but(swap_s=5.0), 0.0, id="nothing to drain"),
        pytest.param(but(ready_messages=None), None, id="blind"),
    ],
)
def test_seconds_to_drain(snapshot: LoadSnapshot, drain_s: float | None) -> None:
    assert wanted_count(snapshot, NOW_S).drain_s == drain_s


def test_a_prompt_token_weighs_a_tenth_until_measured() -> None:
    assert weighted_tokens(100, 7) == 17
    assert weighted_tokens(100, 7, prompt_weight=0.5) == 57


snapshots = st.builds(
    LoadSnapshot,
    bounds=st.integers(0, 5).flatmap(
        lambda least: st.builds(
            Bounds,
            min_count=st.just(least),
            max_count=st.integers(least, 12),
            idle_timeout_s=st.floats(0, 1000),
        )
    ),
    wanted_now=st.integers(0, 15),
    ready_workers=st.integers(0, 15),
    ready_messages=st.none() | st.integers(0, 10_000),
    oldest_report_age_s=st.floats(0, 60),
    mean_job_tokens=st.floats(0, 1e4),
    remaining_tokens=st.floats(0, 1e6),
    arriving_tokens_per_s=st.floats(0, 1e4),
    throughput_tokens_per_s=st.none() | st.floats(1, 1e4),
    start_s=st.floats(0, 600),
    last_busy_at_s=st.floats(0, NOW_S),
    batch=st.none() | st.just(FAR) | st.just(NEAR),
    scale_up_blocked=st.none() | st.just("budget"),
)


@given(snapshots)
def test_bounds_hold_and_a_block_is_obeyed(snapshot: LoadSnapshot) -> None:
    wanted = wanted_count(snapshot, NOW_S).wanted
    assert 0 <= wanted <= snapshot.bounds.max_count
    if snapshot.scale_up_blocked is None:
        assert wanted >= snapshot.bounds.min_count
    else:
        assert wanted <= snapshot.wanted_now


@given(snapshots)
def test_a_stored_decision_comes_out_the_same(snapshot: LoadSnapshot) -> None:
    stored = msgspec.json.encode((snapshot, wanted_count(snapshot, NOW_S)))
    inputs, decision = msgspec.json.decode(stored, type=tuple[LoadSnapshot, ScalingDecision])
    assert wanted_count(inputs, NOW_S) == decision


@given(snapshots.filter(lambda s: s.ready_messages is not None), st.integers(2, 30))
def test_a_constant_load_does_not_flap(snapshot: LoadSnapshot, looks: int) -> None:
    """From the second look on the count does not change, while the load and the time of work stay the same."""
    seen: list[int] = []
    for look in range(looks):
        at_s = NOW_S + look
        decision = wanted_count(but(snapshot, last_busy_at_s=at_s, batch=None), at_s)
        seen.append(decision.wanted)
        snapshot = but(snapshot, wanted_now=decision.wanted, recent_needs=decision.recent_needs)
        assert len(decision.recent_needs) <= 1
    assert len(set(seen[1:])) == 1
