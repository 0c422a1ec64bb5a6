"""One example of every message type, each field set to something that is not its default.

Whoever adds a message adds its example here; whoever adds a field sets it here. `tests/contract/golden/` holds what
these look like on the wire.
"""

from __future__ import annotations

from typing import Any

from shared.messages import (
    CancelJob,
    ChoiceResult,
    CommandResult,
    CreateOption,
    CreateResource,
    DeleteResource,
    DrainWorker,
    Drop,
    EmbedJob,
    FinishedReport,
    GenerateJob,
    GrantCredit,
    Granted,
    JobClaimed,
    JobFinished,
    JobUsage,
    JobVoided,
    Message,
    ModelDamaged,
    ModelHistory,
    ModelRef,
    NodeDevice,
    NodeProcess,
    NodeReport,
    OwnerBeat,
    PaymentReported,
    RepeatTokens,
    ResidentModel,
    SamplingParams,
    ScaleResource,
    ScalingWindow,
    SetPrice,
    SetRate,
    SetScaling,
    SetTeamTerms,
    StartWorker,
    StopWorker,
    Timings,
    TokenDelta,
    TokenLogprob,
    TokensGenerated,
    TurnOffResource,
    TurnOnResource,
    WeightsRef,
    WithdrawPrice,
    WorkerBeat,
    WorkerReport,
    WorkerSpec,
)

NOW_UNIX_MS = 1_793_980_800_123

MODEL = ModelRef(
    model_id="mod_1",
    revision=3,
    name="acme/helper",
    folder="mod_1/3",
    signature="0123456789abcdef",
    base=WeightsRef(
        model_id="mod_2", revision=1, name="acme/base", folder="mod_2/1", signature="0123456789abcdef"
    ),
)

SAMPLING = SamplingParams(
    temperature=0.5,
    top_k=40,
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=-0.5,
    frequency_penalty=0.25,
    logit_bias=[(7, -100.0), (8, 2.5)],
    seed=2**63 - 1,
    logprobs=3,
    ignore_eos=True,
    min_tokens=2,
    echo_logprobs=True,
    bad_words=[[7], [8, 9]],
)

LOGPROBS = [TokenLogprob(token=11, logprob=-0.25, top=[(11, -0.25), (12, -1.5)])]
TIMINGS = Timings(queue_ms=1.5, swap_ms=200.25, prefill_ms=30.5, decode_ms=400.0)

WORKER_SPEC = WorkerSpec(
    worker_id="wrk_1",
    resource_id="res_1",
    place=2,
    incarnation="inc_1",
    pool=True,
    model_type="smollm2-135m",
    precision="int8",
    device_kind="cuda",
    max_batch=16,
    max_context_tokens=2048,
    kv_tokens=65_536,
    preload=[MODEL],
)

_COMMAND: dict[str, Any] = {
    "command_id": "cmd_1",
    "deadline_unix_ms": NOW_UNIX_MS + 5000,
    "reply_queue": "replies.v1.gw_1",
    "actor": "key_1",
}

_JOB: dict[str, Any] = {
    "job_id": "job_1",
    "request_id": "req_1",
    "team_id": "team_1",
    "key_id": "key_1",
    "resource_id": "res_1",
    "model_type": "smollm2-135m",
}

EXAMPLES: tuple[Message, ...] = (
    GenerateJob(
        **_JOB,
        billing="ppt",
        work_class="batch",
        operation="chat",
        model=MODEL,
        owner_queue="replies.v1.gw_1",
        prompt_tokens=[1, 2, 3],
        max_tokens=64,
        accepted_unix_ms=NOW_UNIX_MS,
        deadline_unix_ms=NOW_UNIX_MS + 300_000,
        choices=2,
        sampling=SAMPLING,
        stop=["\n\n", "größer", "終"],
        stop_token_ids=[0, 2],
    ),
    EmbedJob(
        **_JOB,
        billing="ppt",
        work_class="live",
        operation="embeddings",
        model=MODEL,
        owner_queue="replies.v1.gw_1",
        inputs=[[1, 2, 3], [4]],
        accepted_unix_ms=NOW_UNIX_MS,
        deadline_unix_ms=NOW_UNIX_MS + 300_000,
        pooling="last",
        dimensions=256,
    ),
    JobClaimed(job_id="job_1", claim_id="clm_1", worker_id="wrk_1", worker_queue="commands.v1.worker.wrk_1"),
    Granted(job_id="job_1", claim_id="clm_1", attempt=2, prior_tokens=[[5, 6], []]),
    Drop(
        job_id="job_1",
        claim_id="clm_1",
        reason="finished",
        report=FinishedReport(
            attempt=1, outcome="failed", completion_tokens=3, error_code="generation_failed"
        ),
    ),
    CancelJob(job_id="job_1", attempt=2, reason="client_gone"),
    RepeatTokens(job_id="job_1", attempt=2, choice=1, token_start=4),
    TokensGenerated(
        worker_id="wrk_1",
        deltas=[
            TokenDelta(
                job_id="job_1",
                attempt=2,
                choice=1,
                token_start=4,
                tokens=[9, 10],
                text=" wörld\u2028",
                logprobs=LOGPROBS,
                finish_reason="stop",
            )
        ],
    ),
    JobFinished(
        job_id="job_1",
        attempt=2,
        worker_id="wrk_1",
        outcome="failed",
        error_code="model_unavailable",
        error_message="the model's files are gone",
        choices=[
            ChoiceResult(index=1, tokens=[9, 10], text=" world", finish_reason="length", logprobs=LOGPROBS)
        ],
        prompt_logprobs=LOGPROBS,
        embeddings=[b"\x00\x00\x80\x3f\x00\x00\x00\xff"],
        timings=TIMINGS,
    ),
    WorkerBeat(worker_id="wrk_1", jobs=[("job_1", 2), ("job_2", 1)]),
    OwnerBeat(owner_queue="replies.v1.gw_1", job_ids=["job_1", "job_2"]),
    JobUsage(
        **_JOB,
        event_id="evt_1",
        attempt=2,
        worker_id="wrk_1",
        billing="ppt",
        work_class="live",
        operation="text_completion",
        model_id="mod_1",
        model_name="acme/helper",
        revision=3,
        outcome="succeeded",
        prompt_tokens=3,
        completion_tokens=64,
        prefill_ran=True,
        accepted_unix_ms=NOW_UNIX_MS,
        finished_unix_ms=NOW_UNIX_MS + 900,
        error_code="none",
        first_token_unix_ms=NOW_UNIX_MS + 50,
        timings=TIMINGS,
    ),
    JobVoided(
        **_JOB,
        event_id="evt_2",
        billing="resource",
        work_class="live",
        operation="chat",
        model_id="mod_1",
        model_name="acme/helper",
        revision=3,
        reason="client_gone",
        prompt_tokens=3,
        delivered_tokens=17,
        accepted_unix_ms=NOW_UNIX_MS,
        voided_unix_ms=NOW_UNIX_MS + 700,
        error_code="client_closed",
    ),
    PaymentReported(
        provider="stripe",
        event_id="evt_3",
        what="paid",
        payment_id="pi_1",
        amount_nanousd=5_000_000_000,
        team_id="team_1",
        dispute_id="du_1",
    ),
    CommandResult(
        command_id="cmd_1",
        ok=False,
        code="resource_name_taken",
        message="there is a resource of that name",
        body={"resource_id": "res_1", "nested": {"count": 2, "none": None}},
    ),
    CreateOption(
        **_COMMAND,
        model_type="smollm2-135m",
        name="cpu-small",
        device_kind="cpu",
        precision="fp32",
        max_batch=8,
        max_context_tokens=2048,
        kv_tokens=16_384,
        hourly_rate_nanousd=50_000_000,
    ),
    CreateResource(
        **_COMMAND,
        team_id="team_1",
        name="helpers",
        model_type="smollm2-135m",
        option_id="opt_1",
        fixed_count=2,
        pool=True,
    ),
    ScaleResource(**_COMMAND, team_id="team_1", resource_id="res_1", fixed_count=3),
    SetScaling(
        **_COMMAND,
        team_id="team_1",
        resource_id="res_1",
        autoscaling=True,
        min_count=1,
        max_count=4,
        idle_timeout_s=900,
        when_asleep="refuse",
        windows=[
            ScalingWindow(
                name="office hours",
                start="0 8 * * mon-fri",
                duration_minutes=600,
                time_zone="Europe/Berlin",
                min_count=2,
                max_count=8,
            )
        ],
        if_version=7,
    ),
    TurnOnResource(**_COMMAND, team_id="team_1", resource_id="res_1"),
    TurnOffResource(**_COMMAND, team_id="team_1", resource_id="res_1"),
    DeleteResource(**_COMMAND, team_id="team_1", resource_id="res_1"),
    SetPrice(
        **_COMMAND,
        model_type="smollm2-135m",
        work_class="batch",
        prompt_nanousd=20,
        completion_nanousd=60,
        starts_unix_ms=NOW_UNIX_MS,
    ),
    SetRate(**_COMMAND, option_id="opt_1", hourly_rate_nanousd=600_000_000, starts_unix_ms=NOW_UNIX_MS),
    WithdrawPrice(**_COMMAND, version_id="price_1"),
    GrantCredit(**_COMMAND, team_id="team_1", amount_nanousd=5_000_000_000, reason="sorry for the outage"),
    SetTeamTerms(**_COMMAND, team_id="team_1", pays="postpaid", credit_limit_nanousd=100_000_000_000),
    StartWorker(node_id="local", epoch=7, deadline_unix_ms=NOW_UNIX_MS + 20_000, spec=WORKER_SPEC),
    StopWorker(node_id="local", epoch=7, incarnation="inc_1", grace_s=30.5),
    DrainWorker(worker_id="wrk_1", incarnation="inc_1"),
    ModelDamaged(
        event_id="evt_1",
        worker_id="wrk_1",
        resource_id="res_1",
        model_id="mod_1",
        revision=2,
        reason="chunk 3 of 78 differs from what was written",
        found_unix_ms=1_700_000_000_000,
    ),
    NodeReport(
        node_id="local",
        agent_id="agt_1",
        sent_unix_ms=NOW_UNIX_MS,
        devices=[NodeDevice(device="cuda:0", kind="cuda", incarnation="inc_1")],
        processes=[
            NodeProcess(
                incarnation="inc_1",
                resource_id="res_1",
                place=2,
                device="cuda:0",
                pid=4242,
                start_ticks=123_456,
                state="exited",
                exit_code=-9,
                reason="killed",
            )
        ],
    ),
    WorkerReport(
        worker_id="wrk_1",
        resource_id="res_1",
        place=2,
        incarnation="inc_1",
        phase="ready",
        sent_unix_ms=NOW_UNIX_MS,
        running_jobs=3,
        held_jobs=5,
        remaining_tokens=400,
        tokens_per_s=123.5,
        models=[
            ResidentModel(
                model_id="mod_1",
                revision=3,
                state="failed",
                reason="the model's manifest cannot be read",
                weight_bytes=269_060_552,
            )
        ],
        history=[
            ModelHistory(
                model_id="mod_1", revision=3, loads=7, load_ms_p50=210, load_ms_p95=480, hits=40, misses=6
            )
        ],
        detail="one model could not be loaded",
    ),
)
