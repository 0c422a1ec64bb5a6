"""The decoder's forward pass over packed tokens. Knows shapes and arithmetic, not requests.

fp32 follows transformers' order of operations closely enough that greedy tokens are equal (tests compare them);
bf16 keeps norms' inner sums and softmax in fp32. With int8 weights activations are fp32 and the KV pool is bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from .api import ModelRefusal
from .attention import attend, plan_attention
from .decoder import activation_dtype
from .kv_cache import KVPool
from .linear import Int8Scratch, Linear, make_linear
from .packing import PackedTokens
from .spec import DecoderSpec, rotary_frequencies
from .weights import Checkpoint

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: torch.Tensor
    qkv: Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    attention_output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class TorchDecoder:
    """Weights of one model in one precision."""

    def __init__(
        self, spec: DecoderSpec, checkpoint: Checkpoint, precision: str, device: torch.device
    ) -> None:
        """Reads and packs all weights: seconds of work for a large model, on the calling thread. Raises ModelRefusal."""
        self.spec = spec
        self._precision, self._device = precision, device
        self._dtype = activation_dtype(precision)
        self._scratch = Int8Scratch()
        self._activation = _ACTIVATIONS[spec.activation]
        embedding = checkpoint.take("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
        # Kept as the mapped file's view where the device allows: only rows of tokens in use are ever read from it.
        self._embedding = embedding.to(device)
        self._layers = [self._load_layer(checkpoint, layer) for layer in range(spec.layers)]
        self._final_norm = self._vector(checkpoint, "model.norm.weight", spec.hidden_size)
        head = (
            embedding if spec.tied_embeddings else checkpoint.take("lm_head.weight", tuple(embedding.shape))
        )
        self._head = make_linear(head, None, precision, device, self._scratch)
        self._cos, self._signed_sin = self._rotary_tables()
        leftover = [
            name for name in checkpoint.untaken() if not (spec.tied_embeddings and name == "lm_head.weight")
        ]
        if leftover:
            raise ModelRefusal(
                f"safetensors: config.json does not explain {len(leftover)} tensors, such as {leftover[0]}"
            )
        self.weight_bytes = self._count_bytes()

    def forward(self, batch: PackedTokens, pool: KVPool) -> torch.Tensor:
        """See `decoder.Decoder`."""
        spec = self.spec
        plan = plan_attention(batch.spans, pool, self._device)
        tokens = torch.tensor(batch.tokens, device=self._device)
        turning_heads = spec.heads + spec.kv_heads
        hidden = functional.embedding(tokens, self._embedding).to(self._dtype)
        cos, signed_sin = (
            self._cos[plan.positions].unsqueeze(1),
            self._signed_sin[plan.positions].unsqueeze(1),
        )
        for index, layer in enumerate(self._layers):
            mixed = layer.qkv(self._norm(hidden, layer.attention_norm))
            heads = mixed.view(len(tokens), turning_heads + spec.kv_heads, spec.head_dim)
            turned = heads[:, :turning_heads]
            if layer.query_norm is not None and layer.key_norm is not None:
                queries, keys = turned[:, : spec.heads], turned[:, spec.heads :]
                turned = torch.cat(
                    (self._norm(queries, layer.query_norm), self._norm(keys, layer.key_norm)), dim=1
                )
            # roll swaps a head's halves; the sine's first half carries the minus sign of the rotation.
            turned = torch.addcmul(turned * cos, turned.roll(spec.head_dim // 2, dims=-1), signed_sin).to(
                pool.dtype
            )
            pool.write(index, plan.places, turned[:, spec.heads :], heads[:, turning_heads:].to(pool.dtype))
            attended = attend(turned[:, : spec.heads], plan, pool, index).view(len(tokens), -1)
            hidden = hidden + layer.attention_output(attended.to(self._dtype))
            gate, up = layer.gate_up(self._norm(hidden, layer.mlp_norm)).chunk(2, dim=-1)
            hidden = hidden + layer.down(self._activation(gate) * up)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: (rows, hidden_size) as `forward` returns it. Returns (rows, vocab_size) fp32."""
        return self._head(self._norm(hidden, self._final_norm)).float()

    def final_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `decoder.Decoder`."""
        return self._norm(hidden, self._final_norm).float()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self.spec.norm_eps)

    def _load_layer(self, checkpoint: Checkpoint, index: int) -> _Layer:
        spec, prefix = self.spec, f"model.layers.{index}."
        query_size, kv_size = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim

        def linear(names: tuple[str, ...], outputs: tuple[int, ...], inputs: int, has_bias: bool) -> Linear:
            """One product for layers that read the same input."""
            weights = [
                checkpoint.take(f"{prefix}{name}.weight", (size, inputs))
                for name, size in zip(names, outputs, strict=True)
            ]
            bias = None
            if has_bias:
                bias = torch.cat(
                    [
                        checkpoint.take(f"{prefix}{name}.bias", (size,))
                        for name, size in zip(names, outputs, strict=True)
                    ]
                )
            weight = weights[0] if len(weights) == 1 else torch.cat(weights)
            return make_linear(weight, bias, self._precision, self._device, self._scratch)

        attention, mlp = "self_attn.", "mlp."
        return _Layer(
            attention_norm=self._vector(checkpoint, f"{prefix}input_layernorm.weight", spec.hidden_size),
            qkv=linear(
                (attention + "q_proj", attention + "k_proj", attention + "v_proj"),
                (query_size, kv_size, kv_size),
                spec.hidden_size,
                spec.qkv_bias,
            ),
            query_norm=self._head_norm(checkpoint, f"{prefix}{attention}q_norm.weight"),
            key_norm=self._head_norm(checkpoint, f"{prefix}{attention}k_norm.weight"),
            attention_output=linear(
                (attention + "o_proj",), (spec.hidden_size,), query_size, spec.output_bias
            ),
            mlp_norm=self._vector(checkpoint, f"{prefix}post_attention_layernorm.weight", spec.hidden_size),
            gate_up=linear(
                (mlp + "gate_proj", mlp + "up_proj"),
                (spec.intermediate_size, spec.intermediate_size),
                spec.hidden_size,
                spec.mlp_bias,
            ),
            down=linear((mlp + "down_proj",), (spec.hidden_size,), spec.intermediate_size, spec.mlp_bias),
        )

    def _head_norm(self, checkpoint: Checkpoint, name: str) -> torch.Tensor | None:
        return self._vector(checkpoint, name, self.spec.head_dim) if self.spec.qk_norm else None

    def _vector(self, checkpoint: Checkpoint, name: str, size: int) -> torch.Tensor:
        return checkpoint.take(name, (size,)).to(device=self._device, dtype=self._dtype)

    def _rotary_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(max_positions, head_dim) each, in the activations' dtype: cosines, and sines with the first half negated."""
        assert self.spec.rope is not None
        frequencies = torch.tensor(rotary_frequencies(self.spec.rope), dtype=torch.float32)
        angles = torch.outer(torch.arange(self.spec.max_positions, dtype=torch.float32), frequencies)
        cos, sin = angles.cos(), angles.sin()
        return (
            torch.cat((cos, cos), dim=-1).to(device=self._device, dtype=self._dtype),
            torch.cat((-sin, sin), dim=-1).to(device=self._device, dtype=self._dtype),
        )

    def _count_bytes(self) -> int:
        linears = [
            linear
            for layer in self._layers
            for linear in (layer.qkv, layer.attention_output, layer.gate_up, layer.down)
        ]
        embedding_bytes: int = self._embedding.nbytes
        return embedding_bytes + self._head.weight_bytes + sum(linear.weight_bytes for linear in linears)
