"""From a request to its jobs: one per prompt. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from shared.inference.parameters import MAX_SEED, GenerationRequest
from shared.inference.principal import ModelView, Principal, Route
from shared.messages import BillingMode, GenerateJob, ModelRef, SamplingParams, WeightsRef, WorkClass


@dataclass(frozen=True, slots=True)
class JobContext:
    """What all jobs of one request share."""

    request_id: str
    principal: Principal
    model: ModelView
    route: Route
    owner_queue: str
    accepted_unix_ms: int
    deadline_s: float
    work_class: WorkClass = "live"


def build_jobs(
    wanted: GenerationRequest,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    context: JobContext,
    new_job_id: Callable[[], str],
) -> list[GenerateJob]:
    """One job per prompt, in order.

    1. Choice `prompt * n + i` samples with `seed + prompt * n + i`: equal prompts get answers of their own.
    2. The model's end-of-sequence ids stop an answer, unless the client wants them ignored; its own ids always do.
    3. A `top_k` that cuts nothing off is off.
    """
    model = context.model
    eos = () if wanted.sampling.ignore_eos else model.eos_token_ids  # 2
    stop_token_ids = list(dict.fromkeys((*eos, *wanted.stop_token_ids)))
    shared = shared_fields(context)
    return [
        GenerateJob(
            **shared,
            job_id=new_job_id(),
            operation=wanted.operation,
            prompt_tokens=list(tokens),
            max_tokens=max_tokens,
            choices=wanted.n,
            sampling=_sampling(wanted, prompt_index * wanted.n, model.vocab_size),
            stop=list(wanted.stop),
            stop_token_ids=stop_token_ids,
        )
        for prompt_index, tokens in enumerate(prompts)
    ]


def shared_fields(context: JobContext) -> dict[str, Any]:
    """What the jobs of one request have in common: all fields of `messages.Job` but the id."""
    model = context.model
    billing: BillingMode = "ppt" if context.route.billing == "ppt" else "resource"
    return {
        "request_id": context.request_id,
        "team_id": context.principal.team_id,
        "key_id": context.principal.key_id,
        "resource_id": context.route.resource.resource_id,
        "billing": billing,
        "work_class": context.work_class,
        "model_type": model.model_type,
        "model": ModelRef(
            model_id=model.model_id,
            revision=model.revision,
            name=model.full_name,
            folder=model.folder,
            signature=model.signature,
            base=_base(model),
        ),
        "owner_queue": context.owner_queue,
        "accepted_unix_ms": context.accepted_unix_ms,
        "deadline_unix_ms": context.accepted_unix_ms + int(context.deadline_s * 1000),
    }


def _base(model: ModelView) -> WeightsRef | None:
    if model.base is None:
        return None
    return WeightsRef(
        model_id=model.base.model_id,
        revision=model.base.revision,
        name=model.base.full_name,
        folder=model.base.folder,
        signature=model.signature,
    )


def _sampling(wanted: GenerationRequest, first_choice: int, vocab_size: int) -> SamplingParams:
    sampling = wanted.sampling
    return msgspec.structs.replace(
        sampling,
        seed=(sampling.seed + first_choice) & MAX_SEED,  # 1
        top_k=0 if sampling.top_k >= vocab_size else sampling.top_k,  # 3
    )
