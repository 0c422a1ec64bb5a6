"""A decoder whose forward pass is one call into C (see `decoder.Decoder` for what a decoder is).

Every row is computed by itself: in any precision its bits depend neither on its neighbours nor on how its prompt was cut
into chunks, nor on how many threads there are.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from time import perf_counter

import numpy as np
import torch
from torch.nn import functional

from ..api import ModelRefusal
from ..decoder import WeightsDamaged, kv_dtype
from ..decoder_weights import DecoderWeights
from ..kv_cache import BLOCK_TOKENS, KVPool
from ..lora import LoraAdapter
from ..packing import PackedTokens, token_tensor
from ..spec import DecoderSpec, RopeSpec, alibi_slopes, rotary_frequencies
from ..thread_tuner import ThreadTuner
from . import bindings
from .adapter import NativeAdapter, adapter_addresses
from .bindings import Kind, address
from .build import load_library
from .packed_weights import Tensors, pack_weights, product_shapes, rows_of
from .panels import GROUP, PANEL, padded

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
    def __init__(
        self,
        spec: DecoderSpec,
        weights: Tensors,
        precision: str,
        threads: int,
        sums: torch.Tensor | None = None,
    ) -> None:
        """weights: as `pack_weights` names them, kept and never written to. `refusal_reason` must have been None.

        sums: of the weights' panels, as `panel_sums` gives them: the first pass compares them, and raises WeightsDamaged.
        """
        loaded = load_library()
        assert loaded.library is not None, "the caller asks refusal_reason first"
        self._library = loaded.library
        self.instructions = loaded.build.name
        self.spec = spec
        self.weights = weights
        self.weight_bytes = sum(tensor.nbytes for tensor in weights.values())
        self._kind, self._threads = _KINDS[precision], threads
        self.tuner: ThreadTuner | None = None  # sets the threads of each pass where there is one
        self.kv_dtype = kv_dtype(precision)
        self._embedding = weights.get("embedding")
        self._position_table = weights.get("position_table")
        self._embedding_norm = self._norm_pair("embedding_norm") if spec.has_embedding_norm else None
        self._final_norm = self._norm_pair("final_norm")
        self._angles = angle_tables(spec.rope, spec.max_positions) if spec.rope is not None else (None, None)
        self._slopes = torch.tensor(alibi_slopes(spec.heads)) if spec.position == "alibi" else None
        self._shapes = product_shapes(spec)
        self._sums, self._next_sum = sums, 0
        self._damaged = ctypes.c_int32(0)
        self._layers = (bindings.Layer * spec.layers)(*map(self._layer, range(spec.layers)))
        self._struct = self._decoder_struct()
        self._unchecked_layers = self._unchecked_head = sums is not None
        self._scratch = _Scratch(spec, _row_dtype(self._kind, loaded.build.rounds_rows), threads)

    @classmethod
    def pack(cls, spec: DecoderSpec, weights: DecoderWeights, precision: str, threads: int) -> NativeDecoder:
        """From a checkpoint's weights, of which it keeps none but the embedding."""
        return cls(spec, pack_weights(spec, weights, _KINDS[precision]), precision, threads)

    @property
    def threads(self) -> int:
        return self._threads

    @threads.setter
    def threads(self, threads: int) -> None:
        self._threads = threads
        self._scratch.allow(threads)

    def forward(self, batch: PackedTokens, pool: KVPool) -> torch.Tensor:
        """See `decoder.Decoder`."""
        if self.tuner is not None:
            self.threads = self.tuner.next_count()
        tokens = token_tensor(batch, torch.device("cpu"))
        scratch = self._scratch
        scratch.ensure(len(batch.tokens), max(span.start + span.count for span in batch.spans))
        positions, starts, tables = _addressing(batch)
        hidden = self._embed(tokens, positions)
        adapters = adapter_addresses(batch)
        call = scratch.struct(
            len(batch.tokens), self._threads, hidden, self._damaged, has_adapters=adapters is not None
        )
        call.adapters = None if adapters is None else adapters.ctypes.data
        call.positions, call.table_starts, call.tables = (
            positions.ctypes.data,
            starts.ctypes.data,
            tables.ctypes.data,
        )
        call.pool, call.pool_blocks = address(pool.storage), pool.blocks
        begin_s = perf_counter()
        self._library.rh_forward(ctypes.byref(self._struct), ctypes.byref(call))
        if self._unchecked_layers:
            self._believe_layers()
        if self.tuner is not None:
            self.tuner.took(len(batch.tokens), perf_counter() - begin_s)
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
        call = self._scratch.struct(len(hidden), self._threads, hidden, self._damaged)
        self._library.rh_logits(ctypes.byref(self._struct), ctypes.byref(call), logits.data_ptr())
        if self._unchecked_head:
            self._believe_head()
        return logits

    def final_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `decoder.Decoder`."""
        if self._unchecked_head and self._embedding is None:
            self._check_head()  # the prompt's embeddings were read from it
        spec, (weight, bias) = self.spec, self._final_norm
        if spec.norm == "rms":
            return functional.rms_norm(hidden, (spec.hidden_size,), weight, spec.norm_eps)
        return functional.layer_norm(hidden, (spec.hidden_size,), weight, bias, spec.norm_eps)

    def panel_sums(self) -> torch.Tensor:
        """(panels,) int64: of each layer's qkv, attention output, MLP in and MLP out, and of the head."""
        sums = torch.empty(self._panels(), dtype=torch.int64)
        at = sums.data_ptr()
        for linear in self._products():
            self._library.rh_panel_sums(ctypes.byref(linear), at)
            at += _panels_of(linear.outputs) * sums.itemsize
        return sums

    def _products(self) -> Iterator[bindings.Linear]:
        for layer in self._layers:
            yield from (layer.qkv, layer.attention_output, layer.mlp_in, layer.mlp_out)
        yield self._struct.head

    def _panels(self) -> int:
        each = {name: _panels_of(outputs) for name, (outputs, _) in self._shapes.items()}
        return (sum(each.values()) - each["head"]) * self.spec.layers + each["head"]

    def _believe_layers(self) -> None:
        """All of them were compared. Raises WeightsDamaged, again for each further pass."""
        self._raise_if_damaged()
        for layer in self._layers:
            for linear in (layer.qkv, layer.attention_output, layer.mlp_in, layer.mlp_out):
                linear.sums = None
        self._unchecked_layers = False

    def _believe_head(self) -> None:
        self._raise_if_damaged()
        self._struct.head.sums = None
        self._unchecked_head = False

    def _check_head(self) -> None:
        head = self._struct.head
        found = torch.empty(_panels_of(head.outputs), dtype=torch.int64)
        self._library.rh_panel_sums(ctypes.byref(head), found.data_ptr())
        assert self._sums is not None
        if not torch.equal(found, self._sums[-len(found) :]):
            self._damaged.value = 1
        self._believe_head()

    def _raise_if_damaged(self) -> None:
        if self._damaged.value:
            raise WeightsDamaged("its weights differ from what was written")

    def _embed(self, tokens: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
        if self._embedding is None:
            hidden = rows_of(self.weights["head.packed"], tokens, self.spec.hidden_size).float()
        else:
            hidden = functional.embedding(tokens, self._embedding).float()
        if self._position_table is not None:
            hidden += functional.embedding(torch.from_numpy(positions).long(), self._position_table).float()
        if self._embedding_norm is not None:
            hidden = functional.layer_norm(
                hidden, hidden.shape[-1:], *self._embedding_norm, self.spec.norm_eps
            )
        return hidden

    def _layer(self, index: int) -> bindings.Layer:
        name = f"layers.{index}."
        return bindings.Layer(
            attention_norm=self._norm(name + "attention_norm"),
            mlp_norm=self._norm(name + "mlp_norm"),
            query_norm=address(self.weights.get(name + "query_norm")),
            key_norm=address(self.weights.get(name + "key_norm")),
            qkv=self._product(name, "qkv"),
            attention_output=self._product(name, "attention_output"),
            mlp_in=self._product(name, "mlp_in"),
            mlp_out=self._product(name, "mlp_out"),
        )

    def _decoder_struct(self) -> bindings.Decoder:
        spec, rope = self.spec, self.spec.rope
        cos, sin = self._angles
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
            slopes=address(self._slopes),
            layers=self._layers,
            final_norm=self._norm("final_norm"),
            head=self._product("", "head"),
        )

    def _product(self, prefix: str, product: str) -> bindings.Linear:
        (outputs, inputs), name = self._shapes[product], prefix + product
        sums = None
        if self._sums is not None:
            sums = self._sums.data_ptr() + self._next_sum * self._sums.itemsize
            self._next_sum += _panels_of(outputs)
        return bindings.Linear(
            kind=self._kind,
            outputs=outputs,
            inputs=padded(inputs, GROUP),
            true_inputs=inputs,
            packed=address(self.weights[f"{name}.packed"]),
            scales=address(self.weights.get(f"{name}.scales")),
            bias=address(self.weights.get(f"{name}.bias")),
            sums=sums,
        )

    def _norm(self, name: str) -> bindings.Norm:
        """Both NULL where there is no such norm."""
        return bindings.Norm(
            address(self.weights.get(f"{name}.weight")), address(self.weights.get(f"{name}.bias"))
        )

    def _norm_pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")


@functools.lru_cache(maxsize=4)
def angle_tables(rope: RopeSpec, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, (positions, rotary_dim / 2) fp32; models of one type share them."""
    frequencies = torch.tensor(rotary_frequencies(rope), dtype=torch.float32)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def _panels_of(outputs: int) -> int:
    return padded(outputs, PANEL) // PANEL


def _row_dtype(kind: Kind, rounds_rows: bool) -> torch.dtype:
    if kind == Kind.INT8:
        return torch.int8
    return torch.bfloat16 if kind == Kind.BF16 and rounds_rows else torch.float32


class _Scratch:
    """Room that passes share, grown when a larger one comes: one pass runs at a time."""

    def __init__(self, spec: DecoderSpec, row_dtype: torch.dtype, threads: int) -> None:
        """row_dtype: of rows that a product takes."""
        self._spec, self._row_dtype, self._threads = spec, row_dtype, threads
        self._rows = self._tokens = 0
        self.widest_row = max(spec.hidden_size, spec.intermediate_size, spec.heads * spec.head_dim)
        self._plain: torch.Tensor | None = None

    def allow(self, threads: int) -> None:
        """Room for so many threads from the next `ensure` on."""
        if threads > self._threads:
            self._threads, self._tokens = threads, 0

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
            int8 = self._row_dtype == torch.int8
            self._between = torch.empty(grown, spec.hidden_size)
            self._wide = torch.empty(grown, max(qkv, mlp_in))
            self._mixed = torch.empty(grown, mixed)
            self._data = torch.empty(grown, inputs, dtype=self._row_dtype)
            self._scales = torch.empty(grown, inputs // GROUP) if int8 else None
            self._offsets = torch.empty(grown, inputs // GROUP, dtype=torch.int32) if int8 else None
            self._rows = grown
        if tokens > self._tokens:
            grown = _grown(tokens)
            floats = max(self.widest_row, _HEADS_AT_ONCE * -(-grown // BLOCK_TOKENS) * BLOCK_TOKENS)
            # 64 bytes apart, so that two threads never write the same cache line.
            self._row_scratch = torch.empty(self._threads, -(-floats // 16) * 16 + 16)
            self._tokens = grown

    def struct(
        self,
        rows: int,
        threads: int,
        hidden: torch.Tensor,
        damaged: ctypes.c_int32,
        has_adapters: bool = False,
    ) -> bindings.Pass:
        is_rounded = self._row_dtype != torch.float32
        plain = self._plain_rows(rows) if has_adapters and is_rounded else None
        return bindings.Pass(
            rows=rows,
            threads=threads,
            hidden=address(hidden),
            between=address(self._between),
            input=bindings.Rows(
                address(self._data), address(self._scales), address(self._offsets), address(plain)
            ),
            wide=address(self._wide),
            mixed=address(self._mixed),
            row_scratch=address(self._row_scratch),
            row_floats=self._row_scratch.shape[1],
            damaged=ctypes.pointer(damaged),
        )

    def _plain_rows(self, rows: int) -> torch.Tensor:
        """Adapters read the rows as they were before they were rounded."""
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
