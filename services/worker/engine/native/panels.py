"""Weights in the order in which the C kernels read them: panels of 32 outputs, inputs padded to whole groups of 64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from ..decoder_weights import LinearWeights
from .bindings import Kind, Linear, address

PANEL = 32
GROUP = 64
_ABSMAX_INT8 = 127.0


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """What a `bindings.Linear` points to. scales: (outputs,) fp32, int8 only; bias: (outputs,) fp32."""

    kind: Kind
    outputs: int
    true_inputs: int
    packed: torch.Tensor
    scales: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def inputs(self) -> int:
        return padded(self.true_inputs, GROUP)

    @property
    def weight_bytes(self) -> int:
        bytes_: int = self.packed.nbytes
        return bytes_

    def struct(self) -> Linear:
        return Linear(
            kind=self.kind,
            outputs=self.outputs,
            inputs=self.inputs,
            true_inputs=self.true_inputs,
            packed=address(self.packed),
            scales=address(self.scales),
            bias=address(self.bias),
        )


def padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def pack_linear(weights: LinearWeights, kind: Kind) -> PackedLinear:
    """fp32 [panel][input][32]; bf16 [panel][input / 2][32][2]; int8 [panel][input / 4][32][4], stored plus 128."""
    weight = weights.weight
    outputs, inputs = weight.shape
    scales = None
    if kind == Kind.INT8:
        weight = weight.float()
        scales = weight.abs().amax(dim=1).clamp_min_(torch.finfo(torch.float32).tiny).div_(_ABSMAX_INT8)
        # 128 is zero: padding with it adds nothing, whatever the inputs' padding holds.
        weight = weight.div(scales.unsqueeze(1)).round_().add_(128.0).to(torch.uint8)
    else:
        weight = weight.to(torch.float32 if kind == Kind.FP32 else torch.bfloat16)
    together = {Kind.FP32: 1, Kind.BF16: 2, Kind.INT8: 4}[kind]
    fill = 128 if kind == Kind.INT8 else 0
    padding = (0, padded(inputs, GROUP) - inputs, 0, padded(outputs, PANEL) - outputs)
    if any(padding):
        weight = functional.pad(weight, padding, value=fill)
    panels = weight.view(-1, PANEL, padded(inputs, GROUP) // together, together)
    return PackedLinear(
        kind=kind,
        outputs=outputs,
        true_inputs=inputs,
        packed=panels.permute(0, 2, 1, 3).contiguous(),
        scales=scales,
        bias=None if weights.bias is None else weights.bias.float().contiguous(),
    )
