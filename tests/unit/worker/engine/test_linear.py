"""A row's product never depends on the rows beside it, and is close to the exact one."""

from __future__ import annotations

import pytest
import torch

from services.worker.engine.decoder import activation_dtype
from services.worker.engine.linear import Int8Scratch, make_linear

CPU = torch.device("cpu")
# (outputs, inputs): shapes of a small model, and odd ones that leave tails in every blocking.
SHAPES = ((960, 576), (576, 1536), (384, 48), (33, 17))
BATCH_SIZES = (1, 2, 3, 7, 8, 16, 33, 64)


@pytest.fixture(params=[True, False], ids=["with VNNI", "without VNNI"])
def vnni(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole range of int8 needs instructions for it; the reduced one is right on every processor."""
    if request.param and not torch.cpu._is_vnni_supported():
        pytest.skip("this processor has no VNNI")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: request.param)


def rows_with_an_outlier(inputs: int, dtype: torch.dtype) -> torch.Tensor:
    rows = torch.randn(max(BATCH_SIZES), inputs, generator=torch.Generator().manual_seed(2))
    rows[-1] *= 50
    rows[3] = 0
    return rows.to(dtype)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_row_has_the_same_bits_alone_and_in_any_batch(
    precision: str, shape: tuple[int, int], has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator) * 0.05
    bias = torch.randn(shape[0], generator=generator) if has_bias else None
    linear = make_linear(weight, bias, precision, CPU, Int8Scratch())
    rows = rows_with_an_outlier(shape[1], activation_dtype(precision))
    with torch.inference_mode():
        alone = torch.cat([linear(row.unsqueeze(0)) for row in rows])
        for size in BATCH_SIZES:
            assert torch.equal(linear(rows[:size]), alone[:size]), f"first {size} rows"
            assert torch.equal(linear(rows[-size:]), alone[-size:]), f"last {size} rows, with the outlier"


@pytest.mark.usefixtures("vnni")
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 4e-3), ("fp16", 5e-4), ("int8", 1.5e-2)]
)
def test_product_is_close_to_the_exact_one_for_every_row(precision: str, tolerance: float) -> None:
    weight = torch.randn(96, 576, generator=torch.Generator().manual_seed(1)) * 0.05
    rows = rows_with_an_outlier(576, activation_dtype(precision))
    exact = rows.double() @ weight.double().T
    with torch.inference_mode():
        product = make_linear(weight, None, precision, CPU, Int8Scratch())(rows).double()
    norms = exact.norm(dim=1).clamp_min(1e-9)
    assert ((product - exact).norm(dim=1) / norms).max().item() < tolerance


@pytest.mark.usefixtures("vnni")
def test_int8_activations_keep_their_small_channels_beside_large_ones() -> None:
    """Weights that int8 holds exactly, so all error is the activations': far below the 1 % of one int8 number each. Without
    VNNI they are numbers of 7 bits.
    """
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-126, 127, (64, 576), generator=generator).float()
    weight[:, 0] = 127
    rows = torch.randn(8, 576, generator=generator)
    rows[:, 7] *= 100
    weight[:, 7] = 0
    exact = rows.double() @ weight.double().T
    with torch.inference_mode():
        product = make_linear(weight / 127, None, "int8", CPU, Int8Scratch())(rows).double() * 127
    assert ((product - exact).norm(dim=1) / exact.norm(dim=1)).max().item() < (
        3e-3 if torch.cpu._is_vnni_supported() else 5e-3
    )


def test_int8_output_of_a_nan_row_leaves_its_neighbours_alone() -> None:
    linear = make_linear(
        torch.randn(64, 48, generator=torch.Generator().manual_seed(1)), None, "int8", CPU, Int8Scratch()
    )
    rows = rows_with_an_outlier(48, torch.float32)[:4]
    with torch.inference_mode():
        healthy = linear(rows.clone())
        rows[1] = float("nan")
        poisoned = linear(rows)
    assert not torch.isfinite(poisoned[1]).all()
    assert torch.equal(poisoned[[0, 2, 3]], healthy[[0, 2, 3]])
