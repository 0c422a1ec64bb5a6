from __future__ import annotations

import pytest

from services.gateway.paying import Purse, payment_refusal
from shared.inference.principal import Route
from tests.unit.gateway.test_routing import LIVE, MODEL, POOL, TEAM

PPT, OWN = Route(POOL, "ppt"), Route(LIVE, "resource")
PRICED, SPENT = frozenset({"tiny"}), frozenset({"team_a"})


@pytest.mark.parametrize(
    ("route", "purse", "refusal"),
    [
        (PPT, Purse(PRICED), None),
        (PPT, Purse(PRICED, frozenset({"team_b"})), None),
        (PPT, Purse(PRICED, SPENT), (402, "insufficient_credit")),
        (PPT, Purse(frozenset({"big"})), (409, "no_price")),
        (PPT, Purse(), (409, "no_price")),
        (PPT, Purse(frozenset(), SPENT), (409, "no_price")),
        (OWN, Purse(), None),
        (OWN, Purse(PRICED, SPENT), None),
    ],
)
def test_who_cannot_pay_is_told_so_and_not_asked_again(
    route: Route, purse: Purse, refusal: tuple[int, str] | None
) -> None:
    error = payment_refusal(TEAM, MODEL, route, purse)
    assert (None if error is None else (error.status, error.code)) == refusal
    if error is not None:
        assert error.headers == {"x-should-retry": "false"}
