"""The decoder for CUDA devices: products by cuBLAS out of one arena, everything between them by Triton kernels.

Rounds like `torch_decoder.py` computes, but not bit for bit: fp32 is equal token for token, bf16 and fp16 within their
rounding. Without a CUDA device the same code runs under Triton's interpreter, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from ..decoder import activation_dtype
from ..decoder_weights import LinearWeights, NormWeights
from ..kv_cache import BLOCK_TOKENS, KVPool
from ..lora import LoraAdapter, Product
from ..packing import PackedTokens
from ..spec import DecoderSpec, alibi_slopes, rotary_frequencies
from ..torch_adapter import AdapterRows, TorchAdapter, adapter_rows
from .arena import Arena
from .attention import attend_decode, attend_prefill, choose_splits, head_layout, rows_of_a_piece
from .graphs import DecodeGraphs
from .pass_inputs import PassInputs, is_decoding, pass_inputs
from .row_kernels import Norm, activate, residual_norm, turn_and_write

# A device without a count of processors is the interpreter's: enough that tests split a sequence.
_INTERPRETER_PROCESSORS = 8
# Wider tiles do not fit into a processor's shared memory and registers.
_MOST_HEAD_DIM, _MOST_GROUP = 256, 64


@dataclass(frozen=True, slots=True)
class _Layer:
    """first: query, key, value heads, and the MLP's input where mlp_in is None: one norm feeds both."""

    attention_norm: Norm
    first: LinearWeights
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    attention_output: LinearWeights
    mlp_norm: Norm | None
    mlp_in: LinearWeights | None
    mlp_out: LinearWeights


class CudaDecoder:
    """Weights of one model in one precision: fp32, bf16 or fp16."""

    def __init__(
        self,
        spec: DecoderSpec,
        precision: str,
        device: torch.device,
        max_batch: int,
        max_context_tokens: int,
    ) -> None:
        """An empty arena, to be filled. max_batch, max_context_tokens: what graphs are made for; larger passes run without."""
        self.spec = spec
        self._device = device
        self._precision = precision
        dtype = activation_dtype(precision)
        self.arena = Arena(spec, dtype, device)
        self.weight_bytes = self.arena.layout.total_bytes
        self._embedding = self.arena.view("embedding")
        self._position_table = self.arena.view("position_table") if self.arena.has("position_table") else None
        self._embedding_norm = _pair(self.arena.norm("embedding_norm")) if spec.has_embedding_norm else None
        self._layers = [self._layer(index) for index in range(spec.layers)]
        self._final_norm = _pair(self.arena.norm("final_norm"))
        head_bias = self.arena.view("head.bias") if self.arena.has("head.bias") else None
        head = self._embedding if spec.tied_embeddings else self.arena.view("head.weight")
        self._head = LinearWeights(head, head_bias)
        slopes = torch.tensor(alibi_slopes(spec.heads), device=device) if spec.position == "alibi" else None
        self._heads = head_layout(spec.heads, spec.kv_heads, spec.head_dim, slopes)
        self._rope = _rope_tables(spec, device)
        self._dtype = dtype
        self._processors = (
            torch.cuda.get_device_properties(device).multi_processor_count
            if device.type == "cuda"
            else _INTERPRETER_PROCESSORS
        )
        most_tokens = min(max_context_tokens, spec.max_positions)
        self._graphs = DecodeGraphs(max_batch, most_tokens, device, self._run)

    def prepare(self, pool: KVPool) -> None:
        """See `decoder.PreparedDecoder`."""
        if self._device.type == "cuda":
            self._run(_nothing(self._device), None, pool)
            self._graphs.capture_all(pool)

    def forward(self, batch: PackedTokens, pool: KVPool) -> torch.Tensor:
        """See `decoder.Decoder`. A decoding pass's rows stay as they are only until the next one."""
        if self._device.type == "cuda" and is_decoding(batch) and self._graphs.fits(batch):
            return self._graphs.replay(batch, pool)
        return self.forward_eager(batch, pool)

    def forward_eager(self, batch: PackedTokens, pool: KVPool) -> torch.Tensor:
        """`forward` without graphs."""
        inputs = pass_inputs(batch, rows_of_a_piece(self._heads, self._dtype), self._device)
        return self._run(inputs, batch.drawn, pool, adapter_rows(batch.spans, self._device))

    def prepare_adapter(self, adapter: LoraAdapter) -> TorchAdapter:
        """See `decoder.Decoder`. Passes with adapters run without graphs."""
        return TorchAdapter(adapter, self._precision, self._device)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `decoder.Decoder`."""
        return _project(self._normed(hidden), self._head).float()

    def final_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `decoder.Decoder`."""
        return self._normed(hidden).float()

    def _normed(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._residual_norm(hidden.contiguous(), (), (self._final_norm,))[0]

    def _run(
        self,
        inputs: PassInputs,
        drawn: torch.Tensor | None,
        pool: KVPool,
        adapters: Sequence[AdapterRows] = (),
    ) -> torch.Tensor:
        hidden = self._embed(inputs, drawn)
        normed = self._residual_norm(hidden, (), self._norms_before(0))
        for index in range(self.spec.layers):
            following = self._norms_before(index + 1)
            normed = self._run_layer(index, hidden, normed, following, inputs, pool, adapters)
        return hidden

    def _run_layer(
        self,
        index: int,
        hidden: torch.Tensor,
        normed: list[torch.Tensor],
        following: tuple[Norm, ...],
        inputs: PassInputs,
        pool: KVPool,
        adapters: Sequence[AdapterRows],
    ) -> list[torch.Tensor]:
        """hidden: changed in place. normed: under the layer's norms of its input. Returns it under `following`."""
        spec, layer = self.spec, self._layers[index]
        qkv_size = (spec.heads + 2 * spec.kv_heads) * spec.head_dim

        def adapted(y: torch.Tensor, product: Product, x: torch.Tensor) -> torch.Tensor:
            for rows in adapters:
                y = rows.add_to(y, index, product, x)
            return y

        def finish_mlp(mixed: torch.Tensor) -> torch.Tensor:
            active = activate(mixed, spec.intermediate_size, spec.activation, spec.is_gated)
            return adapted(_project(active, layer.mlp_out), "mlp_out", active)

        first = _project(normed[0], layer.first)
        adapted(first[:, :qkv_size], "qkv", normed[0])
        mixed = self._attend(index, first, inputs, pool)
        attended = adapted(_project(mixed, layer.attention_output), "attention_output", mixed)
        if spec.residual == "sequential":
            assert layer.mlp_norm is not None
            normed = self._residual_norm(hidden, (attended,), (layer.mlp_norm,))
        if layer.mlp_in is None:
            mlp = finish_mlp(adapted(first[:, qkv_size:], "mlp_in", normed[0]))
        else:
            mlp = finish_mlp(adapted(_project(normed[-1], layer.mlp_in), "mlp_in", normed[-1]))
        deltas = (mlp,) if spec.residual == "sequential" else (attended, mlp)
        return self._residual_norm(hidden, deltas, following)

    def _norms_before(self, index: int) -> tuple[Norm, ...]:
        """Of the layer's input; the last layer's output gets none here."""
        if index == self.spec.layers:
            return ()
        layer = self._layers[index]
        if self.spec.residual == "parallel_two_norms":
            assert layer.mlp_norm is not None
            return layer.attention_norm, layer.mlp_norm
        return (layer.attention_norm,)

    def _embed(self, inputs: PassInputs, drawn: torch.Tensor | None) -> torch.Tensor:
        tokens = inputs.tokens
        if drawn is not None:
            tokens = torch.where(tokens < 0, drawn[(-1 - tokens).clamp_min(0).long()].to(torch.int32), tokens)
        hidden = functional.embedding(tokens, self._embedding)
        if self._position_table is not None:
            hidden = hidden + functional.embedding(inputs.positions.clamp_min(0), self._position_table)
        if self._embedding_norm is not None:
            (hidden,) = self._residual_norm(hidden, (), (self._embedding_norm,))
        return hidden

    def _attend(self, index: int, mixed: torch.Tensor, inputs: PassInputs, pool: KVPool) -> torch.Tensor:
        spec, layer = self.spec, self._layers[index]
        keys, values = pool.layer(index)
        queries = turn_and_write(
            mixed,
            keys,
            values,
            inputs.positions,
            inputs.tables,
            inputs.table_rows,
            spec.heads,
            self._rope,
            layer.head_norms,
            spec.norm_eps,
        )
        size = spec.heads * spec.head_dim
        output = torch.empty((len(queries), size), dtype=mixed.dtype, device=mixed.device)
        rows = inputs.decode_rows
        if rows:
            splits = choose_splits(rows, spec.kv_heads, self._processors)
            attend_decode(
                queries[:rows],
                keys,
                values,
                inputs.lengths,
                inputs.tables,
                self._heads,
                splits,
                output[:rows],
            )
        if inputs.pieces is not None:
            attend_prefill(
                queries[rows:], keys, values, inputs.pieces, inputs.tables, self._heads, output[rows:]
            )
        return output

    def _residual_norm(
        self, hidden: torch.Tensor, deltas: tuple[torch.Tensor, ...], norms: tuple[Norm, ...]
    ) -> list[torch.Tensor]:
        return residual_norm(hidden, deltas, norms, self.spec.norm == "rms", self.spec.norm_eps)

    def _layer(self, index: int) -> _Layer:
        arena, name, spec = self.arena, f"layers.{index}.", self.spec
        is_fused = spec.residual == "parallel"
        return _Layer(
            attention_norm=_pair(arena.norm(name + "attention_norm")),
            first=arena.linear(name + "first"),
            head_norms=(arena.view(name + "query_norm"), arena.view(name + "key_norm"))
            if spec.qk_norm
            else None,
            attention_output=arena.linear(name + "attention_output"),
            mlp_norm=None if is_fused else _pair(arena.norm(name + "mlp_norm")),
            mlp_in=None if is_fused else arena.linear(name + "mlp_in"),
            mlp_out=arena.linear(name + "mlp_out"),
        )


def refusal_reason(spec: DecoderSpec, precision: str, block_tokens: int) -> str | None:
    """Why the kernels cannot compute this; None where they can."""
    if precision not in ("fp32", "bf16", "fp16"):
        return f"precision {precision}"
    if block_tokens != BLOCK_TOKENS:
        return f"blocks of {block_tokens} tokens"
    if spec.head_dim > _MOST_HEAD_DIM:
        return f"heads of {spec.head_dim} channels"
    if spec.heads // spec.kv_heads > _MOST_GROUP:
        return f"{spec.heads} query heads on {spec.kv_heads} key heads"
    return None


def _project(x: torch.Tensor, linear: LinearWeights) -> torch.Tensor:
    return functional.linear(x, linear.weight, linear.bias)


def _pair(norm: NormWeights) -> Norm:
    return norm.weight, norm.bias


def _rope_tables(spec: DecoderSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, bool] | None:
    """Cosines and sines, (max_positions, rotary_dim / 2) fp32, and whether neighbouring channels turn together."""
    if spec.rope is None:
        return None
    frequencies = torch.tensor(rotary_frequencies(spec.rope), dtype=torch.float32)
    angles = torch.outer(torch.arange(spec.max_positions, dtype=torch.float32), frequencies)
    return angles.cos().to(device), angles.sin().to(device), spec.rope.is_interleaved


def _nothing(device: torch.device) -> PassInputs:
    """A pass of one row that decodes and one that is a prompt chunk, both at no position: it only compiles kernels."""

    def numbers(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return PassInputs(
        tokens=numbers(0, 0),
        positions=numbers(-1, -1),
        tables=torch.zeros((2, 4), dtype=torch.int32, device=device),
        decode_rows=1,
        lengths=numbers(0),
        pieces=numbers(0, 1, 0, 1).view(1, 4),
        table_rows=numbers(0, 1),
    )
