"""Low-rank adapters on a shared base model: PEFT's files read into one form for all decoders and model types.

An adapter adds B A x to products of its base. Here these are the fused products of `LayerWeights`, in the order of rows in
which a decoder has them; what a decoder makes of that is its own (`Decoder.prepare_adapter`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open

from .api import ModelRefusal
from .families import FAMILIES, Family
from .family_weights import qkv_order
from .lora_config import LoraConfig, read_lora_config
from .spec import DecoderSpec

Product = Literal["qkv", "attention_output", "mlp_in", "mlp_out"]

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to one product: up (down x). down: (rank, inputs), up: (outputs, rank), fp32, contiguous, on the CPU.

    The scale is in `up`. Where several adapted tensors make one product, `rank` is the sum of their ranks, and each row of
    `up` is zero outside its own.
    """

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """layers: for each layer of the base, what is added to which product; a product that is not named is left alone."""

    handle: str
    layers: tuple[Mapping[Product, LowRank], ...]


class PreparedAdapter(Protocol):
    """What a decoder made of an adapter; that decoder alone looks inside. weight_bytes: what it holds in memory."""

    @property
    def weight_bytes(self) -> int: ...


def read_adapter(folder: Path, handle: str, spec: DecoderSpec) -> LoraAdapter:
    """spec: the base's. Raises ModelRefusal for what is not PEFT's format, does not fit, or asks for other arithmetic."""
    config = read_lora_config(folder / "adapter_config.json")
    with _Tensors(folder / "adapter_model.safetensors", config) as tensors:
        reader = _Reader(spec, tensors, config.scale)
        layers = tuple(reader.layer(index) for index in range(spec.layers))
        tensors.check_nothing_is_left()
    if not any(layers):
        raise ModelRefusal("adapter_model.safetensors: no tensor adapts a layer of the base model")
    return LoraAdapter(handle, layers)


class _Tensors:
    """The open file: pairs of A and B by the names that their modules have in the base's checkpoint."""

    def __init__(self, path: Path, config: LoraConfig) -> None:
        self._path, self._config = path, config
        self._stack = ExitStack()
        try:
            self._file: Any = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as problem:
            raise ModelRefusal(f"{path.name}: {problem}") from problem
        self._left = set(self._file.keys())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def modules(self) -> set[str]:
        return {
            name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
            for name in self._left
            if name.startswith(_PREFIX) and name.endswith(".lora_A.weight")
        }

    def take(self, module: str, inputs: int, outputs: int) -> LowRank | None:
        """None: this module is not adapted."""
        names = [f"{_PREFIX}{module}.lora_{half}.weight" for half in ("A", "B")]
        found = [name for name in names if name in self._left]
        if not found:
            return None
        if not self._config.targets(module):
            raise ModelRefusal(f"adapter_config.json: target_modules do not name {module}, which is adapted")
        rank = self._config.rank
        return LowRank(self._tensor(names[0], (rank, inputs)), self._tensor(names[1], (outputs, rank)))

    def check_nothing_is_left(self) -> None:
        if self._left:
            raise ModelRefusal(
                f"{self._path.name}: {len(self._left)} tensors adapt nothing that can be adapted here, such as "
                f"{min(self._left)}"
            )

    def _tensor(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        if name not in self._left:
            raise ModelRefusal(f"{self._path.name}: {name} is missing")
        try:
            tensor: torch.Tensor = self._file.get_tensor(name)
        except SafetensorError as problem:
            raise ModelRefusal(f"{self._path.name}: {name}: {problem}") from problem
        if tuple(tensor.shape) != shape:
            raise ModelRefusal(
                f"{self._path.name}: {name} has shape {tuple(tensor.shape)}; base and rank ask for {shape}"
            )
        if not tensor.is_floating_point():
            raise ModelRefusal(f"{self._path.name}: {name} is {tensor.dtype}, not floating point")
        self._left.discard(name)
        return tensor.float()


class _Reader:
    def __init__(self, spec: DecoderSpec, tensors: _Tensors, scale: float) -> None:
        self._spec, self._tensors, self._scale = spec, tensors, scale
        self._family = FAMILIES[spec.model_type]
        self._prefix = _find_prefix(self._family, tensors.modules)

    def layer(self, index: int) -> dict[Product, LowRank]:
        spec, names = self._spec, self._family.names
        query_size, kv_size = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        inner, hidden_size = spec.intermediate_size, spec.hidden_size
        products: dict[Product, LowRank | None] = {
            "qkv": self._joined(index, names.qkv, (query_size, kv_size, kv_size), hidden_size),
            "attention_output": self._joined(index, (names.attention_output,), (hidden_size,), query_size),
            "mlp_in": self._joined(index, names.mlp_in, (inner,) * len(names.mlp_in), hidden_size),
            "mlp_out": self._joined(index, (names.mlp_out,), (hidden_size,), inner),
        }
        qkv, order = products["qkv"], qkv_order(spec)
        if qkv is not None and order is not None:
            products["qkv"] = LowRank(qkv.down, qkv.up[order].contiguous())
        return {name: product for name, product in products.items() if product is not None}

    def _joined(
        self, index: int, names: Sequence[str], outputs: Sequence[int], inputs: int
    ) -> LowRank | None:
        """One addend for several tensors whose outputs stand one after another; a lone one has all of them."""
        if len(names) == 1:
            outputs = (sum(outputs),)
        downs, ups = [], []
        first_output = 0
        for name, size in zip(names, outputs, strict=True):
            part = self._tensors.take(f"{self._prefix}{self._family.names.layer}{index}.{name}", inputs, size)
            if part is not None:
                downs.append(part.down)
                up = torch.zeros(sum(outputs), part.up.shape[1])
                up[first_output : first_output + size] = part.up * self._scale
                ups.append(up)
            first_output += size
        return LowRank(torch.cat(downs), torch.cat(ups, dim=1)) if downs else None


def _find_prefix(family: Family, modules: set[str]) -> str:
    """What stands before the layers: it depends on whether a head was there when the adapter was trained."""
    for prefix in family.prefixes:
        if any(module.startswith(prefix + family.names.layer) for module in modules):
            return prefix
    return family.prefixes[0]
