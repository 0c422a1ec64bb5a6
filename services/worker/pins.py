"""What the scheduler wants this worker to hold whether jobs ask for it or not: pinned models, and preloads.

A preload is done once its model is here, or cannot be loaded; the likeliest models of the spec are preloads that take
free memory only.
"""

from __future__ import annotations

import time

import structlog

from services.worker.model_files import ModelUnavailable
from services.worker.pull_snapshot import ModelKey, Preload
from services.worker.residency import Residency, key_of
from shared.messages import NO_PINS, ModelRef, PinSet, WorkerSpec

log = structlog.get_logger()


class Pins:
    """Replaced as a whole by `replace`; asked before every decision."""

    def __init__(self, spec: WorkerSpec, residency: Residency) -> None:
        self._residency = residency
        self._likeliest = {key_of(ref): ref for ref in spec.preload}
        self._told = list(self._likeliest)
        self._set = NO_PINS
        self._pinned: dict[ModelKey, ModelRef] = {}
        self._since_s: dict[ModelKey, float] = {}
        self._asked: dict[ModelKey, tuple[ModelRef, int]] = {}
        self._done: dict[ModelKey, int] = {}
        """When each preload that is done was asked for."""
        self.replace(spec.pins)

    @property
    def version(self) -> str:
        return self._set.version

    @property
    def known(self) -> list[ModelRef]:
        """Those that jobs may name, the newest first."""
        return self._set.known

    def replace(self, pins: PinSet) -> None:
        """The same set again changes nothing."""
        now_s = time.monotonic()
        self._set = pins
        self._pinned = {key_of(ref): ref for ref in pins.pinned}
        self._since_s = {key: self._since_s.get(key, now_s) for key in self._pinned}
        self._asked = {key_of(each.model): (each.model, each.asked_unix_ms) for each in pins.preload}
        self._done = {key: asked for key, asked in self._done.items() if key in self._asked}
        log.info("pins_set", version=pins.version, pinned=len(self._pinned), preload=len(self._asked))

    def refs(self) -> list[ModelRef]:
        """All that is wanted."""
        return [*self._pinned.values(), *(ref for ref, _ in self._asked.values()), *self._likeliest.values()]

    def first_refs(self) -> list[ModelRef]:
        """What a worker that starts has to have first: one of these."""
        return list({**self._pinned, **self._likeliest}.values())

    def pinned_s(self) -> dict[ModelKey, float]:
        """Pinned models that are here or can be loaded, with the seconds since they were pinned."""
        now_s = time.monotonic()
        return {
            key: now_s - since_s
            for key, since_s in self._since_s.items()
            if self._can_load(self._pinned[key])
        }

    def preloads(self) -> list[Preload]:
        """Those that are still to do, those that were asked for before the likeliest ones."""
        for key, (ref, asked_unix_ms) in self._asked.items():
            if self._residency.is_ready(key) or not self._can_load(ref):
                self._done[key] = asked_unix_ms
        open_ = [key for key, (_, asked) in self._asked.items() if self._done.get(key) != asked]
        self._likeliest = {
            key: ref
            for key, ref in self._likeliest.items()
            if not self._residency.is_ready(key) and self._can_load(ref)
        }
        return [Preload(key, True) for key in open_] + [Preload(key, False) for key in self._likeliest]

    def report(self) -> tuple[list[ModelKey], list[ModelKey]]:
        """The keys of what is pinned, and of preloads, done or not."""
        return list(self._pinned), list(dict.fromkeys([*self._asked, *self._told]))

    def _can_load(self, ref: ModelRef) -> bool:
        if self._residency.failure(key_of(ref)) is not None:
            return False
        try:
            self._residency.size(ref)
        except ModelUnavailable as error:
            self._residency.mark_failed(key_of(ref), str(error))
            return False
        return True
