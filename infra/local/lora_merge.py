"""Merges a LoRA adapter in PEFT's format into the weights of its base, which makes a full fine-tune of the same type.

numpy alone. Each product is summed rank by rank in a fixed order, so that every machine writes the same bytes: a BLAS would
choose its own order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.local.bf16_safetensors import Bf16, read_bf16_safetensors, to_bf16, to_float32

PREFIX = "base_model.model."
# Settings under which the merge is plain W + alpha / r * B @ A. Any other value means another sum.
PLAIN_SETTINGS: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
}


class LoraMergeError(ValueError):
    """The adapter does not fit its base, or is of a kind that this merge does not know."""


def merge_lora(base_file: Path, adapter: Path) -> dict[str, Bf16]:
    """The base's tensors with the adapter added. Raises LoraMergeError, or SafetensorsError for a damaged file."""
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    for key, plain in PLAIN_SETTINGS.items():
        if config.get(key, plain[0]) not in plain:
            raise LoraMergeError(f"{key} = {config[key]!r} is not supported")
    weights = read_bf16_safetensors(base_file)
    deltas = read_bf16_safetensors(adapter / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    for name in [name for name in deltas if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        target = module.removeprefix(PREFIX) + ".weight"
        down = to_float32(deltas.pop(name))  # (rank, in)
        up_name = f"{module}.lora_B.weight"
        if up_name not in deltas or target not in weights:
            raise LoraMergeError(f"{module} has no second half, or the base has no such module")
        up = to_float32(deltas.pop(up_name))  # (out, rank)
        merged = to_float32(weights[target])
        if (up.shape[0], down.shape[1]) != merged.shape or not up.shape[1] == down.shape[0] == config["r"]:
            raise LoraMergeError(f"{module} does not have its module's shape")
        for rank in range(config["r"]):
            merged += scale * up[:, rank : rank + 1] * down[rank : rank + 1, :]
        weights[target] = to_bf16(merged)
    if deltas:
        raise LoraMergeError(f"unknown tensor {min(deltas)!r}")
    return weights
