"""adapter_config.json as PEFT writes it: which adapters may be registered. Pure.

Refused is whatever means other arithmetic than adding B A x to products of the base. The engine reads the same file by the
same rules on its own (`services/worker/engine/lora_config.py`); a contract test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Above what fine-tunes use; the engine's memory for adapters is bounded by it.
MAX_RANK = 256
MAX_MODULE_NAMES = 1_000
# What says nothing about the arithmetic of a trained adapter.
_IRRELEVANT = frozenset(
    (
        *("peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
        *("lora_dropout", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("loftq_config", "eva_config", "corda_config", "runtime_config", "megatron_core", "qalora_group_size"),
    )
)  # fmt: skip
_KNOWN = frozenset(
    ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "target_modules", "init_lora_weights", "bias")
)
# Other beginnings change the base's weights before training.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")


class AdapterConfigError(ValueError):
    """The adapter cannot be served; the text says why, for people."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """modules: names, or ends of names, that may be adapted; None where a pattern says so, which is not run."""

    rank: int
    modules: tuple[str, ...] | None

    def targets(self, module: str) -> bool:
        return self.modules is None or any(
            module == name or module.endswith("." + name) for name in self.modules
        )


def read_adapter_config(config: Mapping[str, Any]) -> AdapterConfig:
    """Judge a parsed file. Raises AdapterConfigError.

    1. It is LoRA for a decoder, added as trained: a known way to begin, no biases.
    2. Any other setting that is on, known to us or not, may mean other arithmetic: DoRA, ranks by pattern, ...
    3. Its rank is one of 1 to 256, its scale a finite number.
    4. Its modules are named, or given by a pattern.
    """
    _expect(config, "peft_type", ("LORA",))  # 1
    _expect(config, "task_type", _TASKS)
    _expect(config, "bias", ("none", None))
    _expect(config, "init_lora_weights", _PLAIN_BEGINNINGS)
    for key, value in config.items():  # 2
        if key not in _KNOWN and key not in _IRRELEVANT and value not in (None, False, "", [], {}):
            raise AdapterConfigError(f"{_shown(key)} {_shown(value)} is not supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")  # 3
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise AdapterConfigError(f"r must be an integer from 1 to {MAX_RANK}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not _is_finite(alpha):
        raise AdapterConfigError("lora_alpha must be a number")
    if not isinstance(config.get("use_rslora") or False, bool):
        raise AdapterConfigError("use_rslora must be true or false")
    return AdapterConfig(rank, _modules(config.get("target_modules")))  # 4


def _modules(targets: object) -> tuple[str, ...] | None:
    if isinstance(targets, str) and targets:
        return None
    if isinstance(targets, list) and 0 < len(targets) <= MAX_MODULE_NAMES:
        names = tuple(name for name in targets if isinstance(name, str))
        if len(names) == len(targets):
            return names
    raise AdapterConfigError("target_modules must be names or a pattern")


def _expect(config: Mapping[str, Any], key: str, values: tuple[object, ...]) -> None:
    value = config.get(key)
    if not any(value is known or (isinstance(value, str) and value == known) for known in values):
        raise AdapterConfigError(f"{key} {_shown(value)} is not supported")


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer that no float holds
        return False


def _shown(value: object) -> str:
    return ascii(value)[:80]
