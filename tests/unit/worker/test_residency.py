"""What becomes of a model that does not load, whatever the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from services.worker import residency
from services.worker.engine_thread import EngineThread
from services.worker.residency import ModelUnavailable, Residency
from shared.messages import ModelRef

REF = ModelRef(model_id="mod_1", revision=1, name="team/model", folder="mod_1/1", signature="s")


class BrokenEngine:
    def __init__(self, error: Exception) -> None:
        self._error = error

    async def load(self, handle: str, folder: Path) -> Any:
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
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else came out of it would end the worker, and all answers that run on it."""
    monkeypatch.setattr(residency, "verify_files", lambda folder, manifest: None)
    resident = Residency(cast(EngineThread, BrokenEngine(error)), tmp_path, "bf16")
    monkeypatch.setattr(resident, "_manifest", lambda ref: None)
    monkeypatch.setattr(resident, "size", lambda ref: 1)
    with pytest.raises(ModelUnavailable, match=type(error).__name__):
        await resident.load(REF)
    assert resident.failure(("mod_1", 1)) == f"{type(error).__name__} while loading"
    assert resident.slots() == {}
