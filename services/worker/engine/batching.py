"""Who may start, what this step computes, and who gives way when blocks run out. Pure: views in, decisions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .kv_cache import blocks_for

# Generated tokens that are computed again attend one by one, as when they were new; more rows at once only cost memory.
REPLAY_TOKENS = 64

# After that many recomputes a sequence comes back only with blocks for its full length, and is left in peace.
MOST_PREEMPTIONS = 2


@dataclass(frozen=True, slots=True)
class SequenceView:
    """A sequence as the decisions see it.

    arrival: order of `Engine.add`; unique. prompt_tokens: the prompt alone. known_tokens: prompt and answer so far.
    computed_tokens: of these, how many have keys and values in the pool. most_tokens: prompt and longest possible
    answer. blocks: held now.
    """

    sequence_id: str
    model: str
    arrival: int
    prompt_tokens: int
    known_tokens: int
    computed_tokens: int
    most_tokens: int
    blocks: int = 0
    preemptions: int = 0

    @property
    def is_decoding(self) -> bool:
        return self.computed_tokens > 0 and self.computed_tokens == self.known_tokens - 1


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + count) of a sequence are computed this step: of its prompt, or of its answer again."""

    sequence_id: str
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class ModelBatch:
    """One forward pass of one model: `decode` adds a token to each, `chunks` work off prompts."""

    model: str
    decode: tuple[str, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Admission:
    sequence_id: str
    blocks: int


def choose_admissions(
    waiting: Sequence[SequenceView], running: int, free_blocks: int, max_batch: int, block_tokens: int
) -> list[Admission]:
    """Which waiting sequences start now, and with how many blocks.

    1. In order of arrival; the first that cannot start holds back all behind it, so that a long one is not starved.
    2. No place in the batch -> stop.
    3. A sequence takes blocks for the tokens it knows and the next one; after MOST_PREEMPTIONS, for its full length.
    4. One spare block for each sequence already running must remain, or the newcomer would be pre-empted at once.
    """
    admissions: list[Admission] = []
    for view in sorted(waiting, key=lambda each: each.arrival):
        residents = running + len(admissions)
        if residents >= max_batch:
            break
        if view.preemptions >= MOST_PREEMPTIONS:
            blocks = blocks_for(view.most_tokens, block_tokens)
        else:
            blocks = blocks_for(min(view.known_tokens + 1, view.most_tokens), block_tokens)
        if blocks + residents > free_blocks:
            break
        admissions.append(Admission(view.sequence_id, blocks))
        free_blocks -= blocks
    return admissions


def plan_step(running: Sequence[SequenceView], chunk_tokens: int, turn: int) -> list[ModelBatch]:
    """What one step computes: one batch for each model with work.

    1. Every decoding sequence decodes one token.
    2. Prompts share `chunk_tokens`: the models take turns, beginning with number `turn` modulo their count; within a
       model the oldest goes first, one chunk each.
    3. A chunk ends at a multiple of `chunk_tokens` or with the prompt, never earlier: where a prompt is cut does not
       depend on its neighbours. So the step's last chunk may overrun the shared amount, by less than one chunk.
    4. At least one chunk is computed when any prompt waits.
    5. No chunk reaches from the prompt into the answer: answer tokens that are computed again (after a resume or a
       pre-emption) go through the arithmetic of decoding, so that in any precision the rest follows as if unbroken.
    """
    models = sorted({view.model for view in running})
    decode: dict[str, list[str]] = {model: [] for model in models}
    prompts: dict[str, list[SequenceView]] = {model: [] for model in models}
    chunks: dict[str, list[Chunk]] = {model: [] for model in models}
    for view in sorted(running, key=lambda each: each.arrival):
        if view.is_decoding:
            decode[view.model].append(view.sequence_id)
        else:
            prompts[view.model].append(view)
    first = turn % len(models) if models else 0
    order = models[first:] + models[:first]
    tokens_left = chunk_tokens
    while tokens_left > 0 and any(prompts.values()):
        for model in order:
            if tokens_left > 0 and prompts[model]:
                chunk = next_chunk(prompts[model].pop(0), chunk_tokens)
                chunks[model].append(chunk)
                tokens_left -= chunk.count
    return [
        ModelBatch(model, tuple(decode[model]), tuple(chunks[model]))
        for model in order
        if decode[model] or chunks[model]
    ]


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
    2. The youngest of the rest: it has the least work to lose, and the oldest always gets on.
    3. None: nobody can give way.
    """
    candidates = [view for view in running if view.preemptions < MOST_PREEMPTIONS]
    return max(candidates, key=lambda view: view.arrival).sequence_id if candidates else None
