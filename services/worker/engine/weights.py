"""Reads a decoder's tensors from safetensors, by name and checked shape. Nothing here executes what a file holds.

Tensors come as views of the mapped file; what keeps them alive keeps the mapping.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from .api import ModelRefusal


class Checkpoint:
    """An open safetensors checkpoint, one file or sharded. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._taken: set[str] = set()
        try:
            for path in _shards(folder):
                # Entered on the stack, so that a second file's failure closes the first.
                opened = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                self._files.update(dict.fromkeys(opened.keys(), opened))
        except (SafetensorError, OSError) as problem:
            self._stack.close()
            raise ModelRefusal(f"{folder.name}: cannot read safetensors: {problem}") from problem

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor in the checkpoint's own dtype. Raises ModelRefusal when absent, misshapen or not floating."""
        file = self._files.get(name)
        if file is None:
            raise ModelRefusal(f"safetensors: tensor {name} is missing")
        try:
            tensor: torch.Tensor = file.get_tensor(name)
        except SafetensorError as problem:
            raise ModelRefusal(f"safetensors: {name}: {problem}") from problem
        if tuple(tensor.shape) != shape:
            raise ModelRefusal(
                f"safetensors: {name} has shape {tuple(tensor.shape)}, config.json says {shape}"
            )
        if not tensor.is_floating_point():
            raise ModelRefusal(f"safetensors: {name} is {tensor.dtype}, not floating point")
        self._taken.add(name)
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def untaken(self) -> list[str]:
        """Names nobody asked for: weights that the config does not explain, so the model would answer wrongly."""
        return sorted(self._files.keys() - self._taken)


def _shards(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise ModelRefusal(f"{folder.name}: neither model.safetensors nor its index is there")
    try:
        weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as problem:
        raise ModelRefusal(f"{index.name}: {problem!r}") from problem
    for name in names:
        # A shard is a neighbour of the index; a path would let a model folder reach outside itself.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelRefusal(f"{index.name}: {name!r} is not a file name ending in .safetensors")
    return [folder / name for name in names]
