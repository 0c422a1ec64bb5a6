"""Memory stays flat over 500 requests; and a leak would be seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.report import Row
from loadtest.soak import SAMPLES, Load, Sample, judge, make_engine, soak
from services.worker.engine import Engine
from services.worker.engine.native.decoder import NativeDecoder
from services.worker.engine.residents import Residents
from services.worker.engine.sequence import LiveSequence
from tests.unit.worker.engine.builders import VOCAB_SIZE, save_model, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("soak")
    save_model(folder, tiny_config())
    return folder


def below_floor(engine: Engine, requests: int) -> list[str]:
    samples, totals = soak(engine, Load(1, VOCAB_SIZE), requests)
    assert totals.ended == requests and totals.failed == 0
    assert min(totals.cancelled, totals.refused, totals.cached_tokens) > 0
    return [row.name for row in judge(samples, engine.config.kv_tokens) if row.is_below_floor]


def test_memory_is_flat_over_500_requests(folder: Path) -> None:
    engine = make_engine(folder, "bf16", threads=1)
    grown = below_floor(engine, 500)
    if not isinstance(engine._models["model"].decoder, NativeDecoder):
        # oneDNN keeps the code it made for each number of rows: plain torch grows by that, as loadtest/README.md says.
        grown = [name for name in grown if name != "resident memory grew"]
    assert grown == []


def test_what_each_sequence_leaves_behind_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    leave = Residents.leave

    def leave_and_keep(self: Residents, sequence: LiveSequence, has_failed: bool = False) -> None:
        kept.append(sequence)
        leave(self, sequence, has_failed)

    monkeypatch.setattr(Residents, "leave", leave_and_keep)
    grown = below_floor(make_engine(folder, "bf16", threads=1), 100)
    assert "objects of the engine grew" in grown


def flat(**changes: list[float]) -> list[Row]:
    readings = {name: changes.get(name, [100.0] * SAMPLES) for name in ("mib", "heap", "objects", "free")}
    samples = [
        Sample(
            500 * (n + 1),
            float(n),
            readings["mib"][n],
            int(readings["heap"][n]),
            int(readings["objects"][n]),
            int(readings["free"][n]),
        )
        for n in range(SAMPLES)
    ]
    return [row for row in judge(samples, kv_tokens=100) if row.is_below_floor]


def steps(per_sample: float) -> list[float]:
    return [100.0 + n * per_sample for n in range(SAMPLES)]


def test_judge() -> None:
    assert flat() == []
    # A KiB, or a Python object, for each of the 500 requests between two samples.
    assert [row.name for row in flat(mib=steps(500 / 1024))] == ["resident memory grew"]
    assert [row.name for row in flat(heap=steps(500))] == ["Python's heap grew"]
    assert [row.name for row in flat(objects=steps(500))] == ["objects of the engine grew"]
    assert [row.name for row in flat(free=[100.0] * (SAMPLES - 1) + [84.0])] == ["KV tokens lost"]
    assert flat(mib=steps(0.01), heap=[100.0 + 700 * (n % 3) for n in range(SAMPLES)]) == []
    warm_up = [100.0 + 90 * min(n, 5) for n in range(SAMPLES)]
    assert flat(mib=warm_up, heap=warm_up, objects=warm_up) == []
