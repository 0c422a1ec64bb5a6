"""The worker's plan, as tables."""

from __future__ import annotations

from typing import Any

import pytest

from services.worker.model_turns import QUANTUM_S
from services.worker.pull_policy import PASSED_OVER_S, Plan, may_start, plan
from services.worker.pull_snapshot import ModelSlot, RunningJob, Snapshot, WaitingJob

A, B, C = ("a", 1), ("b", 1), ("c", 1)
GB = 1 << 30


def waiting(job_id: str, model: tuple[str, int] = A, **change: Any) -> WaitingJob:
    values: dict[str, Any] = {"work_class": "live", "sequences": 1, "waited_s": 0.1, **change}
    return WaitingJob(job_id, model, **values)


def running(job_id: str, model: tuple[str, int] = A, sequences: int = 1, attempt: int = 1) -> RunningJob:
    return RunningJob(job_id, model, sequences, attempt)


def ready(last_used_s: float = 0.0, weight_bytes: int = GB) -> ModelSlot:
    return ModelSlot("ready", weight_bytes, last_used_s)


def decide(max_sequences: int = 4, **snapshot: Any) -> Plan:
    values: dict[str, Any] = {
        "waiting": [],
        "running": [],
        "claimed_sequences": 0,
        "models": {A: ready()},
        "sizes": {A: GB, B: GB, C: GB},
        **snapshot,
    }
    return plan(Snapshot(**values), max_sequences=max_sequences, model_memory_bytes=2 * GB)


@pytest.mark.parametrize(
    ("attempt", "beside", "retried_waits", "expected"),
    [
        (1, [], True, True),
        (2, [], False, True),
        (3, [], False, True),
        (1, [1, 1], False, True),
        (1, [1], True, False),
        (1, [2], False, False),
        (2, [2, 2], True, True),
        (2, [1], True, False),
        (3, [3], True, False),
        (3, [2], True, False),
        (1, [3], False, False),
    ],
)
def test_a_retried_job_runs_apart_from_fresh_ones(
    attempt: int, beside: list[int], retried_waits: bool, expected: bool
) -> None:
    assert may_start(attempt, beside, retried_waits) is expected


def test_jobs_are_claimed_until_the_batch_is_full() -> None:
    jobs = [waiting(f"j{i}") for i in range(6)]
    assert decide(waiting=jobs, running=[running("r")], claimed_sequences=1).claim == ["j0", "j1"]


def test_live_goes_before_batch_and_the_longest_wait_first() -> None:
    jobs = [waiting("old", work_class="batch", waited_s=9), waiting("new"), waiting("older", waited_s=2)]
    assert decide(waiting=jobs).claim == ["older", "new", "old"]


def test_the_lane_that_was_served_least_goes_first() -> None:
    jobs = [waiting("x", lane=0, waited_s=5), waiting("y", lane=1)]
    assert decide(waiting=jobs, lane_tokens={0: 1000, 1: 10}).claim == ["y", "x"]


def test_a_job_larger_than_the_batch_runs_when_nothing_else_does() -> None:
    large = waiting("large", sequences=8)
    assert decide(waiting=[large]).claim == ["large"]
    assert decide(waiting=[large], running=[running("r")]).claim == []


@pytest.mark.parametrize(("waited_s", "expected"), [(PASSED_OVER_S - 0.1, ["small"]), (PASSED_OVER_S, [])])
def test_places_are_kept_for_a_large_job_that_was_passed_over_long_enough(
    waited_s: float, expected: list[str]
) -> None:
    held = [waiting("large", sequences=4, waited_s=waited_s), waiting("small", waited_s=0.05)]
    decided = decide(running=[running("r", sequences=3)], waiting=held)
    assert decided.claim == expected


def test_a_job_whose_claim_is_out_is_not_claimed_again() -> None:
    assert decide(waiting=[waiting("j", claimable=False)]).claim == []


def test_a_granted_job_starts_once_its_model_is_ready() -> None:
    job = waiting("j", model=B, attempt=1)
    assert decide(waiting=[job], models={A: ready(), B: ModelSlot("loading", GB, 0)}).start == []
    assert decide(waiting=[job], models={A: ready(), B: ready()}).start == ["j"]


def test_second_attempts_start_together_and_hold_fresh_ones_back() -> None:
    jobs = [waiting("s1", attempt=2), waiting("s2", attempt=2), waiting("f", attempt=1), waiting("held")]
    decided = decide(waiting=jobs)
    assert decided.start == ["s1", "s2"]
    assert decided.claim == []


def test_claimed_jobs_begin_at_once_only_where_a_first_attempt_may_start() -> None:
    assert decide(waiting=[waiting("j")]).begin_at_once
    assert decide(waiting=[waiting("j")], running=[running("r")]).begin_at_once
    assert not decide(waiting=[waiting("j")], running=[running("r", attempt=2)]).begin_at_once
    assert not decide(waiting=[waiting("j"), waiting("s", attempt=2)]).begin_at_once


def test_a_third_attempt_starts_alone() -> None:
    jobs = [waiting("t1", attempt=3), waiting("t2", attempt=3)]
    assert decide(waiting=jobs).start == ["t1"]
    assert decide(waiting=jobs[:1], running=[running("r")]).start == []


def test_jobs_of_a_model_that_goes_are_paused_and_not_claimed() -> None:
    models = {A: ready(), B: ModelSlot("ready", GB, 0.0, QUANTUM_S)}
    held = [waiting("c", model=C), waiting("b", model=B), waiting("a", model=A)]
    decided = decide(waiting=held, running=[running("rb", B), running("ra", A)], models=models)
    assert (decided.evict, decided.pause, decided.claim) == ([B], ["rb"], ["a"])


def test_a_paused_job_goes_on_when_there_is_a_place_and_is_not_claimed_again() -> None:
    paused = waiting("p", attempt=1, is_paused=True)
    assert (decide(waiting=[paused]).start, decide(waiting=[paused]).claim) == (["p"], [])
    assert decide(waiting=[paused], running=[running("r", sequences=4)]).start == []
    assert decide(waiting=[paused], models={}).start == []
    assert decide(waiting=[paused], running=[running("r", attempt=2)]).start == []


def test_a_paused_job_keeps_no_place_while_its_model_is_away() -> None:
    held = [waiting("p", model=B, sequences=4, attempt=1, is_paused=True), waiting("j")]
    assert decide(waiting=held).claim == ["j"]


def batch(job_id: str, ran_s: float, sequences: int = 1) -> RunningJob:
    return RunningJob(job_id, A, sequences, 1, "batch", ran_s)


@pytest.mark.parametrize(
    ("held", "ran", "paused", "claimed"),
    [
        ([waiting("j")], [batch("b1", 5.0), batch("b2", 1.0), running("r", sequences=2)], ["b2"], ["j"]),
        ([waiting("j", sequences=2)], [batch("b1", 5.0, 3), batch("b2", 1.0)], ["b2", "b1"], ["j"]),
        ([waiting("j", sequences=3)], [batch("b1", 5.0), running("r", sequences=3)], [], []),
        ([waiting("j", work_class="batch")], [batch("b1", 5.0, 4)], [], []),
        ([waiting("j")], [batch("b1", 5.0, 3)], [], ["j"]),
        ([waiting("j")], [RunningJob("b", A, 4, 2, "batch")], [], []),
    ],
)
def test_batch_work_yields_its_places_to_live_work_at_once(
    held: list[WaitingJob], ran: list[RunningJob], paused: list[str], claimed: list[str]
) -> None:
    decided = decide(waiting=held, running=ran)
    assert (decided.pause, decided.claim) == (paused, claimed)


@pytest.mark.parametrize(
    ("waited_s", "beside", "paused"),
    [
        (QUANTUM_S, [], ["r4"]),
        (QUANTUM_S - 0.1, [], []),
        (QUANTUM_S, [running("rb", B)], []),
    ],
)
def test_a_full_batch_gives_a_place_to_a_model_that_has_none(
    waited_s: float, beside: list[RunningJob], paused: list[str]
) -> None:
    crowd = [RunningJob(f"r{i}", A, 1, 1, "live", 9.0 - i) for i in range(5 - len(beside))]
    models = {A: ready(), B: ready()}
    decided = decide(
        max_sequences=5,
        waiting=[waiting("j", model=B, waited_s=waited_s)],
        running=crowd + beside,
        models=models,
    )
    assert (decided.pause, decided.claim) == (paused, ["j"] if paused else [])


def test_the_place_that_a_crowd_gives_goes_to_the_job_it_was_made_for() -> None:
    crowd = [RunningJob(f"r{i}", A, 1, 1, "live", 9.0 - i) for i in range(4)]
    held = [waiting("a", model=A, waited_s=30.0), waiting("b", model=B, waited_s=QUANTUM_S, lane=1)]
    decided = decide(
        max_sequences=4, waiting=held, running=crowd, models={A: ready(), B: ready()}, lane_tokens={1: 999}
    )
    assert (decided.pause, decided.claim) == (["r3"], ["b"])


@pytest.mark.parametrize(
    ("sequences", "paused", "claimed"),
    [(2, ["r3", "r2"], ["j"]), (3, ["r3", "r2", "r1"], ["j"]), (4, [], [])],
)
def test_a_crowd_gives_as_many_places_as_are_needed_keeps_one_and_gives_none_for_nothing(
    sequences: int, paused: list[str], claimed: list[str]
) -> None:
    crowd = [RunningJob(f"r{i}", A, 1, 1, "live", 9.0 - i) for i in range(4)]
    decided = decide(
        max_sequences=4,
        waiting=[waiting("j", model=B, waited_s=QUANTUM_S, sequences=sequences)],
        running=crowd,
        models={A: ready(), B: ready()},
    )
    assert (decided.pause, decided.claim) == (paused, claimed)
