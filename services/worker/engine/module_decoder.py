"""The slow path: transformers' own module behind the engine's interface, for model types that we have no description of.

Correct before anything: each sequence runs alone, and its keys and values live in the engine's pool between passes. The module
gets them as a cache made for one call, so leaving, pre-emption, prefix reuse and the bound on memory are the engine's, as
for every other decoder. `module_loading.py` makes one and proves that the module's state is what the pool holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from .api import ModelRefusal
from .kv_cache import KVPool, blocks_for
from .lora import LoraAdapter, PreparedAdapter
from .packing import PackedTokens, Span, token_tensor


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """What the engine asks of any model; the arithmetic is the module's own. hidden_size: of the states its head reads."""

    model_type: str
    vocab_size: int
    hidden_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    kv_shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The module's cache, equal in all layers. The pool holds the wider of keys and values; the other is padded."""

    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        return self.layers, self.kv_heads, max(self.key_dim, self.value_dim)


class ModuleDecoder:
    """Rows that `forward` returns are what the head reads, and the module's logits behind it."""

    def __init__(self, spec: ModuleSpec, runner: ModuleRunner, layout: KVLayout) -> None:
        self.spec = spec
        self.weight_bytes = runner.weight_bytes
        self._runner, self._layout = runner, layout

    def forward(self, batch: PackedTokens, pool: KVPool) -> torch.Tensor:
        """See `decoder.Decoder`. Raises RuntimeError when the module does."""
        tokens = token_tensor(batch, self._runner.device)
        rows = []
        first = 0
        for span in batch.spans:
            if span.adapter is not None:
                raise RuntimeError(f"model type {self.spec.model_type} takes no adapters")
            rows.append(self._run(tokens[first : first + span.count], span, pool))
            first += span.count
        return torch.cat(rows)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `decoder.Decoder`."""
        return hidden[:, self.spec.hidden_size :].float()

    def prepare_adapter(self, adapter: LoraAdapter) -> PreparedAdapter:
        """See `decoder.Decoder`."""
        raise ModelRefusal(f"model type {self.spec.model_type} takes no adapters")

    def final_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `decoder.Decoder`."""
        return hidden[:, : self.spec.hidden_size].float()

    def _run(self, tokens: torch.Tensor, span: Span, pool: KVPool) -> torch.Tensor:
        cache = self._restore(span, pool)
        states, logits = self._runner.run(tokens, span.start, cache)
        self._store(cache, span, pool)
        return torch.cat((states.to(logits.dtype), logits), dim=-1)

    def _restore(self, span: Span, pool: KVPool) -> Any:
        """A DynamicCache of the tokens before the span."""
        cache = self._runner.empty_cache()
        if span.start == 0:
            return cache
        layout, device = self._layout, self._runner.device
        table = torch.tensor([list(span.blocks[: blocks_for(span.start, pool.block_tokens)])], device=device)
        head_blocks = pool.head_blocks(table)
        for layer in range(layout.layers):
            keys, values = pool.gather(layer, head_blocks)
            cache.update(
                keys[:, :, : span.start, : layout.key_dim].to(layout.dtype),
                values[:, :, : span.start, : layout.value_dim].to(layout.dtype),
                layer,
            )
        return cache

    def _store(self, cache: Any, span: Span, pool: KVPool) -> None:
        device = self._runner.device
        positions = torch.arange(span.start, span.start + span.count, device=device)
        blocks = torch.tensor(list(span.blocks), device=device)[positions // pool.block_tokens]
        places = pool.token_places(blocks, positions % pool.block_tokens)
        for index, layer in enumerate(cache.layers):
            keys, values = (
                functional.pad(
                    tensor[0, :, span.start :].transpose(0, 1), (0, pool.head_dim - tensor.shape[-1])
                ).to(pool.dtype)
                for tensor in (layer.keys, layer.values)
            )
            pool.write(index, places, keys, values)


class ModuleRunner:
    """One call of transformers' module for one sequence."""

    def __init__(self, module: Any, device: torch.device) -> None:
        """Takes the module over: a hook on its head notes what the head reads."""
        self.device = device
        self.weight_bytes: int = sum(parameter.nbytes for parameter in module.parameters())
        self._module = module
        self._states: torch.Tensor | None = None
        module.get_output_embeddings().register_forward_pre_hook(self._note)

    def empty_cache(self) -> Any:
        """Without the config, so that layers with a sliding window keep all their tokens too; the mask hides them."""
        from transformers import DynamicCache

        return DynamicCache()

    def run(self, tokens: torch.Tensor, start: int, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's input and the logits, a row for each token.

        tokens: (count,). cache: holds the `start` tokens before, and the new ones afterwards. Raises RuntimeError, whatever the module raised: strange code on a strange model, and its neighbours must go on.
        """
        try:
            output = self._module(
                input_ids=tokens.unsqueeze(0),
                attention_mask=torch.ones(1, start + len(tokens), dtype=torch.long, device=self.device),
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
            )
        except Exception as problem:
            raise RuntimeError(f"transformers' module: {type(problem).__name__}: {problem}") from problem
        states, self._states = self._states, None
        if states is None:
            raise RuntimeError("transformers' module did not use its head")
        return states.reshape(-1, states.shape[-1]), output.logits[0]

    def _note(self, head: Any, arguments: tuple[Any, ...]) -> None:
        self._states = arguments[0]
