"""Kernels between the products against plain torch: on a GPU for `loadtest.gpu_engine`, and as
`python -m loadtest.gpu_row_checks` under Triton's interpreter for the tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch.nn import functional

from services.worker.engine.cuda.row_kernels import activate, residual_norm, turn_and_write
from services.worker.engine.kv_cache import BLOCK_TOKENS, KVPool

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
EPS = 1e-5
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def check_norms(dtype: torch.dtype, size: int, is_rms: bool, deltas: int, norms: int) -> None:
    hidden = torch.randn(3, size).to(dtype)
    added = [torch.randn(3, size).to(dtype) for _ in range(deltas)]
    weights = [
        (torch.rand(size).to(dtype), None if is_rms else torch.randn(size).to(dtype)) for _ in range(norms)
    ]
    total = hidden.float()
    if added:
        total = (total + torch.stack(added).float().sum(0)).to(dtype).float()
    outputs = residual_norm(hidden, tuple(added), tuple(weights), is_rms, EPS)
    compare(hidden, total, ("residual", dtype, size, deltas))
    for output, (weight, bias) in zip(outputs, weights, strict=True):
        if bias is None:
            expected = functional.rms_norm(total, (size,), weight.float(), EPS)
        else:
            expected = functional.layer_norm(total, (size,), weight.float(), bias.float(), EPS)
        compare(output, expected, ("norm", dtype, size, is_rms, norms))


def check_activation(dtype: torch.dtype, name: str, is_gated: bool) -> None:
    size = 37
    source = 3 * torch.randn(2, 3 * size).to(dtype)
    expected = ACTIVATIONS[name](source[:, :size].float())
    if is_gated:
        expected = expected * source[:, size : 2 * size].float()
    compare(activate(source, size, name, is_gated), expected, (name, dtype, is_gated))


def turned(
    heads: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_interleaved: bool
) -> torch.Tensor:
    """Pairs of channels are points that turn. heads: (rows, heads, head_dim) fp32."""
    half = cos.shape[1]
    result = heads.clone()
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    first = slice(0, 2 * half, 2) if is_interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if is_interleaved else slice(half, 2 * half)
    a, b = heads[..., first], heads[..., second]
    result[..., first], result[..., second] = a * c - b * s, b * c + a * s
    return result


def check_turn(
    dtype: torch.dtype,
    head_dim: int,
    rotary_dim: int,
    is_interleaved: bool,
    has_norm: bool,
    own_tables: bool,
    device: torch.device,
) -> None:
    heads, kv_heads, rows = 3, 2, 3
    pool = KVPool((1, kv_heads, head_dim), 12, dtype, device)
    keys, values = pool.layer(0)
    mixed = torch.randn(rows, (heads + 2 * kv_heads) * head_dim + 8).to(dtype)
    positions = torch.tensor([0, -1, 2 * BLOCK_TOKENS + 5], dtype=torch.int32)
    tables = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.int32)
    table_rows = None if own_tables else torch.tensor([2, 0, 1], dtype=torch.int32)
    angles = torch.rand(64, max(1, rotary_dim // 2)) * 6
    rope = (angles.cos(), angles.sin(), is_interleaved) if rotary_dim else None
    norms = (torch.rand(head_dim).to(dtype), torch.rand(head_dim).to(dtype)) if has_norm else None
    queries = turn_and_write(mixed, keys, values, positions, tables, table_rows, heads, rope, norms, EPS)

    split = mixed[:, : (heads + 2 * kv_heads) * head_dim].float().view(rows, -1, head_dim)
    wanted = [split[:, :heads], split[:, heads : heads + kv_heads]]
    if norms is not None:
        wanted = [
            functional.rms_norm(part, (head_dim,), norm.float(), EPS)
            for part, norm in zip(wanted, norms, strict=True)
        ]
    if rope is not None:
        wanted = [turned(part, positions.clamp_min(0).long(), *rope) for part in wanted]
    case = (dtype, head_dim, rotary_dim, is_interleaved, has_norm)
    blocks = (1, 9) if own_tables else (7, 6)
    for row, block, offset in ((0, blocks[0], 0), (2, blocks[1], 5)):
        compare(queries[row].view(heads, head_dim), wanted[0][row], ("queries", case))
        compare(keys[block, :, offset], wanted[1][row], ("keys", case))
        assert torch.equal(values[block, :, offset].float(), split[row, heads + kv_heads :])
    # Nothing else was written, and nothing at all for the row of padding.
    for memory in (keys, values):
        assert int((memory != 0).any(dim=3).any(dim=1).sum()) == 2


def compare(ours: torch.Tensor, theirs: torch.Tensor, case: object) -> None:
    difference = (ours.float() - theirs.float()).abs().max().item()
    assert difference < TOLERANCE[ours.dtype] * max(1.0, theirs.abs().max().item()), (case, difference)


def check_all(device: torch.device) -> int:
    """Every tensor is made on the device. Returns how many cases there were."""
    torch.manual_seed(0)
    checked = 0
    with device:
        for norm_case in itertools.product(TOLERANCE, (130,), (False, True), (0, 1, 2), (1, 2)):
            check_norms(*norm_case)
            checked += 1
        for activation_case in itertools.product(TOLERANCE, ACTIVATIONS, (False, True)):
            check_activation(*activation_case)
            checked += 1
        shapes = zip(itertools.cycle(TOLERANCE), ((80, 80), (64, 16), (96, 0), (256, 64)), strict=False)
        switches = itertools.product((False, True), repeat=3)
        for (dtype, (head_dim, rotary_dim)), (is_interleaved, has_norm, own_tables) in itertools.product(
            shapes, switches
        ):
            check_turn(dtype, head_dim, rotary_dim, is_interleaved, has_norm, own_tables, device)
            checked += 1
    return checked


def main() -> None:
    torch.set_num_threads(1)
    print(f"checked {check_all(torch.device('cpu'))} cases")


if __name__ == "__main__":
    main()
