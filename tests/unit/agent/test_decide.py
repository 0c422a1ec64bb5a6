"""What commands mean, given what the agent knows: one row per rule."""

from __future__ import annotations

from typing import Any

import pytest

from services.worker.agent.decide import (
    EXITS_KEPT_MS,
    Ignore,
    KnownProcess,
    Refuse,
    Spawn,
    Terminate,
    exit_words,
    forgettable,
    on_start,
    on_stop,
    terminate,
)
from services.worker.agent.devices import Device
from shared.messages import StartWorker, StopWorker, WorkerSpec

NOW_MS = 1_000_000
CPU = [Device("cpu:0", "cpu"), Device("cpu:1", "cpu")]


def make_start(**changes: Any) -> StartWorker:
    spec = {
        "worker_id": "wrk_1",
        "resource_id": "res_1",
        "place": 0,
        "incarnation": "inc_1",
        "pool": False,
        "model_type": "tiny",
        "precision": "bf16",
        "device_kind": "cpu",
        "max_batch": 1,
        "max_context_tokens": 16,
        "kv_tokens": 16,
    } | {name: value for name, value in changes.items() if name in ("device_kind", "place", "incarnation")}
    return StartWorker(
        node_id=changes.get("node_id", "n1"),
        epoch=changes.get("epoch", 5),
        deadline_unix_ms=changes.get("deadline_unix_ms", NOW_MS + 1),
        spec=WorkerSpec(**spec),  # type: ignore[arg-type]
    )


def make_process(incarnation: str = "inc_1", **changes: Any) -> KnownProcess:
    fields: dict[str, Any] = {
        "resource_id": "res_1",
        "place": 0,
        "device": "cpu:0",
        "state": "running",
        "pid": 7,
        "start_ticks": 9,
    }
    return KnownProcess(incarnation=incarnation, **(fields | changes))


EXITED = make_process(state="exited")
OTHER_SEAT = make_process("inc_2", place=1)


@pytest.mark.parametrize(
    ("command", "known", "expected"),
    [
        (make_start(node_id="n2"), [], Ignore("for node n2")),
        (make_start(epoch=4), [], Ignore("epoch 4 is older than 5")),
        (make_start(), [make_process()], Ignore("already known")),
        (make_start(), [make_process(state="intended")], Ignore("already known")),
        (make_start(), [EXITED], Ignore("already known")),
        (make_start(deadline_unix_ms=NOW_MS - 1), [], Ignore("late")),
        (make_start(), [make_process("inc_9")], Refuse("never started: inc_9 still runs for place 0")),
        (make_start(), [make_process("inc_9", state="exited")], Spawn(CPU[0])),
        (make_start(), [OTHER_SEAT], Spawn(CPU[1])),
        (
            make_start(),
            [OTHER_SEAT, make_process("inc_3", place=2, device="cpu:1")],
            Refuse("never started: no free cpu device"),
        ),
        (make_start(device_kind="cuda"), [], Refuse("never started: no free cuda device")),
        (make_start(), [], Spawn(CPU[0])),
        (make_start(epoch=6), [], Spawn(CPU[0])),
    ],
)
def test_a_start(command: StartWorker, known: list[KnownProcess], expected: object) -> None:
    decision = on_start(
        command,
        node_id="n1",
        highest_epoch=5,
        known={p.incarnation: p for p in known},
        devices=CPU,
        stopping=False,
        now_unix_ms=NOW_MS,
    )
    assert decision == expected


def test_an_agent_that_stops_starts_nothing_and_leaves_the_incarnation_startable() -> None:
    decision = on_start(
        make_start(), node_id="n1", highest_epoch=5, known={}, devices=CPU, stopping=True, now_unix_ms=NOW_MS
    )
    assert decision == Ignore("the agent is stopping")


@pytest.mark.parametrize(
    ("changes", "known", "expected"),
    [
        ({"node_id": "n2"}, [], Ignore("for node n2")),
        ({"epoch": 4}, [make_process()], Ignore("epoch 4 is older than 5")),
        ({}, [], Refuse("never started: stopped before its start arrived")),
        ({}, [EXITED], Ignore("has exited")),
        ({}, [make_process()], Terminate(signal_now=True, kill_unix_ms=NOW_MS + 2000)),
        ({}, [make_process(told_to_stop=True)], Terminate(signal_now=False, kill_unix_ms=NOW_MS + 2000)),
        (
            {},
            [make_process(told_to_stop=True, kill_unix_ms=NOW_MS + 500)],
            Terminate(signal_now=False, kill_unix_ms=NOW_MS + 500),
        ),
    ],
)
def test_a_stop(changes: dict[str, Any], known: list[KnownProcess], expected: object) -> None:
    fields: dict[str, Any] = {"node_id": "n1", "epoch": 5, "incarnation": "inc_1", "grace_s": 2.0}
    decision = on_stop(
        StopWorker(**(fields | changes)),
        node_id="n1",
        highest_epoch=5,
        known={p.incarnation: p for p in known},
        now_unix_ms=NOW_MS,
    )
    assert decision == expected


def test_a_later_deadline_does_not_lengthen_an_earlier_one() -> None:
    process = make_process(kill_unix_ms=NOW_MS + 100)
    assert terminate(process, 60_000, NOW_MS).kill_unix_ms == NOW_MS + 100
    assert terminate(process, 10, NOW_MS).kill_unix_ms == NOW_MS + 10


def test_only_old_exits_are_forgotten() -> None:
    old = make_process("old", state="exited", ended_unix_ms=NOW_MS - EXITS_KEPT_MS - 1)
    recent = make_process("recent", state="exited", ended_unix_ms=NOW_MS - EXITS_KEPT_MS)
    running = make_process("running", ended_unix_ms=0)
    assert forgettable([old, recent, running], NOW_MS) == ["old"]


@pytest.mark.parametrize(
    ("code", "killed", "words"),
    [
        (0, False, "exited"),
        (3, False, "exited with status 3"),
        (-9, False, "killed by signal 9"),
        (-9, True, "killed: it did not leave in the time it had"),
        (None, False, "exited; the status went to another parent"),
    ],
)
def test_an_end_is_told_in_words(code: int | None, killed: bool, words: str) -> None:
    assert exit_words(code, killed_after_grace=killed) == words
