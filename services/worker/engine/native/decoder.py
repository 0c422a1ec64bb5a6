"""A decoder whose forward pass is one call into C (see `decoder.Decoder` for what a decoder is).

Every row is computed by itself: in any precision its bits depend neither on its neighbours nor on how its prompt was cut
into chunks, nor on how many threads there are.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch.nn import functional

from ..api import ModelRefusal
from ..decoder import kv_dtype
from ..decoder_weights import DecoderWeights, LayerWeights, NormWeights
from ..kv_cache import BLOCK_TOKENS, KVPool
from ..lora import LoraAdapter
from ..packing import PackedTokens, token_tensor
from ..spec import DecoderSpec, alibi_slopes, rotary_frequencies
from . import bindings
from .adapter import NativeAdapter, adapter_addresses
from .bindings import Kind, address
from .build import load_library
from .panels import GROUP, PackedLinear, pack_linear, padded

_KINDS = {"fp32": Kind.FP32, "bf16": Kind.BF16, "int8": Kind.INT8}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "relu": 3}
_NORMS = {"rms": 0, "layer": 1}
_RESIDUALS = {"sequential": 0, "parallel": 1, "parallel_two_norms": 2}
# kernels.h: query heads of one key head are worked off four at a time.
_HEADS_AT_ONCE = 4
# threads.c counts 8192 rounds in a pass; a layer takes up to 14.
_MOST_LAYERS = 500


def refusal_reason(spec: DecoderSpec, precision: str, block_tokens: int) -> str | None:
    """Why this decoder cannot serve the model here; None: it can."""
    if precision not in _KINDS:
        return f"precision {precision}"
    if spec.head_dim % 16 or (spec.rope is not None and spec.rope.rotary_dim % 2):
        return f"head size {spec.head_dim}"
    if spec.layers > _MOST_LAYERS:
        return f"{spec.layers} layers"
    if block_tokens != BLOCK_TOKENS:
        return f"blocks of {block_tokens} tokens"
    library = load_library()
    return library.reason or None


class NativeDecoder:
    def __init__(self, spec: DecoderSpec, weights: DecoderWeights, precision: str, threads: int) -> None:
        """Packs all weights: a second for each few hundred million parameters. `refusal_reason` must have been None."""
        library = load_library().library
        assert library is not None, "the caller asks refusal_reason first"
        self._library = library
        self.spec = spec
        self._kind, self._threads = _KINDS[precision], threads
        self.kv_dtype = kv_dtype(precision)
        self._kept: list[object] = []  # whatever the structs point to
        self.weight_bytes = 0
        self._embedding = weights.embedding
        self._position_table = weights.position_table
        self._embedding_norm = (
            None if weights.embedding_norm is None else self._floats_of(weights.embedding_norm)
        )
        self._final_norm = self._floats_of(weights.final_norm)
        layers = (bindings.Layer * spec.layers)()
        for index in range(spec.layers):
            layers[index] = self._layer(weights.layer(index))
        self._struct = self._decoder_struct(layers, weights)
        self.weight_bytes += weights.embedding.nbytes
        self._scratch = _Scratch(spec, self._kind, threads)

    @property
    def threads(self) -> int:
        return self._threads

    @threads.setter
    def threads(self, threads: int) -> None:
        if threads != self._threads:
            self._threads = threads
            self._scratch = _Scratch(self.spec, self._kind, threads)

    def forward(self, batch: PackedTokens, pool: KVPool) -> torch.Tensor:
        """See `decoder.Decoder`."""
        tokens = token_tensor(batch, torch.device("cpu"))
        scratch = self._scratch
        scratch.ensure(len(batch.tokens), max(span.start + span.count for span in batch.spans))
        positions, starts, tables = _addressing(batch)
        hidden = self._embed(tokens, positions)
        adapters = adapter_addresses(batch)
        call = scratch.struct(len(batch.tokens), hidden, has_adapters=adapters is not None)
        call.adapters = None if adapters is None else adapters.ctypes.data
        call.positions, call.table_starts, call.tables = (
            positions.ctypes.data,
            starts.ctypes.data,
            tables.ctypes.data,
        )
        call.pool, call.pool_blocks = address(pool.storage), pool.blocks
        self._library.rh_forward(ctypes.byref(self._struct), ctypes.byref(call))
        return hidden

    def prepare_adapter(self, adapter: LoraAdapter) -> NativeAdapter:
        """See `decoder.Decoder`."""
        prepared = NativeAdapter(adapter)
        # A thread's scratch row holds what stands between the two matrices.
        if prepared.widest_rank > self._scratch.widest_row:
            raise ModelRefusal(f"adapter: a rank of {prepared.widest_rank} in one product is too high")
        return prepared

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `decoder.Decoder`."""
        hidden = hidden.contiguous()
        logits = torch.empty(len(hidden), self.spec.vocab_size)
        self._scratch.ensure(len(hidden), 1)
        call = self._scratch.struct(len(hidden), hidden)
        self._library.rh_logits(ctypes.byref(self._struct), ctypes.byref(call), logits.data_ptr())
        return logits

    def final_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `decoder.Decoder`."""
        spec, (weight, bias) = self.spec, self._final_norm
        if spec.norm == "rms":
            return functional.rms_norm(hidden, (spec.hidden_size,), weight, spec.norm_eps)
        return functional.layer_norm(hidden, (spec.hidden_size,), weight, bias, spec.norm_eps)

    def _embed(self, tokens: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
        hidden = functional.embedding(tokens, self._embedding).float()
        if self._position_table is not None:
            hidden += functional.embedding(torch.from_numpy(positions).long(), self._position_table).float()
        if self._embedding_norm is not None:
            hidden = functional.layer_norm(
                hidden, hidden.shape[-1:], *self._embedding_norm, self.spec.norm_eps
            )
        return hidden

    def _layer(self, weights: LayerWeights) -> bindings.Layer:
        return bindings.Layer(
            attention_norm=self._norm(weights.attention_norm),
            mlp_norm=self._norm(weights.mlp_norm),
            query_norm=address(self._floats(weights.query_norm)),
            key_norm=address(self._floats(weights.key_norm)),
            qkv=self._linear(pack_linear(weights.qkv, self._kind)),
            attention_output=self._linear(pack_linear(weights.attention_output, self._kind)),
            mlp_in=self._linear(pack_linear(weights.mlp_in, self._kind)),
            mlp_out=self._linear(pack_linear(weights.mlp_out, self._kind)),
        )

    def _decoder_struct(
        self, layers: ctypes.Array[bindings.Layer], weights: DecoderWeights
    ) -> bindings.Decoder:
        spec, rope = self.spec, self.spec.rope
        cos = sin = slopes = None
        if rope is not None:
            frequencies = torch.tensor(rotary_frequencies(rope), dtype=torch.float32)
            angles = torch.outer(torch.arange(spec.max_positions, dtype=torch.float32), frequencies)
            cos, sin = self._floats(angles.cos()), self._floats(angles.sin())
        if spec.position == "alibi":
            slopes = self._floats(torch.tensor(alibi_slopes(spec.heads)))
        self._kept.append(layers)
        return bindings.Decoder(
            layer_count=spec.layers,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            norm_kind=_NORMS[spec.norm],
            activation=_ACTIVATIONS[spec.activation],
            is_gated=spec.is_gated,
            residual=_RESIDUALS[spec.residual],
            rotary_dim=0 if rope is None else rope.rotary_dim,
            is_interleaved=rope is not None and rope.is_interleaved,
            kind=self._kind,
            kv_kind=Kind.FP32 if self._kind == Kind.FP32 else Kind.BF16,
            norm_eps=spec.norm_eps,
            score_scale=spec.head_dim**-0.5,
            cos=address(cos),
            sin=address(sin),
            slopes=address(slopes),
            layers=layers,
            final_norm=self._norm(weights.final_norm),
            head=self._linear(pack_linear(weights.head, self._kind)),
        )

    def _linear(self, packed: PackedLinear) -> bindings.Linear:
        self._kept.append(packed)
        self.weight_bytes += packed.weight_bytes
        return packed.struct()

    def _norm(self, norm: NormWeights | None) -> bindings.Norm:
        if norm is None:
            return bindings.Norm(None, None)
        weight, bias = self._floats_of(norm)
        return bindings.Norm(address(weight), address(bias))

    def _floats_of(self, norm: NormWeights) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self._floats(norm.weight), self._floats(norm.bias)

    def _floats(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.float().contiguous()
        self._kept.append(tensor)
        return tensor


class _Scratch:
    """Room that passes share, grown when a larger one comes: one pass runs at a time."""

    def __init__(self, spec: DecoderSpec, kind: Kind, threads: int) -> None:
        self._spec, self._kind, self._threads = spec, kind, threads
        self._rows = self._tokens = 0
        self.widest_row = max(spec.hidden_size, spec.intermediate_size, spec.heads * spec.head_dim)
        self._plain: torch.Tensor | None = None

    def ensure(self, rows: int, tokens: int) -> None:
        """tokens: the longest sequence, whose scores one thread holds."""
        spec = self._spec
        # The new sizes count once all of their room is there: a pass that found no memory is tried again in halves.
        if rows > self._rows:
            grown = _grown(rows)
            mixed = spec.heads * spec.head_dim
            mlp_in = spec.intermediate_size * (2 if spec.is_gated else 1)
            qkv = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
            inputs = padded(max(spec.hidden_size, spec.intermediate_size, mixed), GROUP)
            int8 = self._kind == Kind.INT8
            self._between = torch.empty(grown, spec.hidden_size)
            self._wide = torch.empty(grown, max(qkv, mlp_in))
            self._mixed = torch.empty(grown, mixed)
            self._data = torch.empty(grown, inputs, dtype=torch.int8 if int8 else torch.float32)
            self._scales = torch.empty(grown, inputs // GROUP) if int8 else None
            self._offsets = torch.empty(grown, inputs // GROUP, dtype=torch.int32) if int8 else None
            self._rows = grown
        if tokens > self._tokens:
            grown = _grown(tokens)
            floats = max(self.widest_row, _HEADS_AT_ONCE * -(-grown // BLOCK_TOKENS) * BLOCK_TOKENS)
            # 64 bytes apart, so that two threads never write the same cache line.
            self._row_scratch = torch.empty(self._threads, -(-floats // 16) * 16 + 16)
            self._tokens = grown

    def struct(self, rows: int, hidden: torch.Tensor, has_adapters: bool = False) -> bindings.Pass:
        plain = self._plain_rows(rows) if has_adapters and self._kind == Kind.INT8 else None
        return bindings.Pass(
            rows=rows,
            threads=self._threads,
            hidden=address(hidden),
            between=address(self._between),
            input=bindings.Rows(
                address(self._data), address(self._scales), address(self._offsets), address(plain)
            ),
            wide=address(self._wide),
            mixed=address(self._mixed),
            row_scratch=address(self._row_scratch),
            row_floats=self._row_scratch.shape[1],
        )

    def _plain_rows(self, rows: int) -> torch.Tensor:
        """Adapters beside int8 weights read the rows as they were before."""
        if self._plain is None or len(self._plain) < rows:
            self._plain = torch.empty(_grown(rows), self.widest_row)
        return self._plain


def _grown(count: int) -> int:
    """The next power of two: few reallocations, at most twice the room."""
    return max(16, 1 << (count - 1).bit_length())


def _addressing(batch: PackedTokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(positions, table_starts, tables), int32: the first two per row, the last all spans' block tables in a row."""
    tables: list[int] = []
    starts = np.empty(len(batch.tokens), dtype=np.int32)
    positions = np.empty(len(batch.tokens), dtype=np.int32)
    row = 0
    for span in batch.spans:
        starts[row : row + span.count] = len(tables)
        positions[row : row + span.count] = range(span.start, span.start + span.count)
        tables.extend(span.blocks)
        row += span.count
    return positions, starts, np.array(tables, dtype=np.int32)
