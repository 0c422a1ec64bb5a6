"""Which files of a hub's repository make a model that can be registered. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from shared.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX_FILE,
    ModelFolderError,
    ModelFolderErrorCode,
    ModelFolderLimits,
    size_limit,
)

SINGLE = "model.safetensors"
_SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")


def choose_files(listed: Mapping[str, int | None], limits: ModelFolderLimits) -> dict[str, int]:
    """Return the names to fetch, with their sizes. `listed`: the repository's. Raises `ModelFolderError`.

    1. An adapter's repository has no config.json: its two files.
    2. Otherwise what a model folder may hold at its top: configs, tokenizer, and of the weights one file, or all shards and
       their index where that one is not there. Repositories hold the same weights in other forms, and papers: left out.
    3. Without safetensors there is nothing to register.
    4. No file, and not all together, over its limit; and each of a size that is known.
    """
    is_adapter = ADAPTER_CONFIG in listed and "config.json" not in listed
    if is_adapter:  # 1
        names = {ADAPTER_CONFIG, ADAPTER_WEIGHTS} & listed.keys()
        weights = names & {ADAPTER_WEIGHTS}
    else:  # 2
        weights = {SINGLE} if SINGLE in listed else {name for name in listed if _SHARD.fullmatch(name)}
        names = {name for name in listed if _is_config(name, limits)} | weights
        if SINGLE in weights:
            names -= {INDEX_FILE}
    if not weights:  # 3
        raise ModelFolderError(ModelFolderErrorCode.MISSING_FILE, "the repository has no safetensors weights")
    sizes: dict[str, int] = {}
    for name in sorted(names):  # 4
        size, limit = listed[name], size_limit(name, limits, adapter=is_adapter)
        if size is None or size < 0:
            raise ModelFolderError(
                ModelFolderErrorCode.MISSING_FILE, f"the hub does not say how large {name} is"
            )
        if size > limit:
            raise ModelFolderError(ModelFolderErrorCode.MODEL_TOO_LARGE, f"{name} is over {limit} bytes")
        sizes[name] = size
    if sum(sizes.values()) > limits.total_bytes or len(sizes) > limits.files:
        raise ModelFolderError(ModelFolderErrorCode.MODEL_TOO_LARGE, "the repository's model is too large")
    return sizes


def _is_config(name: str, limits: ModelFolderLimits) -> bool:
    """Whether it is a config or a part of the tokenizer; weights are chosen by their own names."""
    if name.endswith(".safetensors"):
        return False
    try:
        size_limit(name, limits)
    except ModelFolderError:
        return False
    return True
