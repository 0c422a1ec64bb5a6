"""A line on its way: its jobs as their owner sees them, and the answer that comes together. No I/O."""

from __future__ import annotations

import time
from collections.abc import Iterator

from services.batch.preparation import Prepared, job_id_at
from services.batch.records import Batch, Lost
from shared.inference.checks import refusal_of
from shared.inference.embeddings import EmbeddingRequest, embedding_parts
from shared.inference.errors import ApiError, error_type
from shared.inference.responses import (
    Choice,
    Echo,
    Head,
    Spellings,
    chat_body,
    completion_body,
    encode,
    tokens_in,
    usage_of,
)
from shared.messages import BillingMode, GenerateJob, JobQueueMessage, JobVoided
from shared.ownership import Deliver, End, OwnedJob


class LineRun:
    """ends[i] is the end of job i, or None while it runs."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        now_s, now_ms = time.monotonic(), time.time() * 1000
        self.owned = [
            OwnedJob(job, deadline_s=now_s + max(0.0, job.deadline_unix_ms - now_ms) / 1000, now_s=now_s)
            for job in prepared.jobs
        ]
        self.sent_s = now_s
        self.ends: list[End | None] = [None] * len(self.owned)
        self._choices = [
            [Choice() for _ in range(job.choices if isinstance(job, GenerateJob) else 0)]
            for job in prepared.jobs
        ]

    @property
    def job_id(self) -> str:
        """The first job's, which stands in the line's row."""
        return self.prepared.jobs[0].job_id

    @property
    def is_over(self) -> bool:
        return None not in self.ends

    @property
    def ends_with_its_batch(self) -> bool:
        """Whether the deadline of its jobs is the batch's end, and not an earlier one."""
        ends_unix_ms = int(self.prepared.batch.expires_at.timestamp() * 1000)
        return self.prepared.jobs[0].deadline_unix_ms >= ends_unix_ms

    @property
    def completion_tokens(self) -> int:
        return sum(len(tokens) for owned in self.owned for tokens in owned.tokens)

    def deliver(self, index: int, delta: Deliver) -> None:
        choice = self._choices[index][delta.choice]
        choice.text.append(delta.text)
        choice.logprobs += delta.logprobs
        choice.finish_reason = delta.finish_reason or choice.finish_reason

    def failure(self) -> End | None:
        """The end of a job that did not succeed, if there is one."""
        return next((end for end in self.ends if end is not None and end.outcome != "succeeded"), None)

    def tokens_to_spell(self) -> list[int]:
        """Token ids whose spelling the answer needs; empty for one without log-probabilities."""
        wanted = self.prepared.wanted
        if isinstance(wanted, EmbeddingRequest) or wanted.sampling.logprobs is None:
            return []
        shown = [token for choice in self._all_choices() for token in tokens_in(choice.logprobs)]
        if wanted.echo:
            shown += [job.prompt_tokens[0] for job in self.prepared.jobs if isinstance(job, GenerateJob)]
            shown += [token for end in self.ends if end for token in tokens_in(end.prompt_logprobs)]
        return shown

    def body(self, spellings: Spellings | None) -> bytes:
        """The answer as the endpoint would give it. All jobs have succeeded."""
        prepared, wanted = self.prepared, self.prepared.wanted
        head = Head(
            prepared.request_id,
            prepared.jobs[0].accepted_unix_ms // 1000,
            prepared.model.full_name,
            prepared.model.revision,
        )
        usage = usage_of(
            prepared.prompt_tokens, self.completion_tokens, (end.timings for end in self.ends if end)
        )
        if isinstance(wanted, EmbeddingRequest):
            vectors = [vector for end in self.ends if end for vector in end.embeddings]
            return b"".join(embedding_parts(head, vectors, wanted.encoding, usage))
        choices = list(self._all_choices())
        if wanted.operation == "chat":
            return chat_body(head, choices, usage, spellings=spellings)
        return completion_body(head, choices, usage, spellings=spellings, echoes=self._echoes())

    def _all_choices(self) -> Iterator[Choice]:
        for choices in self._choices:
            yield from choices

    def _echoes(self) -> list[Echo | None]:
        texts = self.prepared.prompt_texts
        if not texts:
            return [None for _ in self._all_choices()]
        echoes: list[Echo | None] = []
        for text, job, end in zip(texts, self.prepared.jobs, self.ends, strict=True):
            assert isinstance(job, GenerateJob)
            echo = Echo(text, job.prompt_tokens[0], end.prompt_logprobs if end else ())
            echoes += [echo] * job.choices
        return echoes


def error_body(error: ApiError) -> bytes:
    """An error as the endpoint's body."""
    return encode(
        {
            "error": {
                "message": error.message,
                "type": error_type(error.status),
                "param": error.param,
                "code": error.code,
            }
        }
    )


def refusal_of_end(end: End) -> ApiError:
    """How a line whose job did not succeed is told."""
    refusal = refusal_of(end)
    assert refusal is not None
    return refusal


def voided(job: JobQueueMessage, reason_code: str) -> JobVoided:
    """Nobody has this job's answer: it costs nothing, whatever its worker did."""
    return JobVoided(
        event_id=f"void_{job.job_id}",
        job_id=job.job_id,
        request_id=job.request_id,
        team_id=job.team_id,
        key_id=job.key_id,
        resource_id=job.resource_id,
        billing=job.billing,
        work_class=job.work_class,
        operation=job.operation,
        model_type=job.model_type,
        model_id=job.model.model_id,
        model_name=job.model.name,
        revision=job.model.revision,
        reason="deadline" if reason_code == "batch_expired" else "failed",
        prompt_tokens=job.input_token_count,
        delivered_tokens=0,
        accepted_unix_ms=job.accepted_unix_ms,
        voided_unix_ms=time.time_ns() // 1_000_000,
        error_code=reason_code,
        lease_ids=job.lease_ids,
        reserved_nanousd=job.reserved_nanousd,
    )


_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


def voids_of_lost(lost: Lost) -> list[JobVoided]:
    """The same for the jobs of a line whose owner is gone. How long its prompt was nobody knows any more."""
    batch: Batch = lost.batch
    billing: BillingMode = lost.billing
    return [
        JobVoided(
            event_id=f"void_{job_id}",
            job_id=job_id,
            request_id=lost.request_id,
            team_id=batch.team_id,
            key_id=batch.key_id,
            resource_id=lost.resource_id,
            billing=billing,
            work_class="batch",
            operation=_OPERATIONS[batch.endpoint],
            model_type=batch.model_type or "",
            model_id=batch.model_id or "",
            model_name=batch.model_name or "",
            revision=batch.revision or 0,
            reason="failed",
            prompt_tokens=0,
            delivered_tokens=0,
            accepted_unix_ms=lost.accepted_unix_ms,
            voided_unix_ms=time.time_ns() // 1_000_000,
            error_code="owner_lost",
            lease_ids=list(lost.reserved.lease_ids),
            reserved_nanousd=lost.reserved.nanousd[index] if lost.reserved.nanousd else 0,
        )
        for index, job_id in enumerate(job_id_at(lost.job_id, index) for index in range(lost.jobs))
    ]
