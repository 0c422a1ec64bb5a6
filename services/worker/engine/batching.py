"""Who may start, what this step computes, and who gives way when blocks run out. Pure: views in, decisions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .fair_shares import charge, model_weights, open_accounts
from .kv_cache import blocks_for

# Generated tokens that are computed again attend one by one, as when they were new; more rows at once only cost memory.
REPLAY_TOKENS = 64

# After that many recomputes a sequence comes back only with blocks for its full length, and is left in peace.
MOST_PREEMPTIONS = 2


@dataclass(slots=True)
class SequenceView:
    """A sequence as the decisions see it. One object for its whole life, kept up to date by `LiveSequence`: to build
    256 of them anew for each step would cost as much as the decisions. Decisions only read it.

    model: as requests name it; base: whose pass computes it, another where `model` is an adapter. arrival: order of
    `Engine.add`; unique. prompt_tokens: the prompt alone. known_tokens: prompt and answer so far.
    unread_tokens: drawn beyond these by a pass whose outcome the host has not read. computed_tokens: of all these, how many
    have keys and values in the pool, or will by passes that were launched. held_tokens: how many its blocks have room for.
    most_tokens: prompt and longest possible answer. team: whose it is (`SequenceRequest.isolation_key`). background: it
    runs in what others leave (`background.py`).
    """

    sequence_id: str
    model: str
    base: str
    arrival: int
    prompt_tokens: int
    most_tokens: int
    known_tokens: int
    computed_tokens: int = 0
    held_tokens: int = 0
    preemptions: int = 0
    unread_tokens: int = 0
    team: str = ""
    background: bool = False

    @property
    def expected_tokens(self) -> int:
        return self.known_tokens + self.unread_tokens

    @property
    def is_decoding(self) -> bool:
        """What is left is the last token of the answer so far."""
        return self.prompt_tokens <= self.computed_tokens == self.expected_tokens - 1

    @property
    def only_waits(self) -> bool:
        """Nothing is left to compute until a pass is read: all is computed, or its unread token is the answer's last."""
        if self.computed_tokens >= self.expected_tokens:
            return True
        return self.unread_tokens > 0 and self.expected_tokens >= self.most_tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + count) of a sequence are computed this step: of its prompt, or of its answer again."""

    sequence_id: str
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class ModelBatch:
    """One forward pass of one model and of adapters on it: `decode` adds a token to each, `chunks` work off prompts."""

    model: str
    decode: tuple[str, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """accounts: of the models' prompts (`fair_shares.py`), for the next step."""

    batches: list[ModelBatch]
    accounts: dict[str, int]


@dataclass(frozen=True, slots=True)
class FoundPrefix:
    """Blocks that hold a sequence's first tokens already. idle: of these, how many nobody holds: they count as free."""

    blocks: int = 0
    idle: int = 0


def choose_admission(
    view: SequenceView, found: FoundPrefix, running: int, free_blocks: int, max_batch: int, block_tokens: int
) -> int | None:
    """Whether the first of those waiting starts now: with how many blocks beyond those found, or None.

    Asked in order of arrival; who cannot start holds back all behind it, so that a long one is not starved.

    1. No place in the batch -> None.
    2. It takes blocks for the tokens it knows and the next one; after MOST_PREEMPTIONS, for its full length.
    3. One spare block for each sequence already running must remain, or the newcomer would be pre-empted at once. Idle
       blocks that it shares from now on are no longer free.
    """
    if running >= max_batch:
        return None
    if view.preemptions >= MOST_PREEMPTIONS:
        tokens = view.most_tokens
    else:
        tokens = min(view.known_tokens + 1, view.most_tokens)
    blocks = blocks_for(tokens, block_tokens) - found.blocks
    return blocks if blocks + found.idle + running <= free_blocks else None


def waits_for_prefix(left_blocks: int, coming_blocks: int) -> bool:
    """Whether a sequence that could start lets another, which computes its beginning right now, go first.

    left_blocks: full blocks that it would have to compute. coming_blocks: of these, the first that are being computed.

    1. Worth it from half on: as when several answers to one prompt come at once. Below that, it would rather compute
       beside the other than stand back for little.
    """
    return coming_blocks > 0 and 2 * coming_blocks >= left_blocks


def plan_step(
    running: Sequence[SequenceView],
    chunk_tokens: int,
    step_tokens: int,
    turn: int,
    accounts: Mapping[str, int],
) -> StepPlan:
    """What one step computes: one batch for each model with work. running: in order of arrival.

    turn: number of the step; another model's pass is the first each time. accounts: as the last step left them.

    1. Every decoding sequence decodes one token; those that only wait for a pass to be read have nothing to do.
    2. Prompts share what that leaves of `step_tokens`, chunk by chunk: the model whose account is the least goes next, and
       pays for it by its weight (`fair_shares.model_weights`); within a model the oldest goes first, one chunk each.
    3. A chunk ends at a multiple of `chunk_tokens` or with the prompt, never earlier: where a prompt is cut does not
       depend on its neighbours. One that does not fit in what is left waits, and all of its model behind it.
    4. The first chunk is computed whatever is left: each model has one when its account is the least, so that answers
       never starve prompts.
    5. No chunk reaches from the prompt into the answer: answer tokens that are computed again (after a resume or a
       pre-emption) go through the arithmetic of decoding, so that in any precision the rest follows as if unbroken.
    """
    decode: dict[str, list[str]] = {}
    prompts: dict[str, list[SequenceView]] = {}
    for view in running:
        if view.only_waits:
            continue
        if view.is_decoding:
            decode.setdefault(view.base, []).append(view.sequence_id)
        else:
            prompts.setdefault(view.base, []).append(view)
    models = sorted({*decode, *prompts})
    first = turn % len(models) if models else 0
    order = models[first:] + models[:first]
    tokens_left = step_tokens - sum(map(len, decode.values()))
    chunks, accounts = _share_out(prompts, chunk_tokens, tokens_left, accounts)
    batches = [
        ModelBatch(model, tuple(decode.get(model, ())), tuple(chunks.get(model, ())))
        for model in order
        if model in decode or model in chunks
    ]
    return StepPlan(batches, accounts)


def _share_out(
    prompts: Mapping[str, Sequence[SequenceView]],
    chunk_tokens: int,
    tokens_left: int,
    accounts: Mapping[str, int],
) -> tuple[dict[str, list[Chunk]], dict[str, int]]:
    """Rules 2 to 4 of `plan_step`; also the accounts afterwards."""
    chunks: dict[str, list[Chunk]] = {}
    weights = model_weights(prompts)
    accounts = open_accounts(accounts, sorted(prompts))
    queues = {model: iter(views) for model, views in prompts.items()}
    while queues:
        model = min(queues, key=lambda each: (accounts[each], each))
        view = next(queues[model], None)
        chunk = next_chunk(view, chunk_tokens) if view is not None else None
        if chunk is None or (chunk.count > tokens_left and chunks):
            del queues[model]
            continue
        chunks.setdefault(model, []).append(chunk)
        tokens_left -= chunk.count
        accounts[model] += charge(chunk.count, weights[model])
    return chunks, accounts


def next_chunk(view: SequenceView, chunk_tokens: int) -> Chunk:
    start = view.computed_tokens
    if start < view.prompt_tokens:
        end = min(view.prompt_tokens, (start // chunk_tokens + 1) * chunk_tokens)
    else:
        end = min(view.known_tokens, start + REPLAY_TOKENS)
    return Chunk(view.sequence_id, start, end - start)


def choose_victim(running: Sequence[SequenceView]) -> str | None:
    """Who gives its blocks back when one is needed and none is free.

    1. Sequences pre-empted MOST_PREEMPTIONS times hold all they will ever need: never they.
    2. Background work before any other; then the youngest: it has the least work to lose, and the oldest always gets on.
    3. None: nobody can give way.
    """
    candidates = [view for view in running if view.preemptions < MOST_PREEMPTIONS]
    if not candidates:
        return None
    return max(candidates, key=lambda view: (view.background, view.arrival)).sequence_id
