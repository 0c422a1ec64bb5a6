"""Reports in memory: when they were sent by our clock, and what wakes the reconciler."""

from __future__ import annotations

import pytest

from services.scheduler.fleet import (
    FORGET_NODE_S,
    FORGET_WORKER_S,
    LONGEST_BREAK_S,
    Fleet,
    ReportDelays,
    Watch,
)
from shared.messages import NodeReport, WorkerPhase, WorkerReport


def make_report(phase: WorkerPhase = "ready", sent_unix_s: float = 100.0) -> WorkerReport:
    return WorkerReport(
        worker_id="w",
        resource_id="r",
        place=0,
        incarnation="i",
        phase=phase,
        sent_unix_ms=int(sent_unix_s * 1000),
    )


@pytest.mark.parametrize("skew_s", [-3600.0, 0.0, 3600.0])
def test_a_report_that_waited_counts_from_when_it_was_sent_whatever_the_senders_clock_says(
    skew_s: float,
) -> None:
    delays = ReportDelays()
    assert delays.delay_s("w", 100 + skew_s, 100.2) == 0  # the least seen is taken as none
    assert delays.delay_s("w", 101 + skew_s, 101.2) == pytest.approx(0)
    # Never more than it was; a tenth of the silence may be taken for a change of the clock.
    assert 6.1 < delays.delay_s("w", 102 + skew_s, 109.2) <= 7.0


def test_a_clock_that_was_set_back_is_believed_again_after_a_while() -> None:
    delays = ReportDelays()
    delays.delay_s("w", 1000, 1000)
    first = delays.delay_s("w", 991, 1001)
    for second in range(2, 130):
        last = delays.delay_s("w", 990 + second, 1000 + second)
    assert first > 9 and last < 0.2


def test_only_news_wake_the_reconciler() -> None:
    fleet = Fleet()
    fleet.hear(make_report("loading"), now_unix_s=100, now_s=5)
    assert fleet.changed.is_set()
    fleet.changed.clear()
    fleet.hear(make_report("loading", 101), now_unix_s=101, now_s=6)
    assert not fleet.changed.is_set()
    assert fleet.workers["i"].heard_at == 6
    fleet.hear(make_report("ready", 101.1), now_unix_s=101.1, now_s=6.1)
    assert fleet.changed.is_set()


def test_the_silent_are_forgotten_in_the_end() -> None:
    fleet = Fleet()
    fleet.hear(make_report(), now_unix_s=100, now_s=5)
    fleet.forget_old(5 + FORGET_WORKER_S)
    assert "i" in fleet.workers
    fleet.forget_old(5.1 + FORGET_WORKER_S)
    assert fleet.workers == {}


def test_an_agent_that_was_started_again_leaves_nothing_of_the_one_before() -> None:
    fleet = Fleet()
    for number in range(5):
        report = NodeReport(
            node_id="n", agent_id=f"agent_{number}", sent_unix_ms=100_000, devices=[], processes=[]
        )
        fleet.hear(report, now_unix_s=100 + number, now_s=5 + number)
    assert len(fleet.nodes) == 1
    assert len(fleet._delays) == 1
    fleet.forget_old(10 + FORGET_NODE_S)
    assert (fleet.nodes, len(fleet._delays)) == ({}, 0)


def test_a_break_of_its_own_begins_the_watch_anew() -> None:
    watch = Watch()
    assert watch.look(is_connected=True, now_s=10) == 10
    assert watch.look(is_connected=True, now_s=10 + LONGEST_BREAK_S) == 10
    assert watch.look(is_connected=False, now_s=14) is None
    assert watch.look(is_connected=True, now_s=15) == 15
    # Frozen, or not the leader for a while.
    assert watch.look(is_connected=True, now_s=15.1 + LONGEST_BREAK_S) == 15.1 + LONGEST_BREAK_S
