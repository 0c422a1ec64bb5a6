"""What a price list may say, and what it comes to against the prices that are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.billing.price_list import Known, main, plan
from services.billing.price_list_file import MAX_BYTES, BadPriceList, read_price_list
from services.billing.price_versions import WITHDRAWABLE_MS
from services.billing.pricing import Price
from services.billing.rates import Rate

ROOT = Path(__file__).resolve().parents[3]
NOW_MS = 1_800_000_000_000
SOON = "2027-02-01T00:00:00Z"
SOON_MS = 1_801_440_000_000

TOKENS = """[[tokens]]
model_type = "tiny"
work_class = "live"
prompt_usd_per_million = "0.02"
completion_usd_per_million = "0.06"
"""
RATE = """[[rates]]
model_type = "tiny"
option = "bf16"
hourly_rate_usd = "0.60"
"""


def listing(*parts: str) -> bytes:
    return ('currency = "USD"\n' + "".join(parts)).encode()


def problems_of(content: bytes) -> list[str]:
    with pytest.raises(BadPriceList) as caught:
        read_price_list(content)
    return caught.value.problems


def test_the_example_is_well_formed() -> None:
    wanted = read_price_list((ROOT / "infra/prices.example.toml").read_bytes())
    assert len(wanted.tokens) == 3
    assert (wanted.tokens[0].prompt_nanousd, wanted.tokens[0].completion_nanousd) == (20, 60)
    assert {rate.option: rate.hourly_rate_nanousd for rate in wanted.rates} == {
        "int8": 450_000_000,
        "bf16": 600_000_000,
    }


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ['line 1: currency must be "USD"']),
        (b'currency = "EUR"', ['line 1: currency must be "USD"']),
        (b'currency = "USD"\n\xff', ["line 2: not UTF-8"]),
        (b'currency = "USD', ["not TOML: "]),
        (b"#" * (MAX_BYTES + 1), ["line 1: the file is over"]),
        (listing("coins = 1\n"), ["line 1: there is no part 'coins'"]),
        (listing("tokens = 1\n"), ["line 1: tokens must be tables"]),
        (listing("tokens = [1]\n"), ["line 1: tokens[0].model_type is missing"] + [""] * 3),
        (listing(RATE.replace('"0.60"', "0.60")), ["line 2: rates[0].hourly_rate_usd must be a decimal in quotes"]),
        (listing(RATE.replace('"0.60"', "1")), ["line 2: rates[0].hourly_rate_usd must be a decimal in quotes"]),
        (listing(RATE.replace("0.60", "-0.60")), ["line 2: rates[0].hourly_rate_usd must be USD"]),
        (listing(RATE.replace("0.60", "1e3")), ["line 2: rates[0].hourly_rate_usd must be USD"]),
        (listing(RATE.replace("0.60", "0.0000000001")), ["line 2: rates[0].hourly_rate_usd must be USD"]),
        (listing(TOKENS.replace("0.02", "0.0002")), ["line 2: tokens[0].prompt_usd_per_million must be USD"]),
        (listing(TOKENS.replace('"live"', '"night"')), ['line 2: tokens[0].work_class must be "live" or "batch"']),
        (listing(TOKENS.replace('"tiny"', '"Ti ny"')), ["line 2: tokens[0].model_type must be a name"]),
        (listing(TOKENS.replace('"tiny"', "5")), ["line 2: tokens[0].model_type must be a name"]),
        (listing(TOKENS, "starts_at = 2027-01-01\n"), ["line 2: tokens[0].starts_at must be a time with its offset"]),
        (listing(TOKENS, "starts_at = 2027-01-01T00:00:00\n"), ["line 2: tokens[0].starts_at must be a time"]),
        (listing(TOKENS, 'starts_at = "soon"\n'), ["line 2: tokens[0].starts_at must be a time"]),
        (listing(TOKENS, "starts_at = 1999-01-01T00:00:00Z\n"), ["line 2: tokens[0].starts_at must lie between"]),
        (listing(TOKENS, "price = 1\n"), ["line 2: tokens[0].price is not a field"]),
        (listing(TOKENS, RATE, TOKENS), ["line 11: says again what line 2 is about"]),
        (listing(RATE, RATE), ["line 6: says again what line 2 is about"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(content: bytes, expected: list[str]) -> None:
    problems = problems_of(content)
    assert len(problems) == len(expected), problems
    assert all(problem.startswith(start) for problem, start in zip(problems, expected, strict=True)), problems


def test_all_problems_are_said_at_once() -> None:
    bad = listing(
        TOKENS.replace('"0.06"', "0.06").replace("live", "x"), RATE.replace("0.60", "x"), "more = 1\n"
    )
    assert [problem.split()[:3] for problem in problems_of(bad)] == [
        ["line", "2:", "tokens[0].work_class"],
        ["line", "2:", "tokens[0].completion_usd_per_million"],
        ["line", "7:", "rates[0].more"],
        ["line", "7:", "rates[0].hourly_rate_usd"],
    ]


def price(
    price_id: str, starts_unix_ms: int, prompt: int = 20, completion: int = 60, kind: str = "live"
) -> Price:
    return Price(price_id, "tiny", kind, prompt, completion, starts_unix_ms)


def known(prices: list[Price], rates: list[Rate] | None = None) -> Known:
    return Known(
        now_unix_ms=NOW_MS,
        prices=prices,
        rates={"opt_a": rates or [Rate("rate_first", "opt_a", 600_000_000, 0)]},
        options={("tiny", "bf16"): "opt_a"},
        model_types=frozenset({"tiny"}),
    )


LATER = f"starts_at = {SOON}\n"
PAST = "starts_at = 2020-01-01T00:00:00Z\n"
PAST_MS = 1_577_836_800_000
TOO_SOON = "starts_at = 2027-01-15T08:00:01Z\n"
KNOWN_MS = NOW_MS + WITHDRAWABLE_MS
"""When everybody knows a version that is made now."""


@pytest.mark.parametrize(
    ("content", "there", "added", "withdrawn", "problems"),
    [
        (listing(TOKENS), [], [(20, 60, NOW_MS)], [], 0),
        (listing(TOKENS), [price("a", 0)], [], [], 0),
        (listing(TOKENS), [price("a", 0), price("b", SOON_MS, 1, 1)], [], [], 0),
        (listing(TOKENS), [price("a", 0), price("b", 5, 1, 1)], [(20, 60, KNOWN_MS)], [], 0),
        (listing(TOKENS), [price("a", 0, 1, 1), price("b", KNOWN_MS)], [], [], 0),
        (listing(TOKENS), [price("a", 0, kind="batch")], [(20, 60, NOW_MS)], [], 0),
        (listing(TOKENS, LATER), [], [(20, 60, SOON_MS)], [], 0),
        (listing(TOKENS, LATER), [price("a", 0)], [(20, 60, SOON_MS)], [], 0),
        (listing(TOKENS, LATER), [price("a", SOON_MS)], [], [], 0),
        (listing(TOKENS, LATER), [price("a", SOON_MS, 1, 1)], [(20, 60, SOON_MS)], ["a"], 0),
        (listing(TOKENS, PAST), [], [(20, 60, PAST_MS)], [], 0),
        (listing(TOKENS, PAST), [price("a", PAST_MS)], [], [], 0),
        (listing(TOKENS, PAST), [price("a", PAST_MS, 1, 1)], [], [], 1),
        (listing(TOKENS, PAST), [price("a", 0)], [], [], 1),
        (listing(TOKENS, TOO_SOON), [price("a", 0)], [], [], 1),
        (listing(TOKENS, TOO_SOON), [price("a", NOW_MS + 1000, 1, 1)], [], [], 1),
        (listing(TOKENS, TOO_SOON), [price("a", NOW_MS + 1000)], [], [], 0),
        (listing(TOKENS.replace("tiny", "big")), [], [], [], 1),
    ],
)  # fmt: skip
def test_what_a_price_of_tokens_comes_to(
    content: bytes, there: list[Price], added: list[tuple[int, int, int]], withdrawn: list[str], problems: int
) -> None:
    made = plan(read_price_list(content), known(there))
    assert [(p.prompt_nanousd, p.completion_nanousd, p.starts_unix_ms) for p in made.prices] == added
    assert (made.withdrawn, len(made.problems), len(made.words)) == (withdrawn, problems, len(added))


@pytest.mark.parametrize(
    ("content", "there", "added", "withdrawn", "problems"),
    [
        (listing(RATE), [], [], [], 0),
        (listing(RATE.replace("0.60", "0.70")), [], [(700_000_000, KNOWN_MS)], [], 0),
        (listing(RATE, LATER), [], [(600_000_000, SOON_MS)], [], 0),
        (listing(RATE, LATER), [Rate("b", "opt_a", 5, SOON_MS)], [(600_000_000, SOON_MS)], ["b"], 0),
        (listing(RATE, PAST), [], [], [], 1),
        (listing(RATE, TOO_SOON), [], [], [], 1),
        (listing(RATE.replace("bf16", "fp32")), [], [], [], 1),
    ],
)
def test_what_an_hourly_rate_comes_to(
    content: bytes, there: list[Rate], added: list[tuple[int, int]], withdrawn: list[str], problems: int
) -> None:
    first = Rate("rate_first", "opt_a", 600_000_000, 0)
    made = plan(read_price_list(content), known([], [first, *there]))
    assert [(rate.hourly_rate_nanousd, rate.starts_unix_ms) for rate in made.rates] == added
    assert (made.withdrawn, len(made.problems)) == (withdrawn, problems)


def test_the_difference_is_said_in_words() -> None:
    made = plan(
        read_price_list(listing(TOKENS, LATER, RATE.replace("0.60", "0.70"))),
        known([price("a", SOON_MS, 1, 2)]),
    )
    assert made.words == [
        (
            "tiny, live: 0.02 / 0.06 USD for a million prompt / completion tokens instead of "
            "0.001 / 0.002 USD for a million prompt / completion tokens, from 2027-02-01 00:00:00 UTC"
        ),
        "tiny on bf16: 0.60 USD an hour -> 0.70 USD an hour, from now on",
    ]


def test_check_reads_a_file_without_a_database(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_bytes(listing(TOKENS, RATE))
    bad.write_bytes(listing(TOKENS, TOKENS))
    assert main(["check", str(good)]) == 0
    assert "1 token prices and 1 hourly rates" in capsys.readouterr().out
    assert main(["check", str(bad)]) == 1
    assert f"{bad}: line 7: says again what line 2 is about" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "none.toml")]) == 1
    assert main(["diff", str(good)]) == 2
    assert "DATABASE_URL is not set" in capsys.readouterr().err
