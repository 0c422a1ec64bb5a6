"""Loads a platform's price list: `python -m services.billing.price_list check|diff|apply FILE`.

`check` reads the file alone; `diff` says in words what `apply` would change; `apply` does it, all or nothing. What the
file does not name is left as it is. The plan is pure (`plan`); only `main` and `apply` know the database.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from services.billing import price_versions, rates_store, store
from services.billing.instants import from_unix_ms
from services.billing.price_list_file import BadPriceList, HourlyRate, PriceList, TokenPrice, read_price_list
from services.billing.pricing import Price
from services.billing.rates import Rate
from services.billing.settings import PriceListSettings
from shared.database import Connection, Database
from shared.ids import new_id
from shared.outcomes import Unavailable
from shared.settings import SettingsError, load
from shared.usd import format_usd, format_usd_per_million

ROLE = "roundhouse_billing"


@dataclass(frozen=True, slots=True)
class Known:
    """What is there when a list is compared."""

    now_unix_ms: int
    prices: Sequence[Price]
    rates: Mapping[str, Sequence[Rate]]
    """By option id."""
    options: Mapping[tuple[str, str], str]
    """Ids of performance options by model type and name."""
    model_types: frozenset[str]


@dataclass(slots=True)
class Plan:
    """What has to be done so that the list is true."""

    words: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    withdrawn: list[str] = field(default_factory=list)
    prices: list[Price] = field(default_factory=list)
    rates: list[Rate] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Version:
    """What prices and rates have in common: an id, a start, and amounts."""

    version_id: str
    starts_unix_ms: int
    amounts: tuple[int, ...]


def plan(wanted: PriceList, known: Known) -> Plan:
    """Compare a list with what is there. Pure; ids of new versions are made here.

    1. A model type or an option that does not exist -> a problem.
    2. An entry without a start, and the same amounts are in force, or will be as soon as a new version could -> nothing
       to do.
    3. An entry without a start otherwise -> a new version from now on: seconds from now, when everybody knows it; the
       first price of tokens at once.
    4. An entry with a start, and a version that starts then has the same amounts -> nothing to do.
    5. That version has other amounts and has not begun -> it is withdrawn, and replaced.
    6. It has begun, or there is none and the start is past, or too soon for everybody to know it -> a problem: what was
       charged stays. The first version of a token price may start in the past: nothing was charged by another one.
    """
    made = Plan()
    for token in wanted.tokens:
        _plan_tokens(made, token, known)
    for rate in wanted.rates:
        _plan_rate(made, rate, known)
    return made


def _plan_tokens(made: Plan, entry: TokenPrice, known: Known) -> None:
    if entry.model_type not in known.model_types:  # 1
        made.problems.append(f"line {entry.line}: there is no model type '{entry.model_type}'")
        return
    versions = [
        _Version(p.price_id, p.starts_unix_ms, (p.prompt_nanousd, p.completion_nanousd))
        for p in known.prices
        if (p.model_type, p.work_class) == (entry.model_type, entry.work_class)
    ]
    amounts = (entry.prompt_nanousd, entry.completion_nanousd)
    start = _start(
        made, entry.line, f"{entry.model_type}, {entry.work_class}", amounts, entry.starts_unix_ms, versions, known.now_unix_ms,
        first_may_be_past=True,
    )  # fmt: skip
    if start is not None:
        made.prices.append(
            Price(new_id("price"), entry.model_type, entry.work_class, *amounts, starts_unix_ms=start)
        )


def _plan_rate(made: Plan, entry: HourlyRate, known: Known) -> None:
    option_id = known.options.get((entry.model_type, entry.option))
    if option_id is None:  # 1
        made.problems.append(
            f"line {entry.line}: '{entry.model_type}' has no performance option '{entry.option}'"
        )
        return
    versions = [
        _Version(r.rate_id, r.starts_unix_ms, (r.hourly_rate_nanousd,))
        for r in known.rates.get(option_id, ())
    ]
    start = _start(
        made, entry.line, f"{entry.model_type} on {entry.option}", (entry.hourly_rate_nanousd,), entry.starts_unix_ms, versions,
        known.now_unix_ms, first_may_be_past=False,
    )  # fmt: skip
    if start is not None:
        made.rates.append(Rate(new_id("rate"), option_id, entry.hourly_rate_nanousd, start))


def _start(
    made: Plan,
    line: int,
    what: str,
    amounts: tuple[int, ...],
    starts_unix_ms: int | None,
    versions: Sequence[_Version],
    now_unix_ms: int,
    *,
    first_may_be_past: bool,
) -> int | None:
    """Where the version that is to be added starts; None if none is to be added. Rules 2 to 6 of `plan`."""
    soonest_unix_ms = now_unix_ms + price_versions.WITHDRAWABLE_MS if versions else now_unix_ms
    if starts_unix_ms is None:
        begun = [version for version in versions if version.starts_unix_ms <= soonest_unix_ms]
        in_force = max(begun, key=lambda version: version.starts_unix_ms, default=None)
        if in_force is not None and in_force.amounts == amounts:  # 2
            return None
        was = "no price" if in_force is None else _words(in_force.amounts)
        made.words.append(f"{what}: {was} -> {_words(amounts)}, from now on")  # 3
        return soonest_unix_ms
    there = next((version for version in versions if version.starts_unix_ms == starts_unix_ms), None)
    moment = f"{from_unix_ms(starts_unix_ms):%Y-%m-%d %H:%M:%S} UTC"
    if there is not None and there.amounts == amounts:  # 4
        return None
    past = starts_unix_ms < soonest_unix_ms
    if there is not None and not past:  # 5
        made.withdrawn.append(there.version_id)
        made.words.append(f"{what}: {_words(amounts)} instead of {_words(there.amounts)}, from {moment}")
        return starts_unix_ms
    if there is not None or (past and (versions or not first_may_be_past)):  # 6
        made.problems.append(f"line {line}: {what}: {moment} is past or too soon, and what was charged stays")
        return None
    made.words.append(f"{what}: {_words(amounts)}, from {moment}")
    return starts_unix_ms


def _words(amounts: tuple[int, ...]) -> str:
    if len(amounts) == 1:
        return f"{format_usd(amounts[0])} USD an hour"
    prompt, completion = (format_usd_per_million(amount) for amount in amounts)
    return f"{prompt} / {completion} USD for a million prompt / completion tokens"


async def load_known(connection: Connection, wanted: PriceList) -> Known:
    """Everything that the list can be about."""
    options = await connection.fetch("SELECT option_id, model_type, name FROM scheduler_api.options_v1")
    types = await connection.fetch("SELECT name FROM gateway_api.model_types_v1")
    return Known(
        now_unix_ms=await price_versions.database_now_unix_ms(connection),
        prices=await store.load_prices(connection, {token.model_type for token in wanted.tokens}),
        rates=await rates_store.load_rates(connection),
        options={(row["model_type"], row["name"]): row["option_id"] for row in options},
        model_types=frozenset(row["name"] for row in types),
    )


async def apply(connection: Connection, wanted: PriceList, actor: str) -> Plan:
    """Make the list true inside the caller's database transaction. With problems nothing is written."""
    await price_versions.lock_prices(connection)
    await rates_store.adopt_first_rates(connection)
    made = plan(wanted, await load_known(connection, wanted))
    if made.problems:
        return made
    for version_id in made.withdrawn:
        await price_versions.mark_withdrawn(connection, version_id, actor)
    for price in made.prices:
        await store.insert_price(connection, price, actor)
    for rate in made.rates:
        await rates_store.insert_rate(connection, rate, actor)
    return made


class _OnlyAsked(Exception):
    """Rolls back what was only asked for: nothing else says so surely what applying the list does."""

    def __init__(self, made: Plan) -> None:
        super().__init__()
        self.made = made


async def _compare(path: Path, wanted: PriceList, *, write: bool) -> Plan:
    async with AsyncExitStack() as stack:
        settings = load(PriceListSettings)
        database = await Database.open(settings.database_url, ROLE, stack, size=1)
        async with database.transaction() as connection:
            made = await apply(connection, wanted, f"price list {path.name}")
            if not write:
                raise _OnlyAsked(made)
            return made


def main(arguments: Sequence[str]) -> int:
    """Return the exit status: 0 is well, 1 is a list that cannot be used, 2 is a database that is away."""
    parser = argparse.ArgumentParser(prog="python -m services.billing.price_list", description=__doc__)
    parser.add_argument("what", choices=("check", "diff", "apply"))
    parser.add_argument("file", type=Path)
    given = parser.parse_args(arguments)
    try:
        wanted = read_price_list(given.file.read_bytes())
    except OSError as error:
        return _fail([f"{given.file}: {error.strerror}"], 1)
    except BadPriceList as error:
        return _fail([f"{given.file}: {problem}" for problem in error.problems], 1)
    if given.what == "check":
        print(
            f"{given.file}: {len(wanted.tokens)} token prices and {len(wanted.rates)} hourly rates, well formed"
        )
        return 0
    try:
        made = asyncio.run(_compare(given.file, wanted, write=given.what == "apply"))
    except _OnlyAsked as asked:
        made = asked.made
    except (SettingsError, Unavailable) as error:
        return _fail([str(error)], 2)
    if made.problems:
        return _fail([f"{given.file}: {problem}" for problem in made.problems] + ["nothing was changed"], 1)
    for words in made.words:
        print(words)
    done = "changed" if given.what == "apply" else "to change"
    print(f"{len(made.words)} {done}" if made.words else "everything is as the list says")
    return 0


def _fail(lines: Sequence[str], status: int) -> int:
    for line in lines:
        print(line, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
