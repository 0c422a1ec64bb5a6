"""From logits to tokens, for all rows of a step at once.

Chance enters as Gumbel noise that is a hash of (seed, token index, vocabulary index): adding it to the logits and
taking the maximum draws from the softmax (Gumbel-max; Maddison et al., arXiv 1411.0030, section 2). A draw thus depends on
its own row only, neither on the batch nor on how often the engine was started before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .api import Sampling, TokenLogprob
from .bad_words import BadWords, banned_tokens, compile_bad_words

_MASK_64 = (1 << 64) - 1
# splitmix64's constants (Steele, Lea, Flood, OOPSLA 2014).
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
# Noise of the highest of 2^32 hashes.
_NOISE_MAX = -math.log(-math.log1p(-(2.0**-33)))
# Tokens whose noise is always computed; the rest of the vocabulary only where it could still win.
_NOISE_SHORTLIST = 64
# top-p looks at this many of the most likely tokens first; only a row that needs more is sorted whole (3 ms for 49152).
_TOP_P_SHORTLIST = 1024


@dataclass(slots=True)
class SamplingState:
    """What sampling knows of one sequence. Build with `make_state`, call `note` for each generated token.

    seen: (vocabulary,) bool, tokens in prompt or answer; counts: (vocabulary,) fp32, how often each is in the answer.
    Both exist only where a penalty needs them. ending_tokens: forbidden before `min_tokens`. answer: the generated tokens,
    kept only where `bad_words` look at them.
    """

    sampling: Sampling
    index: int
    ending_tokens: torch.Tensor
    bias_tokens: torch.Tensor
    bias_values: torch.Tensor
    seen: torch.Tensor | None
    counts: torch.Tensor | None
    bad_words: BadWords | None
    answer: list[int]

    def note(self, token: int) -> None:
        self.index += 1
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1
        if self.bad_words is not None:
            self.answer.append(token)


@dataclass(frozen=True, slots=True)
class SampledToken:
    token: int
    logprob: TokenLogprob | None


def make_state(
    sampling: Sampling,
    prompt_tokens: Sequence[int],
    ending_tokens: Sequence[int],
    vocab_size: int,
    device: torch.device,
) -> SamplingState:
    """State before the first generated token."""
    seen = counts = None
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        seen[torch.tensor(list(prompt_tokens), dtype=torch.long, device=device)] = True
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = torch.zeros(vocab_size, device=device)
    return SamplingState(
        sampling=sampling,
        index=0,
        ending_tokens=torch.tensor(list(ending_tokens), dtype=torch.long, device=device),
        bias_tokens=torch.tensor(
            [token for token, _ in sampling.logit_bias], dtype=torch.long, device=device
        ),
        bias_values=torch.tensor(
            [value for _, value in sampling.logit_bias], dtype=torch.float32, device=device
        ),
        seen=seen,
        counts=counts,
        bad_words=compile_bad_words(sampling.bad_words) if sampling.bad_words else None,
        answer=[],
    )


def sample(logits: torch.Tensor, rows: Sequence[SamplingState]) -> list[SampledToken | None]:
    """logits: (rows, vocabulary) fp32, overwritten. None for a row whose logits are not all finite.

    Order: logprobs of the raw distribution; penalties, bias, bad words, forbidden endings; temperature; top-k; top-p; min-p; noise.
    """
    is_finite = torch.isfinite(logits.sum(dim=-1)).tolist()
    logprobs = _raw_logprobs(logits, rows, is_finite)
    for row, state in enumerate(rows):
        _adjust(logits[row], state)
    drawn = [row for row, state in enumerate(rows) if state.sampling.temperature > 0 and is_finite[row]]
    tokens: list[int] = torch.argmax(logits, dim=-1).tolist()
    if drawn:
        # Greedy rows have their token by now, so a batch without them is drawn from in place.
        scores = logits if len(drawn) == len(rows) else logits[torch.tensor(drawn, device=logits.device)]
        drawn_tokens: list[int] = _draw(scores, [rows[row] for row in drawn]).tolist()
        for row, token in zip(drawn, drawn_tokens, strict=True):
            tokens[row] = token
    return [
        SampledToken(
            token, score_token(logprobs[row], token, rows[row].sampling.logprobs) if row in logprobs else None
        )
        if is_finite[row]
        else None
        for row, token in enumerate(tokens)
    ]


def score_token(logprobs: torch.Tensor, token: int, top: int | None) -> TokenLogprob:
    """logprobs: (vocabulary,) of one position."""
    alternatives: tuple[tuple[int, float], ...] = ()
    if top:
        values, tokens = logprobs.topk(min(top, len(logprobs)))
        alternatives = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), alternatives)


def hash_32(keys: torch.Tensor, vocabulary_indices: torch.Tensor) -> torch.Tensor:
    """keys: int64 from `noise_key`, broadcast against the indices. int64 in [0, 2^32): splitmix64's upper half.

    int64 products wrap as unsigned ones do; right shifts are made logical by masking the copies of the sign.
    """
    z = vocabulary_indices * _signed(_GOLDEN) + keys
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX_2)
    return _shift_right(z ^ _shift_right(z, 31), 32)


def gumbel_noise(hashes: torch.Tensor) -> torch.Tensor:
    """fp64, from `hash_32`'s 32 bits: uniforms at half steps, so that neither log sees 0."""
    return -torch.log(-torch.log((hashes.double() + 0.5) * 2.0**-32))


def noise_key(seed: int, index: int) -> int:
    """The stream for token `index` of an answer with `seed` (any integer), as a signed 64-bit integer."""
    return _signed(_mix((_mix(seed & _MASK_64) + (index + 1) * _GOLDEN) & _MASK_64))


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK_64
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK_64
    return z ^ (z >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _raw_logprobs(
    logits: torch.Tensor, rows: Sequence[SamplingState], is_finite: Sequence[bool]
) -> dict[int, torch.Tensor]:
    wanted = [row for row, state in enumerate(rows) if state.sampling.logprobs is not None and is_finite[row]]
    if not wanted:
        return {}
    scores = torch.log_softmax(logits[torch.tensor(wanted, device=logits.device)], dim=-1)
    return dict(zip(wanted, scores, strict=True))


def _adjust(row: torch.Tensor, state: SamplingState) -> None:
    """Penalties, bias, bad words and forbidden endings, in place on (vocabulary,).

    repetition: CTRL (arXiv 1909.05858) section 4.1 in transformers' form, over prompt and answer; presence and frequency:
    OpenAI's definition, over the answer.
    """
    sampling = state.sampling
    if state.seen is not None:
        penalised = torch.where(row < 0, row * sampling.repetition_penalty, row / sampling.repetition_penalty)
        row.copy_(torch.where(state.seen, penalised, row))
    if state.counts is not None:
        row.sub_(state.counts, alpha=sampling.frequency_penalty)
        row.sub_((state.counts > 0).to(row.dtype), alpha=sampling.presence_penalty)
    if len(state.bias_tokens):
        row.index_add_(0, state.bias_tokens, state.bias_values)
    if state.bad_words is not None and (banned := banned_tokens(state.bad_words, state.answer)):
        row.index_fill_(0, torch.tensor(banned, device=row.device), float("-inf"))
    if state.index < sampling.min_tokens and len(state.ending_tokens):
        row.index_fill_(0, state.ending_tokens, float("-inf"))


def _draw(scores: torch.Tensor, rows: Sequence[SamplingState]) -> torch.Tensor:
    """scores: (rows, vocabulary), all with temperature > 0; overwritten. Returns (rows,) tokens."""
    temperatures = torch.tensor([[state.sampling.temperature] for state in rows], device=scores.device)
    # The maximum goes first: a tiny temperature then makes the others -inf, and no inf - inf arises.
    scores.sub_(scores.amax(dim=-1, keepdim=True)).div_(temperatures)
    _keep_top_k(scores, rows)
    _keep_top_p(scores, rows)
    _keep_min_p(scores, rows)
    return _argmax_with_noise(scores, [noise_key(state.sampling.seed, state.index) for state in rows])


def _argmax_with_noise(scores: torch.Tensor, keys: Sequence[int]) -> torch.Tensor:
    """(rows,) argmax of scores + noise, exact, without computing the noise of every token.

    The best of a shortlist sets the bar. A token outside scores at most the shortlist's last, so it needs noise of at
    least their difference to win: a bound on its hash, which few pass. Only those few are looked at.
    """
    shortlist = min(_NOISE_SHORTLIST, scores.shape[-1])
    best, best_tokens = scores.topk(shortlist, dim=-1)
    key_column = torch.tensor(keys, device=scores.device).unsqueeze(1)
    noisy, places = (best.double() + gumbel_noise(hash_32(key_column, best_tokens))).max(dim=-1)
    winners = best_tokens.gather(1, places.unsqueeze(1)).squeeze(1)
    if shortlist == scores.shape[-1]:
        return winners
    vocabulary = torch.arange(scores.shape[-1], device=scores.device)
    # Row by row: one row's int64 hashes stay in a core's cache, a whole batch's do not.
    for row, (bar, last) in enumerate(zip(noisy.tolist(), best[:, -1].tolist(), strict=True)):
        if last == -math.inf or bar - last > _NOISE_MAX:
            continue
        hashes = hash_32(key_column[row], vocabulary)
        challengers = torch.nonzero(hashes >= _lowest_hash(bar - last)).squeeze(1)
        if len(challengers):
            value, place = (scores[row, challengers].double() + gumbel_noise(hashes[challengers])).max(dim=0)
            if float(value) > bar:
                winners[row] = challengers[place]
    return winners


def _lowest_hash(noise: float) -> int:
    """A hash at or below the least one whose noise is at least `noise`; one lower than computed, against rounding."""
    return max(0, math.floor(math.exp(-math.exp(min(-noise, 700.0))) * 2.0**32 - 0.5) - 1)


def _keep_top_k(scores: torch.Tensor, rows: Sequence[SamplingState]) -> None:
    """Ties with the k-th stay."""
    vocabulary = scores.shape[-1]
    limited = [row for row, state in enumerate(rows) if 0 < state.sampling.top_k < vocabulary]
    if not limited:
        return
    index = torch.tensor(limited, device=scores.device)
    ranks = torch.tensor([[rows[row].sampling.top_k - 1] for row in limited], device=scores.device)
    best = scores[index].topk(int(ranks.max()) + 1, dim=-1).values
    scores[index] = _drop_below(scores[index], best.gather(1, ranks))


def _keep_top_p(scores: torch.Tensor, rows: Sequence[SamplingState]) -> None:
    """Keeps the fewest most likely tokens whose share is at least top_p, ties with the last included."""
    limited = [row for row, state in enumerate(rows) if state.sampling.top_p < 1.0]
    if not limited:
        return
    index = torch.tensor(limited, device=scores.device)
    shares = torch.tensor([[rows[row].sampling.top_p] for row in limited], device=scores.device)
    chosen = scores[index]
    shortlist = min(_TOP_P_SHORTLIST, chosen.shape[-1])
    thresholds, is_enough = _top_p_thresholds(chosen, shares, shortlist)
    if not bool(is_enough.all()):
        rest = torch.nonzero(~is_enough).squeeze(1)
        thresholds[rest], _ = _top_p_thresholds(chosen[rest], shares[rest], chosen.shape[-1])
    scores[index] = _drop_below(chosen, thresholds)


def _keep_min_p(scores: torch.Tensor, rows: Sequence[SamplingState]) -> None:
    """Drops tokens less likely than min_p times the likeliest, whose score is 0."""
    if any(state.sampling.min_p > 0 for state in rows):
        floors = [math.log(state.sampling.min_p) if state.sampling.min_p > 0 else -math.inf for state in rows]
        scores.masked_fill_(scores < torch.tensor(floors, device=scores.device).unsqueeze(1), float("-inf"))


def _top_p_thresholds(
    scores: torch.Tensor, shares: torch.Tensor, shortlist: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest score to keep, (rows, 1), and whether the `shortlist` best tokens reach the share, (rows,)."""
    best = scores.topk(shortlist, dim=-1).values
    probabilities = torch.exp(best - torch.logsumexp(scores, dim=-1, keepdim=True))
    sums = probabilities.cumsum(dim=-1)
    kept = (sums - probabilities < shares).sum(dim=-1, keepdim=True).clamp_min_(1)
    return best.gather(1, kept - 1), (sums[:, -1:] >= shares).squeeze(1)


def _drop_below(scores: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(scores < thresholds, float("-inf"))
