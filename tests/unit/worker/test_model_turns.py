"""Whose turn it is: rules as tables, and the bound on the wait for a first token over random schedules."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from services.worker.model_turns import OVERTAKE_S, QUANTUM_S, Turns, plan_turns
from services.worker.pull_snapshot import ModelKey, ModelSlot, RunningJob, Snapshot, WaitingJob, WorkClass
from tests.unit.worker.worker_model import SimulatedJob, SimulatedWorker, most_wait_s

A, B, C, D = ("a", 1), ("b", 1), ("c", 1), ("d", 1)


def waits(
    model: ModelKey, waited_s: float = 0.1, work_class: WorkClass = "live", sequences: int = 1
) -> WaitingJob:
    return WaitingJob(f"w-{model[0]}-{waited_s}", model, work_class, sequences, waited_s)


def put_aside(model: ModelKey) -> WaitingJob:
    """Its owner does not answer."""
    return replace(waits(model, 9.0), claimable=False)


def runs(model: ModelKey, work_class: WorkClass = "live", attempt: int = 1) -> RunningJob:
    return RunningJob(f"r-{model[0]}", model, 1, attempt, work_class)


def ready(turn_s: float = 0.0, size: int = 1, last_used_s: float = 0.0) -> ModelSlot:
    return ModelSlot("ready", size, last_used_s, turn_s)


OVER = QUANTUM_S
IN_TURN = QUANTUM_S - 0.1


@pytest.mark.parametrize(
    ("models", "running", "waiting", "expected"),
    [
        pytest.param({A: ready()}, [], [waits(C)], Turns(load=[C]), id="free memory is used at once"),
        pytest.param({A: ready(OVER)}, [runs(A)], [waits(C)], Turns(load=[C]), id="also beside running work"),
        pytest.param({}, [], [waits(D)], Turns(load=[D]), id="one above the budget into an empty device"),
        pytest.param(
            {A: ready(last_used_s=9), B: ready(last_used_s=5)},
            [],
            [waits(C)],
            Turns(evict=[B]),
            id="the least recently used without work makes room",
        ),
        pytest.param(
            {A: ready(OVER), B: ready()}, [runs(A)], [waits(C)], Turns(evict=[B]), id="idle before busy"
        ),
        pytest.param(
            {A: ready(IN_TURN), B: ready(IN_TURN)},
            [runs(A), runs(B)],
            [waits(C, 9.0)],
            Turns(),
            id="nobody gives way within its quantum",
        ),
        pytest.param(
            {A: ready(OVER), B: ready(OVER + 1)},
            [runs(A), runs(B)],
            [waits(C)],
            Turns(evict=[B], pause=["r-b"]),
            id="the longest turn is over, its job is paused",
        ),
        pytest.param(
            {A: ready(0.0), B: ready(IN_TURN)},
            [runs(B)],
            [waits(C, 9.0), waits(A)],
            Turns(),
            id="a model that was just loaded serves those who wait for it",
        ),
        pytest.param(
            {A: ready(IN_TURN), B: ready(0.1)},
            [runs(A), runs(B, "batch")],
            [waits(C)],
            Turns(evict=[B], pause=["r-b"]),
            id="batch work yields to live at once",
        ),
        pytest.param(
            {A: ready(OVER), B: ready(OVER)},
            [runs(A), runs(B)],
            [waits(C, 9.0, "batch")],
            Turns(),
            id="live work does not yield to batch",
        ),
        pytest.param(
            {A: ready(IN_TURN), B: ready(OVER)},
            [runs(A, "batch"), runs(B, "batch")],
            [waits(C, 9.0, "batch")],
            Turns(evict=[B], pause=["r-b"]),
            id="batch models take turns among themselves",
        ),
        pytest.param(
            {A: ready(IN_TURN), B: ready(OVER)},
            [runs(A), runs(B, attempt=2)],
            [waits(C)],
            Turns(),
            id="a job that was in a crash is left alone",
        ),
        pytest.param(
            {A: ModelSlot("loading", 1, 0)}, [], [waits(C)], Turns(), id="one swap at a time: loading"
        ),
        pytest.param(
            {A: ModelSlot("evicting", 1, 0), B: ready()}, [], [waits(C)], Turns(), id="one swap: evicting"
        ),
        pytest.param(
            {A: ready(IN_TURN), B: ready()}, [runs(A)], [waits(D)], Turns(), id="nobody goes for nothing"
        ),
        pytest.param(
            {A: ready(OVER), B: ready()},
            [runs(A)],
            [waits(D)],
            Turns(evict=[B, A], pause=["r-a"]),
            id="all go for one that fits only alone",
        ),
        pytest.param(
            {A: ready()},
            [],
            [waits(B, 5.0, "batch"), waits(C, 0.1)],
            Turns(load=[C]),
            id="live before batch",
        ),
        pytest.param(
            {A: ready()},
            [],
            [waits(B, 0.5), waits(C, 0.1), waits(C, 0.2)],
            Turns(load=[C]),
            id="the most waiting sequences, of those that came at about the same time",
        ),
        pytest.param(
            {A: ready()},
            [],
            [waits(B, OVERTAKE_S + 0.3), waits(C, 0.1), waits(C, 0.2)],
            Turns(load=[B]),
            id="nobody is overtaken by who came much later",
        ),
        pytest.param({A: ready()}, [], [waits(("x", 1))], Turns(), id="no size, no load"),
        pytest.param({A: ready()}, [], [put_aside(B)], Turns(), id="no load for whom nobody answers"),
        pytest.param(
            {A: ready(OVER), B: ready(IN_TURN)},
            [runs(B)],
            [put_aside(A), waits(C)],
            Turns(evict=[A]),
            id="a job whose owner does not answer keeps its model for a quantum only",
        ),
    ],
)
def test_plan_turns(
    models: dict[ModelKey, ModelSlot], running: list[RunningJob], waiting: list[WaitingJob], expected: Turns
) -> None:
    sizes = {A: 1, B: 1, C: 1, D: 3}
    assert plan_turns(Snapshot(waiting, running, 0, models, sizes), 2) == expected


def test_a_cheap_swap_goes_before_an_expensive_one() -> None:
    snapshot = Snapshot([waits(B), waits(C)], [], 0, {}, {B: 1, C: 1}, swap_s={B: 2.0, C: 0.5})
    assert plan_turns(snapshot, 2).load == [C]


def test_abcabc_runs_as_aabbcc() -> None:
    jobs = [SimulatedJob(f"{i}", ("abc"[i % 3], 1), 0.01 * i, 0.1) for i in range(12)]
    sizes = dict.fromkeys((A, B, C), 1)
    worker = SimulatedWorker(jobs, dict.fromkeys(sizes, 0.5), sizes, memory=1, max_sequences=16)
    worker.run()
    assert len(worker.loads) == 3


def random_worker(seed: int) -> SimulatedWorker:
    """Any number of models, more than fit or not; long and short jobs, bursts, batch work, loads that fail."""
    dice = random.Random(seed)
    models = [(f"m{i}", 1) for i in range(dice.randint(1, 9))]
    sizes = {model: dice.choice([1, 1, 1, 2]) for model in models}
    swap_s = {model: dice.choice([0.02, 0.1, 0.5, 2.0]) for model in models}
    broken = frozenset(model for model in models if dice.random() < 0.1)
    jobs, now_s = [], 0.0
    for index in range(dice.randint(1, 18)):
        now_s += dice.choice([0.0, 0.0, 0.05, 0.4, 3.0])
        work_class: WorkClass = "batch" if dice.random() < 0.25 else "live"
        work_s = dice.choice([0.1, 0.5, 1.5, 6.0])
        jobs.append(SimulatedJob(f"j{index}", dice.choice(models), now_s, work_s, work_class))
    return SimulatedWorker(jobs, swap_s, sizes, dice.randint(2, 6), max_sequences=32, broken=broken)


@pytest.mark.parametrize("block", range(10))
def test_each_live_job_waits_within_the_bound_in_a_thousand_schedules(block: int) -> None:
    for seed in range(block * 100, block * 100 + 100):
        worker = random_worker(seed)
        worker.run()
        for job in worker.jobs:
            assert job.ended_s is not None
            assert job.is_failed == (job.model in worker.broken)
            if job.work_class == "live" and not job.is_failed:
                assert job.first_token_s is not None
                waited_s = job.first_token_s - job.arrives_s
                assert waited_s <= most_wait_s(worker, job, QUANTUM_S), (seed, job)
