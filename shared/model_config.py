"""Values of a parsed config.json, each checked as it is read, and the refusals. Pure; `model_type.py` says what they mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Json = Mapping[str, Any]
Shape = tuple[int, ...]
Keys = tuple[str, ...]

# Upper bounds, a few times above the largest open models: they keep hostile configs from naming absurd allocations.
MAX_HIDDEN_SIZE = 65_536
MAX_INTERMEDIATE_SIZE = 1_048_576
MAX_LAYERS = 512
MAX_HEADS = 1_024
MAX_HEAD_DIM = 1_024
MAX_VOCABULARY = 2_097_152
MAX_CONTEXT_TOKENS = 16_777_216

# Rope kind -> the numbers it needs beside theta. Kinds that depend on the length of the running sequence are left out: keys in
# the cache would have to be turned again as a sequence grows.
ROPE_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings"),
}


class ModelTypeErrorCode(StrEnum):
    UNSUPPORTED_ARCHITECTURE = "unsupported_architecture"
    UNSUPPORTED_CONFIG = "unsupported_config"
    INVALID_CONFIG = "invalid_config"


class ModelTypeError(ValueError):
    def __init__(self, code: ModelTypeErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class CheckpointNames:
    """Other names that a checkpoint may use; the first prefix and the first head are those of `Description.tensors`.

    prefixes: before the base model's tensors; a checkpoint of the bare base model lacks it. embedding: tells which is used.
    heads: the output head, which stands outside the prefix. ignored: derived values that old checkpoints store, full names.
    """

    embedding: str
    prefixes: tuple[str, ...]
    heads: tuple[str, ...] = ("lm_head",)
    ignored: frozenset[str] = frozenset()

    def usual(self, names: Iterable[str]) -> dict[str, str]:
        """Each of a checkpoint's names -> the name that `Description.tensors` has for it, or itself."""
        listed = list(names)
        below = self.embedding.removeprefix(self.prefixes[0])
        prefix = next((each for each in self.prefixes if each + below in listed), self.prefixes[0])
        return {name: self._usual(name, prefix) for name in listed}

    def _usual(self, name: str, prefix: str) -> str:
        module, _, kind = name.rpartition(".")
        if module in self.heads:
            return f"{self.heads[0]}.{kind}"
        return self.prefixes[0] + name.removeprefix(prefix) if name.startswith(prefix) else name


@dataclass(frozen=True, slots=True)
class Description:
    """What an architecture's config says. canonical: what the signature is made of, but for version and architecture.

    tensors: every tensor that a checkpoint must hold, and its shape; the head's weight only when it is not tied.
    """

    canonical: Mapping[str, Any]
    context_tokens: int
    tied_embeddings: bool
    tensors: Mapping[str, Shape]
    names: CheckpointNames


def named(config: Json, keys: Keys) -> Any:
    """The value under any of these names, which mean the same; None under none."""
    found = [config[key] for key in keys if config.get(key) is not None]
    if any(value != found[0] for value in found):
        raise invalid(f"{' and '.join(keys)} mean the same and differ")
    return found[0] if found else None


def size(config: Json, keys: str | Keys, maximum: int, default: int | None = None) -> int:
    keys = (keys,) if isinstance(keys, str) else keys
    value = named(config, keys)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= maximum:
        raise invalid(f"{keys[0]} must be an integer from 1 to {maximum}")
    return value


def flag(config: Json, key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise invalid(f"{key} must be true or false")
    return value


def positive(config: Json, key: str, default: float) -> float:
    return number(key, config.get(key, default))


def number(name: str, value: object) -> float:
    # As float in any case: 10000 and 10000.0 in a config are the same arithmetic and must be the same signature.
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value < 1e15
        or not math.isfinite(value)
    ):
        raise invalid(f"{name} must be a positive number")
    return float(value)


def read_rope(config: Json, theta_key: str = "rope_theta") -> tuple[dict[str, Any], float | None]:
    """Kind, theta and the kind's numbers, from the newer `rope_parameters` or the older `rope_scaling` beside a key for theta.

    Also the share of a head that turns, where these settings say it.
    """
    newer, older = config.get("rope_parameters"), config.get("rope_scaling")
    if newer and older:
        # Readers do not agree which of the two wins.
        raise invalid("rope_parameters and rope_scaling exclude each other")
    source = newer or older or {}
    if not isinstance(source, dict):
        raise invalid("rope settings must be an object")
    settings = dict(source)
    theta = settings.pop("rope_theta", None)
    older_kind = settings.pop("type", None)
    kind = settings.pop("rope_type", older_kind)
    if kind is None:
        kind = "default"
    if not isinstance(kind, str) or kind not in ROPE_PARAMETERS:
        raise unsupported(f"rope type must be one of {', '.join(sorted(ROPE_PARAMETERS))}")
    share = settings.pop("partial_rotary_factor", None)
    unknown = settings.keys() - set(ROPE_PARAMETERS[kind])
    if unknown:
        raise unsupported(f"rope setting {min(unknown)[:80]!r} is not served")
    if theta is None:
        theta = config.get(theta_key, 10_000.0)
    rope = {
        "kind": kind,
        "theta": number(theta_key, theta),
        **{name: number(name, settings.get(name)) for name in ROPE_PARAMETERS[kind]},
    }
    return rope, None if share is None else number("partial_rotary_factor", share)


def invalid(message: str) -> ModelTypeError:
    return ModelTypeError(ModelTypeErrorCode.INVALID_CONFIG, f"config.json: {message}")


def unsupported(message: str) -> ModelTypeError:
    return ModelTypeError(ModelTypeErrorCode.UNSUPPORTED_CONFIG, f"config.json: {message}")
