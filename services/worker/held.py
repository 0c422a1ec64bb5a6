"""A job in a worker's hands: its state, what it has generated, and the messages made from it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec
from opentelemetry.trace import Span

from services.worker.engine import Delta, Sampling, SequenceRequest
from services.worker.engine import TokenLogprob as EngineLogprob
from services.worker.pull_snapshot import ModelKey
from services.worker.vectors import PLACES
from shared.broker import Delivery
from shared.messages import (
    ChoiceResult,
    EmbedJob,
    FinishedReport,
    GenerateJob,
    JobFinished,
    JobQueueMessage,
    JobUsage,
    Outcome,
    Timings,
    TokenDelta,
    TokenLogprob,
)

SEED_BITS = 63


class HeldState(StrEnum):
    """waiting -> claiming -> granted -> running -> finishing; back to waiting when an owner does not answer.

    A first delivery goes from waiting to running at once, as attempt 1, while its claim is on the way (`is_granted` is
    false until the answer). If the owner wants another attempt, it goes back to granted.
    A running job that gives way to others is paused, and runs again from the tokens that it has.
    """

    WAITING = "waiting"
    CLAIMING = "claiming"
    GRANTED = "granted"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHING = "finishing"


@dataclass(slots=True)
class ChoiceRecord:
    """One choice of this attempt: every delta is kept until the job ends, so that any can be repeated."""

    prior_tokens: list[int]
    deltas: list[TokenDelta] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def tokens(self) -> list[int]:
        """The answer so far."""
        return self.prior_tokens + [token for delta in self.deltas for token in delta.tokens]

    @property
    def token_count(self) -> int:
        return len(self.prior_tokens) + sum(len(delta.tokens) for delta in self.deltas)


@dataclass(slots=True, eq=False)
class Held:
    """eq=False: a held job is itself, never equal to another."""

    job: JobQueueMessage
    deliveries: list[Delivery]
    received_s: float
    lane: int
    span: Span
    found_ready: bool = False
    """Whether its model was ready when it came."""
    state: HeldState = HeldState.WAITING
    attempt: int = 0
    is_granted: bool = False
    answer: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the owner's answer to the claim has come."""
    claim_id: str = ""
    claim_sent_s: float = 0.0
    claims_sent: int = 0
    """Since the job was last put aside."""
    claims_total: int = 0
    not_before_s: float = 0.0
    hold_until_s: float = 0.0
    """Until then it is kept although it waits; then it goes back to the queue."""
    choices: list[ChoiceRecord] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    vectors: list[bytes | None] = field(default_factory=list)
    """Of an `EmbedJob`, by input; None while it is not computed."""
    inputs_to_begin: list[int] = field(default_factory=list)
    """Of an `EmbedJob`: which of its inputs the engine was not given yet, the next one last."""
    pauses: int = 0
    paused_s: float = 0.0
    began_s: float = 0.0
    """When it last began, or went on, to run."""
    prefilled: set[int] = field(default_factory=set)
    received_unix_ns: int = field(default_factory=time.time_ns)
    swap_started_unix_ns: int | None = None
    swap_ended_unix_ns: int | None = None
    started_unix_ns: int | None = None
    prefilled_unix_ns: int | None = None
    first_token_unix_ns: int | None = None
    paused_unix_ns: int | None = None
    """Since when it has been paused, while it is."""
    paused_prefill_ns: int = 0
    paused_decode_ns: int = 0
    """In pauses that are over, by the stage that they broke."""

    @property
    def model(self) -> ModelKey:
        return (self.job.model.model_id, self.job.model.revision)

    @property
    def places(self) -> int:
        """How many of its sequences run at once."""
        return self.job.choices if isinstance(self.job, GenerateJob) else min(PLACES, len(self.job.inputs))

    def begin(self, attempt: int, prior_tokens: list[list[int]] | None = None) -> None:
        """Forget what an earlier attempt did here, and continue from `prior_tokens`; vectors are computed anew."""
        self.attempt = attempt
        if isinstance(self.job, GenerateJob):
            self.choices = [ChoiceRecord(list(tokens)) for tokens in prior_tokens or [[]] * self.job.choices]
        else:
            self.vectors = [None] * len(self.job.inputs)
            self._list_inputs()
        self.prompt_logprobs = []
        self.prefilled = set()
        self.started_unix_ns = self.prefilled_unix_ns = self.first_token_unix_ns = self.paused_unix_ns = None
        self.paused_prefill_ns = self.paused_decode_ns = 0

    def pause(self) -> None:
        """running -> paused. What its sequences still report, on their way from the engine, is of an old run then."""
        self.state = HeldState.PAUSED
        self.pauses += 1
        self.paused_s = time.monotonic()
        self.paused_unix_ns = time.time_ns()
        self._list_inputs()

    def end_pause(self, now_unix_ns: int) -> None:
        """It goes on, or ends."""
        if self.paused_unix_ns is None:
            return
        paused_ns = max(0, now_unix_ns - self.paused_unix_ns)
        if self.prefilled_unix_ns is None:
            self.paused_prefill_ns += paused_ns
        else:
            self.paused_decode_ns += paused_ns
        self.paused_unix_ns = None

    def _list_inputs(self) -> None:
        open_inputs = [index for index, vector in enumerate(self.vectors) if vector is None]
        self.inputs_to_begin = open_inputs[::-1]

    @property
    def completion_tokens(self) -> int:
        """Tokens published so far, over all choices and attempts."""
        return sum(choice.token_count for choice in self.choices)

    def sequence_id(self, index: int) -> str:
        """Of a choice, or of an input to embed; another one in each run."""
        return f"{self.job.job_id}/{self.attempt}.{self.pauses}/{index}"

    def sequence_ids(self) -> list[str]:
        return [self.sequence_id(index) for index in range(len(self.choices) or len(self.vectors))]

    def remaining_tokens(self) -> int:
        """Upper bound of what is left to generate."""
        if isinstance(self.job, EmbedJob):
            return 0
        return self.job.max_tokens * self.job.choices - self.completion_tokens


def parse_sequence_id(sequence_id: str) -> tuple[str, int]:
    """Return (job id, index of the choice or of the input)."""
    job_id, _, index = sequence_id.rsplit("/", 2)
    return job_id, int(index)


def model_handle(key: ModelKey) -> str:
    return f"{key[0]}@{key[1]}"


def model_key(handle: str) -> ModelKey:
    model_id, _, revision = handle.rpartition("@")
    return model_id, int(revision)


def choice_seed(seed: int, choice: int) -> int:
    return (seed + choice) % (1 << SEED_BITS)


def first_requests(held: Held) -> list[SequenceRequest]:
    """What a job begins with, or goes on with after a pause: all choices without an end, or the first of its inputs."""
    if isinstance(held.job, EmbedJob):
        requests = (next_embed_request(held, held.job) for _ in range(held.places))
        return [request for request in requests if request is not None]
    return _sequence_requests(held, held.job)


def next_embed_request(held: Held, job: EmbedJob) -> SequenceRequest | None:
    """For the next input that the engine was not given, or None when it has all."""
    if not held.inputs_to_begin:
        return None
    index = held.inputs_to_begin.pop()
    return SequenceRequest(
        sequence_id=held.sequence_id(index),
        model=model_handle(held.model),
        isolation_key=job.team_id,
        prompt_tokens=job.inputs[index],
        max_tokens=0,
        sampling=Sampling(),
        pooling=job.pooling,
        background=job.work_class == "batch",
    )


def _sequence_requests(held: Held, job: GenerateJob) -> list[SequenceRequest]:
    params = job.sampling
    requests = []
    for index, choice in enumerate(held.choices):
        if choice.finish_reason is not None:
            continue
        sampling = Sampling(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=tuple((token, bias) for token, bias in params.logit_bias),
            seed=choice_seed(params.seed, index),
            logprobs=params.logprobs,
            ignore_eos=params.ignore_eos,
            min_tokens=params.min_tokens,
            bad_words=tuple(tuple(word) for word in params.bad_words),
        )
        requests.append(
            SequenceRequest(
                sequence_id=held.sequence_id(index),
                model=model_handle(held.model),
                isolation_key=job.team_id,
                prompt_tokens=job.prompt_tokens,
                max_tokens=job.max_tokens,
                sampling=sampling,
                stop=tuple(job.stop),
                stop_token_ids=tuple(job.stop_token_ids),
                prior_tokens=choice.tokens,
                echo_logprobs=params.echo_logprobs and index == 0 and not held.prompt_logprobs,
                background=job.work_class == "batch",
            )
        )
    return requests


def to_message(held: Held, choice: int, delta: Delta) -> TokenDelta:
    """The wire form of one engine delta."""
    return TokenDelta(
        job_id=held.job.job_id,
        attempt=held.attempt,
        choice=choice,
        token_start=delta.token_start,
        tokens=list(delta.tokens),
        text=delta.text,
        logprobs=to_logprobs(delta.logprobs),
        finish_reason=delta.finish_reason,  # type: ignore[arg-type]
    )


def to_logprobs(logprobs: tuple[EngineLogprob, ...]) -> list[TokenLogprob]:
    return [TokenLogprob(token=item.token, logprob=item.logprob, top=list(item.top)) for item in logprobs]


def merged(deltas: list[TokenDelta]) -> TokenDelta:
    """Consecutive deltas of one choice as one."""
    first, last = deltas[0], deltas[-1]
    if len(deltas) == 1:
        return first
    return TokenDelta(
        job_id=first.job_id,
        attempt=first.attempt,
        choice=first.choice,
        token_start=first.token_start,
        tokens=[token for delta in deltas for token in delta.tokens],
        text="".join(delta.text for delta in deltas),
        logprobs=[item for delta in deltas for item in delta.logprobs],
        finish_reason=last.finish_reason,
    )


def repeated(held: Held, choice: int, token_start: int) -> TokenDelta | None:
    """What was published of a choice from `token_start` on, or None when nothing begins there."""
    if not 0 <= choice < len(held.choices):
        return None
    later = [delta for delta in held.choices[choice].deltas if delta.token_start >= token_start]
    return merged(later) if later and later[0].token_start == token_start else None


def timings(held: Held, now_unix_ns: int) -> Timings:
    """Where the time went; stages that were not reached are 0. To be paused is to queue once more."""
    accepted_ns = held.job.accepted_unix_ms * 1_000_000
    started_ns = held.started_unix_ns or now_unix_ns
    swap_ns = 0
    if held.swap_started_unix_ns is not None:
        swap_ns = (held.swap_ended_unix_ns or now_unix_ns) - held.swap_started_unix_ns
    prefilled_ns = held.prefilled_unix_ns or now_unix_ns
    held.end_pause(now_unix_ns)
    paused_ns = held.paused_prefill_ns + held.paused_decode_ns
    prefill_ns = prefilled_ns - started_ns - held.paused_prefill_ns if held.started_unix_ns else 0
    decode_ns = now_unix_ns - prefilled_ns - held.paused_decode_ns if held.prefilled_unix_ns else 0
    return Timings(
        queue_ms=_ms(started_ns - accepted_ns - swap_ns + paused_ns),
        swap_ms=_ms(swap_ns),
        prefill_ms=_ms(prefill_ns),
        decode_ms=_ms(decode_ns),
    )


def _ms(duration_ns: int) -> float:
    return round(max(0, duration_ns) / 1e6, 3)


def finished_message(
    held: Held, worker_id: str, outcome: Outcome, code: str | None, message: str | None, spent: Timings
) -> JobFinished:
    """The owner's copy of the end."""
    results = []
    for index, choice in enumerate(held.choices):
        results.append(
            ChoiceResult(
                index=index,
                tokens=choice.tokens,
                text="".join(delta.text for delta in choice.deltas),
                finish_reason=choice.finish_reason,  # type: ignore[arg-type]
                logprobs=[item for delta in choice.deltas for item in delta.logprobs],
            )
        )
    return JobFinished(
        job_id=held.job.job_id,
        attempt=held.attempt,
        worker_id=worker_id,
        outcome=outcome,
        error_code=code,
        error_message=message,
        choices=results,
        prompt_logprobs=held.prompt_logprobs,
        embeddings=[vector for vector in held.vectors if vector is not None]
        if outcome == "succeeded"
        else [],
        timings=spent,
    )


def usage_message(held: Held, worker_id: str, outcome: Outcome, code: str | None, spent: Timings) -> JobUsage:
    """Billing's copy of the end: counts and times only."""
    report = FinishedReport(
        attempt=held.attempt, outcome=outcome, completion_tokens=held.completion_tokens, error_code=code
    )
    usage = reported_usage(held.job, worker_id, report)
    prompt_tokens = usage.prompt_tokens
    if outcome == "cancelled" and not isinstance(held.job, GenerateJob):
        prompt_tokens = sum(len(held.job.inputs[index]) for index in held.prefilled)
    return msgspec.structs.replace(
        usage,
        prompt_tokens=prompt_tokens,
        prefill_ran=bool(held.prefilled) or held.completion_tokens > 0,
        first_token_unix_ms=held.first_token_unix_ns // 1_000_000 if held.first_token_unix_ns else None,
        timings=spent,
    )


def reported_usage(job: JobQueueMessage, worker_id: str, report: FinishedReport) -> JobUsage:
    """The fact that a worker, perhaps another one that is dead by now, finished the job."""
    return JobUsage(
        event_id=f"use_{job.job_id}_{report.attempt}",
        job_id=job.job_id,
        attempt=report.attempt,
        request_id=job.request_id,
        team_id=job.team_id,
        key_id=job.key_id,
        resource_id=job.resource_id,
        worker_id=worker_id,
        billing=job.billing,
        work_class=job.work_class,
        operation=job.operation,
        model_type=job.model_type,
        model_id=job.model.model_id,
        model_name=job.model.name,
        revision=job.model.revision,
        outcome=report.outcome,
        prompt_tokens=job.input_token_count,
        completion_tokens=report.completion_tokens,
        prefill_ran=report.completion_tokens > 0,
        accepted_unix_ms=job.accepted_unix_ms,
        finished_unix_ms=time.time_ns() // 1_000_000,
        error_code=report.error_code,
        lease_ids=job.lease_ids,
        reserved_nanousd=job.reserved_nanousd,
    )
