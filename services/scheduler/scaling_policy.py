"""Pure: how many workers a resource wants, from a snapshot of its load and the time. No I/O, no clock of its own.

Work is counted in completion tokens' worth. `wanted_count` follows these rules; the first of 1 and 2 that fits ends
the matter, the rest work together.
1. Blind (the broker does not answer, or the workers' reports are stale): hold what was wanted, and say so.
2. Throughput never measured: one worker if there is any work, else hold.
3. Steady need: arriving work, at the utilisation aimed at; or what usually runs, in full batches, where that is more (long
   streams, of which none arrived lately). Both are means of a minute: that a crowd fills all workers for a moment says
   nothing about how many are needed. The utilisation, in crowds (5) too, is lower where requests may wait for less than
   `LONG_WAIT_S`: what comes while a worker starts, and what chance sends at once, then has to fit into those that are there.
4. Waiting work that the workers there (and those on their way) will not have done by the time that a new one could be
   ready and have its model: so much more that it is drained in `drain_target_s` from then on, or in `drain_starts` of a
   start where that is longer (how much comes until then is known the less the longer it is). What they will have done by
   then wants nobody, for a new worker would come too late for it. Swap before scale: a worker that is there waits for
   a model as a new one would, but not for its own start, so what merely waits for a swap starts nobody.
   Both are counted in workers, so one step goes to what is needed, also from zero.
5. Crowds: a worker that is started for a crowd comes too late for one that is shorter than a start, but not for the next.
   So many are wanted as the crowds of late would have been worth (`crowds.py`): each of them would have spared
   `crowd_share` of an hour's requests a wait beyond the target. The next crowd may be larger, so what that takes above
   what usually comes is multiplied by `crowd_room`. After the idle time-out of nothing to do no crowd counts.
6. Any live job that runs or waits wants one worker; so does any line of a batch. More lines want no more, however many
   run: they fill what live requests leave. A batch whose deadline needs more has a resource for itself.
7. Down slowly: wanted is the highest need of the last `down_window_s`; of one start time where that is longer (an idle
   worker is kept for as long as starting it again would cost).
8. The last worker is kept until nothing was done for the idle time-out; then, with a minimum of 0, none is wanted.
9. Bounds hold whatever the rules say, also while blind: a lowered maximum is obeyed at once.
"""

from __future__ import annotations

import math

import msgspec
from msgspec import Struct

from services.scheduler.crowds import SeenCrowds, Terms, worth_of

REPORTS_STALE_S = 10.0
SHORT_WAIT_S, LONG_WAIT_S = 1.0, 8.0


class Tuning(Struct, frozen=True, kw_only=True):
    """What `loadtest.scaling` found; see its README for the curves."""

    utilisation: float = 0.97
    """A higher one lets queues grow; that they do not grow too long is for crowds (5) to see."""
    short_wait_utilisation: float = 0.7
    """Where requests may wait for `SHORT_WAIT_S` only; between that and `LONG_WAIT_S` it grows evenly."""
    drain_target_s: float = 30.0
    drain_starts: float = 0.5
    down_window_s: float = 100.0
    crowd_share: float = 0.015
    """What one worker more has to be worth: a share of an hour's requests."""
    crowd_room: float = 1.5
    crowd_windows: float = 3.0
    """Requests that crowds made late are forgotten with a time constant of so many `down_window_s`."""


TUNING = Tuning()


class Need(Struct, frozen=True):
    """What was needed at a time; the policy is given its own earlier needs."""

    at: float
    count: int


class Load(Struct, frozen=True, kw_only=True):
    """What was measured of a resource."""

    ready_messages: int | None = None
    """Live jobs in the queues; None when the broker did not answer."""
    batch_messages: int = 0
    """Lines of batches in the queue and at workers."""
    waiting_jobs: int = 0
    """Live jobs that workers hold and that do not run."""
    running_sequences: int = 0
    """Of live jobs."""
    usually_running: float = 0.0
    """Of live jobs, a running mean."""
    remaining_tokens: int = 0
    """What the running jobs may still generate at most, as their workers report it."""
    reports_age_s: float = 0.0
    """Of the oldest of the ready workers' latest reports; 0 without a ready worker."""
    job_tokens: float = 0.0
    """Running mean."""
    arriving_tokens_per_s: float = 0.0
    worker_tokens_per_s: float | None = None
    """Of one worker with a full batch; None until measured."""
    crowds: SeenCrowds | None = None
    """Who would have waited for longer than the resource's target, with how many workers. None when nobody came."""
    swap_s: float = 0.0
    """What a job waits for its model, on average."""


class Supply(Struct, frozen=True, kw_only=True):
    """What there is, and how long more would take."""

    ready_workers: int
    starting_ages_s: list[float]
    max_batch: int
    start_s: float


class ScalingMemory(Struct, frozen=True, kw_only=True):
    """What the policy hands on from one look to the next."""

    wanted: int
    busy_at: float
    """When there was work last."""
    needs: list[Need] = []


class ScalingDecision(Struct, frozen=True, kw_only=True):
    wanted: int
    why: str
    need: int | None
    """None when it could not be told."""
    drain_s: float | None
    """Seconds to drain what waits and runs, with the workers that are ready; after a start where there is none."""
    memory: ScalingMemory


def decide_count(
    load: Load,
    supply: Supply,
    bounds: tuple[int, int],
    idle_timeout_s: float,
    memory: ScalingMemory,
    now: float,
    tuning: Tuning = TUNING,
    *,
    target_wait_s: float = LONG_WAIT_S,
) -> ScalingDecision:
    """Decide; the same values always give the same decision. bounds: (least, most)."""
    if load.ready_messages is None:
        return _hold(bounds, memory, "the broker does not tell how much waits")
    if supply.ready_workers and load.reports_age_s > REPORTS_STALE_S:
        return _hold(bounds, memory, f"the workers' latest report is {load.reports_age_s:.0f} s old")
    has_work = bool(load.ready_messages or load.batch_messages or load.waiting_jobs or load.running_sequences)
    busy_at = now if has_work else memory.busy_at
    if not load.worker_tokens_per_s:
        count = max(memory.wanted, 1 if has_work else 0)
        kept = msgspec.structs.replace(memory, wanted=count, busy_at=busy_at)
        why = "work waits, and no worker's throughput is known" if has_work else "nothing was measured yet"
        count, why = _idle(count, why, idle_timeout_s, kept, now)
        return _bounded(bounds, count, why, None, None, kept)
    utilisation = utilisation_for(target_wait_s, tuning)
    drain_s = max(tuning.drain_target_s, supply.start_s * tuning.drain_starts)
    steady, more = _need(load, supply, load.ready_messages, load.worker_tokens_per_s, utilisation, drain_s)
    why = _why(load, supply, steady, more)
    need = max(_whole(steady + more), 1 if has_work else 0)
    if load.crowds is not None and now - busy_at < idle_timeout_s:
        crowd, words = _for_crowds(load, load.crowds, load.worker_tokens_per_s * utilisation, tuning)
        if crowd > need:
            need, why = crowd, f"{why}; {words}"
    needs = _remember(memory.needs, Need(now, need), now - max(tuning.down_window_s, supply.start_s))
    count = needs[0].count
    if count > need:
        why += f"; {count} were needed {now - needs[0].at:.0f} s ago"
    kept = ScalingMemory(wanted=memory.wanted, busy_at=busy_at, needs=needs)
    count, why = _idle(count, why, idle_timeout_s, kept, now)
    return _bounded(bounds, count, why, need, _drain_s(load, supply), kept)


def _for_crowds(load: Load, seen: SeenCrowds, done_tokens_per_s: float, tuning: Tuning) -> tuple[int, str]:
    """Return (workers, why). done_tokens_per_s: what is asked of a worker."""
    worth = worth_of(seen, tuning.crowd_share)
    if worth.workers <= 1:
        return 0, ""
    comes = max(load.arriving_tokens_per_s, seen.usual_per_s * load.job_tokens) / done_tokens_per_s
    count = max(_whole(comes + (worth.workers - comes) * tuning.crowd_room), worth.workers)
    words = (
        f"{count} for crowds, as the next may be larger: with {worth.workers - 1} the last ones would have kept {worth.late_with_one_less:.0f}"
        f" of {seen.requests:.0f} requests waiting for too long"
    )
    return count, words


def crowd_terms(target_wait_s: float, tuning: Tuning) -> Terms:
    return Terms(
        wait_s=target_wait_s,
        utilisation=utilisation_for(target_wait_s, tuning),
        least_share=tuning.crowd_share,
        forget_s=tuning.down_window_s * tuning.crowd_windows,
    )


def utilisation_for(target_wait_s: float, tuning: Tuning) -> float:
    share = (target_wait_s - SHORT_WAIT_S) / (LONG_WAIT_S - SHORT_WAIT_S)
    room = tuning.utilisation - tuning.short_wait_utilisation
    return tuning.short_wait_utilisation + room * min(max(share, 0.0), 1.0)


def _need(
    load: Load,
    supply: Supply,
    ready_messages: int,
    worker_tokens_per_s: float,
    utilisation: float,
    drain_s: float,
) -> tuple[float, float]:
    """Return (workers for what comes, workers for what waits)."""
    arriving, start_s = load.arriving_tokens_per_s, supply.start_s
    waiting = (ready_messages + load.waiting_jobs) * load.job_tokens
    steady = arriving / worker_tokens_per_s / utilisation
    steady = max(steady, load.usually_running / supply.max_batch)
    # By when a new one is ready and has its model, those there have had as long without the swap that they wait for, too.
    served_s = supply.ready_workers * start_s + sum(min(age, start_s) for age in supply.starting_ages_s)
    left = max(waiting + arriving * start_s - served_s * worker_tokens_per_s, 0.0) if waiting else 0.0
    return steady, left / worker_tokens_per_s / drain_s


def _why(load: Load, supply: Supply, steady: float, more: float) -> str:
    why = (
        f"{load.arriving_tokens_per_s:.0f} tokens/s arrive, a worker does {load.worker_tokens_per_s:.0f}:"
        f" {steady:.1f} workers"
    )
    if more:
        why += f", and {more:.1f} for what will still wait in {supply.start_s + load.swap_s:.0f} s"
    return why


def _whole(workers: float) -> int:
    return math.ceil(round(workers, 6))  # so that a sum such as 0.1 + 0.2 does not cost a worker


def _remember(needs: list[Need], need: Need, since: float) -> list[Need]:
    """The needs that can still be the highest of the window, highest first; so few are kept."""
    return [*(earlier for earlier in needs if earlier.at > since and earlier.count > need.count), need]


def _idle(count: int, why: str, idle_timeout_s: float, memory: ScalingMemory, now: float) -> tuple[int, str]:
    """Whether the last worker goes: whatever else says none, or says one for a need that is over."""
    idle_s = now - memory.busy_at
    if idle_s >= idle_timeout_s:
        return (0, f"nothing to do for {idle_s:.0f} s") if count <= 1 else (count, why)
    if count == 0 and memory.wanted > 0:
        return 1, f"nothing to do for {idle_s:.0f} s; the last worker is kept for {idle_timeout_s:.0f} s"
    return count, why


def _drain_s(load: Load, supply: Supply) -> float:
    waiting = (load.ready_messages or 0) + load.waiting_jobs
    if not waiting + load.running_sequences or not load.worker_tokens_per_s:
        return 0.0
    # What jobs may generate at most is no forecast: most stop long before.
    tokens = waiting * load.job_tokens
    tokens += min(load.remaining_tokens, load.running_sequences * load.job_tokens)
    start_s = 0.0 if supply.ready_workers else supply.start_s
    start_s += load.swap_s if waiting else 0.0
    return start_s + tokens / load.worker_tokens_per_s / max(supply.ready_workers, 1)


def _hold(bounds: tuple[int, int], memory: ScalingMemory, reason: str) -> ScalingDecision:
    words = f"held, for it cannot be seen what is needed: {reason}"
    return _bounded(bounds, memory.wanted, words, None, None, memory)


def _bounded(
    bounds: tuple[int, int],
    count: int,
    why: str,
    need: int | None,
    drain_s: float | None,
    memory: ScalingMemory,
) -> ScalingDecision:
    least, most = bounds
    wanted = min(max(count, least), most)
    if wanted > count:
        why += f"; raised to the minimum of {least}"
    elif wanted < count:
        why += f"; cut to the maximum of {most}"
    kept = msgspec.structs.replace(memory, wanted=wanted)
    return ScalingDecision(wanted=wanted, why=why, need=need, drain_s=drain_s, memory=kept)
