"""How many threads compute: a table of measured seconds, and one real measurement."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from services.worker.engine.native.build import load_library
from services.worker.engine.native.decoder import NativeDecoder
from services.worker.engine.thread_choice import (
    available_cores,
    candidate_counts,
    cores_within,
)
from services.worker.engine.thread_tuner import ThreadTuner, choose_threads
from tests.unit.worker.engine.builders import make_engine, make_request, run_all
from tests.unit.worker.engine.conftest import TinyModel


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        pytest.param({1: 1.0}, 1, id="one core"),
        pytest.param({1: 1.0, 2: 0.5}, 2, id="alone: twice as fast"),
        pytest.param({1: 1.0, 2: 0.9}, 1, id="shared: hardly faster"),
        pytest.param({1: 1.0, 2: 8.0}, 1, id="shared: waits for a core that others have"),
        pytest.param({1: 1.0, 2: 0.5, 4: 0.45}, 2, id="bound by memory beyond two"),
        pytest.param({1: 1.0, 2: 0.9, 4: 0.5}, 4, id="two bring little, four do"),
        pytest.param({1: 1.0, 2: 0.6, 4: 0.3, 6: 0.2}, 6, id="each brings enough"),
    ],
)
def test_more_threads_are_taken_only_where_they_bring_enough(seconds: dict[int, float], chosen: int) -> None:
    assert choose_threads(seconds) == chosen


@pytest.mark.parametrize(
    ("cores", "counts"),
    [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8]), (400, [1, 2, 4, 8, 16, 32, 64])],
)
def test_candidates_are_powers_of_two_and_all_cores(cores: int, counts: list[int]) -> None:
    assert candidate_counts(cores) == counts


def test_an_engine_that_was_told_no_number_measures_one_and_answers_the_same(tiny: TinyModel) -> None:
    request = make_request("a", [5, 6, 7, 8], 12)
    measured, told = make_engine(tiny.folder, threads=0), make_engine(tiny.folder, threads=1)
    assert run_all(measured, [request])["a"].tokens == run_all(told, [request])["a"].tokens
    if load_library().library is not None:
        assert measured._loader._tuner is not None
        assert measured._loader._tuner.chosen in candidate_counts(available_cores())


def test_each_pass_takes_the_threads_that_are_said_and_tells_how_long_it_took(tiny: TinyModel) -> None:
    if load_library().library is None:
        pytest.skip(load_library().reason)
    request = make_request("a", [5, 6, 7, 8], 12)
    engine, told = make_engine(tiny.folder, threads=0), make_engine(tiny.folder, threads=1)
    (decoder,) = [cast(NativeDecoder, model.decoder) for model in engine._models.values()]
    tuner = _Tuner(decoder)
    decoder.tuner = cast(ThreadTuner, tuner)
    assert run_all(engine, [request])["a"].tokens == run_all(told, [request])["a"].tokens
    assert [rows for rows, _, _ in tuner.took_passes] == [4] + [1] * 11
    assert [threads for _, _, threads in tuner.took_passes] == [1, 3, 2, 1] * 3
    assert all(0.0 < seconds < 60.0 for _, seconds, _ in tuner.took_passes)


class _Tuner:
    """Says numbers that go up and down, and looks which one the pass was made with."""

    def __init__(self, decoder: NativeDecoder) -> None:
        self._decoder = decoder
        self.took_passes: list[tuple[int, float, int]] = []

    def next_count(self) -> int:
        return (1, 3, 2, 1)[len(self.took_passes) % 4]

    def took(self, rows: int, seconds: float) -> None:
        self.took_passes.append((rows, seconds, self._decoder.threads))


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("1600000 100000", 8),
        ("", 8),
        ("200000", 8),
        ("200000 0", 8),
    ],
)
def test_a_containers_quota_limits_the_cores(quota: str, cores: int) -> None:
    assert cores_within(quota, 8) == cores


def test_torch_gets_one_thread_beside_the_kernels_and_all_where_it_computes_itself(tiny: TinyModel) -> None:
    if load_library().library is None:
        pytest.skip(load_library().reason)
    try:
        for kernels, threads in (("native", 1), ("torch", 2), ("native", 1)):
            engine = make_engine(tiny.folder, kernels=kernels, threads=2)
            run_all(engine, [make_request("a", [5, 6, 7], 2)])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
