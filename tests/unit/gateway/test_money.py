from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.money import MAX_USD, NANO, format_usd, parse_usd, parse_usd_per_million
from shared.inference.errors import ApiError


@pytest.mark.parametrize(
    ("text", "nano"),
    [("0", 0), ("0.60", 600_000_000), ("1", NANO), ("0.000000001", 1), ("1000000", MAX_USD * NANO), ("12.5", 12_500_000_000)],
)  # fmt: skip
def test_a_decimal_string_is_read_exactly(text: str, nano: int) -> None:
    assert parse_usd(text, "x") == nano


@pytest.mark.parametrize(
    "text", ["", "1e3", "-1", "+1", ".5", "5.", "00.5", "0.0000000001", "1000000.01", "9" * 30, "1,5", " 1", "1\n", "٣", "NaN"]
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_usd(text, "rate")
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_money", "rate")


def test_a_price_must_be_whole_nano_dollars_for_one_token() -> None:
    assert parse_usd_per_million("0.02", "x") == 20
    assert parse_usd_per_million("0.001", "x") == 1
    with pytest.raises(ApiError):
        parse_usd_per_million("0.0001", "x")


@pytest.mark.parametrize(
    ("nano", "text"), [(0, "0.00"), (1, "0.000000001"), (NANO, "1.00"), (600_000_000, "0.60"), (-1_500_000_000, "-1.50")]
)  # fmt: skip
def test_amounts_are_shown_with_at_least_two_places(nano: int, text: str) -> None:
    assert format_usd(nano) == text


@given(st.integers(0, MAX_USD * NANO))
def test_what_is_shown_is_read_back(nano: int) -> None:
    assert parse_usd(format_usd(nano), "x") == nano
