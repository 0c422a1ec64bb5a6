"""adapter_config.json as PEFT writes it: what of it we compute, and the refusal of everything that means other arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .api import ModelRefusal
from .config_file import Config, read_json

# What says nothing about the arithmetic of a trained adapter: where it came from, how it was trained, and which modules were
# chosen, which the file of tensors says again.
_IRRELEVANT = frozenset(
    (
        *("peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
        *("lora_dropout", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *(
            "loftq_config",
            "eva_config",
            "corda_config",
            "runtime_config",
            "megatron_core",
            "qalora_group_size",
        ),
        # Says how a matrix is merged into its base; A and B are stored the same way either way.
        "fan_in_fan_out",
    )
)
_KNOWN = frozenset(
    ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "target_modules", "init_lora_weights", "bias")
)
# Others change the base's weights before training.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """modules: names, or ends of names, that may be adapted; None where a pattern says so.

    A pattern is not run: it comes with the files and may take for ever. The file of tensors says what is adapted.
    """

    rank: int
    scale: float
    modules: tuple[str, ...] | None

    def targets(self, module: str) -> bool:
        return self.modules is None or any(
            module == name or module.endswith("." + name) for name in self.modules
        )


def read_lora_config(path: Path) -> LoraConfig:
    """Raises ModelRefusal."""
    return lora_config(read_json(path))


def lora_config(config: Config) -> LoraConfig:
    """Raises ModelRefusal.

    1. It is LoRA for a decoder, added as trained: a known way to begin, no biases.
    2. Any other setting that is on, known to us or not, may mean other arithmetic: DoRA, ranks by pattern, ...
    """
    _expect(config, "peft_type", ("LORA",))  # 1
    _expect(config, "task_type", _TASKS)
    _expect(config, "bias", ("none", None))
    _expect(config, "init_lora_weights", _PLAIN_BEGINNINGS)
    for key, value in config.items():  # 2
        if key not in _KNOWN and key not in _IRRELEVANT and value not in (None, False, "", [], {}):
            raise _refusal(f"{key} {value!r} is not supported")
    rank = config.get("r")
    if type(rank) is not int or rank < 1:
        raise _refusal(f"r must be a positive integer, got {rank!r}")
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise _refusal(f"lora_alpha must be a number, got {alpha!r}")
    use_rslora = config.get("use_rslora") or False
    if not isinstance(use_rslora, bool):
        raise _refusal(f"use_rslora must be true or false, got {use_rslora!r}")
    # rsLoRA: arXiv 2312.03732.
    return LoraConfig(rank, alpha / (math.sqrt(rank) if use_rslora else rank), _modules(config))


def _modules(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets:
        return None
    if isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets):
        return tuple(targets)
    raise _refusal(f"target_modules must be names or a pattern, got {targets!r}")


def _expect(config: Config, key: str, values: tuple[object, ...]) -> None:
    value = config.get(key)
    if not any(value is known or (isinstance(value, str) and value == known) for known in values):
        raise _refusal(f"{key} {value!r} is not supported")


def _refusal(problem: str) -> ModelRefusal:
    return ModelRefusal(f"adapter_config.json: {problem}")
