"""A job that gives way goes on from the tokens it has: nothing twice, nothing lost, whatever was still on its way."""

from __future__ import annotations

import msgspec
from opentelemetry import trace

from services.worker.held import Held, HeldState, first_requests, next_embed_request, timings
from shared.messages import EmbedJob, FinishReason, GenerateJob, Timings, TokenDelta, TokenLogprob
from tests.integration.worker_process import stub_embed_job, stub_job

JOB = stub_job("replies.v1.owner", "res_1", max_tokens=8)
EMBED = stub_embed_job("replies.v1.owner", "res_1", [[index] for index in range(40)])


def held_job(job: GenerateJob | EmbedJob) -> Held:
    held = Held(job, [], 0.0, 0, trace.INVALID_SPAN)
    held.begin(1)
    held.state = HeldState.RUNNING
    return held


def delta(
    held: Held, choice: int, start: int, tokens: list[int], finish: FinishReason | None = None
) -> TokenDelta:
    return TokenDelta(
        job_id=held.job.job_id,
        attempt=1,
        choice=choice,
        token_start=start,
        tokens=tokens,
        text="",
        finish_reason=finish,
    )


def test_open_choices_go_on_from_their_tokens_and_ended_ones_do_not_run_again() -> None:
    held = held_job(msgspec.structs.replace(JOB, choices=2))
    held.begin(1, [[7], []])
    held.choices[0].deltas.append(delta(held, 0, 1, [8, 9]))
    held.choices[1].deltas.append(delta(held, 1, 0, [5], "stop"))
    held.choices[1].finish_reason = "stop"
    held.pause()
    requests = first_requests(held)
    assert [list(request.prior_tokens) for request in requests] == [[7, 8, 9]]


def test_each_run_has_names_of_its_own_for_its_sequences() -> None:
    held = held_job(JOB)
    before = held.sequence_ids()
    held.pause()
    assert not set(before) & set(held.sequence_ids())


def test_inputs_are_embedded_once_and_those_cut_off_again() -> None:
    job = EMBED
    held = held_job(job)
    first_requests(held)
    held.vectors[1] = b"done"
    held.pause()
    left = [index for index in range(len(job.inputs)) if index != 1]
    begun = [request.sequence_id for request in first_requests(held)]
    while (request := next_embed_request(held, job)) is not None:
        begun.append(request.sequence_id)
    assert begun == [held.sequence_id(index) for index in left]


def test_a_prompt_is_scored_once() -> None:
    sampling = msgspec.structs.replace(JOB.sampling, echo_logprobs=True)
    held = held_job(msgspec.structs.replace(JOB, sampling=sampling))
    held.pause()
    assert [request.echo_logprobs for request in first_requests(held)] == [True]
    held.prompt_logprobs = [TokenLogprob(token=1, logprob=-0.5)]
    held.pause()
    assert [request.echo_logprobs for request in first_requests(held)] == [False]


def test_the_time_of_a_pause_is_queueing_and_neither_prefill_nor_decode() -> None:
    held = held_job(JOB)
    accepted_ns = held.job.accepted_unix_ms * 1_000_000
    second = 1_000_000_000

    def pause(begins_s: int, ends_s: int | None) -> None:
        held.pause()
        held.paused_unix_ns = accepted_ns + begins_s * second
        if ends_s is not None:
            held.end_pause(accepted_ns + ends_s * second)

    held.started_unix_ns = accepted_ns + second
    pause(2, 5)
    held.end_pause(accepted_ns + 99 * second)  # it is over already
    held.prefilled_unix_ns = accepted_ns + 7 * second
    pause(9, 19)
    pause(20, None)  # and ends so
    spent = timings(held, accepted_ns + 21 * second)
    assert spent == Timings(queue_ms=15_000, swap_ms=0, prefill_ms=3_000, decode_ms=3_000)
    held.begin(2)
    held.started_unix_ns = accepted_ns + 30 * second
    assert timings(held, accepted_ns + 31 * second).queue_ms == 30_000, "of the attempt that counts"
