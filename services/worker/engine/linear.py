"""Matrix products of a decoder in three precisions behind one call: `linear(x) -> y`, both (tokens, features).

Every variant gives a row the same bits whatever rows stand beside it (a test holds them to it on the machine at hand),
so a neighbour in the batch cannot change an answer.
"""

from __future__ import annotations

import warnings
from typing import Protocol

import torch
from torch.nn import functional

from .decoder import activation_dtype

# Rows below this have no information left; the bound keeps the division finite.
_SMALLEST_SCALE = 1e-12
_ABSMAX_INT8 = 127
# The kernel cuts [-1, 1] into 255 steps, or 127 in its reduced range.
_STEPS_PER_UNIT, _REDUCED_STEPS_PER_UNIT = 127.5, 63.5


class Linear(Protocol):
    weight_bytes: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class PlainLinear:
    """`torch.nn.functional.linear` on a weight kept as it is."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        self.weight_bytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)


class PackedLinear:
    """fp32 or bf16 on a weight reordered once for oneDNN.

    Against plain linear, 1 thread, AVX512-BF16, 49152 x 576: 3.3 -> 1.4 ms for one row in bf16, 20 -> 6.6 ms for 16 rows
    in fp32. oneDNN sums in one order for all batch sizes from 2 on; a lone row, which it would sum in another, is doubled.
    """

    _ROWS_HINT = 16

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), self._ROWS_HINT)
        self._bias = bias
        self.weight_bytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.repeat(2, 1) if x.shape[0] == 1 else x
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return y[: x.shape[0]]


class Int8Scratch:
    """Input buffers of int8 linears, one for each width: those of one decoder run one after another and share it."""

    def __init__(self) -> None:
        self._rows: dict[int, torch.Tensor] = {}

    def rows(self, count: int, inputs: int) -> torch.Tensor:
        """(count, inputs + 2) fp32; the last two columns hold +1 and -1, the rest is whatever was there."""
        rows = self._rows.get(inputs)
        if rows is None or rows.shape[0] < count:
            rows = torch.empty(count, inputs + 2)
            rows[:, inputs] = 1.0
            rows[:, inputs + 1] = -1.0
            self._rows[inputs] = rows
        return rows[:count]


class Int8Linear:
    """int8 weights with a scale per output channel; activations as two int8 numbers with a scale per row; fp32 in and out.

    The kernel takes one activation scale for its whole input, so each row is first divided by its own absolute maximum,
    and two columns of +1 and -1 against zero weights pin the range: the scale is then 2/255 (2/127 without VNNI) whatever
    the rows hold.

    One int8 number per activation is too little where a few channels are large: a second row carries what rounding the
    first left over. SmolLM2-135M, perplexity of one prose text: fp32 58.57, one number 61.25 (and plainly wrong answers),
    two numbers 58.56, for some 15 % more time per decoding step.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, scratch: Int8Scratch) -> None:
        outputs, self._inputs = weight.shape
        self._scratch = scratch
        padded = torch.zeros(outputs, self._inputs + 2)
        padded[:, : self._inputs] = weight
        scales = padded.abs().amax(dim=1).clamp_min(_SMALLEST_SCALE) / _ABSMAX_INT8
        with warnings.catch_warnings():
            # The constructor of quantized tensors is on its way out; torch is pinned, and a test covers this path.
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch.quantize_per_channel(
                padded, scales.double(), torch.zeros(outputs, dtype=torch.long), 0, torch.qint8
            )
        self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        self._bias = None if bias is None else bias.float()
        # Without VNNI the kernel adds pairs of products in 16 bits, which full-range activations overflow.
        self._reduce_range = not torch.cpu._is_vnni_supported()
        self._steps_per_unit = _REDUCED_STEPS_PER_UNIT if self._reduce_range else _STEPS_PER_UNIT
        self.weight_bytes = outputs * (self._inputs + 2)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        count = x.shape[0]
        rows = self._scratch.rows(2 * count, self._inputs)
        scale = x.abs().amax(dim=-1, keepdim=True).clamp_min_(_SMALLEST_SCALE)
        steps = torch.div(x, scale, out=rows[:count, : self._inputs]) * self._steps_per_unit
        # At most half a step either way, doubled to fill the range again; so it counts 1/255 (1/127).
        torch.mul(steps.sub_(steps.round()), 2.0, out=rows[count:, : self._inputs])
        y: torch.Tensor = torch.ops.quantized.linear_dynamic(rows, self._packed, self._reduce_range)
        y = torch.add(y[:count], y[count:], alpha=0.5 / self._steps_per_unit).mul_(scale)
        return y if self._bias is None else y.add_(self._bias)


def make_linear(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    precision: str,
    device: torch.device,
    scratch: Int8Scratch,
) -> Linear:
    """weight: (outputs, inputs), any floating dtype. precision: "fp32", "bf16", "fp16" or "int8" (CPU only).

    scratch: shared by linears of which only one runs at a time.
    """
    if precision == "int8":
        return Int8Linear(weight.float(), bias, scratch)
    dtype = activation_dtype(precision)
    weight = weight.to(device=device, dtype=dtype)
    bias = None if bias is None else bias.to(device=device, dtype=dtype)
    if device.type == "cpu" and _can_pack(dtype):
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
