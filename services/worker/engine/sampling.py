"""From logits to tokens, for all rows of a step at once and on their device; one copy brings the outcome to the host.

`Sampler.prepare` turns the rows' wishes into tensors, kept while the same rows come back; `sample_on_device` asks nothing
of the host, so that a next step may start from its tokens unread; `SampledBatch.read` is the copy. Chance is a hash of
(seed, token index, vocabulary index): a draw depends on its own row only, neither on the batch nor on how often the
engine was started before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .api import Sampling, TokenLogprob
from .bad_words import BadWords, banned_tokens, compile_bad_words
from .draw_batch import CutTensors, cut_tensors, draw_batch, seed_tensor
from .draw_rows import RowDrawer, cut_of
from .noise import mixed_seed, noise_key, noise_keys
from .penalties import ForbiddenEndings, PenalisedRow, PenaltyTable, TokenAddends, forbid
from .scoring import Scores, packed, parts_of, read_scores, score
from .transfer import ToHost, to_device


@dataclass(slots=True, eq=False)
class SamplingState:
    """What sampling knows of one sequence. Build with `make_state`, call `note` for each generated token.

    index: of the next token. ending_tokens: forbidden before `min_tokens`. answer: the generated tokens, kept only where a
    penalty or bad words look at them. banned_always: bad words of one token; bad_sequences: the longer ones.
    """

    sampling: Sampling
    prompt_tokens: Sequence[int]
    ending_tokens: Sequence[int]
    banned_always: tuple[int, ...]
    bad_sequences: BadWords | None
    index: int = 0
    answer: list[int] = field(default_factory=list)

    @property
    def has_penalty(self) -> bool:
        wanted = self.sampling
        return bool(wanted.repetition_penalty != 1.0 or wanted.presence_penalty or wanted.frequency_penalty)

    def banned_now(self) -> list[int]:
        """Beside those banned always."""
        return [] if self.bad_sequences is None else banned_tokens(self.bad_sequences, self.answer)

    def note(self, token: int) -> None:
        self.index += 1
        if self.has_penalty or self.bad_sequences is not None:
            self.answer.append(token)


def make_state(
    sampling: Sampling, prompt_tokens: Sequence[int], ending_tokens: Sequence[int]
) -> SamplingState:
    """State before the first generated token."""
    words = compile_bad_words(sampling.bad_words)
    sequences = BadWords(endings=words.endings) if words.endings else None
    return SamplingState(sampling, prompt_tokens, ending_tokens, words.always, sequences)


@dataclass(frozen=True, slots=True)
class SampledToken:
    token: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class SampledBatch:
    """tokens: (rows,) int64 on the device. scores: of the batch's `scored` rows, on the device.

    outcome: `packed` tokens, whether each is usable, and scores, on their way to the host since they were drawn.
    """

    tokens: torch.Tensor
    scores: Scores | None
    batch: SamplingBatch
    outcome: ToHost

    def read(self) -> list[SampledToken | None]:
        """Waits for the drawing, not for passes launched since. None for a row whose logits are not all finite, or whose tokens are all forbidden."""
        rows = len(self.tokens)
        host = self.outcome.wait()
        tokens, is_usable = host[:rows].tolist(), host[rows : 2 * rows].tolist()
        states, scored = self.batch.states, self.batch.scored
        logprobs: dict[int, TokenLogprob] = {}
        if self.scores is not None:
            shape = self.scores.top_tokens.shape
            unpacked = read_scores(
                host[2 * rows :],
                shape[1],
                [tokens[row] for row in scored],
                [states[row].sampling.logprobs or 0 for row in scored],
            )
            logprobs = dict(zip(scored, unpacked, strict=True))
        return [
            SampledToken(token, logprobs.get(row)) if is_usable[row] else None
            for row, token in enumerate(tokens)
        ]


class SamplingBatch:
    """The rows of a step as tensors; the same object serves following steps as long as the rows are the same."""

    def __init__(self, sampler: Sampler, states: Sequence[SamplingState], indices: Sequence[int]) -> None:
        """indices: of the token that each row draws next."""
        device = sampler.device
        self.states = tuple(states)
        self.steps = 0
        self.banned: list[tuple[int, int]] = []
        self.penalties: PenaltyTable | None = None
        self.penalised = [row for row, state in enumerate(states) if state.has_penalty]
        self.scored = [row for row, state in enumerate(states) if state.sampling.logprobs is not None]
        self.scored_index = to_device(torch.tensor(self.scored, dtype=torch.long), device)
        self.most_top = max((states[row].sampling.logprobs or 0 for row in self.scored), default=0)
        self._first_indices = list(indices)
        self._bias, self._endings = _bias(states, device), _endings(states, indices, device)
        self.draws = _Draws(sampler, states, indices)

    @property
    def is_adjusted(self) -> bool:
        return bool(self._bias or self._endings or self.penalties or self.banned)

    def next_index(self, row: int) -> int:
        return self._first_indices[row] + self.steps

    def adjust(self, logits: torch.Tensor) -> None:
        """Penalties, bias, forbidden tokens; in place."""
        if self.penalties is not None:
            self.penalties.apply(logits)
        if self._bias is not None:
            self._bias.apply(logits)
        if self._endings is not None:
            self._endings.apply(logits, self.steps)
        if self.banned:
            forbid(logits, self.banned)

    def note(self, tokens: torch.Tensor) -> None:
        self.steps += 1
        if self.penalties is not None:
            self.penalties.note(tokens)


class Sampler:
    """One for each model: keeps the last batch, as most steps bring the same rows back."""

    def __init__(self, vocab_size: int, device: torch.device, row_by_row: bool | None = None) -> None:
        """row_by_row: None chooses what is right for the device."""
        self.vocab_size, self.device = vocab_size, device
        by_rows = device.type == "cpu" if row_by_row is None else row_by_row
        self.drawer = RowDrawer(vocab_size) if by_rows else None
        self._last: SamplingBatch | None = None

    def sample(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> list[SampledToken | None]:
        """logits: (rows, vocabulary) fp32, overwritten."""
        return sample_on_device(logits, self.prepare(states)).read()

    def prepare(self, states: Sequence[SamplingState], unread: Sequence[int] | None = None) -> SamplingBatch:
        """unread: for each row, how many tokens the last batch drew that its state has not noted yet; 0 where the state
        has `bad_sequences`, which are compared on the host.
        """
        indices = [state.index for state in states]
        if unread is not None:
            if any(ahead and state.bad_sequences for ahead, state in zip(unread, states, strict=True)):
                raise ValueError("bad words look at tokens that were not read yet")
            indices = [index + ahead for index, ahead in zip(indices, unread, strict=True)]
        batch = self._last
        if batch is None or not _continues(batch, states, indices):
            batch = SamplingBatch(self, states, indices)
            if batch.penalised:
                batch.penalties = self._penalties(batch)
            self._last = batch
        batch.banned = [(row, token) for row, state in enumerate(states) for token in state.banned_now()]
        return batch

    def _penalties(self, batch: SamplingBatch) -> PenaltyTable:
        """Rows that the last batch has at the same index are copied on the device, others come from the host."""
        last, before = self._last, {}
        if last is not None and last.penalties is not None:
            before = {id(last.states[row]): (place, row) for place, row in enumerate(last.penalised)}
        rows: list[PenalisedRow] = []
        carried: list[tuple[int, int]] = []
        width = 0
        for place, row in enumerate(batch.penalised):
            state = batch.states[row]
            there = before.get(id(state))
            prompt = state.prompt_tokens if state.sampling.repetition_penalty != 1.0 else ()
            if there is not None and last is not None and last.next_index(there[1]) == batch.next_index(row):
                carried.append((place, there[0]))
                rows.append(PenalisedRow(row, state.sampling, (), ()))
            elif batch.next_index(row) != state.index:
                raise ValueError("a row has unread tokens that the last batch does not hold")
            else:
                rows.append(PenalisedRow(row, state.sampling, (*prompt, *state.answer), state.answer))
            width = max(width, len(prompt) + batch.next_index(row))
        table = PenaltyTable(rows, width, self.vocab_size, self.device)
        if carried and last is not None and last.penalties is not None:
            table.carry_over(last.penalties, carried)
        return table


def sample_on_device(logits: torch.Tensor, batch: SamplingBatch) -> SampledBatch:
    """logits: (rows, vocabulary) fp32, overwritten; rows beyond the batch's are ignored. Waits for no device.

    Order: logprobs of the raw distribution; penalties, bias, forbidden tokens; temperature; top-k; top-p; min-p; noise.
    """
    logits = logits[: len(batch.states)]
    is_usable = torch.isfinite(logits.sum(dim=-1))
    logprobs = None
    if batch.scored:
        scored = logits if len(batch.scored) == len(logits) else logits[batch.scored_index]
        logprobs = torch.log_softmax(scored, dim=-1)
    batch.adjust(logits)
    tokens = _argmax(logits)
    batch.draws.put(tokens, logits, batch.steps)
    if batch.is_adjusted:
        is_usable &= torch.isfinite(logits.gather(1, tokens.unsqueeze(1)).squeeze(1))
    batch.note(tokens)
    scores = None if logprobs is None else score(logprobs, tokens[batch.scored_index], batch.most_top)
    return SampledBatch(tokens, scores, batch, ToHost(packed([tokens, is_usable, *parts_of(scores)])))


class _Draws:
    """The rows with a temperature: how each cuts its distribution, and its noise."""

    def __init__(self, sampler: Sampler, states: Sequence[SamplingState], indices: Sequence[int]) -> None:
        self._rows = [row for row, state in enumerate(states) if state.sampling.temperature > 0]
        self._drawer = sampler.drawer
        self._indices = [indices[row] for row in self._rows]
        self._seeds = [states[row].sampling.seed for row in self._rows]
        self._cuts = [cut_of(states[row].sampling, sampler.vocab_size) for row in self._rows]
        if self._rows and self._drawer is None:
            self._index = to_device(torch.tensor(self._rows), sampler.device)
            self._cut_tensors: CutTensors = cut_tensors(self._cuts, sampler.device)
            self._seed_tensor = seed_tensor([mixed_seed(seed) for seed in self._seeds], sampler.device)
            self._index_tensor = to_device(torch.tensor(self._indices), sampler.device)

    def put(self, tokens: torch.Tensor, logits: torch.Tensor, step: int) -> None:
        """Writes the drawn rows' tokens into `tokens`."""
        if not self._rows:
            return
        if self._drawer is None:
            chosen = logits if len(self._rows) == len(logits) else logits[self._index]
            keys = noise_keys(self._seed_tensor, self._index_tensor + step)
            tokens[self._index] = draw_batch(chosen, self._cut_tensors, keys)
            return
        rows, drawn = logits.numpy(), tokens.numpy()
        for row, cut, seed, index in zip(self._rows, self._cuts, self._seeds, self._indices, strict=True):
            drawn[row] = self._drawer.draw(rows[row], cut, noise_key(seed, index + step))


def _continues(batch: SamplingBatch, states: Sequence[SamplingState], indices: Sequence[int]) -> bool:
    return len(batch.states) == len(states) and all(
        known is state and batch.next_index(row) == index
        for row, (known, state, index) in enumerate(zip(batch.states, states, indices, strict=True))
    )


def _bias(states: Sequence[SamplingState], device: torch.device) -> TokenAddends | None:
    """With tokens that are banned always, whose addend is -inf."""
    entries = [
        (row, token, value) for row, state in enumerate(states) for token, value in state.sampling.logit_bias
    ]
    entries += [(row, token, -math.inf) for row, state in enumerate(states) for token in state.banned_always]
    return TokenAddends(entries, device) if entries else None


def _endings(
    states: Sequence[SamplingState], indices: Sequence[int], device: torch.device
) -> ForbiddenEndings | None:
    entries = [
        (row, token, state.sampling.min_tokens - index)
        for row, (state, index) in enumerate(zip(states, indices, strict=True))
        for token in state.ending_tokens
        if index < state.sampling.min_tokens
    ]
    return ForbiddenEndings(entries, device) if entries else None


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """(rows,); of equal ones the lowest token. numpy's takes a tenth of torch's time on a CPU."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)
