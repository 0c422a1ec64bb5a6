"""The CUDA decoder's arithmetic, on CPU tensors under the interpreter; its inputs and its arena as they are."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from services.worker.engine.cuda.arena import Arena, arena_layout
from services.worker.engine.cuda.graphs import buckets_for
from services.worker.engine.cuda.pass_inputs import DecodeTable, pass_inputs
from services.worker.engine.packing import PackedTokens, Span
from services.worker.engine.spec import spec_from_config
from tests.unit.worker.engine.builders import tiny_config
from tests.unit.worker.engine.cuda.interpreted import run_checks
from tests.unit.worker.engine.family_configs import VARIANTS

CPU = torch.device("cpu")


@pytest.mark.parametrize("names", [("qwen3", "bloom", "opt"), ("gptj", "gpt_neox")])
def test_decoder_equals_the_torch_decoder(names: tuple[str, ...]) -> None:
    run_checks("tests.unit.worker.engine.cuda.decoder_checks", *names)


def test_pass_inputs_say_positions_tables_and_pieces() -> None:
    spans = (Span([5, 6], 17, 1), Span([7], 3, 1), Span([7], 4, 6), Span([9], 2, 1))
    inputs = pass_inputs(PackedTokens(range(9), spans), 4, CPU)
    assert inputs.tokens.tolist() == list(range(9))
    assert inputs.positions.tolist() == [17, 3, 4, 5, 6, 7, 8, 9, 2]
    assert inputs.decode_rows == 2 and inputs.lengths.tolist() == [18, 4]
    assert inputs.table_rows is not None and inputs.table_rows.tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 3]
    assert inputs.tables[:, 0].tolist() == [5, 7, 7, 9] and int(inputs.tables[0, 1]) == 6
    # A single token behind a chunk is a piece of its own.
    assert inputs.pieces is not None
    assert inputs.pieces.tolist() == [[0, 4, 4, 2], [4, 2, 8, 2], [6, 1, 2, 3]]


def test_decode_table_marks_the_rows_that_stand_for_nothing() -> None:
    table = DecodeTable(4, 40, CPU)
    inputs = table.inputs(4)
    assert inputs.positions.tolist() == [-1] * 4 and inputs.lengths.tolist() == [0] * 4
    table.write(PackedTokens([8, -1], (Span([5, 6], 17, 1), Span([7], 3, 1))), 4)
    assert inputs.tokens.tolist() == [8, -1, 0, 0]
    assert inputs.positions.tolist() == [17, 3, -1, -1] and inputs.lengths.tolist() == [18, 4, 0, 0]
    assert inputs.tables[0, :2].tolist() == [5, 6] and int(inputs.tables[1, 0]) == 7
    table.write(PackedTokens([9], (Span([7], 4, 1),)), 2)
    assert inputs.positions.tolist()[:2] == [4, -1]


@pytest.mark.parametrize(
    ("most_rows", "buckets"),
    [(1, (1,)), (3, (1, 2, 4)), (16, (1, 2, 4, 8, 16)), (100, (1, 2, 4, 8, 16, 32, 64, 96, 128))],
)
def test_graphs_reach_the_largest_batch(most_rows: int, buckets: tuple[int, ...]) -> None:
    assert buckets_for(most_rows) == buckets
    assert buckets_for(1000)[-1] == 256


def test_arena_of_a_type_is_the_same_for_all_its_models_and_nothing_overlaps() -> None:
    for config in (tiny_config(), *VARIANTS.values()):
        spec = spec_from_config(config.to_dict(), {})
        layout = arena_layout(spec, torch.bfloat16)
        assert layout == arena_layout(dataclasses.replace(spec, eos_token_ids=(7,)), torch.bfloat16)
        arena = Arena(spec, torch.bfloat16, CPU)
        arena.memory.zero_()
        for name, place in layout.places.items():
            assert place.offset_bytes % 256 == 0
            arena.view(name).add_(1)
        assert all(bool((arena.view(name) == 1).all()) for name in layout.places)
        assert arena.memory.nbytes == layout.total_bytes
