"""What follows from workers' counters and the depths of queues over time."""

from __future__ import annotations

from typing import Any

import pytest

from services.scheduler.load_meter import LoadMeter, Measured
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
        done = report(completion_tokens=second * 40, left_jobs=second, stream_s=second * 4.0)
        meter.look({"i": done}, 0, 0, 0.0, float(second))
    measured = meter.measured()
    assert measured is not None
    assert measured.job_tokens == pytest.approx(40.0, rel=0.02)
    assert measured.worker_tokens_per_s == pytest.approx(80.0, rel=0.15)
