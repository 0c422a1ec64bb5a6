"""Fifty swaps beside answers: each answer is that of a fresh process; and what would be wrong is seen."""

from __future__ import annotations

import pytest

from loadtest import hotswap_models
from loadtest.engine_models import make_tiny_llama
from loadtest.hotswap_models import TINY_NOISE_STD, FineTunes, ensure_fine_tunes
from loadtest.hotswap_sides import PRECISION
from loadtest.hotswap_soak import SAMPLES, Sample, SwapSoak, WrongAnswer, fresh_answers, judge
from services.worker.engine import EngineConfig
from services.worker.engine.native.build import load_library

pytestmark = pytest.mark.skipif(load_library().library is None, reason="images are of the C kernels")


@pytest.fixture(scope="module")
def tunes(tmp_path_factory: pytest.TempPathFactory) -> FineTunes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hotswap_models, "HOME", tmp_path_factory.mktemp("hotswap"))
        return ensure_fine_tunes(make_tiny_llama(), 4, EngineConfig(precision=PRECISION), TINY_NOISE_STD)


@pytest.fixture(scope="module")
def expected(tunes: FineTunes) -> dict[str, list[int]]:
    return fresh_answers(tunes)


@pytest.mark.timeout(180)
async def test_fifty_swaps_answer_as_fresh_processes_do(
    tunes: FineTunes, expected: dict[str, list[int]]
) -> None:
    assert len({tuple(answer) for answer in expected.values()}) == 4, "they would not be told apart"
    soak = SwapSoak(tunes, expected)
    samples = await soak.run(50)
    assert len(soak.swap_s) == 50 and len(samples) == SAMPLES
    assert soak.background_answers > 0
    # One model stayed; of those that came and went, neither a file nor a mapping is left.
    assert {sample.mapped_images for sample in samples} == {1}
    assert len({sample.open_files for sample in samples}) == 1


@pytest.mark.timeout(180)
async def test_an_answer_of_other_weights_is_seen(tunes: FineTunes, expected: dict[str, list[int]]) -> None:
    names = [model.ref.folder for model in tunes.models]
    crossed = {**expected, names[1]: expected[names[3]], names[3]: expected[names[1]]}
    with pytest.raises(WrongAnswer, match="revision 1, after 1 swaps"):
        await SwapSoak(tunes, crossed).run(50)
    # The weights of the old revision under the new one's name.
    stale = {**expected, names[3]: expected[names[2]]}
    with pytest.raises(WrongAnswer, match="revision 2, after 26 swaps"):
        await SwapSoak(tunes, stale).run(50)


def flat(swaps: int) -> Sample:
    return Sample(swaps, 200_000, 20, 1)


@pytest.mark.parametrize(
    ("last", "below"),
    [
        (flat(1000), []),
        (Sample(1000, 203_900, 20, 1), []),
        (Sample(1000, 204_100, 20, 1), ["resident memory less mapped files"]),
        (Sample(1000, 200_000, 21, 1), ["open files"]),
        (Sample(1000, 200_000, 20, 2), ["mapped images"]),
    ],
)
def test_what_grows_is_below_its_floor(last: Sample, below: list[str]) -> None:
    # What the warm-up takes does not count.
    samples = [Sample(0, 100_000, 15, 1)] * 5 + [flat(500)] * 15 + [last] * 5
    assert [row.name for row in judge(samples) if row.is_below_floor] == below
