"""Triton kernels compute what torch does: under the interpreter here, on the device in `loadtest.gpu_engine`."""

from __future__ import annotations

import pytest

from services.worker.engine.cuda.attention import choose_splits, cut_pieces
from tests.unit.worker.engine.cuda.interpreted import run_checks


@pytest.mark.parametrize("head_dims", [("64", "80"), ("96", "128"), ("256",)])
def test_attention_kernels_equal_the_torch_path(head_dims: tuple[str, ...]) -> None:
    run_checks("loadtest.gpu_attention_checks", *head_dims)


def test_kernels_between_products_equal_torch() -> None:
    run_checks("loadtest.gpu_row_checks")


@pytest.mark.parametrize(
    ("sequences", "kv_heads", "splits"),
    [(1, 8, 32), (1, 2, 32), (8, 8, 8), (32, 8, 2), (34, 8, 1), (256, 8, 1), (64, 16, 1)],
)
def test_splits_fill_the_device_and_no_more(sequences: int, kv_heads: int, splits: int) -> None:
    assert choose_splits(sequences, kv_heads, processors=132) == splits


def test_pieces_cover_each_row_once_and_know_its_position() -> None:
    spans = [(0, 5, 20, 3), (5, 9, 0, 7)]
    assert cut_pieces(spans, 4) == [(0, 4, 20, 3), (4, 1, 24, 3), (5, 4, 0, 7), (9, 4, 4, 7), (13, 1, 8, 7)]
