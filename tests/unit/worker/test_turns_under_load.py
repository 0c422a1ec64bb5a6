"""More models than there is memory for, and more requests than can be answered: how much is answered in time."""

from __future__ import annotations

import itertools

import pytest

from loadtest.hotswap_traffic import goodput, make_trace
from tests.unit.worker.loaded_worker import MAX_BATCH, FifoWorker, LoadedWorker

TRACE_S, SEEDS = 16.0, range(4)
SLOTS = 3


def run(worker: type[LoadedWorker], rate_per_s: float, models: int, window: int) -> tuple[float, float]:
    """Answers in time each second, and pauses of each job, over some traces."""
    good, pauses, jobs = 0.0, 0, 0
    for seed in SEEDS:
        trace = make_trace(rate_per_s, TRACE_S, models, vocab_size=1000, seed=seed)
        side = worker(SLOTS, window)
        side.run(trace)
        good += goodput([job.latency_s for job in side.jobs], TRACE_S)
        pauses, jobs = pauses + side.pauses, jobs + len(trace)
    return good / len(SEEDS), pauses / jobs


def test_turns_answer_more_than_order_of_arrival_and_do_not_collapse_under_overload() -> None:
    ours = {rate: run(LoadedWorker, rate, 20, MAX_BATCH + 16) for rate in (4.0, 6.0, 8.0, 11.0)}
    fifo = {rate: run(FifoWorker, rate, 20, 1000)[0] for rate in (4.0, 6.0, 8.0, 11.0)}
    best = max(good for good, _ in ours.values())
    assert best > 1.3 * max(fifo.values()), (ours, fifo)
    for rate, (good, pauses) in ours.items():
        assert good > fifo[rate], (rate, ours, fifo)
        assert pauses < 0.5, "most answers end within the turn that they began in"
    assert ours[11.0][0] > 0.6 * best, ours


@pytest.mark.parametrize("window", [MAX_BATCH + 4, MAX_BATCH + 16])
def test_one_model_more_than_fits_costs_little(window: int) -> None:
    """Throughput falls smoothly as models are added: no cliff where the memory ends."""
    good = [run(LoadedWorker, 6.0, models, window)[0] for models in range(2, 9)]
    for fewer, more in itertools.pairwise(good):
        assert more > 0.8 * fewer, good
