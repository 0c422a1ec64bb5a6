"""The C kernels: against plain torch for odd shapes, and what only they promise: bits that depend on one row alone."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from services.worker.engine import EngineConfig, ModelRefusal
from services.worker.engine.decoder import WeightsDamaged
from services.worker.engine.decoder_choice import describe_kernels, make_decoder
from services.worker.engine.decoder_weights import LayerWeights, LinearWeights, NormWeights
from services.worker.engine.kv_cache import KVPool
from services.worker.engine.native import bindings, build
from services.worker.engine.native import decoder as native_decoder
from services.worker.engine.native.bindings import Kind, address
from services.worker.engine.native.decoder import NativeDecoder
from services.worker.engine.native.panels import GROUP, pack_linear, padded
from services.worker.engine.packing import PackedTokens, Span
from services.worker.engine.spec import DecoderSpec, RopeSpec
from services.worker.engine.torch_decoder import TorchDecoder
from tests.unit.worker.engine.builders import make_engine, save_model, tiny_config

needs_kernels = pytest.mark.usefixtures("library")
CPU = torch.device("cpu")
KV_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}


@pytest.fixture(params=build.BUILDS, ids=lambda each: str(each.name))
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> build.NativeLibrary:
    """Each build that this processor can run: decoders of the test compute with it."""
    found = build.load_build(request.param)
    if found.library is None:
        pytest.skip(found.reason)
    monkeypatch.setattr(native_decoder, "load_library", lambda: found)
    return found


def make_spec(**changes: Any) -> DecoderSpec:
    values: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 72,
        "intermediate_size": 100,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "norm": "rms",
        "norm_eps": 1e-5,
        "activation": "silu",
        "is_gated": True,
        "residual": "sequential",
        "position": "rope",
        "rope": RopeSpec(10000.0, 16),
        "has_embedding_norm": False,
        "max_positions": 256,
        "tied_embeddings": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "head_bias": True,
        "qk_norm": True,
        "eos_token_ids": (),
    }
    spec = DecoderSpec(**{**values, **changes})
    if spec.rope is not None and spec.rope.rotary_dim > spec.head_dim:
        raise ValueError("rotary_dim")
    return spec


class RandomWeights:
    """Every tensor drawn anew but the same for one seed."""

    def __init__(self, spec: DecoderSpec, seed: int = 0) -> None:
        self._spec, self._seed = spec, seed
        self._random = torch.Generator().manual_seed(seed)
        self.embedding = self._draw(spec.vocab_size, spec.hidden_size)
        self.position_table: torch.Tensor | None = None
        self.embedding_norm: NormWeights | None = None
        self.final_norm = self._norm(spec.hidden_size)
        self.head = self._linear(spec.vocab_size, spec.hidden_size)

    def layer(self, index: int) -> LayerWeights:
        self._random.manual_seed(self._seed * 1000 + index + 1)
        spec = self._spec
        mixed, mlp = spec.heads * spec.head_dim, spec.intermediate_size * (2 if spec.is_gated else 1)
        qkv = mixed + 2 * spec.kv_heads * spec.head_dim
        return LayerWeights(
            attention_norm=self._norm(spec.hidden_size),
            qkv=self._linear(qkv, spec.hidden_size),
            query_norm=self._draw(spec.head_dim) + 1.0 if spec.qk_norm else None,
            key_norm=self._draw(spec.head_dim) + 1.0 if spec.qk_norm else None,
            attention_output=self._linear(spec.hidden_size, mixed),
            mlp_norm=self._norm(spec.hidden_size),
            mlp_in=self._linear(mlp, spec.hidden_size),
            mlp_out=self._linear(spec.hidden_size, spec.intermediate_size),
        )

    def _draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._random) * 0.3

    def _norm(self, size: int) -> NormWeights:
        return NormWeights(self._draw(size) + 1.0, self._draw(size) if self._spec.norm == "layer" else None)

    def _linear(self, outputs: int, inputs: int) -> LinearWeights:
        return LinearWeights(self._draw(outputs, inputs), self._draw(outputs))


def make_pool(spec: DecoderSpec, precision: str = "fp32") -> KVPool:
    return KVPool(spec.kv_shape, 40, KV_DTYPES[precision], CPU)


def native(spec: DecoderSpec, precision: str = "fp32", threads: int = 1) -> NativeDecoder:
    config = EngineConfig(precision=precision, threads=threads, kernels="native")
    decoder = make_decoder(spec, RandomWeights(spec), config, CPU)
    assert isinstance(decoder, NativeDecoder)
    return decoder


def forward(
    decoder: NativeDecoder | TorchDecoder, tokens: list[int], *spans: Span, pool: KVPool
) -> torch.Tensor:
    with torch.inference_mode():
        return decoder.forward(PackedTokens(tokens, spans), pool).clone()


TOKENS = [(7 * index + index * index) % 97 for index in range(150)]
BLOCKS = tuple(range(11, 21))


@needs_kernels
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="sizes that fill neither panels nor groups"),
        pytest.param({"heads": 12, "kv_heads": 2}, id="six heads on one key head"),
        pytest.param({"heads": 10, "kv_heads": 2}, id="five heads on one key head"),
        pytest.param({"heads": 3, "kv_heads": 1, "head_dim": 64}, id="head size 64"),
        pytest.param({"heads": 2, "kv_heads": 2, "head_dim": 80}, id="head size 80"),
        pytest.param({"heads": 2, "kv_heads": 1, "head_dim": 96}, id="head size 96"),
        pytest.param({"heads": 2, "kv_heads": 2, "head_dim": 256}, id="head size 256"),
        pytest.param({"intermediate_size": 4160}, id="deeper than one depth"),
        pytest.param({"hidden_size": 2112, "layers": 1}, id="wider than one depth"),
    ],
)
def test_fp32_equals_plain_torch_for_a_prompt_and_for_a_token_after_it(changes: dict[str, Any]) -> None:
    spec = make_spec(**changes)
    ours, reference = native(spec), TorchDecoder(spec, RandomWeights(spec), "fp32", CPU)
    pool, reference_pool = make_pool(spec), make_pool(spec)
    for start, count in ((0, 129), (129, 1), (130, 20)):
        span, tokens = Span(BLOCKS, start, count), TOKENS[start : start + count]
        got = forward(ours, tokens, span, pool=pool)
        expected = forward(reference, tokens, span, pool=reference_pool)
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        assert torch.allclose(ours.logits(got), reference.logits(expected), rtol=1e-3, atol=1e-3)


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_row_has_the_same_bits_alone_in_a_batch_in_any_chunks_and_by_any_threads(precision: str) -> None:
    spec = make_spec()
    whole = forward(
        native(spec, precision), TOKENS[:130], Span(BLOCKS, 0, 130), pool=make_pool(spec, precision)
    )
    for threads in (1, 2, 3):
        decoder, pool = native(spec, precision, threads), make_pool(spec, precision)
        rows = []
        for start in (0, 1, 18, 100):  # chunks of 1, 17, 82 and 30 tokens, beside a neighbour of other values
            end = {0: 1, 1: 18, 18: 100, 100: 130}[start]
            neighbour = Span(tuple(range(30, 36)), start // 2, 9)
            tokens = [96] * 9 + TOKENS[start:end]
            rows.append(forward(decoder, tokens, neighbour, Span(BLOCKS, start, end - start), pool=pool)[9:])
        assert torch.equal(torch.cat(rows), whole), f"{threads} threads"


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_neighbour_of_large_values_or_of_no_numbers_changes_no_bit(precision: str) -> None:
    """One scale over all rows of a batch would let one team's outlier coarsen another team's answer."""
    spec = make_spec()
    weights = RandomWeights(spec)
    weights.embedding[95] *= 1e4
    weights.embedding[96] = float("nan")
    decoder = NativeDecoder.pack(spec, weights, precision, 1)
    alone = forward(decoder, TOKENS[:20], Span(BLOCKS, 0, 20), pool=make_pool(spec, precision))
    for loud in (95, 96):
        neighbour = Span((1, 2), 0, 20)
        together = forward(
            decoder,
            [loud] * 20 + TOKENS[:20],
            neighbour,
            Span(BLOCKS, 0, 20),
            pool=make_pool(spec, precision),
        )
        assert torch.equal(together[20:], alone)
        assert torch.isfinite(alone).all()


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_among_good_ones_shows_in_the_logits(
    precision: str, activation: str, bad: float
) -> None:
    """Vector maxima and minima drop a NaN where their operands stand in the wrong order."""
    spec = make_spec(activation=activation)
    weights = RandomWeights(spec)
    weights.embedding[7, 5] = bad
    decoder = NativeDecoder.pack(spec, weights, precision, 1)
    hidden = forward(decoder, [1, 7, 2], Span(BLOCKS, 0, 3), pool=make_pool(spec, precision))
    logits = decoder.logits(hidden)
    assert torch.isfinite(logits[0]).all(), "the token before"
    assert not torch.isfinite(logits[1]).any()
    assert not torch.isfinite(logits[2]).any(), "the token after attends to it"


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_one_weight_that_is_no_number_shows_in_the_logits(precision: str, activation: str) -> None:
    spec = make_spec(activation=activation, is_gated=False)
    weights = RandomWeights(spec)
    layer = weights.layer(0)
    layer.mlp_in.weight[3, 2] = float("nan")
    weights.layer = lambda index: layer if index == 0 else RandomWeights(spec).layer(index)  # type: ignore[method-assign]
    decoder = NativeDecoder.pack(spec, weights, precision, 1)
    hidden = forward(decoder, TOKENS[:3], Span(BLOCKS, 0, 3), pool=make_pool(spec, precision))
    assert not torch.isfinite(decoder.logits(hidden)).any()


@needs_kernels
def test_an_earlier_tokens_key_that_is_no_number_shows_though_its_value_is_one() -> None:
    """A score that is none must not become a weight of nearly 0."""
    spec = make_spec()
    decoder, pool = native(spec), make_pool(spec)
    forward(decoder, TOKENS[:3], Span(BLOCKS, 0, 3), pool=pool)
    pool.storage[0, 0, BLOCKS[0]].view(spec.kv_heads, -1)[:, 0] = float(
        "nan"
    )  # token 0, channel 0 of each head
    hidden = forward(decoder, TOKENS[3:4], Span(BLOCKS, 3, 1), pool=pool)
    assert not torch.isfinite(hidden).any()


@needs_kernels
def test_a_pass_that_found_no_memory_leaves_room_for_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec()
    decoder, pool = native(spec), make_pool(spec)
    expected = forward(native(spec), TOKENS[:70], Span(BLOCKS, 0, 70), pool=make_pool(spec))
    real_empty, calls = torch.empty, iter(range(100))

    def failing_empty(*arguments: Any, **keywords: Any) -> torch.Tensor:
        if next(calls) == 2:
            raise RuntimeError("can't allocate memory")
        return real_empty(*arguments, **keywords)

    monkeypatch.setattr(torch, "empty", failing_empty)
    with pytest.raises(RuntimeError, match="allocate"):
        forward(decoder, TOKENS[:140], Span(BLOCKS, 0, 140), pool=pool)
    monkeypatch.undo()
    assert torch.equal(forward(decoder, TOKENS[:70], Span(BLOCKS, 0, 70), pool=pool), expected)


@needs_kernels
def test_teams_of_changing_size_and_a_child_of_fork_compute_the_same() -> None:
    spec = make_spec()
    decoder, pool = native(spec), make_pool(spec)
    expected = forward(decoder, TOKENS[:20], Span(BLOCKS, 0, 20), pool=pool)
    for threads in (4, 1, 3, 2, 4, 2, 1, 4):
        decoder.threads = threads
        assert torch.equal(forward(decoder, TOKENS[:20], Span(BLOCKS, 0, 20), pool=pool), expected)
    decoder.threads = 2
    child = os.fork()
    if child == 0:
        same = torch.equal(forward(decoder, TOKENS[:20], Span(BLOCKS, 0, 20), pool=pool), expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


@needs_kernels
def test_what_a_block_held_before_never_counts() -> None:
    spec = make_spec()
    decoder, pool = native(spec), make_pool(spec)
    clean = forward(decoder, TOKENS[:21], Span(BLOCKS, 0, 21), pool=make_pool(spec))
    pool.storage.fill_(float("nan"))
    assert torch.equal(forward(decoder, TOKENS[:21], Span(BLOCKS, 0, 21), pool=pool), clean)


@needs_kernels
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("int8", 0.06)])
def test_lower_precisions_are_close_to_fp32(precision: str, tolerance: float) -> None:
    spec = make_spec(hidden_size=192, intermediate_size=320)
    exact = forward(native(spec), TOKENS[:64], Span(BLOCKS, 0, 64), pool=make_pool(spec))
    decoder = native(spec, precision)
    rough = forward(decoder, TOKENS[:64], Span(BLOCKS, 0, 64), pool=make_pool(spec, precision))
    assert not torch.equal(rough, exact)
    assert ((rough - exact).norm() / exact.norm()).item() == pytest.approx(0, abs=tolerance)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_activations_equal_torch_over_their_whole_range(
    activation: str, library: build.NativeLibrary
) -> None:
    """The MLP's first product is made to hand on its input: wide numbers, small ones, zero, both signs."""
    spec = make_spec(activation=activation, is_gated=False, intermediate_size=72, layers=1, qk_norm=False)
    ours, reference = native(spec), TorchDecoder(spec, RandomWeights(spec), "fp32", CPU)
    scale = torch.logspace(-6, 2, len(TOKENS)).unsqueeze(1)
    wide = torch.cat((scale, -scale)).expand(-1, 72).contiguous()
    row = torch.empty(72)
    struct = ours._struct
    assert library.library is not None
    activate = library.library.rh_activate_row
    activate.argtypes = (ctypes.POINTER(bindings.Decoder), ctypes.c_void_p, ctypes.c_void_p)
    for values in wide:
        activate(ctypes.byref(struct), address(values), address(row))
        assert torch.allclose(row, reference._activation(values), rtol=1e-5, atol=3e-7)


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (33, 65), (64, 128)])
def test_packing_keeps_every_weight(kind: Kind, outputs: int, inputs: int) -> None:
    """Read back by the layout that the header states."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))
    packed, scales = pack_linear(weight, kind)
    width = padded(inputs, GROUP)
    rows = packed.permute(0, 2, 1, 3).reshape(-1, width).float()
    if kind == Kind.INT8:
        assert scales is not None
        assert (rows[outputs:] == 128).all() and (rows[:, inputs:] == 128).all()
        by_row = scales.float().transpose(1, 2).reshape(-1, width // GROUP)
        back = ((rows - 128) * by_row.repeat_interleave(GROUP, dim=1))[:outputs, :inputs]
        assert (back - weight).abs().max() <= scales.max() / 2 + 1e-7
    else:
        expected = weight if kind == Kind.FP32 else weight.bfloat16().float()
        assert scales is None
        assert torch.equal(rows[:outputs, :inputs], expected)
        assert not rows[outputs:].any() and not rows[:, inputs:].any()


def test_all_zero_weights_and_inputs_stay_zero_in_int8() -> None:
    packed, scales = pack_linear(torch.zeros(3, 5), Kind.INT8)
    assert scales is not None and torch.isfinite(scales).all()
    assert (packed == 128).all()


def test_structs_of_another_size_are_refused_at_load(
    library: build.NativeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Longer(ctypes.Structure):
        _fields_ = [*bindings.Pass._fields_, ("more", ctypes.c_int64)]

    assert library.library is not None
    bindings.declare(library.library)
    monkeypatch.setattr(bindings, "Pass", Longer)
    with pytest.raises(OSError, match="files changed"):
        bindings.declare(library.library)
    monkeypatch.undo()
    bindings.declare(library.library)


@pytest.mark.parametrize(
    ("changes", "config", "reason"),
    [
        ({"head_dim": 24, "rope": RopeSpec(1e4, 24)}, {}, "head size 24"),
        ({}, {"precision": "fp16"}, "precision fp16"),
        ({}, {"block_tokens": 8}, "blocks of 8 tokens"),
        ({"layers": 501}, {}, "501 layers"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_by_name_and_served_by_torch(
    changes: dict[str, Any], config: dict[str, Any], reason: str
) -> None:
    spec = make_spec(**changes)
    with pytest.raises(ModelRefusal, match=reason):
        make_decoder(spec, RandomWeights(spec), EngineConfig(kernels="native", **config), CPU)
    if spec.layers < 10:
        decoder = make_decoder(spec, RandomWeights(spec), EngineConfig(kernels="auto", **config), CPU)
        assert isinstance(decoder, TorchDecoder)


# ---- checksums of panels


def plain_sum(panel: bytes) -> int:
    """`checks.c`, number by number."""
    columns = [column // 16 + 1 for column in range(128)]
    for at, (word,) in enumerate(struct.iter_unpack("<I", panel)):
        mixed = columns[at % 128] ^ word
        columns[at % 128] = ((mixed << 13 | mixed >> 19) & 0xFFFFFFFF) * 0x9E3779B1 & 0xFFFFFFFF
    total = len(panel)
    for word in columns:
        total = (total ^ word) * 0x9E3779B185EBCA87 & 0xFFFFFFFFFFFFFFFF
    return total


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_sums_of_panels_are_what_is_written_of_them(precision: str) -> None:
    decoder = native(make_spec(), precision)
    sums = [number & 0xFFFFFFFFFFFFFFFF for number in decoder.panel_sums().tolist()]
    expected = [
        plain_sum(bytes(panel.contiguous().view(-1).view(torch.uint8).numpy()))
        for name in PRODUCTS
        for panel in decoder.weights[f"{name}.packed"]
    ]
    assert sums == expected


PRODUCTS = [
    *(
        f"layers.{layer}.{product}"
        for layer in (0, 1)
        for product in ("qkv", "attention_output", "mlp_in", "mlp_out")
    ),
    "head",
]


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_first_pass_compares_sums_and_says_what_others_say(precision: str, threads: int) -> None:
    plain = native(make_spec(), precision, threads)
    checked = NativeDecoder(plain.spec, plain.weights, precision, threads, plain.panel_sums())
    for _ in range(2):
        pools = [make_pool(plain.spec, precision) for _ in range(2)]
        rows = [
            forward(decoder, TOKENS[:20], Span(BLOCKS, 0, 20), pool=pool)
            for decoder, pool in zip((plain, checked), pools, strict=True)
        ]
        assert torch.equal(*rows) and torch.equal(*(d.logits(rows[0]) for d in (plain, checked)))
    # It is compared once: later passes take panels in larger pieces.
    assert all(linear.sums is None for linear in checked._products())


@needs_kernels
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("at", [0, -1])
def test_a_changed_bit_of_any_product_is_found_before_anything_is_said(name: str, at: int) -> None:
    plain = native(make_spec(), "bf16", 2)
    weights = {**plain.weights, f"{name}.packed": plain.weights[f"{name}.packed"].clone()}
    weights[f"{name}.packed"].view(-1).view(torch.uint8)[at] ^= 64
    damaged = NativeDecoder(plain.spec, weights, "bf16", 2, plain.panel_sums())
    for _ in range(2):  # again and again
        with pytest.raises(WeightsDamaged):
            hidden = forward(damaged, TOKENS[:3], Span(BLOCKS, 0, 3), pool=make_pool(plain.spec, "bf16"))
            assert name == "head"
            damaged.logits(hidden)


@needs_kernels
def test_an_embedding_that_is_read_from_the_head_is_compared_where_no_token_is_drawn() -> None:
    spec = make_spec(tied_embeddings=True, head_bias=False)
    drawn = RandomWeights(spec)
    drawn.embedding = drawn.embedding.bfloat16()
    drawn.head = LinearWeights(drawn.embedding, None)
    plain = NativeDecoder.pack(spec, drawn, "bf16", 1)
    assert "embedding" not in plain.weights
    sums, span = plain.panel_sums(), Span(BLOCKS, 0, 3)
    sound = NativeDecoder(spec, plain.weights, "bf16", 1, sums)
    hidden = forward(sound, TOKENS[:3], span, pool=make_pool(spec, "bf16"))
    assert torch.equal(sound.final_hidden(hidden), plain.final_hidden(hidden))
    weights = {**plain.weights, "head.packed": plain.weights["head.packed"].clone()}
    weights["head.packed"].view(-1).view(torch.uint8)[5] ^= 1
    damaged = NativeDecoder(spec, weights, "bf16", 1, sums)
    hidden = forward(damaged, TOKENS[:3], span, pool=make_pool(spec, "bf16"))
    with pytest.raises(WeightsDamaged):
        damaged.final_hidden(hidden)


def test_an_older_compiler_leaves_the_newest_instructions_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_cpu_flags", lambda: build.AVX512_BF16.cpu_flags | build.AVX2.cpu_flags)

    def load_build(kind: build.Build) -> build.NativeLibrary:
        fails = kind is build.AVX512_BF16
        return build.NativeLibrary(
            None if fails else ctypes.CDLL(None), "unknown flag" if fails else "", kind
        )

    monkeypatch.setattr(build, "load_build", load_build)
    build.load_library.cache_clear()
    try:
        assert build.load_library().build is build.AVX512
    finally:
        build.load_library.cache_clear()


def test_a_machine_without_compiler_or_instructions_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = make_spec()
    monkeypatch.setattr(build, "_BUILD", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    build.load_library.cache_clear()
    try:
        monkeypatch.setattr(build, "_cpu_flags", lambda: build.AVX2.cpu_flags)
        assert "no C compiler" in build.load_library().reason
        build.load_library.cache_clear()
        monkeypatch.setattr(build, "_cpu_flags", lambda: build.AVX2.cpu_flags - {"avx2"})
        assert build.load_library().reason == "this processor lacks avx2"
        decoder = make_decoder(spec, RandomWeights(spec), EngineConfig(), CPU)
        assert isinstance(decoder, TorchDecoder)
        words = describe_kernels(decoder, EngineConfig(), CPU)
        assert words == "torch: this processor lacks avx2"
    finally:
        monkeypatch.undo()
        build.load_library.cache_clear()


def test_a_config_that_names_millions_of_positions_costs_no_memory_for_them(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_config())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1 << 24}))
    for kernels in ("auto", "torch"):
        decoder = make_engine(tmp_path, kernels=kernels)._models["m"].decoder
        assert isinstance(decoder.spec, DecoderSpec) and decoder.spec.max_positions == 256


def test_a_compiler_that_fails_is_a_reason_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'no such instruction' >&2\nexit 1\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "_BUILD", tmp_path / "made")
    monkeypatch.setattr(shutil, "which", lambda name: str(compiler))
    monkeypatch.setattr(build, "_cpu_flags", lambda: build.AVX2.cpu_flags)
    build.load_library.cache_clear()
    try:
        assert "no such instruction" in build.load_library().reason
        assert list((tmp_path / "made").iterdir()) == []
    finally:
        build.load_library.cache_clear()


def test_every_field_of_the_spec_is_looked_at() -> None:
    """A new field that changes the arithmetic must not be passed over by the C kernels in silence."""
    known = {
        *("model_type", "vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads"),
        *("head_dim", "norm", "norm_eps", "activation", "is_gated", "residual", "position", "rope"),
        *("has_embedding_norm", "max_positions", "tied_embeddings", "qkv_bias", "output_bias", "mlp_bias"),
        *("head_bias", "qk_norm", "eos_token_ids"),
    }
    assert {field.name for field in dataclasses.fields(DecoderSpec)} == known
