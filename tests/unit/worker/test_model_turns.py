"""Whose turn it is: rules as tables, and the bound on the wait for a first token over random schedules."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from services.worker.model_turns import OVERTAKE_S, QUANTUM_S, Turns, plan_turns
from services.worker.pull_snapshot import (
    ModelKey,
    ModelSlot,
    Preload,
    RunningJob,
    Snapshot,
    WaitingJob,
    WorkClass,
)
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
            {A: ready(OVER), B: ready(OVER + 9)},
            [runs(A), runs(B)],
            [waits(C), waits(B)],
            Turns(evict=[A], pause=["r-a"]),
            id="the one with the fewest sequences goes first",
        ),
        pytest.param(
            {A: ready(OVER), B: ready(OVER + 9)},
            [runs(A), runs(B)],
            [waits(C), waits(B, sequences=3), waits(A, sequences=4)],
            Turns(evict=[B], pause=["r-b"]),
            id="sequences, not jobs",
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


@pytest.mark.parametrize(
    ("running", "waiting", "expected"),
    [
        pytest.param(
            [runs(A), runs(B)], [waits(C, 9.0)], Turns(), id="nobody is interrupted twice in a quantum"
        ),
        pytest.param([runs(A)], [waits(C, 9.0)], Turns(evict=[B]), id="an idle model goes at once"),
        pytest.param(
            [runs(A), runs(B, "batch")],
            [waits(C)],
            Turns(evict=[B], pause=["r-b"]),
            id="so does one with batch work, for a live job",
        ),
    ],
)
def test_a_swap_was_less_than_a_quantum_ago(
    running: list[RunningJob], waiting: list[WaitingJob], expected: Turns
) -> None:
    snapshot = Snapshot(
        waiting,
        running,
        0,
        {A: ready(OVER), B: ready(OVER)},
        {A: 1, B: 1, C: 1},
        since_swap_s=QUANTUM_S - 0.1,
    )
    assert plan_turns(snapshot, 2) == expected
    later = replace(snapshot, since_swap_s=QUANTUM_S)
    assert plan_turns(later, 2).evict != []


@pytest.mark.parametrize(
    ("models", "running", "waiting", "pinned", "preload", "expected"),
    [
        pytest.param({}, [], [], {A: 0.0}, [], Turns(load=[A]), id="a pinned model is loaded for nobody"),
        pytest.param({A: ready()}, [], [], {A: 9.0}, [], Turns(), id="once"),
        pytest.param(
            {A: ready(), B: ready(last_used_s=5)},
            [],
            [waits(C)],
            {A: 9.0},
            [],
            Turns(evict=[B]),
            id="a pinned model stays, though it is used least",
        ),
        pytest.param(
            {A: ready(OVER + 9), B: ready(OVER)},
            [runs(A), runs(B)],
            [waits(C)],
            {A: 9.0},
            [],
            Turns(evict=[B], pause=["r-b"]),
            id="a pinned model keeps its place after its quantum",
        ),
        pytest.param(
            {A: ready(OVER), B: ready(OVER)},
            [runs(A, "batch"), runs(B)],
            [waits(C)],
            {A: 9.0},
            [],
            Turns(evict=[B], pause=["r-b"]),
            id="a pinned model keeps its place with batch work too",
        ),
        pytest.param(
            {A: ready(), B: ready()}, [], [], {C: 0.0}, [], Turns(evict=[A]), id="idle models make room for a pin"
        ),
        pytest.param(
            {A: ready(IN_TURN), B: ready(IN_TURN)},
            [runs(A), runs(B)],
            [],
            {C: 99.0},
            [],
            Turns(),
            id="a pin takes nobody's quantum",
        ),
        pytest.param(
            {A: ready(IN_TURN), B: ready(OVER)},
            [runs(A), runs(B)],
            [],
            {C: 0.0},
            [],
            Turns(evict=[B], pause=["r-b"]),
            id="a pin waits like a live job",
        ),
        pytest.param(
            {A: ready()}, [], [waits(B, 1.0)], {C: 5.0}, [], Turns(load=[C]), id="whoever waited longer goes first: the pin"
        ),
        pytest.param(
            {A: ready()}, [], [waits(B, 5.0)], {C: 1.0}, [], Turns(load=[B]), id="whoever waited longer goes first: the job"
        ),
        pytest.param(
            {A: ready(), B: ready()},
            [],
            [waits(C)],
            {A: 9.0, B: 9.0},
            [],
            Turns(no_room=[C]),
            id="pins leave no room: the jobs are told, and nobody waits behind them",
        ),
        pytest.param(
            {A: ready()},
            [],
            [waits(D, 9.0), waits(C)],
            {A: 9.0},
            [],
            Turns(load=[C], no_room=[D]),
            id="who does not fit beside a pin does not hold up who does",
        ),
        pytest.param(
            {A: ready(), B: ready()}, [], [], {A: 9.0, B: 9.0, C: 9.0}, [], Turns(), id="one pin too many stays absent"
        ),
        pytest.param(
            {A: ModelSlot("loading", 1, 0), B: ready()},
            [],
            [waits(C)],
            {A: 9.0, B: 9.0},
            [],
            Turns(no_room=[C]),
            id="no room is said during a swap too",
        ),
        pytest.param({}, [], [], {("x", 1): 9.0}, [], Turns(), id="a pin without a size is not loaded"),
        pytest.param({A: ready()}, [], [], {}, [B, C], Turns(load=[B]), id="preloads come in order"),
        pytest.param({A: ready()}, [], [], {}, [A, C], Turns(load=[C]), id="one that is here is done"),
        pytest.param({A: ready()}, [runs(A)], [], {}, [B], Turns(load=[B]), id="a preload runs beside answers"),
        pytest.param(
            {A: ready()}, [], [waits(A)], {}, [B], Turns(), id="but not while anybody waits, for whatever model"
        ),
        pytest.param(
            {A: ready(last_used_s=5), B: ready(last_used_s=9)}, [], [], {}, [C], Turns(evict=[A]), id="idle ones go for it"
        ),
        pytest.param(
            {A: ready(), B: ready()}, [], [], {}, [replace(Preload(C, True), may_evict=False)], Turns(),
            id="unless it may not evict",
        ),
        pytest.param(
            {A: ready(OVER + 9), B: ready()}, [runs(A)], [], {B: 9.0}, [C], Turns(), id="neither work nor a pin goes for it"
        ),
        pytest.param(
            {A: ready()}, [], [], {B: 0.0}, [C], Turns(load=[B]), id="a pin goes before a preload"
        ),
        pytest.param(
            {A: ready()}, [], [], {A: 9.0}, [D, B], Turns(load=[B]), id="a preload that never fits holds up no other"
        ),
    ],
)  # fmt: skip
def test_pins_and_preloads(
    models: dict[ModelKey, ModelSlot],
    running: list[RunningJob],
    waiting: list[WaitingJob],
    pinned: dict[ModelKey, float],
    preload: list[ModelKey | Preload],
    expected: Turns,
) -> None:
    sizes = {A: 1, B: 1, C: 1, D: 3}
    preloads = [each if isinstance(each, Preload) else Preload(each, True) for each in preload]
    snapshot = Snapshot(waiting, running, 0, models, sizes, pinned=pinned, preload=preloads)
    assert plan_turns(snapshot, 2) == expected


X, Y = ("x", 1), ("y", 1)
"""Adapters on A."""


@pytest.mark.parametrize(
    ("models", "running", "waiting", "pinned", "preload", "expected"),
    [
        pytest.param({}, [], [waits(X)], {}, [], Turns(load=[A]), id="the base comes first"),
        pytest.param({A: ready()}, [], [waits(X)], {}, [], Turns(load=[X]), id="then the adapter"),
        pytest.param({A: ready(OVER), X: ready(OVER, last_used_s=5)}, [], [waits(C)], {}, [], Turns(evict=[X, A]),
                     id="adapters go before their base"),
        pytest.param({A: ready(), X: ready(last_used_s=9), Y: ready(last_used_s=5)}, [], [waits(B)], {}, [],
                     Turns(evict=[X, Y, A]), id="a base that is idle takes its adapters along"),
        pytest.param({A: ready(OVER), X: ready(IN_TURN)}, [runs(X)], [waits(C)], {}, [], Turns(),
                     id="an adapter's quantum is its base's"),
        pytest.param({A: ready(OVER + 1), X: ready(OVER)}, [runs(X), runs(A)], [waits(B)], {}, [],
                     Turns(evict=[X, A], pause=["r-x", "r-a"]), id="their turn is over together"),
        pytest.param({A: ready(OVER + 1), X: ready(OVER)}, [runs(X), runs(A)], [waits(C)], {}, [],
                     Turns(evict=[X], pause=["r-x"]), id="a base has the work of its adapters too: one of those goes first"),
        pytest.param({A: ready(OVER + 1), X: ready(OVER)}, [runs(A), runs(X, attempt=2)], [waits(C)], {}, [], Turns(),
                     id="a job that was in a crash keeps the base too"),
        pytest.param({A: ready(OVER), X: ready(OVER)}, [runs(X)], [waits(Y)], {}, [],
                     Turns(evict=[X], pause=["r-x"]), id="adapters on one base make room for each other"),
        pytest.param({A: ready(), X: ready()}, [], [waits(C)], {X: 9.0}, [], Turns(no_room=[C]),
                     id="a pinned adapter pins its base"),
        pytest.param({A: ready(OVER + 9), B: ready(OVER)}, [runs(A), runs(B)], [waits(C, 9.0)], {X: 0.0}, [],
                     Turns(evict=[B], pause=["r-b"]), id="also before it is here"),
        pytest.param({A: ready(IN_TURN, size=2)}, [runs(A, "batch")], [waits(C, 9.0), waits(X)], {}, [], Turns(),
                     id="a base has live work when a live job waits for an adapter on it"),
        pytest.param({A: ready(OVER, size=2), X: ready()}, [], [waits(Y)], {}, [], Turns(evict=[X]),
                     id="a base above the budget with one adapter at a time"),
        pytest.param({A: ready(size=2)}, [], [waits(Y)], {}, [], Turns(load=[Y]), id="nothing but the base is empty"),
        pytest.param({}, [], [], {}, [X], Turns(load=[A]), id="a preload of an adapter begins with its base"),
        pytest.param({A: ready(), X: ModelSlot("ready", 0, 0.0)}, [], [waits(C, 2.0), waits(B)], {}, [],
                     Turns(load=[C]), id="an adapter that failed takes no room"),
        pytest.param({A: ready(), B: ready(last_used_s=9), X: ModelSlot("ready", 0, 0.0)}, [], [waits(C)], {}, [],
                     Turns(evict=[A]), id="nor does it hold its base"),
    ],
)  # fmt: skip
def test_adapters_and_their_bases(
    models: dict[ModelKey, ModelSlot],
    running: list[RunningJob],
    waiting: list[WaitingJob],
    pinned: dict[ModelKey, float],
    preload: list[ModelKey],
    expected: Turns,
) -> None:
    sizes = {A: 1, B: 2 if B not in models else 1, C: 1, X: 1, Y: 1}
    preloads = [Preload(each, True) for each in preload]
    snapshot = Snapshot(
        waiting, running, 0, models, sizes, pinned=pinned, preload=preloads, bases={X: A, Y: A}
    )
    assert plan_turns(snapshot, 2) == expected


def test_an_adapter_without_its_base_costs_both_swaps() -> None:
    waiting = [waits(X), waits(X, 0.11), waits(B)]
    swap_s = {A: 2.0, X: 0.1, B: 0.5}
    snapshot = Snapshot(waiting, [], 0, {}, {A: 1, X: 1, B: 1}, swap_s=swap_s, bases={X: A})
    assert plan_turns(snapshot, 9).load == [B]
    snapshot = replace(snapshot, models={A: ready()})
    assert plan_turns(snapshot, 9).load == [X]


def test_a_base_is_used_by_what_its_adapters_run() -> None:
    models = {A: ready(IN_TURN, last_used_s=1), X: ready(IN_TURN, last_used_s=2), B: ready(last_used_s=9)}
    snapshot = Snapshot([waits(C)], [runs(X)], 0, models, {C: 1}, bases={X: A})
    assert plan_turns(snapshot, 3) == Turns(evict=[B])


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
    memory = dice.randint(2, 6)
    bases: dict[ModelKey, ModelKey] = {}
    if dice.random() < 0.4:
        bases = {model: dice.choice(models[:2]) for model in models[2:] if dice.random() < 0.7}
    pins: dict[ModelKey, float] = {}
    for model in dice.sample(models, min(dice.choice([0, 0, 1, 2, 4]), len(models) - 1)):
        # Room for the largest of the others, and its base, is left, as the scheduler sees to.
        held = {*pins, model, *(bases[pin] for pin in [*pins, model] if pin in bases)}
        if sum(sizes[pin] for pin in held) + (4 if bases else 2) <= memory:
            pins[model] = dice.choice([0.0, 0.0, dice.random() * 5.0])
    preload = [Preload(model, dice.random() < 0.5) for model in dice.sample(models, min(2, len(models)))]
    return SimulatedWorker(
        jobs, swap_s, sizes, memory, max_sequences=32, broken=broken, pins=pins, bases=bases,
        preload=preload if dice.random() < 0.3 else [],
    )  # fmt: skip


def is_broken(worker: SimulatedWorker, model: ModelKey) -> bool:
    return model in worker.broken or worker.bases.get(model) in worker.broken


@pytest.mark.parametrize("block", range(10))
def test_each_live_job_waits_within_the_bound_in_a_thousand_schedules(block: int) -> None:
    for seed in range(block * 100, block * 100 + 100):
        worker = random_worker(seed)
        worker.run()
        for job in worker.jobs:
            assert job.ended_s is not None
            assert job.is_failed == is_broken(worker, job.model)
            missing = [pin for pin in worker.pins if pin not in worker.slots and not is_broken(worker, pin)]
            assert missing == [], "a pinned model never came"
            if job.work_class == "live" and not job.is_failed:
                assert job.first_token_s is not None
                waited_s = job.first_token_s - job.arrives_s
                assert waited_s <= most_wait_s(worker, job, QUANTUM_S), (seed, job)
