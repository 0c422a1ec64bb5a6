"""Every kernel, as its launch function calls it, compiles for an H100: types, shapes and shared memory are a compiler's to judge.

Triton brings its own compiler and assembler, so no GPU is needed. That the code runs right there is for `loadtest.gpu_engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from services.worker.engine.cuda.attention import attend_decode, attend_prefill, head_layout
from services.worker.engine.cuda.row_kernels import activate, residual_norm, turn_and_write

H100 = GPUTarget("cuda", 90, 32)
MOST_SHARED_BYTES = 227 * 1024
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}


def compile_instead(kernel: Any, compiled: list[int], *args: Any, **options: Any) -> None:
    """What a launch with these arguments would compile. An int of 1 is a constant, as Triton has it."""
    names = {parameter.name for parameter in kernel.params}
    values = {parameter.name: arg for parameter, arg in zip(kernel.params, args, strict=False)}
    values |= {name: value for name, value in options.items() if name in names}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(place,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    chosen = {name: value for name, value in options.items() if name in ("num_warps", "num_stages")}
    compiled.append(triton.compile(source, target=H100, options=chosen).metadata.shared)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Shared memory of each kernel that was launched since."""
    found: list[int] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def launcher(kernel: Any, _grid: Any) -> Callable[..., None]:
        return lambda *args, **options: compile_instead(kernel, found, *args, **options)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "__getitem__", launcher)
    return found


@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads", "kv_heads", "splits"),
    [
        (torch.bfloat16, 128, 32, 8, 4),
        (torch.bfloat16, 256, 16, 16, 1),
        (torch.float16, 80, 12, 12, 1),
        (torch.float32, 64, 12, 4, 2),
    ],
)
def test_attention_compiles(
    compiled: list[int], dtype: torch.dtype, head_dim: int, heads: int, kv_heads: int, splits: int
) -> None:
    slopes = torch.ones(heads) if heads == 12 else None
    layout = head_layout(heads, kv_heads, head_dim, slopes)
    queries = torch.zeros((2, heads * head_dim), dtype=dtype)
    keys = torch.zeros((3, kv_heads, 16, head_dim), dtype=dtype)
    numbers = torch.zeros((2, 4), dtype=torch.int32)
    attend_decode(queries, keys, keys, numbers[:, 0], numbers, layout, splits, queries)
    attend_prefill(queries, keys, keys, numbers, numbers, layout, queries)
    assert len(compiled) == (3 if splits > 1 else 2)
    assert 0 < max(compiled) < MOST_SHARED_BYTES


def test_kernels_between_products_compile(compiled: list[int]) -> None:
    dtype = torch.bfloat16
    rows = torch.zeros((2, 64), dtype=dtype)
    weight = torch.zeros(64, dtype=dtype)
    residual_norm(rows, (rows,), ((weight, None),), True, 1e-5)
    residual_norm(rows, (rows, rows), ((weight, weight), (weight, weight)), False, 1e-5)
    for name, is_gated in (("silu", True), ("gelu", False), ("gelu_pytorch_tanh", False), ("relu", False)):
        activate(torch.zeros((2, 128), dtype=dtype), 64, name, is_gated)
    keys = torch.zeros((3, 2, 16, 64), dtype=dtype)
    mixed = torch.zeros((2, 6 * 64), dtype=dtype)
    numbers = torch.zeros((2, 4), dtype=torch.int32)
    angles = torch.zeros((32, 16))
    norms = (torch.zeros(64, dtype=dtype), torch.zeros(64, dtype=dtype))
    for rope, head_norms, table_rows in (
        ((angles, angles, False), norms, None),
        ((angles, angles, True), None, numbers[0]),
        (None, None, numbers[0]),
    ):
        turn_and_write(mixed, keys, keys, numbers[:, 1], numbers, table_rows, 2, rope, head_norms, 1e-5)
    assert len(compiled) == 9
