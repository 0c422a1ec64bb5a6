"""Each side under the same traces at higher and higher rates, until it is past its best; then again at its best."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from loadtest.hotswap_traffic import Arrival, best_rate, goodput, is_past_its_best, make_trace

Replay = Callable[[Sequence[Arrival]], Awaitable[list[float | None]]]


@dataclass(slots=True)
class Climb:
    """curve: goodput by rate of arrivals. at_best: at the rate where it was best, once for each repeat."""

    curve: dict[float, float] = field(default_factory=dict)
    at_best: list[float] = field(default_factory=list)


async def climb(
    sides: Mapping[str, Replay],
    rates_per_s: Mapping[str, Sequence[float]],
    *,
    trace_s: float,
    repeats: int,
    models: int,
    vocab_size: int,
    say: Callable[[str], None],
) -> dict[str, Climb]:
    """rates_per_s: of each side. The sides take turns, and each has the same arrivals at the same rate."""
    found = {name: Climb() for name in sides}

    async def measure(name: str, rate: float, seed: int) -> float:
        trace = make_trace(rate, trace_s, models, vocab_size, seed)
        value = goodput(await sides[name](trace), trace_s)
        say(f"{name}: {value:.2f}/s in time of {len(trace) / trace_s:.2f}/s")
        return value

    for rate in sorted({rate for rates in rates_per_s.values() for rate in rates}):
        for name, climbed in found.items():
            if rate in rates_per_s[name] and not is_past_its_best(climbed.curve):
                climbed.curve[rate] = await measure(name, rate, seed=0)
    for seed in range(1, repeats + 1):
        names = list(found)
        for name in names if seed % 2 else reversed(names):
            found[name].at_best.append(await measure(name, best_rate(found[name].curve), seed))
    return found
