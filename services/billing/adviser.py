"""Pure: what a team's traffic of the last days would have cost in other ways. It advises; it charges and changes nothing.

What it assumes, and says with its answer (`ASSUMPTIONS`): the past repeats itself; a GPU answers at least as many
requests a minute as it was seen to; counts are those at which nearly all requests find a free GPU at once. All amounts
are integer nano-USD, rates of requests are integer thousandths a minute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.billing.instants import HOUR_US, MINUTE_US
from services.billing.pricing import Price, price_in_force, tokens_amount_nanousd

GOOD_PERCENT = 95
"""Of the minutes with requests: in so many a count must be enough. The rest wait for a minute or so, not for ever."""
FEWEST_REQUESTS = 20
"""With fewer records than this nothing is said of what a GPU can do."""
MAX_GPUS = 64
HOURS_A_DAY = 24

ASSUMPTIONS = (
    "The traffic of these days comes again; what is compared is what it would have cost in the other ways.",
    "By the token: every request at the price that was in force in its minute, tokens found in a cache included.",
    "One GPU serves at least what it was seen to: requests over their summed GPU time, or the most that were finished in a"
    + " minute for each live GPU, whichever is more. With more traffic than there was, batching may do better.",
    f"A number of GPUs is enough if it serves the requests of {GOOD_PERCENT} of 100 minutes in the minute they came in.",
    "Autoscaling: for each hour what it needs, and none in an hour without requests; the first request after such an hour"
    + " waits for a start. Windows: for each hour of the UTC day what the busiest of the days needed.",
)


@dataclass(frozen=True, slots=True)
class Minute:
    """All requests of one minute and class, for one model type."""

    minute_us: int
    work_class: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What GPUs were seen to do: requests with known GPU time, that time in all, and the best minute of one GPU."""

    requests: int
    gpu_us: int
    best_minute_milli: int
    """Thousandths of requests for each live GPU, in the minute that finished the most; 0 if none is known."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to run: what it would have cost, and with how many GPUs (the most at once)."""

    cost_nanousd: int
    gpus: int
    by_hour_of_day: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Advice:
    """For one model type. None: cannot be told from these records."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    paid_nanousd: int
    by_token_nanousd: int | None
    requests_a_minute_milli: int | None
    """What one GPU serves at least."""
    fixed: Way | None
    autoscaled: Way | None
    windows: Way | None
    break_even_milli: int | None
    """Requests a minute, in thousandths, from which on one GPU that is always on costs less than tokens."""
    break_even_within_one_gpu: bool | None
    cheapest: str
    """`paid` if nothing is known to be cheaper than what was paid, else the name of the way."""


def advise(
    minutes: Sequence[Minute],
    paid_nanousd: int,
    prices: Iterable[Price],
    model_type: str,
    hourly_rate_nanousd: int | None,
    seen: Seen,
    first_us: int,
    hours: int,
) -> Advice:
    """Compare the ways for one model type over `hours` whole hours from `first_us` on.

    minutes: those with requests, each class apart. hourly_rate_nanousd: of the option that would be used; None if the
    type has none.
    """
    requests = sum(minute.requests for minute in minutes)
    by_token = by_token_nanousd(minutes, prices, model_type)
    capacity = capacity_milli(seen)
    fixed = autoscaled = windows = None
    if capacity is not None and hourly_rate_nanousd is not None:
        demand = requests_by_minute(minutes)
        needs = needed_by_hour(demand, capacity, first_us, hours)
        fixed_count = needed(demand.values(), capacity)
        fixed = Way(hourly_rate_nanousd * fixed_count * hours, fixed_count)
        autoscaled = Way(hourly_rate_nanousd * sum(needs), max(needs, default=0))
        days = needed_by_hour_of_day(needs, first_us)
        scheduled = sum(days[hour_of_day(first_us, index)] for index in range(hours))
        windows = Way(hourly_rate_nanousd * scheduled, max(days), tuple(days))
    even = break_even_milli(hourly_rate_nanousd, by_token, requests)
    scaled = {"fixed": fixed, "autoscaled": autoscaled, "windows": windows}
    ways = {"by_token": by_token} | {
        name: None if way is None else way.cost_nanousd for name, way in scaled.items()
    }
    return Advice(
        requests=requests,
        prompt_tokens=sum(minute.prompt_tokens for minute in minutes),
        completion_tokens=sum(minute.completion_tokens for minute in minutes),
        paid_nanousd=paid_nanousd,
        by_token_nanousd=by_token,
        requests_a_minute_milli=capacity,
        fixed=fixed,
        autoscaled=autoscaled,
        windows=windows,
        break_even_milli=even,
        break_even_within_one_gpu=None if even is None or capacity is None else even <= capacity,
        cheapest=cheapest(paid_nanousd, ways),
    )


def by_token_nanousd(minutes: Iterable[Minute], prices: Iterable[Price], model_type: str) -> int | None:
    """What these tokens cost at the prices of their minutes; None if a minute has no price."""
    versions, total = list(prices), 0
    for minute in minutes:
        price = price_in_force(versions, model_type, minute.work_class, minute.minute_us // 1000)
        if price is None:
            return None
        total += tokens_amount_nanousd(price, minute.prompt_tokens, minute.completion_tokens)
    return total


def capacity_milli(seen: Seen) -> int | None:
    """Thousandths of requests a minute that one GPU serves at least; None with too few records. See `ASSUMPTIONS`."""
    if seen.requests < FEWEST_REQUESTS or seen.gpu_us <= 0:
        return None
    one_by_one = 1000 * seen.requests * MINUTE_US // seen.gpu_us
    return max(one_by_one, seen.best_minute_milli, 1)


def requests_by_minute(minutes: Iterable[Minute]) -> dict[int, int]:
    """Requests of all classes by minute; minutes without any are left out."""
    demand: dict[int, int] = {}
    for minute in minutes:
        if minute.requests:
            demand[minute.minute_us] = demand.get(minute.minute_us, 0) + minute.requests
    return demand


def needed(demand: Iterable[int], capacity: int) -> int:
    """GPUs that serve at once the requests of `GOOD_PERCENT` of these minutes; 0 without any, at most `MAX_GPUS`."""
    counts = sorted(-(-1000 * requests // capacity) for requests in demand)
    if not counts:
        return 0
    good = -(-len(counts) * GOOD_PERCENT // 100)
    return min(counts[good - 1], MAX_GPUS)


def needed_by_hour(demand: Mapping[int, int], capacity: int, first_us: int, hours: int) -> list[int]:
    """For each hour from `first_us` on."""
    by_hour: list[list[int]] = [[] for _ in range(hours)]
    for minute_us, requests in demand.items():
        index = (minute_us - first_us) // HOUR_US
        if 0 <= index < hours:
            by_hour[index].append(requests)
    return [needed(counts, capacity) for counts in by_hour]


def hour_of_day(first_us: int, index: int) -> int:
    return (first_us // HOUR_US + index) % HOURS_A_DAY


def needed_by_hour_of_day(needs: Sequence[int], first_us: int) -> list[int]:
    """The most that each hour of the UTC day needed on any of the days."""
    most = [0] * HOURS_A_DAY
    for index, count in enumerate(needs):
        at = hour_of_day(first_us, index)
        most[at] = max(most[at], count)
    return most


def break_even_milli(hourly_rate_nanousd: int | None, by_token: int | None, requests: int) -> int | None:
    """Thousandths of requests a minute at which an hour of one GPU costs what their tokens cost; rounded up."""
    if not hourly_rate_nanousd or not by_token or not requests:
        return None
    return -(-1000 * hourly_rate_nanousd * requests // (60 * by_token))


def cheapest(paid_nanousd: int, ways: Mapping[str, int | None]) -> str:
    """The name of the cheapest way; `paid` if none is cheaper than what was paid. Ties go to the first named."""
    best, amount = "paid", paid_nanousd
    for name, cost in ways.items():
        if cost is not None and cost < amount:
            best, amount = name, cost
    return best
