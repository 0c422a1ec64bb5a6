"""Which token is drawn, row by row in numpy: the way for a CPU, where looking at few tokens beats few operations.

`draw_batch.py` computes the same for a device that must not wait for the host. One row at a time stays in a core's cache,
and its result cannot depend on the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .api import Sampling
from .noise import NOISE_MAX, RowNoise, gumbel_of, lowest_hash

# Scores are 0 for the likeliest. Noise is computed at once for tokens this near to it, at most so many; for the rest of
# the vocabulary only where it could still win.
_NEAR = -5.0
_NEAR_TOKENS = 3072
# top-p sorts this many of the likeliest first; a row that needs more sorts all that could be needed.
_TOP_P_TOKENS = 1024

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Cut:
    """Which tokens may be drawn. top_k: 0 is off."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


def cut_of(sampling: Sampling, vocab_size: int) -> Cut:
    # A temperature that fp32 takes for 0 would divide 0 by 0; this one is as greedy.
    temperature = max(sampling.temperature, 1e-30)
    top_k = sampling.top_k if 0 < sampling.top_k < vocab_size else 0
    return Cut(temperature, top_k, sampling.top_p, sampling.min_p)


class RowDrawer:
    """Holds 32 bytes x vocabulary to work in."""

    def __init__(self, vocab_size: int) -> None:
        self._noise = RowNoise(vocab_size)
        self._scores = np.empty(vocab_size, dtype=np.float32)
        self._work = np.empty(vocab_size, dtype=np.float32)

    def draw(self, logits: Scores, cut: Cut, key: int) -> int:
        """logits: (vocabulary,). Any token when they are not finite or all forbidden: the caller knows."""
        best = logits.max()
        if not math.isfinite(best):
            return 0
        with np.errstate(over="ignore"):
            # The maximum goes first: a tiny temperature then makes the others -inf, and no inf - inf arises.
            scores = np.subtract(logits, best, out=self._scores)
            np.divide(scores, np.float32(cut.temperature), out=scores)
        return self._best_with_noise(scores, threshold(scores, cut, self._work), key)

    def _best_with_noise(self, scores: Scores, lowest: float, key: int) -> int:
        """argmax of scores + noise over scores >= lowest, exact, without computing the noise of every token.

        The best of the near tokens sets the bar. A token outside scores at most `rest`, so it needs noise of at least
        their difference to win: a bound on its hash, which few pass. Only those few are looked at.
        """
        is_all = lowest > -math.inf
        rest = lowest if is_all else _NEAR
        near = np.flatnonzero(scores >= rest)
        if len(near) > _NEAR_TOKENS:
            rest = max(lowest, _NEAR)
            near = near[scores[near] >= rest]
            is_all = rest == lowest
        if len(near) > _NEAR_TOKENS:
            near, rest, is_all = near[:_NEAR_TOKENS], 0.0, False
        noisy = scores[near] + self._noise.of_tokens(key, near)
        place = int(noisy.argmax())
        winner, bar = int(near[place]), float(noisy[place])
        if is_all or bar - rest > NOISE_MAX:
            return winner
        hashes = self._noise.hashes(key)
        challengers = np.flatnonzero(hashes >= np.uint64(lowest_hash(bar - rest)))
        challengers = challengers[scores[challengers] >= lowest]
        if len(challengers):
            noisy = scores[challengers] + gumbel_of(hashes[challengers])
            place = int(noisy.argmax())
            if noisy[place] > bar:
                return int(challengers[place])
        return winner


def threshold(scores: Scores, cut: Cut, work: Scores) -> float:
    """The lowest score that may be drawn. scores: (vocabulary,), 0 for the likeliest; work: the same size, overwritten.

    1. top-k: the k-th best; ties with it stay.
    2. top-p: of what is left, the fewest most likely tokens whose share is at least top_p; ties with the last stay.
    3. min-p: tokens less likely than min_p times the likeliest go.
    """
    lowest = -math.inf
    if cut.top_k:
        lowest = float(_largest(scores, cut.top_k, work)[0])
    if cut.top_p < 1.0:
        lowest = max(lowest, _top_p_threshold(scores, lowest, cut.top_p, work))
    if cut.min_p > 0:
        lowest = max(lowest, math.log(cut.min_p))
    return min(lowest, 0.0)


def _top_p_threshold(scores: Scores, lowest: float, top_p: float, work: Scores) -> float:
    if lowest > -math.inf:
        candidates = scores[np.flatnonzero(scores >= lowest)]
        total = float(np.exp(candidates).sum())
        return _last_needed(candidates, top_p * total)[0]
    total = float(np.exp(scores, out=work).sum())
    needed, is_enough = _last_needed(_largest(scores, min(_TOP_P_TOKENS, len(scores)), work), top_p * total)
    if is_enough:
        return needed
    # Tokens of a share below (1 - top_p) / vocabulary are together less than 1 - top_p: none is needed. Half of it,
    # against rounding.
    least = math.log((1.0 - top_p) * total / (2 * len(scores)))
    return _last_needed(scores[np.flatnonzero(scores >= least)], top_p * total)[0]


def _last_needed(candidates: Scores, mass: float) -> tuple[float, bool]:
    """The lowest of the fewest largest scores that reach `mass`, and whether all of them do. Sorts in place."""
    candidates.sort()
    descending = candidates[::-1]
    sums = np.exp(descending).cumsum(dtype=np.float64)
    # One is needed when those before it do not reach the mass.
    place = min(int(np.searchsorted(sums, mass)), len(sums) - 1)
    return float(descending[place]), bool(sums[-1] >= mass)


def _largest(scores: Scores, count: int, work: Scores) -> Scores:
    """The `count` largest, the least of them first, the others in no order; in `work`."""
    rank = len(scores) - count
    np.copyto(work, scores)
    work.partition(rank)
    return work[rank:]


def best_tokens(rows: Scores, count: int) -> npt.NDArray[np.int64]:
    """(rows, vocabulary) to (rows, count) tokens, best first; of equal ones the lowest. `best_of_rows` in numpy."""
    count = min(count, rows.shape[1])
    best = np.empty((len(rows), count), dtype=np.int64)
    work = np.empty(rows.shape[1], dtype=np.float32)
    for row, out in zip(rows, best, strict=True):
        # Not "at least": a row of no numbers would then have none.
        tokens = np.flatnonzero(~(row < _largest(row, count, work)[0]))
        out[:] = tokens[np.argsort(-row[tokens], kind="stable")[:count]]
    return best
