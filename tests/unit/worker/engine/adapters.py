"""LoRA adapters with random weights: as PEFT saves them, and merged by hand into transformers' module."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK = 4
ALPHA = 6.0


def adapter_tensors(
    model: Any, targets: Sequence[str], seed: int, rank: int = RANK, size: float = 0.3
) -> dict[str, torch.Tensor]:
    """A and B for each module whose name ends so, by the names that PEFT gives them."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if any(name == target or name.endswith("." + target) for target in targets):
            outputs, inputs = _shape(module)
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * size
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * size
    assert tensors, "no module has such a name"
    return tensors


def adapter_config(targets: Sequence[str] | str, **changes: Any) -> dict[str, Any]:
    """What PEFT writes, with its defaults."""
    values: dict[str, Any] = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "base",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": ALPHA,
        "lora_bias": False,
        "lora_dropout": 0.1,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "qalora_group_size": 16,
        "r": RANK,
        "rank_pattern": {},
        "revision": None,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
    }
    return {**values, **changes}


def save_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def scale_of(config: Mapping[str, Any]) -> float:
    rank = config["r"]
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config["use_rslora"] else rank)


def merged(model: Any, tensors: Mapping[str, torch.Tensor], scale: float) -> Any:
    """A copy of transformers' module with scale x B A added to its weights."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, down in tensors.items():
            if name.endswith(".lora_A.weight"):
                module = result.get_submodule(
                    name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                )
                addend = scale * tensors[name.replace(".lora_A.", ".lora_B.")] @ down
                module.weight += addend.t() if type(module).__name__ == "Conv1D" else addend
    return result


def _shape(module: Any) -> tuple[int, int]:
    """(outputs, inputs)"""
    first, second = module.weight.shape
    return (second, first) if type(module).__name__ == "Conv1D" else (first, second)
