"""What a worker tells billing of a job: the prompt once, whatever the cache had of it, and the tokens of all choices."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from opentelemetry import trace

from services.worker.held import Held, reported_usage, usage_message
from shared.messages import EmbedJob, FinishedReport, GenerateJob, Outcome, Timings
from tests.contract.examples import EXAMPLES

JOB = next(message for message in EXAMPLES if isinstance(message, GenerateJob))


def fact_of(
    tokens: list[int], *, outcome: Outcome = "succeeded", prefilled: bool = True, **fields: Any
) -> Any:
    """The fact of a job whose choices published so many tokens each."""
    held = Held(replace(JOB, choices=len(tokens), **fields), [], 0.0, 0, trace.INVALID_SPAN)
    held.begin(1, [list(range(count)) for count in tokens])
    held.prefilled = set(range(len(tokens))) if prefilled else set()
    return usage_message(held, "wrk_1", outcome, None, Timings())


ECHO = {"sampling": replace(JOB.sampling, echo_logprobs=True)}


@pytest.mark.parametrize(
    ("tokens", "fields", "completion"),
    [
        pytest.param([7], {}, 7, id="one-answer"),
        pytest.param([7, 5, 9], {}, 21, id="n-answers-and-one-prompt"),
        pytest.param([4], ECHO, 4, id="an-echoed-prompt-is-no-answer"),
        pytest.param([0], ECHO | {"max_tokens": 0}, 0, id="a-prompt-that-is-only-scored"),
    ],
)
def test_the_fact_counts_the_prompt_once(tokens: list[int], fields: dict[str, Any], completion: int) -> None:
    fact = fact_of(tokens, **fields)
    assert (fact.prompt_tokens, fact.completion_tokens) == (len(JOB.prompt_tokens), completion)


def test_a_prompt_that_a_cache_had_is_counted_whole() -> None:
    """The fact is of the job's prompt; how much of it the engine had to compute is not asked."""
    held = Held(replace(JOB, prompt_tokens=list(range(500))), [], 0.0, 0, trace.INVALID_SPAN)
    held.begin(1)
    assert usage_message(held, "wrk_1", "succeeded", None, Timings()).prompt_tokens == 500


def test_a_job_that_was_cancelled_before_its_prompt_was_read_says_so() -> None:
    assert fact_of([0], outcome="cancelled", prefilled=False).prefill_ran is False
    assert fact_of([0], outcome="cancelled").prefill_ran is True
    assert fact_of([2], outcome="cancelled", prefilled=False).prefill_ran is True


def test_the_fact_names_what_was_reserved_for_its_job() -> None:
    """Else billing would hold it until no job of the lease can run any more."""
    jobs = [message for message in EXAMPLES if isinstance(message, GenerateJob | EmbedJob)]
    assert len(jobs) == 2
    for job in jobs:
        report = FinishedReport(attempt=1, outcome="succeeded", completion_tokens=3)
        fact = reported_usage(job, "wrk_1", report)
        assert fact.lease_ids == job.lease_ids == ["lease_1", "lease_2"]
        assert fact.reserved_nanousd == job.reserved_nanousd > 0
