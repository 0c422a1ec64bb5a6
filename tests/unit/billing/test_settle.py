"""What facts about a job come to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing.settle import BadFact, FactsDisagree, check_fact, settle
from shared.messages import JobUsage, UsageEvent
from tests.unit.billing.builders import make_usage, make_void


@pytest.mark.parametrize(
    ("facts", "outcome", "prompt", "completion"),
    [
        pytest.param([make_usage()], "succeeded", 10, 20, id="succeeded"),
        pytest.param([make_usage(outcome="cancelled")], "cancelled", 10, 20, id="cancelled-after-prefill"),
        pytest.param(
            [make_usage(operation="embeddings", completion_tokens=0)], "succeeded", 10, 0, id="embedded"
        ),
        pytest.param(
            [make_usage(operation="embeddings", completion_tokens=0, prefill_ran=False)],
            "succeeded",
            10,
            0,
            id="embedded-by-a-worker-that-could-not-report",
        ),
        pytest.param(
            [
                make_void(operation="embeddings", delivered_tokens=0),
                make_usage(operation="embeddings", outcome="cancelled", completion_tokens=0),
            ],
            "cancelled",
            10,
            0,
            id="embedded-when-the-client-went",
        ),
        pytest.param(
            [
                make_void(operation="embeddings", delivered_tokens=0),
                make_usage(operation="embeddings", outcome="cancelled", prompt_tokens=4, completion_tokens=0),
            ],
            "cancelled",
            4,
            0,
            id="embedded-in-part-when-the-client-went",
        ),
        pytest.param(
            [make_usage(outcome="cancelled", prefill_ran=False, completion_tokens=0)],
            "cancelled",
            0,
            0,
            id="cancelled-in-the-queue",
        ),
        pytest.param([make_usage(outcome="failed", error_code="poison")], "failed", 0, 0, id="failed-by-us"),
        pytest.param([make_usage(outcome="expired", completion_tokens=0)], "expired", 0, 0, id="expired"),
        pytest.param(
            [make_usage(attempt=2, completion_tokens=20), make_usage(attempt=1, completion_tokens=7)],
            "succeeded",
            10,
            20,
            id="a-zombies-attempt-is-ignored",
        ),
        pytest.param(
            [make_usage(attempt=1), make_usage(attempt=2, outcome="failed")],
            "failed",
            0,
            0,
            id="the-highest-attempt-decides-even-if-it-failed",
        ),
        pytest.param([make_usage(), make_void()], "cancelled", 10, 5, id="voided-after-success"),
        pytest.param([make_void()], "cancelled", 10, 5, id="gateways-word-alone"),
        pytest.param([make_void(delivered_tokens=0)], "cancelled", 0, 0, id="gone-and-prefill-not-known"),
        pytest.param(
            [make_void(delivered_tokens=0), make_usage(outcome="cancelled", completion_tokens=3)],
            "cancelled",
            10,
            0,
            id="gone-before-the-first-token-but-prefill-ran",
        ),
        pytest.param(
            [
                make_void(delivered_tokens=0),
                make_usage(outcome="cancelled", prefill_ran=False, completion_tokens=0),
            ],
            "cancelled",
            0,
            0,
            id="gone-before-prefill",
        ),
        pytest.param(
            [make_void(), make_usage(outcome="failed")],
            "cancelled",
            10,
            5,
            id="gateways-word-corrects-a-failure",
        ),
        pytest.param([make_usage(), make_void(reason="deadline")], "expired", 0, 0, id="deadline"),
        pytest.param([make_usage(), make_void(reason="failed")], "failed", 0, 0, id="failed-at-the-gateway"),
        pytest.param(
            [make_void(reason="never_published", delivered_tokens=0)], "failed", 0, 0, id="never-published"
        ),
        pytest.param(
            [make_void(event_id="a", delivered_tokens=9), make_void(event_id="b", delivered_tokens=4)],
            "cancelled",
            10,
            4,
            id="two-voids-the-cheaper-decides",
        ),
        pytest.param(
            [make_void(event_id="a"), make_void(event_id="b", reason="deadline")],
            "expired",
            0,
            0,
            id="two-voids-the-free-one-decides",
        ),
        pytest.param(
            [make_usage(event_id="a"), make_usage(event_id="b", completion_tokens=11)],
            "succeeded",
            10,
            11,
            id="one-attempt-told-twice-the-cheaper-decides",
        ),
    ],
)
def test_settle_decides_outcome_and_billable_tokens(
    facts: list[UsageEvent], outcome: str, prompt: int, completion: int
) -> None:
    settlement = settle(facts)
    assert (settlement.outcome, settlement.billable_prompt_tokens, settlement.billable_completion_tokens) == (
        outcome,
        prompt,
        completion,
    )


def test_settle_keeps_delivered_tokens_of_a_job_that_pays_nothing() -> None:
    settlement = settle([make_usage(outcome="failed", completion_tokens=7)])
    assert (settlement.delivered_tokens, settlement.billable_completion_tokens) == (7, 0)


def test_settle_keeps_the_workers_attempt_when_the_gateway_decides() -> None:
    settlement = settle([make_void(), make_usage(attempt=3)])
    assert (settlement.attempt, settlement.outcome) == (3, "cancelled")
    assert settle([make_void()]).attempt == 0


@pytest.mark.parametrize(
    "other", [{"team_id": "team_b"}, {"billing": "resource"}, {"job_id": "job_2"}, {"model_type": "gpt-j-6b"}]
)
def test_settle_refuses_facts_that_disagree_about_who_pays(other: dict[str, Any]) -> None:
    with pytest.raises(FactsDisagree):
        settle([make_usage(), make_void(**other)])


def test_settle_refuses_no_facts() -> None:
    with pytest.raises(FactsDisagree):
        settle([])


@pytest.mark.parametrize(
    "fact",
    [
        make_usage(prompt_tokens=-1),
        make_usage(completion_tokens=-1),
        make_usage(completion_tokens=2**31),
        make_usage(attempt=-1),
        make_usage(finished_unix_ms=10**15),
        make_usage(first_token_unix_ms=-1),
        make_void(delivered_tokens=-1),
        make_void(voided_unix_ms=10**15),
        make_void(accepted_unix_ms=-5),
    ],
)
def test_check_fact_refuses_what_cannot_be(fact: UsageEvent) -> None:
    with pytest.raises(BadFact):
        check_fact(fact)


def test_check_fact_accepts_the_usual() -> None:
    check_fact(make_usage())
    check_fact(make_usage(first_token_unix_ms=None))
    check_fact(make_void())


_tokens = st.integers(0, 50)
_usages = st.builds(
    make_usage,
    event_id=st.uuids().map(str),
    attempt=st.integers(1, 3),
    outcome=st.sampled_from(["succeeded", "failed", "cancelled", "expired"]),
    completion_tokens=_tokens,
    prefill_ran=st.booleans(),
)
_voids = st.builds(
    make_void,
    event_id=st.uuids().map(str),
    reason=st.sampled_from(["client_gone", "deadline", "failed", "never_published"]),
    delivered_tokens=_tokens,
)


@given(st.lists(st.one_of(_usages, _voids), min_size=1, max_size=6), st.randoms(), st.integers(1, 3))
def test_settle_does_not_depend_on_order_or_repeats(
    facts: list[UsageEvent], random: Any, repeats: int
) -> None:
    shuffled = facts * repeats
    random.shuffle(shuffled)
    assert settle(shuffled) == settle(facts)


@given(st.lists(st.one_of(_usages, _voids), min_size=1, max_size=6))
def test_settle_never_bills_more_than_some_fact_says_was_delivered(facts: list[UsageEvent]) -> None:
    settlement = settle(facts)
    delivered = [f.completion_tokens if isinstance(f, JobUsage) else f.delivered_tokens for f in facts]
    assert 0 <= settlement.billable_completion_tokens <= max(delivered)
    assert settlement.billable_prompt_tokens in (0, 10)
