"""What a worker counts of its time."""

from __future__ import annotations

from services.worker.work_counters import WorkCounters


def test_time_is_counted_for_each_sequence_and_once_for_the_worker() -> None:
    counters = WorkCounters()
    for sequences, at_s in ((0, 10.0), (2, 12.0), (3, 15.0), (0, 16.0), (1, 20.0), (0, 20.5)):
        counters.run(sequences, at_s)
    # Two for three seconds, three for one, one for half of one; nothing from 16 to 20.
    assert (counters.stream_s, counters.busy_s) == (9.5, 4.5)
