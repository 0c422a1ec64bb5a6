from __future__ import annotations

import pytest

from shared.inference.checks import check_vocabulary, choose_max_tokens, context_tokens, refusal_of
from shared.inference.errors import ApiError
from shared.inference.jobs import JobContext, build_jobs
from shared.inference.parameters import MAX_SEED, GenerationRequest, parse_chat, parse_completion
from shared.inference.principal import BaseView, Route
from shared.messages import GenerateJob, WeightsRef
from tests.unit.gateway.inference.builders import EOS, finished, make_model, make_principal, make_route


def completion(**fields: object) -> GenerationRequest:
    return parse_completion({"model": "m", "prompt": "x", **fields}, random_seed=7)


def chat(**fields: object) -> GenerationRequest:
    return parse_chat({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}, random_seed=7)


def jobs_of(wanted: GenerationRequest, *prompts: list[int], route: Route | None = None) -> list[GenerateJob]:
    context = JobContext(
        "req_1", make_principal(), make_model(), route or make_route(), "replies", 1_000, 300.0
    )
    ids = iter(f"job_{i}" for i in range(99))
    return build_jobs(wanted, prompts, 5, context, lambda: next(ids))


def test_each_prompt_is_a_job_with_its_own_seeds() -> None:
    jobs = jobs_of(completion(n=3, seed=10), [1], [2, 3])
    assert [(job.job_id, job.prompt_tokens, job.choices, job.sampling.seed) for job in jobs] == [
        ("job_0", [1], 3, 10),
        ("job_1", [2, 3], 3, 13),
    ]


def test_seeds_wrap_within_their_range() -> None:
    assert [job.sampling.seed for job in jobs_of(completion(seed=MAX_SEED), [1], [2])] == [MAX_SEED, 0]


def test_job_says_who_pays_where_it_runs_and_until_when() -> None:
    (job,) = jobs_of(completion(), [1], route=Route(make_route(pool=True).resource, "ppt"))
    assert (job.team_id, job.key_id, job.resource_id, job.billing, job.work_class) == (
        "team_1",
        "key_1",
        "res_1",
        "ppt",
        "live",
    )
    assert (job.accepted_unix_ms, job.deadline_unix_ms) == (1_000, 301_000)
    assert (job.model.name, job.model.revision, job.model.folder) == ("acme/tiny", 3, "mod_1/3")
    assert (job.model.base, job.model.tokenizer_folder) == (None, "mod_1/3")
    assert (job.request_id, job.owner_queue, job.max_tokens, job.operation) == (
        "req_1",
        "replies",
        5,
        "text_completion",
    )
    assert jobs_of(completion(), [1])[0].billing == "resource"


def test_a_job_for_an_adapter_names_the_weights_below_it() -> None:
    model = make_model(base=BaseView("mod_2", "platform/big", 4, "mod_2/4"))
    context = JobContext("req_1", make_principal(), model, make_route(), "replies", 1_000, 300.0)
    (job,) = build_jobs(completion(), [[1]], 5, context, lambda: "job_1")
    assert (job.model.folder, job.model.tokenizer_folder) == ("mod_1/3", "mod_2/4")
    assert job.model.base == WeightsRef(
        model_id="mod_2", revision=4, name="platform/big", folder="mod_2/4", signature=model.signature
    )


@pytest.mark.parametrize(
    ("fields", "stop_token_ids"),
    [
        ({}, [EOS]),
        ({"stop_token_ids": [4, EOS, 4]}, [EOS, 4]),
        ({"ignore_eos": True}, []),
        ({"ignore_eos": True, "stop_token_ids": [4]}, [4]),
    ],
)
def test_stop_tokens_are_the_models_and_the_clients(
    fields: dict[str, object], stop_token_ids: list[int]
) -> None:
    assert jobs_of(completion(**fields), [1])[0].stop_token_ids == stop_token_ids


@pytest.mark.parametrize(("top_k", "sent"), [(-1, 0), (0, 0), (1, 1), (258, 258), (259, 0), (1_000_000, 0)])
def test_top_k_that_cuts_nothing_off_is_off(top_k: int, sent: int) -> None:
    assert jobs_of(completion(top_k=top_k), [1])[0].sampling.top_k == sent


@pytest.mark.parametrize(
    ("model_tokens", "resource_tokens", "tokens"), [(4096, 2048, 2048), (1024, 2048, 1024)]
)
def test_context_is_the_smaller_of_models_and_resources(
    model_tokens: int, resource_tokens: int, tokens: int
) -> None:
    model, route = make_model(context_tokens=model_tokens), make_route(max_context_tokens=resource_tokens)
    assert context_tokens(model, route) == tokens


@pytest.mark.parametrize(
    ("wanted", "prompt_tokens", "max_tokens"),
    [
        (completion(max_tokens=10), 90, 10),
        (completion(max_tokens=0, echo=True), 99, 0),
        (chat(), 10, 50),
        (chat(), 70, 30),
        (chat(), 99, 1),
        (chat(max_tokens=80), 10, 80),
        (chat(min_tokens=30), 70, 30),
    ],
)
def test_answer_may_take_what_was_asked_or_what_is_left(
    wanted: GenerationRequest, prompt_tokens: int, max_tokens: int
) -> None:
    assert choose_max_tokens(wanted, [[1], [1] * prompt_tokens], 100, 50) == max_tokens


@pytest.mark.parametrize(
    ("wanted", "prompt_tokens", "code", "param"),
    [
        (completion(max_tokens=11), 90, "context_length_exceeded", "prompt"),
        (completion(), 100, "context_length_exceeded", "prompt"),
        (chat(), 100, "context_length_exceeded", "messages"),
        (chat(), 0, "empty_prompt", "messages"),
        (chat(min_tokens=31), 70, "invalid_value", "min_tokens"),
    ],
)
def test_request_that_does_not_fit_is_refused(
    wanted: GenerationRequest, prompt_tokens: int, code: str, param: str
) -> None:
    with pytest.raises(ApiError) as caught:
        choose_max_tokens(wanted, [[1], [1] * prompt_tokens], 100, 50)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)


def test_refusal_names_the_counts() -> None:
    with pytest.raises(ApiError) as caught:
        choose_max_tokens(completion(max_tokens=11), [[1] * 90], 100, 50)
    for count in ("100", "101", "90", "11"):
        assert count in caught.value.message.replace(".", " ").split()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [1, 259]}, "prompt"),
        ({"prompt": [[1], [259]]}, "prompt"),
        ({"logit_bias": {"259": 1}}, "logit_bias"),
        ({"stop_token_ids": [259]}, "stop_token_ids"),
    ],
)
def test_token_outside_of_the_vocabulary_is_refused(fields: dict[str, object], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_vocabulary(completion(**fields), 259)
    assert (caught.value.code, caught.value.param) == ("invalid_token_id", param)
    check_vocabulary(completion(**fields), 260)


@pytest.mark.parametrize(
    ("outcome", "code", "status", "shown", "may_retry"),
    [
        ("expired", "deadline_exceeded", 504, "deadline_exceeded", False),
        ("expired", None, 504, "deadline_exceeded", False),
        ("failed", "resource_off", 409, "resource_off", False),
        ("failed", "poison", 500, "poison", False),
        ("failed", "context_length_exceeded", 400, "context_length_exceeded", True),
        ("failed", "invalid_request", 400, "invalid_request", True),
        ("failed", "model_unavailable", 503, "model_unavailable", True),
        ("failed", None, 503, "generation_failed", True),
        ("cancelled", None, 503, "generation_failed", True),
    ],
)
def test_how_a_job_ended_has_one_answer(
    outcome: str, code: str | None, status: int, shown: str, may_retry: bool
) -> None:
    error = refusal_of(finished(0, outcome=outcome, code=code))
    assert error is not None
    assert (error.status, error.code) == (status, shown)
    assert (error.headers.get("x-should-retry") != "false") is may_retry
    assert refusal_of(finished(3, "stop")) is None
