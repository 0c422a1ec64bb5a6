"""What a worker makes of the set it was given: what is wanted, what is done, what it tells."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from services.worker import pins as pins_module
from services.worker.model_files import ModelUnavailable
from services.worker.pins import Pins
from services.worker.pull_snapshot import ModelKey, Preload
from services.worker.residency import Residency
from shared.messages import NO_PINS, ModelRef, PinSet, PreloadAsked
from tests.contract.examples import WORKER_SPEC


def ref(name: str) -> ModelRef:
    return ModelRef(model_id=name, revision=1, name=name, folder=name, signature="s")


def key(name: str) -> ModelKey:
    return name, 1


class ResidencyPart:
    def __init__(self) -> None:
        self.ready: set[str] = set()
        self.failed: dict[ModelKey, str] = {}
        self.unreadable: set[str] = set()

    def is_ready(self, key: ModelKey) -> bool:
        return key[0] in self.ready

    def failure(self, key: ModelKey) -> str | None:
        return self.failed.get(key)

    def mark_failed(self, key: ModelKey, reason: str) -> None:
        self.failed[key] = reason

    def size(self, ref: ModelRef) -> int:
        if ref.model_id in self.unreadable:
            raise ModelUnavailable("unreadable")
        return 1


@pytest.fixture
def residency() -> ResidencyPart:
    return ResidencyPart()


def make(residency: ResidencyPart, pins: PinSet | None = None, preload: tuple[str, ...] = ()) -> Pins:
    refs = [ref(name) for name in preload]
    spec = msgspec.structs.replace(WORKER_SPEC, preload=refs, pins=pins or NO_PINS)
    return Pins(spec, cast(Residency, residency))


def pinned(*names: str, version: str = "v1") -> PinSet:
    return PinSet(version=version, pinned=[ref(name) for name in names])


def asked(*pairs: tuple[str, int], version: str = "v1") -> PinSet:
    preload = [PreloadAsked(model=ref(name), asked_unix_ms=asked) for name, asked in pairs]
    return PinSet(version=version, preload=preload)


def test_pins_count_from_when_they_came_and_a_new_set_keeps_that(
    residency: ResidencyPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [10.0]
    monkeypatch.setattr(pins_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    pins = make(residency, pinned("a"))
    clock[0] = 15.0
    pins.replace(pinned("a", "b", version="v2"))
    clock[0] = 16.0
    assert pins.pinned_s() == {key("a"): 6.0, key("b"): 1.0}
    assert pins.version == "v2"
    pins.replace(NO_PINS)
    pins.replace(pinned("a"))
    assert pins.pinned_s() == {key("a"): 0.0}, "pinned anew, counted anew"


def test_a_pin_that_cannot_be_loaded_is_not_asked_for_until_it_may_be_tried_again(
    residency: ResidencyPart,
) -> None:
    residency.unreadable = {"a"}
    pins = make(residency, pinned("a", "b"))
    assert set(pins.pinned_s()) == {key("b")}
    assert residency.failed == {key("a"): "unreadable"}
    residency.failed, residency.unreadable = {}, set()
    assert set(pins.pinned_s()) == {key("a"), key("b")}


def test_a_preload_is_done_once_and_again_when_it_is_asked_for_again(residency: ResidencyPart) -> None:
    pins = make(residency, asked(("a", 1), ("b", 1)))
    assert pins.preloads() == [Preload(key("a"), True), Preload(key("b"), True)]
    residency.ready = {"a"}
    assert pins.preloads() == [Preload(key("b"), True)]
    residency.ready = set()
    assert pins.preloads() == [Preload(key("b"), True)], "it went since: not loaded again for the same asking"
    pins.replace(asked(("a", 1), ("b", 1), ("c", 5), version="v2"))
    assert pins.preloads() == [Preload(key("b"), True), Preload(key("c"), True)]
    pins.replace(asked(("a", 9), ("b", 1), version="v3"))
    assert pins.preloads() == [Preload(key("a"), True), Preload(key("b"), True)]


def test_a_preload_that_fails_is_done(residency: ResidencyPart) -> None:
    residency.failed = {key("a"): "broken"}
    pins = make(residency, asked(("a", 1)), preload=("a", "b"))
    assert pins.preloads() == [Preload(key("b"), False)]


def test_the_likeliest_models_take_free_memory_only_and_come_last(residency: ResidencyPart) -> None:
    pins = make(residency, asked(("a", 1)), preload=("x", "y"))
    assert pins.preloads() == [Preload(key("a"), True), Preload(key("x"), False), Preload(key("y"), False)]
    residency.ready = {"x"}
    assert [preload.model for preload in pins.preloads()] == [key("a"), key("y")]
    residency.ready = set()
    assert [preload.model for preload in pins.preloads()] == [key("a"), key("y")], "once"


def test_whatever_is_wanted_can_be_found_and_is_told(residency: ResidencyPart) -> None:
    both = PinSet(version="v", pinned=[ref("a")], preload=[PreloadAsked(model=ref("b"), asked_unix_ms=1)])
    pins = make(residency, both, preload=("a", "x"))
    assert [each.model_id for each in pins.refs()] == ["a", "b", "a", "x"]
    assert [each.model_id for each in pins.first_refs()] == ["a", "x"]
    residency.ready = {"a", "b", "x"}
    assert pins.preloads() == []
    assert pins.report() == ([key("a")], [key("b"), key("a"), key("x")])
