"""Chance as a pure function: Gumbel noise that is a hash of (seed, token index, vocabulary index).

Adding it to the logits and taking the maximum draws from the softmax (Gumbel-max; Maddison et al., arXiv 1411.0030,
section 2). Torch for any device; numpy for one row on a CPU, in place, where that takes a third of the time.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

_MASK_64 = (1 << 64) - 1
# splitmix64's constants (Steele, Lea, Flood, OOPSLA 2014).
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

# Noise of the highest of 2^32 hashes.
NOISE_MAX = -math.log(-math.log1p(-(2.0**-33)))


def noise_key(seed: int, index: int) -> int:
    """The stream for token `index` of an answer with `seed` (any integer), as a signed 64-bit integer."""
    return signed_64(_mix((mixed_seed(seed) + (index + 1) * _GOLDEN) & _MASK_64))


def mixed_seed(seed: int) -> int:
    """The part of `noise_key` that is the same for a whole answer: in [0, 2^64)."""
    return _mix(seed & _MASK_64)


def noise_keys(mixed_seeds: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`noise_key` on the device; both int64, the seeds as `signed_64` of `mixed_seed`."""
    return _mix_tensor(mixed_seeds + (indices + 1) * signed_64(_GOLDEN))


def hash_32(keys: torch.Tensor, vocabulary_indices: torch.Tensor) -> torch.Tensor:
    """keys: int64 from `noise_key`, broadcast against the indices. int64 in [0, 2^32): splitmix64's upper half."""
    return _shift_right(_mix_tensor(vocabulary_indices * signed_64(_GOLDEN) + keys), 32)


def gumbel_noise(hashes: torch.Tensor) -> torch.Tensor:
    """fp64, from `hash_32`'s 32 bits: uniforms at half steps, so that neither log sees 0."""
    return -torch.log(-torch.log((hashes.double() + 0.5) * 2.0**-32))


def rough_gumbel_noise(hashes: torch.Tensor) -> torch.Tensor:
    """`gumbel_noise` in fp32, within 1e-5; from the distance to 1, where fp32 is fine for noise high enough to win."""
    from_top = ((2**32 - 1) - hashes).float().add_(0.5).mul_(2.0**-32)
    # The lowest hashes round to a distance of 1: their noise is no number in fp32, and below -3 in truth.
    return -torch.log(-torch.log1p(-from_top.clamp_max_(1 - 2.0**-24)))


def lowest_hash(noise: float) -> int:
    """A hash at or below the least one whose noise is at least `noise`; one lower than computed, against rounding."""
    return max(0, math.floor(math.exp(-math.exp(min(-noise, 700.0))) * 2.0**32 - 0.5) - 1)


class RowNoise:
    """Noise for one row at a time on a CPU; holds 24 bytes x vocabulary to work in."""

    def __init__(self, vocab_size: int) -> None:
        self._steps = np.arange(vocab_size, dtype=np.uint64) * np.uint64(_GOLDEN)
        self._z, self._shifted = np.empty_like(self._steps), np.empty_like(self._steps)

    def hashes(self, key: int) -> npt.NDArray[np.uint64]:
        """`hash_32` of the whole vocabulary; valid until the next call."""
        z = np.add(self._steps, np.uint64(key & _MASK_64), out=self._z)
        return _mix_in_place(z, self._shifted)

    def of_tokens(self, key: int, tokens: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
        """`gumbel_noise` of some tokens."""
        z = self._steps[tokens] + np.uint64(key & _MASK_64)
        return gumbel_of(_mix_in_place(z, np.empty_like(z)))


def gumbel_of(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """`gumbel_noise` in numpy."""
    noise: npt.NDArray[np.float64] = -np.log(-np.log((hashes.astype(np.float64) + 0.5) * 2.0**-32))
    return noise


def signed_64(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK_64
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK_64
    return z ^ (z >> 31)


def _mix_tensor(z: torch.Tensor) -> torch.Tensor:
    """int64 products wrap as unsigned ones do; right shifts are made logical by masking the copies of the sign."""
    z = (z ^ _shift_right(z, 30)) * signed_64(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * signed_64(_MIX_2)
    return z ^ _shift_right(z, 31)


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix_in_place(z: npt.NDArray[np.uint64], shifted: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    for bits, factor in ((30, _MIX_1), (27, _MIX_2)):
        z ^= np.right_shift(z, np.uint64(bits), out=shifted)
        z *= np.uint64(factor)
    z ^= np.right_shift(z, np.uint64(31), out=shifted)
    z >>= np.uint64(32)
    return z
