"""A job's span and its stages: queue wait, swap, prefill, decode."""

from __future__ import annotations

from services.worker.held import Held
from shared import telemetry
from shared.messages import GenerateJob, JobQueueMessage


def job_attributes(job: JobQueueMessage) -> dict[str, str | int]:
    """Attributes of the worker's span for a job: names and counts, never text."""
    limits = {telemetry.GEN_AI_MAX_TOKENS: job.max_tokens} if isinstance(job, GenerateJob) else {}
    return {
        **limits,
        telemetry.MESSAGING_SYSTEM: "rabbitmq",
        telemetry.GEN_AI_OPERATION: job.operation,
        telemetry.GEN_AI_PROVIDER: "roundhouse",
        telemetry.GEN_AI_REQUEST_MODEL: job.model.name,
        telemetry.GEN_AI_INPUT_TOKENS: job.input_token_count,
        telemetry.JOB_ID: job.job_id,
        telemetry.TEAM_ID: job.team_id,
        telemetry.RESOURCE_ID: job.resource_id,
    }


def record_stages(held: Held, now_unix_ns: int) -> None:
    """Spans of the stages that are over; the wait begins when the gateway accepted the request."""
    accepted_ns = held.job.accepted_unix_ms * 1_000_000
    waited_until_ns = held.swap_started_unix_ns or held.started_unix_ns or now_unix_ns
    telemetry.record_child(held.span, "queue_wait", accepted_ns, waited_until_ns)
    # A model that was resident leaves a swap of no length: every trace has the same stages.
    swapped = held.swap_started_unix_ns is not None
    swap_ended_ns = (held.swap_ended_unix_ns or now_unix_ns) if swapped else waited_until_ns
    telemetry.record_child(
        held.span, "swap", waited_until_ns, swap_ended_ns, {telemetry.SWAP_NEEDED: swapped}
    )
    if held.started_unix_ns is not None:
        prefilled_ns = held.prefilled_unix_ns or now_unix_ns
        telemetry.record_child(held.span, "prefill", held.started_unix_ns, prefilled_ns)
    if held.prefilled_unix_ns is not None:
        telemetry.record_child(held.span, "decode", held.prefilled_unix_ns, now_unix_ns)
