"""Pure: how many GPUs a batch needs for its deadline, how long it takes on them, and what they and its tokens cost.

Work is counted in completion tokens' worth, as the scheduler counts it. Amounts are integers in nano-USD.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PROMPT_TOKEN_WEIGHT = 0.1
"""What a prompt token takes beside a completion token, as in the scheduler's load: where the same kind of lines was
measured before, it hardly matters."""
SPARE_SHARE = 0.1
"""Of the time until the deadline that is left free: answers are longer than they were, a worker is lost."""
RELEASE_S = 5.0
"""GPUs are live for so long after the last line: the end is seen, and they drain."""
UNKNOWN_START_S = 60.0
"""Of a worker of which no start is known."""
HOUR_S, MINUTE_S = 3600, 60


@dataclass(frozen=True, slots=True)
class Work:
    """What a batch's lines come to."""

    lines: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def tokens(self) -> float:
        return self.completion_tokens + self.prompt_tokens * PROMPT_TOKEN_WEIGHT


@dataclass(frozen=True, slots=True)
class Size:
    """run_s: from the GPUs being live to the last line's end; None if nobody has measured what a GPU does."""

    gpus: int
    run_s: float | None
    in_time: bool | None
    """None: not known."""


def size(work: Work, gpu_tokens_per_s: float | None, start_s: float, left_s: float, most: int) -> Size:
    """Choose the number of GPUs. Pure.

    left_s: until the deadline. most: GPUs that may be used, 1 at least.

    1. What a GPU does was never measured -> one, and nothing is said about the end.
    2. Usable is what is left, less the start and a spare tenth.
    3. As few as do the work in that time, one at least; never more than there are lines.
    4. More than there may be, or no usable time -> as many as there may be, and say whether that is in time: it is, if the
       end comes before the deadline itself.
    """
    most = max(1, min(most, work.lines))  # 3
    if not gpu_tokens_per_s:  # 1
        return Size(1, None, None)
    usable_s = left_s * (1 - SPARE_SHARE) - start_s  # 2
    needed = most
    if usable_s > 0:
        needed = max(1, math.ceil(round(work.tokens / (gpu_tokens_per_s * usable_s), 6)))  # 3
    gpus = min(needed, most)  # 4
    run_s = work.tokens / (gpu_tokens_per_s * gpus)
    return Size(gpus, run_s, start_s + run_s <= left_s)


def offers(most: int, chosen: int) -> list[int]:
    """The numbers of GPUs that a quote shows: powers of two up to the most, and the chosen one."""
    shown = {1, chosen, most}
    count = 2
    while count < most:
        shown.add(count)
        count *= 2
    return sorted(each for each in shown if each <= max(most, chosen))


def minutes_of(live_from_unix_s: int, live_s: float) -> list[int]:
    """Billed minutes of one GPU in each UTC hour that it is live in: begun minutes, counted within the hour."""
    start, end = float(live_from_unix_s), live_from_unix_s + live_s
    minutes = []
    while start < end:
        border = min(end, (start // HOUR_S + 1) * HOUR_S)
        minutes.append(math.ceil(round((border - start) / MINUTE_S, 9)))
        start = border
    return minutes


def gpus_cost_nanousd(hourly_rate_nanousd: int, gpus: int, minutes: list[int]) -> int:
    """What so many GPUs cost that are live for these minutes of each hour: as billing rounds, per GPU and hour."""
    return gpus * sum((hourly_rate_nanousd * each + 30) // 60 for each in minutes)


def tokens_cost_nanousd(prompt_nanousd: int, completion_nanousd: int, work: Work) -> int:
    return prompt_nanousd * work.prompt_tokens + completion_nanousd * work.completion_tokens
