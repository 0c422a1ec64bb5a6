"""Which models are on the device, and how large others would be: state machine and bookkeeping, no policy.

absent -> loading -> ready -> evicting -> absent;  loading -> failed -> absent (tried again after a pause);
ready -> evicting -> failed, where the first pass finds its weights damaged
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import structlog

from services.worker.model_files import ModelUnavailable
from services.worker.model_history import ModelHistories
from services.worker.model_loads import ModelLoads
from services.worker.pull_snapshot import ModelKey, ModelSlot
from shared.messages import ModelRef, ResidentModel, WeightsRef

log = structlog.get_logger()

RETRY_FAILED_S = 30.0
TAKE_OUT_PAUSE_S = 0.05
MOST_REPORTED = 256
MOST_REASON = 200
_BYTES_FACTOR = {"bf16": 1.0, "fp32": 2.0, "int8": 0.8}
"""Memory for weights relative to the bf16 files; int8 keeps embeddings in bf16. Replaced by the truth once loaded."""

State = Literal["loading", "ready", "evicting", "failed"]


@dataclass(slots=True)
class _Resident:
    state: State
    weight_bytes: int
    last_used_s: float
    work_since_s: float | None = None
    failed_s: float = 0.0
    reason: str = ""


class Residency:
    """Loads and evicts on command; answers what is where."""

    def __init__(self, loads: ModelLoads, precision: str) -> None:
        self._loads = loads
        self._factor = _BYTES_FACTOR[precision]
        self._models: dict[ModelKey, _Resident] = {}
        self._sizes: dict[ModelKey, int] = {}
        self._swap_s: dict[ModelKey, float] = {}
        self._last_load_s = -math.inf
        self.bases: dict[ModelKey, ModelKey] = {}
        """Of every adapter that was asked about."""
        self.history = ModelHistories()

    def slots(self) -> dict[ModelKey, ModelSlot]:
        """Models that take memory now."""
        now_s = time.monotonic()
        return {
            key: ModelSlot(
                model.state,
                model.weight_bytes,
                model.last_used_s,
                0.0 if model.work_since_s is None else now_s - model.work_since_s,
            )
            for key, model in self._models.items()
            if model.state != "failed"
        }

    def since_load_s(self) -> float:
        """How long ago the last load ended well."""
        return time.monotonic() - self._last_load_s

    def note_work(self, keys: Collection[ModelKey]) -> None:
        """These models have jobs at the moment: their turn, and that of their bases, has begun, or goes on; that of the
        others is over."""
        now_s = time.monotonic()
        keys = {*keys, *(self.bases[key] for key in keys if key in self.bases)}
        for key, model in self._models.items():
            if model.state != "ready" or key not in keys:
                model.work_since_s = None
            elif model.work_since_s is None:
                model.work_since_s = now_s

    def swap_costs(self, keys: Collection[ModelKey]) -> dict[ModelKey, float]:
        """How long the last load of each took; of one that was never loaded, what its size suggests."""
        measured_bytes = sum(self._sizes[key] for key in self._swap_s)
        s_per_byte = sum(self._swap_s.values()) / measured_bytes if measured_bytes else None
        costs: dict[ModelKey, float] = {}
        for key in keys:
            if key in self._swap_s:
                costs[key] = self._swap_s[key]
            elif s_per_byte is not None:
                costs[key] = self._sizes[key] * s_per_byte
        return costs

    def report(self) -> list[ResidentModel]:
        """Bounded; those used last come first, failed ones last."""
        newest = sorted(self._models.items(), key=lambda item: -item[1].last_used_s)
        return [
            ResidentModel(
                model_id=key[0],
                revision=key[1],
                state=model.state,
                reason=model.reason[:MOST_REASON],
                weight_bytes=model.weight_bytes,
            )
            for key, model in newest[:MOST_REPORTED]
        ]

    def is_ready(self, key: ModelKey) -> bool:
        model = self._models.get(key)
        return model is not None and model.state == "ready"

    def touch(self, key: ModelKey) -> None:
        """It is used now, and so is its base."""
        for each in (key, self.bases.get(key)):
            if each is not None and (model := self._models.get(each)) is not None:
                model.last_used_s = time.monotonic()

    def failure(self, key: ModelKey) -> str | None:
        """Why the model, or the base of an adapter, cannot be used at present, or None."""
        base = self.bases.get(key)
        if base is not None and (reason := self.failure(base)) is not None:
            return f"its base: {reason}"
        model = self._models.get(key)
        if model is None or model.state != "failed":
            return None
        if time.monotonic() - model.failed_s > RETRY_FAILED_S:
            del self._models[key]
            return None
        return model.reason

    def size(self, ref: WeightsRef) -> int:
        """Estimated weight bytes of a model that is not loaded yet; of an adapter, what it adds to its base.

        Raises `ModelUnavailable`, also when an adapter's base cannot be read.
        """
        key = (ref.model_id, ref.revision)
        base = ref.base if isinstance(ref, ModelRef) else None
        if base is not None:
            self.bases[key] = (base.model_id, base.revision)
            self.size(base)
        if key not in self._sizes:
            self._sizes[key] = int(self._loads.file_bytes(ref) * self._factor)
        return self._sizes[key]

    def sizes(self) -> Mapping[ModelKey, int]:
        return self._sizes

    def mark_failed(self, key: ModelKey, reason: str) -> None:
        self._models[key] = _Resident("failed", 0, 0.0, failed_s=time.monotonic(), reason=reason)

    async def load(self, ref: WeightsRef) -> None:
        """absent -> loading -> ready; an adapter's base has to be ready. Raises `ModelUnavailable` and leaves it `failed`."""
        key = (ref.model_id, ref.revision)
        self._models[key] = _Resident("loading", self.size(ref), time.monotonic())
        started_s = time.monotonic()
        try:
            info = await self._loads.load(ref)
        except Exception as error:
            reason = (
                str(error) if isinstance(error, ModelUnavailable) else f"{type(error).__name__} while loading"
            )
            self.mark_failed(key, reason)
            log.error("model_load_failed", model_id=key[0], revision=key[1], error=str(error))
            raise ModelUnavailable(reason) from error
        self._sizes[key] = info.weight_bytes
        self._models[key] = _Resident("ready", info.weight_bytes, time.monotonic())
        self._last_load_s = time.monotonic()
        self._swap_s[key] = self._last_load_s - started_s
        self.history.note_load(key, self._swap_s[key])
        log.info(
            "model_loaded",
            model_id=key[0],
            revision=key[1],
            weight_bytes=info.weight_bytes,
            kernels=info.kernels,
            load_ms=round((time.monotonic() - started_s) * 1000),
        )

    async def take_out(self, key: ModelKey, reason: str) -> None:
        """ready -> evicting -> failed: its weights are damaged. Until its sequences have failed it is tried again."""
        if not self.is_ready(key):
            return  # told already
        self._models[key].state = "evicting"
        self._loads.distrust(key, reason)
        while True:
            for adapter in [each for each, base in self.bases.items() if base == key and self.is_ready(each)]:
                with contextlib.suppress(ValueError):
                    await self.evict(adapter)
            try:
                await self._loads.unload(key)
                break
            except ValueError:
                await asyncio.sleep(TAKE_OUT_PAUSE_S)
        self.mark_failed(key, "the model's image is damaged")

    async def evict(self, key: ModelKey) -> None:
        """ready -> evicting -> absent. Raises `ValueError`, and leaves it ready, while a sequence of it lives."""
        self._models[key].state = "evicting"
        try:
            await self._loads.unload(key)
        except ValueError:
            self._models[key].state = "ready"
            raise
        del self._models[key]
        log.info("model_evicted", model_id=key[0], revision=key[1])


def key_of(ref: WeightsRef) -> ModelKey:
    return ref.model_id, ref.revision


def find_ref(ref: ModelRef, key: ModelKey) -> WeightsRef | None:
    """Where the weights of `key` are, if they are the model's or its base's."""
    for part in (ref, ref.base):
        if part is not None and key_of(part) == key:
            return part
    return None
