"""Pure: a quote, made of what was counted in a file and what is known of prices, GPUs and their pace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from services.batch.sizing import (
    RELEASE_S,
    UNKNOWN_START_S,
    Size,
    Work,
    gpus_cost_nanousd,
    minutes_of,
    offers,
    size,
    tokens_cost_nanousd,
)
from shared.usd import format_usd

MOST_GPUS = 64


class Answers(Struct, frozen=True, kw_only=True):
    """How long answers are taken to be. `mean`: the mean of so many answers that the model gave this team lately, or the
    line's own limit where that is less. `limit`: it gave none, each is taken to be as long as its line allows.
    """

    basis: Literal["mean", "limit", "none"]
    mean_tokens: float | None = None
    requests: int = 0


class Counted(Struct, frozen=True, kw_only=True):
    """What is in a file."""

    lines: int
    refused_lines: int
    """The endpoint would refuse them: they fail at once and cost nothing."""
    prompt_tokens: int
    completion_tokens: int
    completion_tokens_at_most: int
    answers: Answers


class TokenPrice(Struct, frozen=True, kw_only=True):
    price_id: str
    prompt_nanousd: int
    completion_nanousd: int


class Option(Struct, frozen=True, kw_only=True):
    """A performance option, and what is known of it."""

    option_id: str
    name: str
    device_kind: str
    max_batch: int
    max_context_tokens: int
    hourly_rate_nanousd: int
    tokens_per_s: float | None = None
    """What one GPU did, in completion tokens' worth."""
    pace_basis: Literal["batches", "requests", "unknown"] = "unknown"
    """`batches`: while it ran batches; `requests`: in its best hour, whatever it ran, which may be less than it could do."""
    start_s: float | None = None
    free_gpus: int | None = None


class Offer(Struct, frozen=True, kw_only=True):
    """So many GPUs: how long, and for how much."""

    gpus: int
    finish_s: int | None
    minutes: int | None
    cost_nanousd: int | None
    cost_usd: str | None


class OptionQuote(Struct, frozen=True, kw_only=True):
    option: str
    option_id: str
    hourly_rate_nanousd: int
    tokens_per_s: float | None
    pace_basis: str
    start_s: float
    start_basis: Literal["measured", "assumed"]
    free_gpus: int | None
    gpus_at_most: int
    gpus: int
    """What the deadline asks for."""
    in_time: bool | None
    offers: list[Offer]


class TokensQuote(Struct, frozen=True, kw_only=True):
    price_id: str
    cost_nanousd: int
    cost_usd: str


class Quote(Struct, frozen=True, kw_only=True):
    model: str
    deadline_s: int
    counted: Counted
    tokens: TokensQuote | None
    """By the token, on shared GPUs; None: the type's tokens have no price of the class batch."""
    resources: list[OptionQuote]
    """On GPUs of its own, by option."""


def make_quote(
    model: str,
    counted: Counted,
    price: TokenPrice | None,
    options: Sequence[Option],
    quota: int,
    max_gpus: int | None,
    deadline_s: int,
    now_unix_s: int,
) -> Quote:
    """quota: GPUs that the team may have. max_gpus: that it wants to pay for at most."""
    work = work_of(counted)
    cost = (
        None if price is None else tokens_cost_nanousd(price.prompt_nanousd, price.completion_nanousd, work)
    )
    return Quote(
        model=model,
        deadline_s=deadline_s,
        counted=counted,
        tokens=None
        if price is None or cost is None
        else TokensQuote(price_id=price.price_id, cost_nanousd=cost, cost_usd=format_usd(cost)),
        resources=[
            quote_option(work, option, most_gpus(option, quota, max_gpus), deadline_s, now_unix_s)
            for option in options
        ],
    )


def work_of(counted: Counted) -> Work:
    return Work(counted.lines - counted.refused_lines, counted.prompt_tokens, counted.completion_tokens)


def most_gpus(option: Option, quota: int, max_gpus: int | None) -> int:
    """As many as the team may have and wants, and as are free now where that is known; one at least: it may come free."""
    most = min(quota, MOST_GPUS if max_gpus is None else max_gpus)
    return max(1, most if option.free_gpus is None else min(most, option.free_gpus))


def quote_option(work: Work, option: Option, most: int, deadline_s: int, now_unix_s: int) -> OptionQuote:
    start_s = UNKNOWN_START_S if option.start_s is None else option.start_s
    chosen = size(work, option.tokens_per_s, start_s, deadline_s, most)
    counts = offers(max(1, min(most, work.lines)), chosen.gpus)
    return OptionQuote(
        option=option.name,
        option_id=option.option_id,
        hourly_rate_nanousd=option.hourly_rate_nanousd,
        tokens_per_s=option.tokens_per_s,
        pace_basis=option.pace_basis,
        start_s=start_s,
        start_basis="assumed" if option.start_s is None else "measured",
        free_gpus=option.free_gpus,
        gpus_at_most=most,
        gpus=chosen.gpus,
        in_time=chosen.in_time,
        offers=[_offer(work, option, gpus, start_s, now_unix_s) for gpus in counts],
    )


def _offer(work: Work, option: Option, gpus: int, start_s: float, now_unix_s: int) -> Offer:
    if not option.tokens_per_s:
        return Offer(gpus=gpus, finish_s=None, minutes=None, cost_nanousd=None, cost_usd=None)
    run = Size(gpus, work.tokens / (option.tokens_per_s * gpus), None)
    assert run.run_s is not None
    minutes = minutes_of(now_unix_s + round(start_s), run.run_s + RELEASE_S)
    cost = gpus_cost_nanousd(option.hourly_rate_nanousd, gpus, minutes)
    return Offer(
        gpus=gpus,
        finish_s=round(start_s + run.run_s),
        minutes=gpus * sum(minutes),
        cost_nanousd=cost,
        cost_usd=format_usd(cost),
    )
