"""A load beside models that compute takes a tenth of a processor, by the time that it computes itself."""

from __future__ import annotations

import time

from services.worker.engine.loading import Pace


def seconds_of_wait(pace: Pace) -> float:
    started_s = time.monotonic()
    pace.wait(0)
    return time.monotonic() - started_s


def compute(seconds: float) -> None:
    end_s = time.thread_time() + seconds
    while time.thread_time() < end_s:
        pass


def test_who_computed_waits_nine_times_as_long() -> None:
    pace = Pace(lambda: True)
    compute(0.02)
    assert seconds_of_wait(pace) >= 0.18
    compute(0.01)
    assert seconds_of_wait(pace) >= 0.09


def test_what_was_waited_for_is_not_counted() -> None:
    pace = Pace(lambda: True)
    time.sleep(0.5)
    assert seconds_of_wait(pace) < 1.0  # by the wall it would be 4.5 s


def test_nobody_waits_where_nothing_computes() -> None:
    pace = Pace(lambda: False)
    compute(0.05)
    assert seconds_of_wait(pace) < 0.3
