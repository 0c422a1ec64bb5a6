"""What follows from workers' counters and the depths of queues over time."""

from __future__ import annotations

import math
from typing import Any

import pytest

from services.scheduler.crowds import Terms
from services.scheduler.load_meter import LoadMeter, Measured
from services.scheduler.scaling_policy import ScalingMemory, Supply, decide_count
from shared.messages import WorkerReport


def report(**counters: Any) -> WorkerReport:
    return WorkerReport(
        worker_id="w", resource_id="r", place=0, incarnation="i", phase="ready", sent_unix_ms=0, **counters
    )


def at_rate(seconds: int, jobs_per_s: float = 2.0, skip: range = range(0)) -> LoadMeter:
    """A worker that does jobs of 10 prompt and 50 completion tokens, two streams at once, with reports in `skip` lost."""
    meter = LoadMeter(max_batch=8)
    for second in range(seconds + 1):
        if second in skip:
            continue
        jobs = int(second * jobs_per_s)
        said = report(
            completion_tokens=jobs * 50,
            prompt_tokens=jobs * 10,
            left_jobs=jobs,
            stream_s=second * 2.0,
            held_jobs=2,
            running_sequences=2,
            remaining_tokens=70,
        )
        meter.look({"i": said}, 0, 0, 0.5, 1000.0 + second)
    return meter


def test_a_steady_stream_is_measured_exactly() -> None:
    load = at_rate(300).load()
    assert load.job_tokens == pytest.approx(51.0)
    assert load.arriving_tokens_per_s == pytest.approx(102.0, rel=0.01)
    # 102 tokens in two seconds of streams: 51 a stream, eight of them fill a worker.
    assert load.worker_tokens_per_s == pytest.approx(408.0)
    assert (load.running_sequences, load.waiting_jobs, load.remaining_tokens) == (2, 0, 70)


def test_lost_reports_change_nothing_but_the_time_of_knowing() -> None:
    lossy, whole = at_rate(300, skip=range(100, 190)).load(), at_rate(300).load()
    assert lossy.job_tokens == pytest.approx(whole.job_tokens)
    assert lossy.worker_tokens_per_s == pytest.approx(whole.worker_tokens_per_s)
    assert lossy.arriving_tokens_per_s == pytest.approx(whole.arriving_tokens_per_s, rel=0.02)


def test_jobs_that_move_from_queue_to_worker_do_not_arrive_twice() -> None:
    meter = LoadMeter(max_batch=8, known=Measured(job_tokens=100.0, worker_tokens_per_s=800.0))
    meter.look({}, 50, 0, 0.0, 0.0)
    for second in range(1, 51):
        meter.look({"i": report(held_jobs=second, waiting_jobs=second)}, 50 - second, 0, 0.0, float(second))
    assert meter.load().arriving_tokens_per_s == 0.0
    assert meter.load().waiting_jobs == 50


def test_a_worker_that_dies_brings_no_arrivals_and_a_leader_that_is_new_counts_no_past() -> None:
    meter = LoadMeter(max_batch=8)
    before = report(left_jobs=10_000, completion_tokens=500_000, stream_s=5_000.0, held_jobs=4)
    meter.look({"i": before}, 0, 0, 0.0, 0.0)
    meter.look({"i": before}, 0, 0, 0.0, 1.0)
    assert meter.load().arriving_tokens_per_s == 0.0
    assert meter.load().job_tokens == 50.0
    meter.look({}, 4, 0, 0.0, 2.0)
    assert meter.load().arriving_tokens_per_s == 0.0
    # One that is heard of for the first time brings what it holds, and nothing of its past.
    meter.look({"i2": before}, 4, 0, 0.0, 3.0)
    assert 0 < meter.load().arriving_tokens_per_s < 4 * 50


def test_what_came_while_the_broker_was_away_is_no_crowd_of_one_second() -> None:
    meter = LoadMeter(max_batch=8, known=Measured(job_tokens=100.0, worker_tokens_per_s=800.0))
    meter.look({}, 0, 0, 0.0, 0.0)
    meter.look({}, None, 0, 0.0, 1.0)
    assert meter.load().ready_messages is None
    meter.look({}, 500, 3, 0.0, 60.0)
    assert meter.load().arriving_tokens_per_s == 0.0
    assert (meter.load().ready_messages, meter.load().batch_messages) == (500, 3)


def test_what_is_known_from_before_begins_and_what_is_measured_takes_over() -> None:
    known = Measured(job_tokens=100.0, worker_tokens_per_s=800.0)
    meter = LoadMeter(max_batch=8, known=known)
    assert meter.measured() == known
    assert LoadMeter(max_batch=8).measured() is None
    for second in range(200):
        done = report(
            completion_tokens=second * 40, left_jobs=second, stream_s=second * 4.0, running_sequences=8
        )
        meter.look({"i": done}, 0, 0, 0.0, float(second))
    measured = meter.measured()
    assert measured is not None
    assert measured.job_tokens == pytest.approx(40.0, rel=0.02)
    assert measured.worker_tokens_per_s == pytest.approx(80.0, rel=0.15)


def test_a_batch_that_keeps_a_worker_full_is_measured_and_wants_no_second_one() -> None:
    """Eight lines run all the time, two live requests a minute beside them."""
    meter = LoadMeter(max_batch=8)
    for second in range(301):
        lines, live = second * 2, second // 30
        said = report(
            completion_tokens=(lines + live) * 50,
            left_jobs=lines + live,
            stream_s=second * 8.0,
            held_jobs=20,
            running_sequences=8,
            waiting_jobs=12,
            batch_held_jobs=20,
            batch_waiting_jobs=12,
            batch_sequences=8,
            batch_left_jobs=lines,
        )
        meter.look({"i": said}, 0, 5000, 0.5, 1000.0 + second)
    load = meter.load()
    assert load.worker_tokens_per_s == pytest.approx(101.7, rel=0.01)
    assert load.job_tokens == pytest.approx(50.0)
    assert load.arriving_tokens_per_s < 5.0
    assert (load.running_sequences, load.waiting_jobs, load.batch_messages) == (0, 0, 5020)
    supply = Supply(ready_workers=1, starting_ages_s=[], max_batch=8, start_s=20.0)
    memory = ScalingMemory(wanted=1, busy_at=1300.0)
    assert decide_count(load, supply, (0, 8), 60.0, memory, 1300.0).wanted == 1
    # The last lines are with the worker: it is not idle.
    meter.look({"i": said}, 0, 0, 0.5, 1301.0)
    assert decide_count(meter.load(), supply, (0, 8), 60.0, memory, 9000.0).wanted == 1


def test_a_nearly_full_batch_tells_more_of_a_full_one_than_an_empty_one_does() -> None:
    """A stream alone does 80 tokens a second, each of eight 50: eight times 80 is what no worker does."""
    meter = LoadMeter(max_batch=8)
    tokens = stream_s = 0.0
    for second in range(1, 901):
        full = second % 30 < 4
        tokens, stream_s = tokens + (400 if full else 80), stream_s + (8 if full else 1)
        said = report(
            completion_tokens=int(tokens),
            left_jobs=second,
            stream_s=stream_s,
            running_sequences=8 if full else 1,
        )
        meter.look({"i": said}, 0, 0, 0.0, float(second))
    assert meter.load().worker_tokens_per_s == pytest.approx(400, rel=0.1)


@pytest.mark.parametrize(("wait_s", "late"), [(10.0, [49.0, 38.0, 27.0, 16.0, 5.0]), (20.0, [39.0, 18.0])])
def test_a_crowd_is_late_with_fewer_workers_than_would_have_kept_every_wait_below_the_target(
    wait_s: float, late: list[float]
) -> None:
    meter = LoadMeter(max_batch=8, known=Measured(job_tokens=100.0, worker_tokens_per_s=100.0))
    meter.look({}, 0, 0, 0.0, 0.0, terms=Terms(wait_s=wait_s, least_share=1.0))
    assert meter.load().crowds is None
    meter.look(
        {}, 60, 0, 0.0, 1.0, terms=Terms(wait_s=wait_s, least_share=1.0)
    )  # a minute's work of one worker
    seen = meter.load().crowds
    assert seen is not None and seen.requests == 60.0 and seen.late == pytest.approx(late)
    # As its real queue stays, nothing more comes: nobody more is late, and they are forgotten.
    for second in range(2, 302):
        meter.look({}, 60, 0, 0.0, float(second), terms=Terms(wait_s=wait_s, least_share=1.0))
    now = meter.load().crowds
    assert now is not None and now.late == pytest.approx([each / math.e for each in seen.late], rel=0.01)
    # Another leader has seen them, too.
    other = LoadMeter(8, meter.measured(), now)
    other.look({}, 0, 0, 0.0, 400.0)
    assert other.load().crowds == now


def test_the_jobs_of_a_worker_that_died_are_no_crowd_when_they_come_back() -> None:
    def after_death(new: int) -> list[float]:
        meter = LoadMeter(max_batch=8, known=Measured(job_tokens=100.0, worker_tokens_per_s=100.0))
        for second in range(60):
            held = report(held_jobs=min(second, 40))
            meter.look({"i": held}, 0, 0, 0.0, float(second))
        before = meter.load().crowds
        assert before is not None and not before.late
        meter.look({}, 0, 0, 0.0, 60.0)
        meter.look({}, 40 + new, 0, 0.0, 61.0, terms=Terms(least_share=1.0))
        seen = meter.load().crowds
        assert seen is not None and seen.requests == pytest.approx(40 + new, rel=0.02)
        return seen.late

    assert after_death(new=0) == []
    assert after_death(new=30) == pytest.approx([19.0, 8.0], abs=0.7)


def test_what_usually_runs_follows_in_a_minute() -> None:
    meter = LoadMeter(max_batch=8)
    for second in range(60):
        meter.look({"i": report(held_jobs=8, running_sequences=8)}, 0, 0, 0.0, float(second))
        assert meter.load().running_sequences == 8
    assert meter.load().usually_running == pytest.approx(8 * (1 - 1 / math.e), rel=0.02)
    for second in range(60, 360):
        meter.look({"i": report()}, 0, 0, 0.0, float(second))
    assert meter.load().usually_running < 0.1
