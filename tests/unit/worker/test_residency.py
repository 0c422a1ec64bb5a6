"""What becomes of a model that does not load, whatever the reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from services.worker import residency
from services.worker.engine import ModelInfo
from services.worker.model_files import ModelUnavailable
from services.worker.model_loads import ModelLoads
from services.worker.pull_snapshot import ModelKey
from services.worker.residency import Residency
from shared.messages import ModelRef, WeightsRef

REF = ModelRef(model_id="mod_1", revision=1, name="team/model", folder="mod_1/1", signature="s")


class Loads:
    """Loads and unloads; a load takes `load_s` of the test's time."""

    def __init__(self, clock: list[float], load_s: float) -> None:
        self._clock, self._load_s = clock, load_s

    def file_bytes(self, ref: WeightsRef) -> int:
        return 200

    async def load(self, ref: WeightsRef) -> ModelInfo:
        self._clock[0] += self._load_s
        return ModelInfo("m", 100, 8, 8, ())

    async def unload(self, key: ModelKey) -> None:
        pass


class BrokenLoads(Loads):
    def __init__(self, error: Exception) -> None:
        super().__init__([0.0], 0.0)
        self._error = error

    async def load(self, ref: WeightsRef) -> ModelInfo:
        raise self._error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        OverflowError("(34, 'Numerical result out of range')"),
        ValueError("model is loaded already"),
        MemoryError(),
        OSError("vanished"),
        KeyError("weight"),
    ],
)
async def test_a_model_that_fails_to_load_for_any_reason_is_failed_and_nothing_else_is(
    error: Exception,
) -> None:
    """Whatever else came out of it would end the worker, and all answers that run on it."""
    resident = Residency(cast(ModelLoads, BrokenLoads(error)), "bf16")
    with pytest.raises(ModelUnavailable, match=type(error).__name__):
        await resident.load(REF)
    assert resident.failure(("mod_1", 1)) == f"{type(error).__name__} while loading"
    assert resident.slots() == {}


async def test_a_turn_runs_while_there_is_work_and_begins_anew_after_a_break_or_a_swap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = (REF.model_id, REF.revision)
    clock = [100.0]
    monkeypatch.setattr(residency, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    resident = Residency(cast(ModelLoads, Loads(clock, 3.0)), "bf16")

    def turn_after(seconds: float, *, work: bool) -> float:
        clock[0] += seconds
        resident.note_work({key} if work else set())
        return resident.slots()[key].turn_s

    await resident.load(REF)
    assert [turn_after(1, work=work) for work in (True, True, True)] == [0, 1, 2]
    assert [turn_after(1, work=work) for work in (False, True, True)] == [0, 0, 1]
    await resident.evict(key)
    await resident.load(REF)
    assert [turn_after(1, work=work) for work in (True, True)] == [0, 1]


async def test_a_swap_costs_what_it_took_and_an_unknown_one_what_its_size_suggests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = msgspec.structs.replace(REF, model_id="mod_2")
    clock = [100.0]
    monkeypatch.setattr(residency, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    resident = Residency(cast(ModelLoads, Loads(clock, 3.0)), "bf16")
    resident.size(other)
    assert resident.swap_costs({("mod_2", 1)}) == {}
    await resident.load(REF)
    assert resident.swap_costs({("mod_1", 1), ("mod_2", 1)}) == {("mod_1", 1): 3.0, ("mod_2", 1): 6.0}


BASE = WeightsRef(model_id="mod_base", revision=4, name="team/base", folder="mod_base/4", signature="s")
ADAPTER = msgspec.structs.replace(REF, model_id="mod_adapter", base=BASE)


async def test_an_adapter_works_and_fails_with_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(residency, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    resident = Residency(cast(ModelLoads, Loads(clock, 1.0)), "bf16")
    adapter, base = ("mod_adapter", 1), ("mod_base", 4)
    assert resident.size(ADAPTER) == 200
    assert resident.bases == {adapter: base}
    assert set(resident.sizes()) == {adapter, base}
    await resident.load(BASE)
    await resident.load(ADAPTER)

    resident.note_work({adapter})
    clock[0] += 5.0
    assert {key: slot.turn_s for key, slot in resident.slots().items()} == {adapter: 5.0, base: 5.0}
    resident.touch(adapter)
    assert {slot.last_used_s for slot in resident.slots().values()} == {clock[0]}

    await resident.evict(adapter)
    resident.mark_failed(base, "no such file")
    assert resident.failure(adapter) == "its base: no such file"
    assert resident.failure(("mod_other", 1)) is None
