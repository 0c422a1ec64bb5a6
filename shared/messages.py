"""Every message that crosses the broker, as frozen structs with a versioned type tag.

Commands are imperative, facts are past tense. Within a version fields may be added with a default; a new meaning gets
a new tag. Unknown extra fields are ignored, missing ones refused. Times that cross processes are Unix milliseconds UTC;
token ids are plain integers. What a job costs never travels in a message: billing alone computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any, Literal, TypeVar

import msgspec

Outcome = Literal["succeeded", "failed", "cancelled", "expired"]
FinishReason = Literal["stop", "length"]
WorkClass = Literal["live", "batch"]
BudgetScope = Literal["team", "resource", "model", "key"]
BudgetAction = Literal["refuse_ppt", "stop_scale_up", "stop_batches", "turn_off"]
BillingMode = Literal["ppt", "resource"]

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
TOGETHER_BYTES = 256 * 1024
"""Messages for one queue that are smaller than that together may travel in one body."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=True):
    """Base of all messages; the tag is the AMQP `type` property too."""


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of the values inside messages."""


# ---- jobs: owner -> queue -> worker -> owner


class WeightsRef(Part, frozen=True):
    """Exactly which files: those of one revision of one model."""

    model_id: str
    revision: int
    name: str
    folder: str
    """Path of the revision's folder below the model store, e.g. `mod_…/1`."""
    signature: str


class ModelRef(WeightsRef, frozen=True):
    """Exactly which weights: a job names its revision and never gets another.

    base: of an adapter, the revision of the model that it stands on; both have one signature. The tokenizer is the
    base's. None for a model with weights of its own.
    """

    base: WeightsRef | None = None

    @property
    def tokenizer_folder(self) -> str:
        return self.folder if self.base is None else self.base.folder


class SamplingParams(Part, frozen=True):
    """The engine's `Sampling`, field by field; ranges are checked by the gateway."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: list[tuple[int, float]] = []
    seed: int = 0
    logprobs: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    echo_logprobs: bool = False
    """Log-probabilities of the prompt too (completions with `echo` and `logprobs`)."""
    bad_words: list[list[int]] = []
    """Token sequences that the answer may not hold."""


class Job(Message, frozen=True):
    """Fields that every job has: who asked and pays, which weights, who waits for it and until when."""

    job_id: str
    request_id: str
    team_id: str
    key_id: str
    resource_id: str
    billing: BillingMode
    work_class: WorkClass
    model_type: str
    model: ModelRef
    owner_queue: str
    accepted_unix_ms: int
    deadline_unix_ms: int
    lease_ids: list[str] = []
    """Leases on budgets that the job's worst case was reserved from; its facts name them, so that billing lets go of it."""
    reserved_nanousd: int = 0


class GenerateJob(Job, frozen=True, kw_only=True, tag="job.generate.v1"):
    """One inference request on its way. `choices` sequences share the prompt; choice i samples with seed + i."""

    operation: Literal["chat", "text_completion"]
    prompt_tokens: list[int]
    max_tokens: int
    choices: int = 1
    sampling: SamplingParams = SamplingParams()
    stop: list[str] = []
    stop_token_ids: list[int] = []

    @property
    def input_token_count(self) -> int:
        return len(self.prompt_tokens)


class EmbedJob(Job, frozen=True, kw_only=True, tag="job.embed.v1"):
    """Texts to make vectors of. Nothing is told before the end, so another attempt begins anew."""

    operation: Literal["embeddings"]
    inputs: list[list[int]]
    pooling: Literal["mean", "last"] = "mean"
    dimensions: int | None = None
    """So many of each vector's first values; None: all."""

    @property
    def input_token_count(self) -> int:
        return sum(map(len, self.inputs))


class JobClaimed(Message, frozen=True, tag="job.claimed.v1"):
    """A worker asks the job's owner whether it may run the job.

    A job's first delivery may be begun at once, as attempt 1, while the claim is on its way: the first worker's word
    (claim, tokens or finish) that reaches the owner makes it the holder.
    """

    job_id: str
    claim_id: str
    worker_id: str
    worker_queue: str


class Granted(Message, frozen=True, tag="job.granted.v1"):
    """The owner's yes. `prior_tokens[i]` are the tokens that the owner already has of choice i."""

    job_id: str
    claim_id: str
    attempt: int
    prior_tokens: list[list[int]]


class FinishedReport(Part, frozen=True):
    """How a job ended that a worker finished: enough for another worker to report it to billing."""

    attempt: int
    outcome: Outcome
    completion_tokens: int
    error_code: str | None = None


class Drop(Message, frozen=True, tag="job.drop.v1"):
    """The owner's no; the worker acks the job and forgets it.

    report: the job was finished by a worker, perhaps one that died before billing knew. Whoever gets this publishes
    the fact before it acks; the fact's id depends on job and attempt alone, so a double changes nothing.
    """

    job_id: str
    claim_id: str
    reason: Literal["unknown", "finished", "cancelled", "expired", "running_elsewhere", "poison"]
    report: FinishedReport | None = None


class CancelJob(Message, frozen=True, tag="job.cancel.v1"):
    """Stop this attempt within one engine step."""

    job_id: str
    attempt: int
    reason: str


class RepeatTokens(Message, frozen=True, tag="job.repeat_tokens.v1"):
    """The owner saw a gap: send choice's tokens from `token_start` once more."""

    job_id: str
    attempt: int
    choice: int
    token_start: int


class TokenLogprob(Part, frozen=True):
    """Natural logs under the model's own distribution; `top` are the likeliest alternatives, best first."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = []


class TokenDelta(Part, frozen=True):
    """What one engine step added to one choice of one job. Text may lag behind tokens (held-back stop strings)."""

    job_id: str
    attempt: int
    choice: int
    token_start: int
    tokens: list[int]
    text: str
    logprobs: list[TokenLogprob] = []
    finish_reason: FinishReason | None = None


class TokensGenerated(Message, frozen=True, tag="job.tokens.v1"):
    """All deltas of one engine step for one owner."""

    worker_id: str
    deltas: list[TokenDelta]


class Timings(Part, frozen=True):
    """Milliseconds that the job spent in each stage, over all attempts that this worker ran."""

    queue_ms: float = 0.0
    swap_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0


class ChoiceResult(Part, frozen=True):
    """One choice's result: `tokens` are all of them, resumed ones included; `text` and `logprobs` are of this attempt
    alone, which is enough to mend any gap."""

    index: int
    tokens: list[int]
    text: str
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = []


class JobFinished(Message, frozen=True, tag="job.finished.v1"):
    """The end of one attempt, told to the owner. `prompt_logprobs` only when they were asked for; `embeddings` of an
    `EmbedJob` that succeeded: one for each input, little-endian fp32 numbers of length 1 as a vector."""

    job_id: str
    attempt: int
    worker_id: str
    outcome: Outcome
    error_code: str | None = None
    error_message: str | None = None
    choices: list[ChoiceResult] = []
    prompt_logprobs: list[TokenLogprob] = []
    embeddings: list[bytes] = []
    timings: Timings = Timings()


class WorkerBeat(Message, frozen=True, tag="worker.beat.v1"):
    """Sign of life of a worker to one owner, naming the attempts of its jobs that it holds."""

    worker_id: str
    jobs: list[tuple[str, int]]


class OwnerBeat(Message, frozen=True, tag="owner.beat.v1"):
    """Sign of life of an owner to one worker, naming the jobs it still waits for."""

    owner_queue: str
    job_ids: list[str]


# ---- facts about money


class JobUsage(Message, frozen=True, tag="usage.job_finished.v1"):
    """A worker's fact for billing: what one attempt published. No text and no token ids."""

    event_id: str
    job_id: str
    attempt: int
    request_id: str
    team_id: str
    key_id: str
    resource_id: str
    worker_id: str
    billing: BillingMode
    work_class: WorkClass
    operation: str
    model_type: str
    model_id: str
    model_name: str
    revision: int
    outcome: Outcome
    prompt_tokens: int
    completion_tokens: int
    prefill_ran: bool
    accepted_unix_ms: int
    finished_unix_ms: int
    error_code: str | None = None
    first_token_unix_ms: int | None = None
    timings: Timings = Timings()
    lease_ids: list[str] = []
    reserved_nanousd: int = 0


class JobVoided(Message, frozen=True, tag="usage.job_voided.v1"):
    """A gateway's fact for billing: its client did not get the granted finish; this much was delivered."""

    event_id: str
    job_id: str
    request_id: str
    team_id: str
    key_id: str
    resource_id: str
    billing: BillingMode
    work_class: WorkClass
    operation: str
    model_type: str
    model_id: str
    model_name: str
    revision: int
    reason: Literal["client_gone", "deadline", "failed", "never_published"]
    prompt_tokens: int
    delivered_tokens: int
    accepted_unix_ms: int
    voided_unix_ms: int
    error_code: str | None = None
    lease_ids: list[str] = []
    reserved_nanousd: int = 0
    had_worker: bool = True
    """Whether a worker was granted the job: then its own fact follows, and may say that the prompt was read."""


# ---- budgets: gateway <-> billing


class LeaseClosed(Part, frozen=True):
    """A gateway takes nothing more from this lease; all that it reserved from it is in jobs that may run."""

    lease_id: str
    spent_nanousd: int


class AskBudget(Message, frozen=True, tag="budget.ask.v1"):
    """A gateway asks for a slice of what is left of a budget. Idempotent by lease id. Transient: it is asked again.

    With no needs and nothing wanted it only tells what was closed.
    """

    lease_id: str
    budget_id: str
    period_start: date
    gateway_id: str
    reply_queue: str
    deadline_unix_ms: int
    """Nobody waits for an answer after this."""
    needs_nanousd: list[int]
    """The requests that wait, the first come first."""
    wanted_nanousd: int
    """Beside the needs, for requests to come."""
    unit_nanousd: int
    """What the last request needed: a slice that is smaller serves nobody."""
    job_deadline_s: int
    closed: list[LeaseClosed] = []


class BudgetLeased(Message, frozen=True, tag="budget.leased.v1"):
    """The answer to `AskBudget`. Valid for `valid_ms` from when it was first asked for."""

    lease_id: str
    budget_id: str
    period_start: date
    granted_nanousd: int
    valid_ms: int
    refused: list[int] = []
    """Indexes of the needs that do not fit into what is left."""
    unposted_nanousd: int = 0
    """What would be free if no lease held anything: for more than that it is no use to wait for running requests."""
    closed: list[str] = []
    """Leases whose close is recorded."""


class BudgetAlerted(Message, frozen=True, tag="budget.alerted.v1"):
    """So much of a budget is spent. A hint: `billing_api.alerts_v1` has all of them."""

    alert_id: str
    budget_id: str
    team_id: str
    scope: BudgetScope
    scope_id: str
    period: Literal["day", "month"]
    period_start: date
    percent: int
    limit_nanousd: int
    spent_nanousd: int


class PaymentReported(Message, frozen=True, tag="payment.reported.v1"):
    """A gateway's fact for billing: what the payment provider says of one payment, checked by its signature."""

    provider: str
    event_id: str
    """The provider's own: the same event has the same id however often it comes."""
    what: Literal["paid", "refunded", "disputed", "dispute_won"]
    payment_id: str
    amount_nanousd: int
    """Paid: the payment. Refunded: the sum of all refunds so far. Disputed, won: the dispute."""
    team_id: str | None = None
    """Whose payment it is; of what was paid always there, of what follows never."""
    dispute_id: str | None = None


# ---- resources: gateway -> scheduler, billing


class CommandResult(Message, frozen=True, tag="command.result.v1"):
    """The one answer to a command; repeated as it was when the command comes again."""

    command_id: str
    ok: bool
    code: str = "ok"
    message: str = ""
    body: dict[str, Any] = {}


class Command(Message, frozen=True):
    """Fields that every command has. A command that arrives after its deadline is dropped, not run."""

    command_id: str
    deadline_unix_ms: int
    reply_queue: str
    actor: str


class CreateOption(Command, frozen=True, tag="option.create.v1"):
    """Platform only. One hardware configuration for a model type."""

    model_type: str
    name: str
    device_kind: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16", "int8"]
    max_batch: int
    max_context_tokens: int
    kv_tokens: int
    hourly_rate_nanousd: int


class CreateResource(Command, frozen=True, tag="resource.create.v1"):
    """takes_traffic: whether requests of its type go to it; else only what names it, such as a batch that owns it."""

    team_id: str
    name: str
    model_type: str
    option_id: str
    fixed_count: int
    pool: bool = False
    takes_traffic: bool = True


class ScaleResource(Command, frozen=True, tag="resource.scale.v1"):
    team_id: str
    resource_id: str
    fixed_count: int


class ScalingWindow(Part, frozen=True):
    """Bounds of its own for `duration_minutes` from each time that fits `start` (cron's five fields, in the zone)."""

    name: str
    start: str
    duration_minutes: int
    time_zone: str
    min_count: int
    max_count: int


class SetScaling(Command, frozen=True, tag="resource.set_scaling.v1"):
    """All scaling settings of a resource at once. With autoscaling off both counts are the fixed number.

    if_version: refused (`precondition_failed`) unless these are still the settings of that version; None: whatever they are.
    """

    team_id: str
    resource_id: str
    autoscaling: bool
    min_count: int
    max_count: int
    idle_timeout_s: int
    when_asleep: Literal["wake", "refuse"]
    windows: list[ScalingWindow] = []
    if_version: int | None = None
    target_wait_s: int = 10


class SetQuota(Command, frozen=True, tag="quota.set.v1"):
    """Platform only. scope: `every_team`, `platform`, or a team's id; places None: the team has none of its own."""

    scope: str
    places: int | None = None


class TurnOnResource(Command, frozen=True, tag="resource.turn_on.v1"):
    """until_unix_ms: when it is turned off again, unless another one of these says later; None: not by itself."""

    team_id: str
    resource_id: str
    until_unix_ms: int | None = None


class TurnOffResource(Command, frozen=True, tag="resource.turn_off.v1"):
    team_id: str
    resource_id: str


class DeleteResource(Command, frozen=True, tag="resource.delete.v1"):
    team_id: str
    resource_id: str


class PinModel(Command, frozen=True, tag="resource.pin_model.v1"):
    """Keep a model resident on so many workers; None: on every one. Replaces an earlier pin of the model."""

    team_id: str
    resource_id: str
    model_id: str
    copies: int | None


class UnpinModel(Command, frozen=True, tag="resource.unpin_model.v1"):
    team_id: str
    resource_id: str
    model_id: str


class PreloadModel(Command, frozen=True, tag="resource.preload_model.v1"):
    """Load a model once on every worker, when no work waits there."""

    team_id: str
    resource_id: str
    model_id: str


class SetPrice(Command, frozen=True, tag="price.set.v1"):
    """Platform only. Price version of a model type's tokens from `starts_unix_ms` on."""

    model_type: str
    work_class: WorkClass
    prompt_nanousd: int
    completion_nanousd: int
    starts_unix_ms: int


class SetRate(Command, frozen=True, tag="rate.set.v1"):
    """Platform only. What an hour on a performance option costs from `starts_unix_ms` on."""

    option_id: str
    hourly_rate_nanousd: int
    starts_unix_ms: int


class WithdrawPrice(Command, frozen=True, tag="price.withdraw.v1"):
    """Platform only. Take back a version, of a price or of a rate, that has not begun."""

    version_id: str


class GrantCredit(Command, frozen=True, tag="credit.grant.v1"):
    """Platform only. Money that the platform gives a team; once for each command id, however long after."""

    team_id: str
    amount_nanousd: int
    reason: str


class SetTeamTerms(Command, frozen=True, tag="terms.set.v1"):
    """Platform only. How a team pays from now on."""

    team_id: str
    pays: Literal["prepaid", "postpaid"]
    credit_limit_nanousd: int | None = None
    """What a postpaid team may owe; None: any amount."""


# ---- batches: gateway -> batch service


class OwnResource(Part, frozen=True):
    """The GPUs that a batch is to have for itself. option: None for the cheapest that is in time."""

    option: str | None = None
    max_gpus: int | None = None
    quote_id: str | None = None


class CreateBatch(Command, frozen=True, tag="batch.create.v1"):
    """Run the lines of a file of the team's. The gateway has checked the shape of every field."""

    team_id: str
    key_id: str
    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: str
    """As the client wrote it."""
    completion_window_s: int
    metadata: dict[str, str] = {}
    output_expires_after_s: int | None = None
    own_resource: OwnResource | None = None


class BatchTemplate(Part, frozen=True):
    """What each batch of a schedule is made of, as in `CreateBatch`."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: str
    completion_window_s: int
    metadata: dict[str, str] = {}
    output_expires_after_s: int | None = None
    own_resource: OwnResource | None = None


class CreateSchedule(Command, frozen=True, tag="batch.create_schedule.v1"):
    """Makes a batch at each time that `cron` says in the zone."""

    team_id: str
    key_id: str
    name: str
    cron: str
    time_zone: str
    batch: BatchTemplate


class ChangeSchedule(Command, frozen=True, tag="batch.change_schedule.v1"):
    team_id: str
    schedule_id: str
    paused: bool


class DeleteSchedule(Command, frozen=True, tag="batch.delete_schedule.v1"):
    team_id: str
    schedule_id: str


class QuoteBatch(Command, frozen=True, tag="batch.quote.v1"):
    """Asks what the lines of a file would take and cost; answered with a quote's id, which is counted afterwards.

    deadline_s: when the batch is to be over, from now. option: None for every option of the model's type.
    """

    team_id: str
    key_id: str
    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    deadline_s: int
    option: str | None = None
    max_gpus: int | None = None


class CancelBatch(Command, frozen=True, tag="batch.cancel.v1"):
    team_id: str
    batch_id: str


class DeleteBatchFile(Command, frozen=True, tag="batch.delete_file.v1"):
    """Delete a file that a batch wrote."""

    team_id: str
    file_id: str


class CreateQueueCredential(Command, frozen=True, tag="queue_credential.create.v1"):
    """Let a team submit through the broker, as a user of its own. The password itself is known to the gateway alone."""

    team_id: str
    key_id: str
    name: str
    password_hash: str
    """As RabbitMQ keeps it: salted SHA-256."""


class RotateQueueCredential(Command, frozen=True, tag="queue_credential.rotate.v1"):
    team_id: str
    credential_id: str
    password_hash: str


class RevokeQueueCredential(Command, frozen=True, tag="queue_credential.revoke.v1"):
    team_id: str
    credential_id: str


class CreateBudget(Command, frozen=True, tag="budget.create.v1"):
    team_id: str
    scope: BudgetScope
    scope_id: str
    """The id of the team itself, or of its resource, model or key."""
    period: Literal["day", "month"]
    limit_nanousd: int
    alert_percents: list[int]
    actions: list[BudgetAction]


class ChangeBudget(Command, frozen=True, tag="budget.change.v1"):
    """None: as it is."""

    team_id: str
    budget_id: str
    limit_nanousd: int | None = None
    alert_percents: list[int] | None = None
    actions: list[BudgetAction] | None = None


class DeleteBudget(Command, frozen=True, tag="budget.delete.v1"):
    team_id: str
    budget_id: str


# ---- scheduler <-> node agent <-> worker


class PreloadAsked(Part, frozen=True):
    """Asked for once: what was loaded for it and has gone since is not loaded again."""

    model: ModelRef
    asked_unix_ms: int


class PinSet(Part, frozen=True):
    """Models that one worker has to hold, and those it shall load when no work waits. version: of the whole set, empty of none.

    known: those that jobs may name, the newest first, bounded: a worker makes images of them before anybody asks.
    """

    version: str
    pinned: list[ModelRef] = []
    preload: list[PreloadAsked] = []
    known: list[ModelRef] = []


NO_PINS = PinSet(version="")


class WorkerSpec(Part, frozen=True):
    """All that a worker process needs to know of its place; handed to it as one JSON argument."""

    worker_id: str
    resource_id: str
    place: int
    incarnation: str
    pool: bool
    model_type: str
    precision: Literal["fp32", "bf16", "int8"]
    device_kind: Literal["cpu", "cuda"]
    max_batch: int
    max_context_tokens: int
    kv_tokens: int
    preload: list[ModelRef] = []
    """The likeliest models; one is resident before the worker says that it is ready, the others follow as memory allows."""
    pins: PinSet = NO_PINS


class StartWorker(Message, frozen=True, tag="node.start_worker.v1"):
    """Idempotent by incarnation: an incarnation that the agent ever knew is not started again."""

    node_id: str
    epoch: int
    deadline_unix_ms: int
    spec: WorkerSpec


class StopWorker(Message, frozen=True, tag="node.stop_worker.v1"):
    """SIGTERM, then SIGKILL after `grace_s`. An unknown incarnation is remembered as exited, so it never starts later."""

    node_id: str
    epoch: int
    incarnation: str
    grace_s: float


class DrainWorker(Message, frozen=True, tag="worker.drain.v1"):
    """Finish what runs, give back the rest, leave."""

    worker_id: str
    incarnation: str


class ShareJobs(Message, frozen=True, tag="worker.share_jobs.v1"):
    """Another worker of the resource has nothing to do: give back to the queue what was not begun. May come again, or be lost."""

    worker_id: str
    incarnation: str


class SetPins(Message, frozen=True, tag="worker.set_pins.v1"):
    """Replaces the worker's set. Sent again whenever the worker reports another version."""

    worker_id: str
    incarnation: str
    pins: PinSet


class NodeDevice(Part, frozen=True):
    device: str
    kind: Literal["cpu", "cuda"]
    incarnation: str | None = None


class NodeProcess(Part, frozen=True):
    incarnation: str
    resource_id: str
    place: int
    device: str
    pid: int
    start_ticks: int
    state: Literal["running", "exited"]
    exit_code: int | None = None
    reason: str = ""


class NodeReport(Message, frozen=True, tag="node.report.v1"):
    """All that a node agent knows, every second and at once on a change. Exited processes stay listed for ten minutes."""

    node_id: str
    agent_id: str
    sent_unix_ms: int
    devices: list[NodeDevice]
    processes: list[NodeProcess]


WorkerPhase = Literal["starting", "loading", "warming", "ready", "draining", "drained"]


class ResidentModel(Part, frozen=True):
    model_id: str
    revision: int
    state: Literal["loading", "ready", "evicting", "failed"]
    reason: str = ""
    weight_bytes: int = 0


class ModelHistory(Part, frozen=True):
    """Of one model on one worker since the worker's start. Percentiles are of the latest loads.

    hits: jobs that found the model ready; misses: those that it was loaded for.
    """

    model_id: str
    revision: int
    loads: int = 0
    load_ms_p50: int = 0
    load_ms_p95: int = 0
    hits: int = 0
    misses: int = 0


class WorkerReport(Message, frozen=True, tag="worker.report.v1"):
    """A worker's own state, every second and at once on a change of phase."""

    worker_id: str
    resource_id: str
    place: int
    incarnation: str
    phase: WorkerPhase
    sent_unix_ms: int
    running_jobs: int = 0
    held_jobs: int = 0
    remaining_tokens: int = 0
    tokens_per_s: float = 0.0
    models: list[ResidentModel] = []
    """All that are not absent; bounded, those used last first."""
    history: list[ModelHistory] = []
    """Bounded, those that changed last first: whoever reads it keeps what it was told of the others."""
    model_memory_bytes: int = 0
    pins_version: str = ""
    pinned: list[tuple[str, int]] = []
    """(model id, revision), whether resident or not."""
    preload: list[tuple[str, int]] = []
    detail: str = ""
    running_sequences: int = 0
    waiting_jobs: int = 0
    """Held ones that do not run: not begun, or paused."""
    completion_tokens: int = 0
    """This and what follows counts from the worker's start."""
    prompt_tokens: int = 0
    left_jobs: int = 0
    stream_s: float = 0.0
    """Seconds that sequences ran, summed over sequences."""
    batch_held_jobs: int = 0
    """Of all of these, what is lines of batches."""
    batch_waiting_jobs: int = 0
    batch_sequences: int = 0
    batch_left_jobs: int = 0


class ModelDamaged(Message, frozen=True, tag="worker.model_damaged.v1"):
    """An alarm: a worker found a model's files, its image or its answers to be other than they were. It took the model out."""

    event_id: str
    worker_id: str
    resource_id: str
    model_id: str
    revision: int
    reason: str
    found_unix_ms: int


JobQueueMessage = GenerateJob | EmbedJob
ReplyMessage = JobClaimed | TokensGenerated | JobFinished | WorkerBeat | CommandResult
WorkerCommand = Granted | Drop | CancelJob | RepeatTokens | OwnerBeat | DrainWorker | SetPins | ShareJobs
NodeCommand = StartWorker | StopWorker
UsageEvent = JobUsage | JobVoided
PaymentFact = PaymentReported
BudgetAnswer = BudgetLeased
BudgetQuestion = AskBudget
BudgetEvent = BudgetAlerted
FleetEvent = NodeReport | WorkerReport
Alarm = ModelDamaged
SchedulerCommand = (
    CreateOption
    | CreateResource
    | ScaleResource
    | SetScaling
    | SetQuota
    | TurnOnResource
    | TurnOffResource
    | DeleteResource
    | PinModel
    | UnpinModel
    | PreloadModel
)
QueueCredentialCommand = CreateQueueCredential | RotateQueueCredential | RevokeQueueCredential
BatchCommand = (
    CreateBatch
    | QuoteBatch
    | CancelBatch
    | DeleteBatchFile
    | CreateSchedule
    | ChangeSchedule
    | DeleteSchedule
    | QueueCredentialCommand
)
BillingCommand = (
    SetPrice
    | SetRate
    | WithdrawPrice
    | GrantCredit
    | SetTeamTerms
    | CreateBudget
    | ChangeBudget
    | DeleteBudget
)

M = TypeVar("M")

_encoder = msgspec.json.Encoder()


def encode(message: Message) -> bytes:
    """Return the message's JSON bytes."""
    return _encoder.encode(message)


def encode_together(messages: Sequence[Message]) -> list[bytes]:
    """The bodies that carry these messages: each one of them alone, or an array of several, of a bounded size."""
    groups: list[list[bytes]] = []
    size = 0
    for body in map(encode, messages):
        if not groups or size + len(body) > TOGETHER_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(body)
        size += len(body)
    return [group[0] if len(group) == 1 else b"[" + b",".join(group) + b"]" for group in groups]


def type_of(message: Message) -> str:
    """Return the type tag, e.g. `job.generate.v1`."""
    return str(message.__struct_config__.tag)


def decoder(of: Any) -> msgspec.json.Decoder[Any]:
    """Return a strict decoder for one message type or a union of them; it raises `msgspec.ValidationError`."""
    return msgspec.json.Decoder(of)


def together_decoder(of: Any) -> msgspec.json.Decoder[Any]:
    """The same for bodies that may be arrays of such messages."""
    return msgspec.json.Decoder(of | list[of])
