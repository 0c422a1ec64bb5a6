"""Pure: what is done next about the resource that a batch has for itself, and when it gets more GPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from services.batch.input_lines import Problem
from services.batch.quote import Counted, Option, OptionQuote, most_gpus, quote_option, work_of
from services.batch.sizing import SPARE_SHARE
from shared.usd import format_usd

HOLD_S = 600.0
"""For so long a resource stays on without our word: what is paid at most after this service is gone for good."""
RENEW_S = 300.0
LATE_COMMAND_S = 60.0
"""A command to make the resource may still be carried out so long after it was sent."""

Act = Literal["turn_on", "turn_off", "delete", "forget", "wait"]


@dataclass(frozen=True, slots=True)
class Seen:
    """The batch's resource as the scheduler has it."""

    resource_id: str
    wanted: str
    state: str
    on_for_s: float | None
    """For how long it is held on from now; None: without an end, or off."""


def next_act(batch_state: str, stopped: bool, seen: Seen | None, made: bool, held_for_s: float) -> Act:
    """Choose. Asked again every second; whatever died or was lost in between, the next look goes on from what is there.

    stopped: a budget that stops batches or resources is used up, or the team has nothing left to spend.
    made: the command to make the resource was answered. held_for_s: since that command went out last.

    1. The file is still being checked -> wait: whoever checks it makes the resource.
    2. Lines run -> the resource is on, and held on; but off while nobody pays for it.
    3. Otherwise (all lines are over, or the batch is) -> off, and deleted when it is off.
    4. It is not there (any more) -> done with it; but if it is not known that it was made, not as long as the command to
       make it may still be carried out.
    """
    if batch_state == "validating":  # 1
        return "wait"
    runs = batch_state == "in_progress"
    if seen is None:  # 4
        return "forget" if not runs and (made or held_for_s > LATE_COMMAND_S) else "wait"
    is_on = seen.wanted == "on"
    if runs and not stopped:  # 2
        return "wait" if is_on and seen.on_for_s is not None and seen.on_for_s > RENEW_S else "turn_on"
    if is_on:
        return "turn_off"
    if runs:
        return "wait"
    return "delete" if seen.state == "off" else "wait"  # 3


def more_gpus(
    gpus: int, live: int, lines_left: int, lines_per_s: float, left_s: float, start_s: float, most: int
) -> int:
    """How many GPUs the batch should have by the pace that it goes at; never fewer than it has. Pure.

    1. Not all of its GPUs are live yet, or no pace is known -> as many as it has.
    2. It will be done in what is left, less a spare tenth -> as many as it has.
    3. As many more as do the rest in that time, less the start of new ones; never more than there may be.
    """
    if live < gpus or lines_per_s <= 0 or lines_left <= 0:  # 1
        return gpus
    usable_s = left_s * (1 - SPARE_SHARE)
    if lines_left / lines_per_s <= usable_s:  # 2
        return gpus
    after_start_s = max(usable_s - start_s, 1.0)
    left_then = max(lines_left - lines_per_s * start_s, 0.0)
    needed = math.ceil(round(left_then * gpus / (lines_per_s * after_start_s), 6))  # 3
    return max(gpus, min(needed, max(most, gpus), lines_left))


def choose_option(
    counted: Counted,
    options: Sequence[Option],
    quota: int,
    max_gpus: int | None,
    left_s: float,
    now_unix_s: int,
) -> tuple[Option, OptionQuote]:
    """Of the options (one at least) the cheapest that is in time; else one that may be; else the soonest over. Pure."""
    quotes = [
        (
            option,
            quote_option(
                work_of(counted), option, most_gpus(option, quota, max_gpus), round(left_s), now_unix_s
            ),
        )
        for option in options
    ]

    def rank(quoted: tuple[Option, OptionQuote]) -> tuple[int, int, int]:
        quote = quoted[1]
        offer = next(offer for offer in quote.offers if offer.gpus == quote.gpus)
        if quote.in_time:
            return 0, offer.cost_nanousd or 0, offer.finish_s or 0
        if quote.in_time is None:
            return 1, quote.hourly_rate_nanousd, 0
        return 2, offer.finish_s or 0, 0

    return min(quotes, key=rank)


def refusal_of_size(
    quote: OptionQuote, spendable_nanousd: int | None, budget_spent: bool, quota: int
) -> Problem | None:
    """Why a batch does not get its resource; None if it does. Pure.

    spendable_nanousd: None is without a bound.

    1. The team may have no GPUs -> over_quota.
    2. A budget that stops batches, turns resources off or keeps them from growing is used up -> budget_exceeded.
    3. The team has nothing left to spend, or less than it would cost -> insufficient_credit.
    4. Even as many GPUs as there may be are too slow -> deadline_unreachable.
    """
    offer = next(offer for offer in quote.offers if offer.gpus == quote.gpus)
    if quota < 1:  # 1
        return Problem("over_quota", "The team may have no GPUs.", param="own_resource")
    if budget_spent:  # 2
        return Problem("budget_exceeded", "A budget of the team is used up.", param="own_resource")
    if spendable_nanousd is not None and spendable_nanousd <= (offer.cost_nanousd or 0):  # 3
        cost = "an unknown amount" if offer.cost_usd is None else f"about {offer.cost_usd} USD"
        message = f"The batch would cost {cost}, and the team may spend {format_usd(spendable_nanousd)} USD."
        return Problem("insufficient_credit", message, param="own_resource")
    if quote.in_time is False:  # 4
        message = f"On {quote.gpus} GPUs, the most that there may be, it takes about {offer.finish_s} s."
        return Problem("deadline_unreachable", message, param="completion_window")
    return None
