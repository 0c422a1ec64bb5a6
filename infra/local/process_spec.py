"""What the supervisor is told about a process, and the pure decisions about starting, restarting and stopping it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from infra.local.probes import Probe

FIRST_RESTART_DELAY_S = 0.5
LONGEST_RESTART_DELAY_S = 15.0
# Ready for this long, a process counts as healthy again, and its next death is the first one.
HEALTHY_AFTER_S = 30.0


class ProcessState(StrEnum):
    """waiting → preparing → starting → ready → (died) backing-off → preparing ...; one-shots end in done.

    Asked to stop, any of them → stopping → stopped.
    """

    WAITING = "waiting"
    PREPARING = "preparing"
    STARTING = "starting"
    READY = "ready"
    UNREADY = "unready"  # was ready, runs, and its probe says no: shown, not acted upon
    BACKING_OFF = "backing-off"
    DONE = "done"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process.

    env: its whole environment (the supervisor only adds the marker by which leftovers are found).
    depends_on: names that must be ready (one-shots: done) whenever it starts. They are stopped after it; their death
    alone does not touch it.
    stop_after: further names that must have ended before it is stopped.
    prepare: blocking; runs on a thread before each start; must be idempotent; SetupFailed is shown to the user.
    one_shot: runs to its end once; its success makes it "done".
    stop_deadline_s: after it, SIGKILL for its whole process group.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    depends_on: tuple[str, ...] = ()
    stop_after: tuple[str, ...] = ()
    prepare: Callable[[], None] | None = None
    ready: Probe | None = None
    ready_timeout_s: float = 60.0
    one_shot: bool = False
    stop_signal: signal.Signals = signal.SIGTERM
    stop_deadline_s: float = 10.0


def restart_delay_s(failures_in_a_row: int) -> float:
    """How long to wait before the next start, doubling from half a second. failures_in_a_row: 1 or more."""
    return float(min(FIRST_RESTART_DELAY_S * 2 ** min(failures_in_a_row - 1, 16), LONGEST_RESTART_DELAY_S))


def failures_after_exit(failures_in_a_row: int, was_ready_s: float) -> int:
    """The count that the next back-off is made from. was_ready_s: how long it had been ready; 0 if it never was."""
    return 1 if was_ready_s >= HEALTHY_AFTER_S else failures_in_a_row + 1


def stop_order(specs: Sequence[ProcessSpec]) -> list[list[str]]:
    """Groups of names; each group is stopped at once, after all earlier groups have ended. Pure.

    1. A process is stopped after everything that depends on it,
    2. and after everything in its `stop_after`.
    Raises ValueError when that is impossible (a cycle), or a name is unknown or used twice.
    """
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise ValueError(f"a process name is used twice: {sorted(names)}")
    must_end_first: dict[str, set[str]] = {name: set() for name in names}
    for spec in specs:
        for other in (*spec.depends_on, *spec.stop_after):
            if other not in must_end_first:
                raise ValueError(f"{spec.name} names an unknown process {other!r}")
        for dependency in spec.depends_on:
            must_end_first[dependency].add(spec.name)
        must_end_first[spec.name].update(spec.stop_after)
    order: list[list[str]] = []
    ended: set[str] = set()
    while len(ended) < len(names):
        group = [name for name in names if name not in ended and must_end_first[name] <= ended]
        if not group:
            raise ValueError(f"processes wait for each other: {sorted(set(names) - ended)}")
        order.append(group)
        ended.update(group)
    return order


def exit_words(return_code: int) -> str:
    """An exit status in words: negative codes are signals, as in `subprocess`."""
    if return_code >= 0:
        return f"exit status {return_code}"
    try:
        return f"killed by {signal.Signals(-return_code).name}"
    except ValueError:
        return f"killed by signal {-return_code}"
