"""A checkpoint's tensors as `DecoderWeights`, by the names and layouts of its family."""

from __future__ import annotations

import torch

from .api import ModelRefusal
from .decoder_weights import LayerWeights, LinearWeights, NormWeights
from .families import FAMILIES
from .spec import DecoderSpec
from .weights import Checkpoint


class FamilyWeights:
    """See `DecoderWeights`. Reads on demand: the checkpoint stays open as long as layers are asked for."""

    def __init__(self, spec: DecoderSpec, checkpoint: Checkpoint) -> None:
        """Raises ModelRefusal."""
        self._spec, self._checkpoint = spec, checkpoint
        self._family = FAMILIES[spec.model_type]
        names = self._names = self._family.names
        self._prefix = self._find_prefix()
        hidden_size = spec.hidden_size
        self.embedding = self._take(f"{names.embedding}.weight", (spec.vocab_size, hidden_size))
        self.position_table = self._position_table()
        self.embedding_norm = None if names.embedding_norm is None else self._norm(names.embedding_norm)
        self.final_norm = self._norm(names.final_norm)
        self.head = self._head()

    def layer(self, index: int) -> LayerWeights:
        """Raises ModelRefusal."""
        spec, names, layer = self._spec, self._names, f"{self._names.layer}{index}."
        query_size, kv_size = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        inner = spec.intermediate_size
        qkv = self._joined(layer, names.qkv, (query_size, kv_size, kv_size), spec.hidden_size, spec.qkv_bias)
        return LayerWeights(
            attention_norm=self._norm(layer + names.attention_norm),
            qkv=self._in_row_order(qkv),
            query_norm=self._head_norm(layer + names.query_norm),
            key_norm=self._head_norm(layer + names.key_norm),
            attention_output=self._joined(
                layer, (names.attention_output,), (spec.hidden_size,), query_size, spec.output_bias
            ),
            mlp_norm=None if names.mlp_norm is None else self._norm(layer + names.mlp_norm),
            mlp_in=self._joined(
                layer, names.mlp_in, (inner,) * len(names.mlp_in), spec.hidden_size, spec.mlp_bias
            ),
            mlp_out=self._joined(layer, (names.mlp_out,), (spec.hidden_size,), inner, spec.mlp_bias),
        )

    def check_nothing_is_left(self) -> None:
        """After all layers were read. Raises ModelRefusal for tensors that the config does not explain."""
        names = self._names
        ignored = {self._prefix + name for name in names.ignored_outside}
        for index in range(self._spec.layers):
            ignored |= {f"{self._prefix}{names.layer}{index}.{name}" for name in names.ignored}
        leftover = [name for name in self._checkpoint.untaken() if name not in ignored]
        if leftover:
            raise ModelRefusal(
                f"safetensors: config.json does not explain {len(leftover)} tensors, such as {leftover[0]}"
            )

    def _find_prefix(self) -> str:
        prefixes = self._family.prefixes
        for prefix in prefixes:
            if f"{prefix}{self._names.embedding}.weight" in self._checkpoint:
                return prefix
        return prefixes[0]

    def _head(self) -> LinearWeights:
        spec, shape = self._spec, tuple(self.embedding.shape)
        heads = self._names.heads
        head = next((name for name in heads if f"{name}.weight" in self._checkpoint), heads[0])
        weight = self.embedding
        if not spec.tied_embeddings or f"{head}.weight" in self._checkpoint:
            weight = self._checkpoint.take(f"{head}.weight", shape)
            # Some writers save the tied head as well. Where it differs, it is not tied, for transformers neither.
            if spec.tied_embeddings and torch.equal(weight, self.embedding):
                weight = self.embedding
        bias = self._checkpoint.take(f"{head}.bias", (spec.vocab_size,)) if spec.head_bias else None
        return LinearWeights(weight, bias)

    def _position_table(self) -> torch.Tensor | None:
        name, offset = self._names.position_table, self._family.position_offset
        if name is None:
            return None
        table = self._take(f"{name}.weight", (self._spec.max_positions + offset, self._spec.hidden_size))
        return table[offset:]

    def _in_row_order(self, qkv: LinearWeights) -> LinearWeights:
        """Rows of all query heads, then key heads, then value heads."""
        order = qkv_order(self._spec)
        if order is None:
            return qkv
        return LinearWeights(qkv.weight[order], None if qkv.bias is None else qkv.bias[order])

    def _joined(
        self, layer: str, names: tuple[str, ...], outputs: tuple[int, ...], inputs: int, has_bias: bool
    ) -> LinearWeights:
        """One product of several tensors that read the same input; a lone one holds all the outputs already."""
        if len(names) == 1:
            outputs = (sum(outputs),)
        weights, biases = [], []
        for name, size in zip(names, outputs, strict=True):
            if self._family.is_transposed:
                weights.append(self._take(f"{layer}{name}.weight", (inputs, size)).t())
            else:
                weights.append(self._take(f"{layer}{name}.weight", (size, inputs)))
            if has_bias:
                biases.append(self._take(f"{layer}{name}.bias", (size,)))
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        return LinearWeights(weight, torch.cat(biases) if has_bias else None)

    def _norm(self, name: str) -> NormWeights:
        size = (self._spec.hidden_size,)
        weight = self._take(f"{name}.weight", size)
        return NormWeights(weight, self._take(f"{name}.bias", size) if self._spec.norm == "layer" else None)

    def _head_norm(self, name: str) -> torch.Tensor | None:
        return self._take(f"{name}.weight", (self._spec.head_dim,)) if self._spec.qk_norm else None

    def _take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._checkpoint.take(self._prefix + name, shape)


def qkv_order(spec: DecoderSpec) -> torch.Tensor | None:
    """Which row of a checkpoint's packed matrix comes when: all query heads, key heads, value heads. None: as they are."""
    family = FAMILIES[spec.model_type]
    if family.qkv_layout == "rows":
        return None
    rows = torch.arange(3 * spec.heads * spec.head_dim)
    if family.qkv_layout == "heads":
        return rows.view(spec.heads, 3, spec.head_dim).transpose(0, 1).reshape(-1)
    query, value, key = rows.view(family.qkv_groups, 3, -1).unbind(1)
    return torch.cat((query.reshape(-1), key.reshape(-1), value.reshape(-1)))
