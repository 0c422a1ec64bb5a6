"""Which caps a request is under, what it costs at most, and what its client is told."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing.pricing import Price, price_in_force, tokens_amount_nanousd
from shared.budgets.caps import (
    Cap,
    TokenPrice,
    caps_on,
    refusal_of_cap,
    with_leases,
    worst_case_nanousd,
)
from shared.budgets.gate import Reservation
from shared.budgets.slices import Answer, Slice
from shared.messages import EmbedJob, GenerateJob, ModelRef

_JOB: dict[str, Any] = {
    "job_id": "job_1",
    "request_id": "req_1",
    "team_id": "team_a",
    "key_id": "key_a",
    "resource_id": "res_pool",
    "billing": "ppt",
    "work_class": "live",
    "model_type": "tiny",
    "model": ModelRef(model_id="mod_a", revision=1, name="a/m", folder="mod_a/1", signature="abc"),
    "owner_queue": "replies.v1.gw",
    "accepted_unix_ms": 1_000,
    "deadline_unix_ms": 2_000,
}


def generate(**fields: Any) -> GenerateJob:
    values = {"operation": "chat", "prompt_tokens": [1] * 10, "max_tokens": 20, **fields}
    return GenerateJob(**{**_JOB, **values})


def price(prompt: int = 20, completion: int = 60, starts: int = 0, **fields: str) -> TokenPrice:
    return TokenPrice(**{"model_type": "tiny", "work_class": "live", **fields}, prompt_nanousd=prompt,
                      completion_nanousd=completion, starts_unix_ms=starts)  # fmt: skip


@pytest.mark.parametrize(
    ("scope", "scope_id", "team", "on"),
    [
        ("team", "team_a", "team_a", True),
        ("key", "key_a", "team_a", True),
        ("model", "mod_a", "team_a", True),
        ("resource", "res_pool", "team_a", True),
        ("credit", "team_a", "team_a", True),
        ("credit", "team_b", "team_b", False),
        ("key", "key_b", "team_a", False),
        ("model", "key_a", "team_a", False),
        # Two teams may use one model or pool: each has budgets of its own.
        ("model", "mod_a", "team_b", False),
        ("resource", "res_pool", "team_b", False),
    ],
)
def test_which_cap_a_job_is_under(scope: str, scope_id: str, team: str, on: bool) -> None:
    cap = Cap("bud_1", team, scope, scope_id, "day")
    assert caps_on([cap], generate()) == ([cap] if on else [])
    assert caps_on([cap], generate(billing="resource")) == []


def test_the_worst_case_is_prompt_and_all_choices_at_full_length() -> None:
    assert worst_case_nanousd(generate(), [price()]) == 10 * 20 + 20 * 60
    assert worst_case_nanousd(generate(choices=3), [price()]) == 10 * 20 + 3 * 20 * 60
    assert worst_case_nanousd(generate(max_tokens=0), [price()]) == 200
    embed = EmbedJob(**_JOB, operation="embeddings", inputs=[[1, 2], [3]])
    assert worst_case_nanousd(embed, [price()]) == 3 * 20


def test_without_a_price_in_force_nothing_can_be_reserved() -> None:
    assert worst_case_nanousd(generate(), []) is None
    assert worst_case_nanousd(generate(), [price(starts=1_001)]) is None
    assert worst_case_nanousd(generate(), [price(work_class="batch"), price(model_type="other")]) is None
    assert worst_case_nanousd(generate(), [price(starts=1_000)]) == 1_400


@given(
    versions=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from([0, 500, 1_000, 1_001, 5_000])),
        unique_by=lambda version: version[2],
    ),
    prompt=st.integers(1, 50),
    tokens=st.integers(0, 50),
    choices=st.integers(1, 4),
    used=st.integers(0, 200),
)
def test_billing_never_charges_more_than_was_reserved(
    versions: list[tuple[int, int, int]], prompt: int, tokens: int, choices: int, used: int
) -> None:
    """The two services compute it apart from each other."""
    job = generate(prompt_tokens=[1] * prompt, max_tokens=tokens, choices=choices)
    reserved = worst_case_nanousd(job, [price(*version) for version in versions])
    charged_by = price_in_force(
        [Price(f"p{start}", "tiny", "live", p, c, start) for p, c, start in versions], "tiny", "live", 1_000
    )
    if charged_by is None:
        assert reserved is None
        return
    assert reserved == tokens_amount_nanousd(charged_by, prompt, tokens * choices)
    assert reserved >= tokens_amount_nanousd(charged_by, prompt, min(used, tokens * choices))


def test_a_refusal_says_whether_to_try_again() -> None:
    cap = Cap("bud_1", "team_a", "key", "key_a", "day")
    for spent_up, headers in (
        (True, {"x-should-retry": "false"}),
        (False, {"x-should-retry": "true", "Retry-After": "2"}),
    ):
        error = refusal_of_cap(cap, spent_up=spent_up)
        assert (error.status, error.code, error.headers) == (402, "budget_exceeded", headers)
        assert "the key's budget of this day (UTC)" in error.message


def test_credit_that_is_spent_is_named_as_such() -> None:
    cap = Cap("credit:team_a", "team_a", "credit", "team_a", "ever")
    assert refusal_of_cap(cap, spent_up=True).code == "insufficient_credit"
    error = refusal_of_cap(cap, spent_up=False)
    assert (error.code, error.headers["x-should-retry"]) == ("insufficient_credit", "true")
    assert "the team's credit is reserved" in error.message


# ---- reservations


def taken(amount: int) -> tuple[Slice, str]:
    of = Slice(lambda: "lease_1")
    of.wait("w", amount)
    ask, _ = of.tick(0.0)
    assert ask is not None
    of.on_answer(Answer(ask.lease_id, amount, 10.0, (), 0, ()), 0.0)
    return of, "lease_1"


def spent(of: Slice) -> int:
    of.drain()
    ask, _ = of.tick(1.0)
    assert ask is not None
    return ask.closed[0][1]


@pytest.mark.parametrize(("published", "costs"), [([], 0), ([0], 30), ([0, 1], 100), ([1, 1], 70)])
def test_what_was_reserved_for_jobs_that_never_run_is_given_back(published: list[int], costs: int) -> None:
    of, lease_id = taken(100)
    reservation = Reservation([generate(), generate(job_id="job_2")], [(of, lease_id)], [30, 70])
    assert [(job.lease_ids, job.reserved_nanousd) for job in reservation.jobs] == [
        (["lease_1"], 30),
        (["lease_1"], 70),
    ]
    for index in published:
        reservation.published(index)
    reservation.resolve()
    reservation.resolve()
    assert spent(of) == costs


def test_without_a_cap_jobs_stay_as_they_are() -> None:
    jobs = [generate()]
    reservation = Reservation(jobs)
    reservation.published(0)
    reservation.resolve()
    assert reservation.jobs == jobs
    assert with_leases(jobs, ["l"], [5])[0].reserved_nanousd == 5
