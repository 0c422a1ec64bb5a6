"""Pure: how many workers a resource wants, from a snapshot of its load and the time. No I/O, no clock of its own.

`wanted_count` follows these rules; the first of 1 and 2 that fits ends the matter, 3 to 8 work together.
1. Blind (the broker does not answer, or the workers' reports are stale): hold what was wanted, and say so.
2. Throughput never measured: one worker if anything waits, else hold.
3. Need = arriving work per second, at the utilisation aimed at, plus the work in hand spread over the time in which
   it shall be drained. Both are counted in workers, so one step goes to what is needed, also from zero.
4. Batch work counts only when its deadline is near: twice the time that one worker and its start would take.
5. Swap time lengthens the seconds to drain that are told, but is no need: a model that waits for a swap gets no
   worker of its own, only its tokens count.
6. Down slowly: wanted is the highest need of the last `down_window_s`, or of one start time where that is longer (an
   idle worker is kept for as long as starting it again would cost).
7. The last worker is kept until nothing was done for `idle_timeout_s`; then, with a minimum of 0, none is wanted.
8. Bounds hold whatever the rules say. Where scaling up is blocked, the count does not rise, not even to the minimum.
Bounds hold while blind, too: a lowered maximum is obeyed at once.
"""

from __future__ import annotations

import math

import msgspec

PROMPT_TOKEN_WEIGHT = 0.1
"""What a prompt token costs beside a completion token, until it has been measured."""

REPORTS_STALE_S = 10.0
UTILISATION = 0.8
BATCH_URGENCY = 2.0


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """The settings in force now: windows and quotas have been applied."""

    min_count: int
    max_count: int
    idle_timeout_s: float
    drain_target_s: float = 10.0
    down_window_s: float = 180.0


class Need(msgspec.Struct, frozen=True):
    """What was needed at a time; the policy is given its own earlier needs."""

    at_s: float
    count: int


class BatchWork(msgspec.Struct, frozen=True, kw_only=True):
    """Batch jobs that wait, in completion tokens' worth of work, and the earliest deadline among them."""

    tokens: float
    deadline_at_s: float


class LoadSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a resource. Tokens are completion tokens' worth: see `weighted_tokens`."""

    bounds: Bounds
    wanted_now: int
    ready_workers: int
    ready_messages: int | None
    """Live jobs in the queue; None when the broker did not answer."""
    oldest_report_age_s: float
    """Of the ready workers' latest reports; 0 when there is no ready worker."""
    mean_job_tokens: float
    remaining_tokens: float
    """Of the jobs that run now, as the workers report them."""
    arriving_tokens_per_s: float
    throughput_tokens_per_s: float | None
    """Of one busy worker; None until measured."""
    start_s: float
    swap_s: float = 0.0
    """The longest swap that a waiting model needs; 0 when each waiting model is hot."""
    last_busy_at_s: float
    batch: BatchWork | None = None
    scale_up_blocked: str | None = None
    """The reason in words, or None."""
    recent_needs: tuple[Need, ...] = ()


class ScalingDecision(msgspec.Struct, frozen=True, kw_only=True):
    wanted: int
    need: int | None
    """None when it could not be told."""
    drain_s: float | None
    """With the workers that are ready; after a start where there is none."""
    words: str
    recent_needs: tuple[Need, ...]


def weighted_tokens(
    prompt_tokens: float, completion_tokens: float, prompt_weight: float = PROMPT_TOKEN_WEIGHT
) -> float:
    """Work of a job, in completion tokens' worth."""
    return prompt_tokens * prompt_weight + completion_tokens


def wanted_count(snapshot: LoadSnapshot, now_s: float) -> ScalingDecision:
    """Decide; the same snapshot and time always give the same decision."""
    if snapshot.ready_messages is None:
        return _hold(snapshot, "the broker does not answer")
    if snapshot.ready_workers and snapshot.oldest_report_age_s > REPORTS_STALE_S:
        return _hold(snapshot, f"the latest report is {snapshot.oldest_report_age_s:.0f} s old")
    if not snapshot.throughput_tokens_per_s:
        count = max(snapshot.wanted_now, 1 if snapshot.ready_messages else 0)
        return _bounded(snapshot, count, None, None, "throughput is not measured yet", snapshot.recent_needs)
    work_s = _work_s(snapshot, snapshot.ready_messages, snapshot.throughput_tokens_per_s)
    need = _need(snapshot, work_s, snapshot.throughput_tokens_per_s, now_s)
    recent = _remember(snapshot, Need(now_s, need), now_s)
    count, why = recent[0].count, f"{need} needed"
    if count > need:
        why += f", {count} within the window before"
    if count == 0 and snapshot.wanted_now > 0:
        idle_s = now_s - snapshot.last_busy_at_s
        if idle_s < snapshot.bounds.idle_timeout_s:
            count, why = 1, f"idle for {idle_s:.0f} s of {snapshot.bounds.idle_timeout_s:.0f} s"
        else:
            why = f"idle for {idle_s:.0f} s"
    return _bounded(snapshot, count, need, _drain_s(snapshot, work_s), why, recent)


def _work_s(snapshot: LoadSnapshot, ready_messages: int, throughput_tokens_per_s: float) -> float:
    """Seconds that one worker would need for all live work in hand."""
    tokens = ready_messages * snapshot.mean_job_tokens + snapshot.remaining_tokens
    return tokens / throughput_tokens_per_s


def _need(snapshot: LoadSnapshot, work_s: float, throughput_tokens_per_s: float, now_s: float) -> int:
    load = snapshot.arriving_tokens_per_s / throughput_tokens_per_s / UTILISATION
    load += work_s / snapshot.bounds.drain_target_s
    if snapshot.batch is not None:
        batch_s = snapshot.batch.tokens / throughput_tokens_per_s
        left_s = snapshot.batch.deadline_at_s - now_s
        if left_s <= BATCH_URGENCY * (batch_s + snapshot.start_s):
            load += batch_s / max(left_s - snapshot.start_s, snapshot.bounds.drain_target_s)
    if snapshot.ready_messages and load <= 0:
        return 1  # a waiting job whose size is not known
    return math.ceil(round(load, 9))  # so that a sum such as 0.1 + 0.2 does not cost a worker


def _remember(snapshot: LoadSnapshot, need: Need, now_s: float) -> tuple[Need, ...]:
    """The needs that can still be the highest of the window, highest first; so few are kept."""
    since_s = now_s - max(snapshot.bounds.down_window_s, snapshot.start_s)
    kept = [
        earlier for earlier in snapshot.recent_needs if earlier.at_s > since_s and earlier.count > need.count
    ]
    return (*kept, need)


def _drain_s(snapshot: LoadSnapshot, work_s: float) -> float:
    if work_s == 0:
        return 0.0
    start_s = 0.0 if snapshot.ready_workers else snapshot.start_s
    return start_s + snapshot.swap_s + work_s / max(snapshot.ready_workers, 1)


def _hold(snapshot: LoadSnapshot, reason: str) -> ScalingDecision:
    words = f"held, for it cannot be seen what is needed: {reason}"
    return _bounded(snapshot, snapshot.wanted_now, None, None, words, snapshot.recent_needs)


def _bounded(
    snapshot: LoadSnapshot,
    count: int,
    need: int | None,
    drain_s: float | None,
    why: str,
    recent_needs: tuple[Need, ...],
) -> ScalingDecision:
    bounds = snapshot.bounds
    wanted = min(max(count, bounds.min_count), bounds.max_count)
    if wanted > count:
        why += f", raised to the minimum of {bounds.min_count}"
    elif wanted < count:
        why += f", cut to the maximum of {bounds.max_count}"
    if snapshot.scale_up_blocked is not None and wanted > snapshot.wanted_now:
        wanted = snapshot.wanted_now
        why += f", not scaled up: {snapshot.scale_up_blocked}"
    return ScalingDecision(wanted=wanted, need=need, drain_s=drain_s, words=why, recent_needs=recent_needs)
