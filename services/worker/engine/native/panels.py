"""Weights in the order in which the C kernels read them: panels of 32 outputs, inputs padded to whole groups of 32."""

from __future__ import annotations

import torch
from torch.nn import functional

from .bindings import Kind

PANEL = 32
GROUP = 32
_ABSMAX_INT8 = 127.0


def padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def pack_linear(weight: torch.Tensor, kind: Kind) -> tuple[torch.Tensor, torch.Tensor | None]:
    """weight: (outputs, inputs). Returns its numbers and, int8 only, scales (panels, groups, 32) bf16.

    fp32 [panel][input][32]; bf16 [panel][input / 2][32][2]; int8 [panel][input / 4][32][4], stored plus 128.

    int8: each output has a scale for each group of 32 inputs, as rows of activations have. SmolLM2-135M, perplexity of one
    prose text: fp32 51.0, groups of 32 51.4, and half of greedy tokens equal fp32's; with groups of 64 for activations
    and one scale for an output's whole row 51.2, and a third of them.
    """
    outputs, inputs = weight.shape
    dtype = torch.bfloat16 if kind == Kind.BF16 else torch.float32
    weight = weight.to(dtype)
    padding = (0, padded(inputs, GROUP) - inputs, 0, padded(outputs, PANEL) - outputs)
    if any(padding):
        weight = functional.pad(weight, padding)
    scales = None
    if kind == Kind.INT8:
        weight, scales = _quantized(weight)
    together = {Kind.FP32: 1, Kind.BF16: 2, Kind.INT8: 4}[kind]
    panels = weight.view(-1, PANEL, padded(inputs, GROUP) // together, together)
    return panels.permute(0, 2, 1, 3).contiguous(), scales


def _quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight: fp32, padded. Returns uint8 of the same shape, 128 being zero, and scales (panels, groups, 32) bf16."""
    groups = weight.view(len(weight), -1, GROUP)
    # Rounded up to bf16 before it is used: the step grows by 1.2 % at most, and the largest weight still fits.
    scales = groups.abs().amax(dim=2).mul_((1 + 2**-7) / _ABSMAX_INT8).to(torch.bfloat16)
    steps = scales.float().clamp_min_(torch.finfo(torch.float32).tiny).unsqueeze(2)
    whole = groups.div(steps).round_().add_(128.0).to(torch.uint8)
    return whole.view(weight.shape), scales.view(-1, PANEL, scales.shape[1]).transpose(1, 2).contiguous()
