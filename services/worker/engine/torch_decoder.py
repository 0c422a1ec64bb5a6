"""The decoder on plain torch operations: every described model type, every precision, any device. The reference.

fp32 follows transformers' order of operations closely enough that greedy tokens are equal (tests compare them);
bf16 and fp16 keep norms' inner sums and softmax in fp32. With int8 weights activations are fp32 and the KV pool is bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from .attention import AttentionPlan, attend, plan_attention
from .decoder import activation_dtype
from .decoder_weights import DecoderWeights, LayerWeights, LinearWeights, NormWeights
from .kv_cache import KVPool
from .linear import Int8Scratch, Linear, make_linear
from .lora import LoraAdapter, Product
from .packing import PackedTokens, token_tensor
from .spec import DecoderSpec, RopeSpec, alibi_slopes, rotary_frequencies
from .torch_adapter import AdapterRows, TorchAdapter, adapter_rows

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


@dataclass(frozen=True, slots=True)
class _Layer:
    """products: by the names of `LayerWeights`' fields. mlp_norm: None where attention and MLP read the same norm."""

    attention_norm: NormWeights
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    mlp_norm: NormWeights | None
    products: dict[Product, Linear]


class TorchDecoder:
    """Weights of one model in one precision."""

    def __init__(
        self, spec: DecoderSpec, weights: DecoderWeights, precision: str, device: torch.device
    ) -> None:
        """Reads and packs all weights: seconds of work for a large model, on the calling thread. Raises ModelRefusal."""
        self.spec = spec
        self._precision, self._device = precision, device
        self._dtype = activation_dtype(precision)
        self._scratch = Int8Scratch()
        self._activation = _ACTIVATIONS[spec.activation]
        # Kept as the mapped file's view where the device allows: only rows of tokens in use are ever read from it.
        self._embedding = weights.embedding.to(device)
        table = weights.position_table
        self._position_table = None if table is None else self._vector(table)
        self._embedding_norm = (
            None if weights.embedding_norm is None else self._norm_of(weights.embedding_norm)
        )
        self._layers = [self._make_layer(weights.layer(index)) for index in range(spec.layers)]
        self._final_norm = self._norm_of(weights.final_norm)
        self._head = self._linear(weights.head)
        self._slopes = (
            torch.tensor(alibi_slopes(spec.heads), device=device) if spec.position == "alibi" else None
        )
        self._rotary = (
            None if spec.rope is None else _rotary_tables(spec.rope, spec.max_positions, self._dtype, device)
        )
        self.weight_bytes = self._count_bytes()

    def forward(self, batch: PackedTokens, pool: KVPool) -> torch.Tensor:
        """See `decoder.Decoder`."""
        plan = plan_attention(batch.spans, pool, self._device, self._slopes)
        hidden = self._embed(batch, plan)
        turns, adapters = self._turns(plan), adapter_rows(batch.spans, self._device)
        for index, layer in enumerate(self._layers):
            normed = self._norm(hidden, layer.attention_norm)
            attended = self._attention(index, normed, turns, adapters, plan, pool)
            if self.spec.residual == "sequential":
                hidden = hidden + attended
                hidden = hidden + self._mlp(index, self._mlp_input(layer, hidden, normed), adapters)
            else:
                hidden = hidden + (
                    attended + self._mlp(index, self._mlp_input(layer, hidden, normed), adapters)
                )
        return hidden

    def prepare_adapter(self, adapter: LoraAdapter) -> TorchAdapter:
        """See `decoder.Decoder`."""
        return TorchAdapter(adapter, self._precision, self._device)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: (rows, hidden_size) as `forward` returns it. Returns (rows, vocab_size) fp32."""
        return self._head(self._norm(hidden, self._final_norm)).float()

    def final_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `decoder.Decoder`."""
        return self._norm(hidden, self._final_norm).float()

    def _embed(self, batch: PackedTokens, plan: AttentionPlan) -> torch.Tensor:
        tokens = token_tensor(batch, self._device)
        hidden = functional.embedding(tokens, self._embedding).to(self._dtype)
        if self._position_table is not None:
            hidden = hidden + self._position_table[plan.positions]
        return hidden if self._embedding_norm is None else self._norm(hidden, self._embedding_norm)

    def _attention(
        self,
        index: int,
        normed: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor] | None,
        adapters: Sequence[AdapterRows],
        plan: AttentionPlan,
        pool: KVPool,
    ) -> torch.Tensor:
        spec, layer = self.spec, self._layers[index]
        turning_heads = spec.heads + spec.kv_heads
        mixed = self._project(index, "qkv", normed, adapters)
        heads = mixed.view(len(mixed), turning_heads + spec.kv_heads, spec.head_dim)
        turned = heads[:, :turning_heads]
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = turned[:, : spec.heads], turned[:, spec.heads :]
            turned = torch.cat((self._rms(queries, layer.query_norm), self._rms(keys, layer.key_norm)), dim=1)
        if turns is not None:
            turned = self._turn(turned, *turns)
        turned = turned.to(pool.dtype)
        pool.write(index, plan.places, turned[:, spec.heads :], heads[:, turning_heads:].to(pool.dtype))
        attended = attend(turned[:, : spec.heads], plan, pool, index).view(len(mixed), -1)
        return self._project(index, "attention_output", attended.to(self._dtype), adapters)

    def _mlp(self, index: int, normed: torch.Tensor, adapters: Sequence[AdapterRows]) -> torch.Tensor:
        inner = self._project(index, "mlp_in", normed, adapters)
        if self.spec.is_gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = self._activation(gate) * up
        else:
            inner = self._activation(inner)
        return self._project(index, "mlp_out", inner, adapters)

    def _mlp_input(self, layer: _Layer, hidden: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        return normed if layer.mlp_norm is None else self._norm(hidden, layer.mlp_norm)

    def _project(
        self, index: int, name: Product, x: torch.Tensor, adapters: Sequence[AdapterRows]
    ) -> torch.Tensor:
        """Every product of a layer, with what the adapters add to their rows."""
        y = self._layers[index].products[name](x)
        for rows in adapters:
            y = rows.add_to(y, index, name, x)
        return y

    def _turns(self, plan: AttentionPlan) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and signed sines of the rows' positions, each (rows, 1, rotary_dim); None without rotation."""
        if self._rotary is None:
            return None
        cos, signed_sin = self._rotary
        return cos[plan.positions].unsqueeze(1), signed_sin[plan.positions].unsqueeze(1)

    def _turn(self, heads: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
        """heads: (rows, heads, head_dim), of which the first rotary_dim channels turn.

        Each channel meets its partner times the sine, whose sign is in the table.
        """
        assert self.spec.rope is not None
        rotary_dim = self.spec.rope.rotary_dim
        turning = heads[..., :rotary_dim]
        if self.spec.rope.is_interleaved:
            partners = turning.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            partners = turning.roll(rotary_dim // 2, dims=-1)
        turned = torch.addcmul(turning * cos, partners, signed_sin)
        if rotary_dim == self.spec.head_dim:
            return turned
        return torch.cat((turned, heads[..., rotary_dim:]), dim=-1)

    def _norm(self, x: torch.Tensor, norm: NormWeights) -> torch.Tensor:
        if self.spec.norm == "rms":
            return self._rms(x, norm.weight)
        return functional.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, self.spec.norm_eps)

    def _rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self.spec.norm_eps)

    def _make_layer(self, weights: LayerWeights) -> _Layer:
        return _Layer(
            attention_norm=self._norm_of(weights.attention_norm),
            query_norm=None if weights.query_norm is None else self._vector(weights.query_norm),
            key_norm=None if weights.key_norm is None else self._vector(weights.key_norm),
            mlp_norm=None if weights.mlp_norm is None else self._norm_of(weights.mlp_norm),
            products={
                "qkv": self._linear(weights.qkv),
                "attention_output": self._linear(weights.attention_output),
                "mlp_in": self._linear(weights.mlp_in),
                "mlp_out": self._linear(weights.mlp_out),
            },
        )

    def _linear(self, weights: LinearWeights) -> Linear:
        return make_linear(weights.weight, weights.bias, self._precision, self._device, self._scratch)

    def _norm_of(self, norm: NormWeights) -> NormWeights:
        return NormWeights(self._vector(norm.weight), None if norm.bias is None else self._vector(norm.bias))

    def _vector(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self._device, dtype=self._dtype)

    def _count_bytes(self) -> int:
        linears = [self._head, *(linear for layer in self._layers for linear in layer.products.values())]
        tables = [self._embedding, *([] if self._position_table is None else [self._position_table])]
        embedding_bytes: int = sum(table.nbytes for table in tables)
        return embedding_bytes + sum(linear.weight_bytes for linear in linears)


def _rotary_tables(
    rope: RopeSpec, positions: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions, rotary_dim) each: cosines, and sines with each pair's first channel negated."""
    frequencies = torch.tensor(rotary_frequencies(rope), dtype=torch.float32)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    cos, sin = angles.cos(), angles.sin()
    if rope.is_interleaved:
        pairs = torch.stack((cos, cos), dim=-1), torch.stack((-sin, sin), dim=-1)
        tables = pairs[0].flatten(-2), pairs[1].flatten(-2)
    else:
        tables = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return tables[0].to(device=device, dtype=dtype), tables[1].to(device=device, dtype=dtype)
