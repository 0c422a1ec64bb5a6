"""Reads pins and preloads, and says what each worker shall hold; the leader tells whoever reports another set."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping

import asyncpg
import msgspec

from services.scheduler.model_refs import COLUMNS, model_ref
from services.scheduler.pins import Pin, PinWorker, assign_pins, room_for_pins
from services.scheduler.snapshot import Stored, StoredPlace
from services.scheduler.states import PlaceState
from shared.database import Database
from shared.messages import NO_PINS, ModelRef, PinSet, PreloadAsked, SetPins, WorkerReport

TELL_AGAIN_S = 2.0
PRELOAD_LASTS_S = 900.0
"""A worker that starts later than that after it was asked for loads nothing for it."""

# A deleted model, or a resource that is off, has none.
_PINS = f"""
    SELECT p.resource_id, p.copies, {COLUMNS}
    FROM scheduler.model_pins p
    JOIN scheduler.resources r USING (resource_id)
    JOIN gateway_api.models_v1 m ON m.model_id = p.model_id AND m.model_type = r.model_type
    WHERE r.wanted = 'on' ORDER BY p.pinned_at, p.model_id
"""
_PRELOADS = f"""
    SELECT p.resource_id, extract(epoch FROM p.asked_at)::float8 AS asked_at, {COLUMNS}
    FROM scheduler.model_preloads p
    JOIN scheduler.resources r USING (resource_id)
    JOIN gateway_api.models_v1 m ON m.model_id = p.model_id AND m.model_type = r.model_type
    WHERE r.wanted = 'on' AND p.asked_at > now() - make_interval(secs => $1) ORDER BY p.asked_at, p.model_id
"""
# How many models may run on each resource with pins, and the largest that was seen there.
MODELS_OF = """
    SELECT r.resource_id,
           (SELECT count(*) FROM gateway_api.models_v1 m
            WHERE m.model_type = r.model_type AND (r.pool OR m.is_platform OR m.team_id = r.team_id))::int AS models,
           coalesce((SELECT max(w.weight_bytes) FROM scheduler_api.worker_models_v1 w
                     WHERE w.resource_id = r.resource_id), 0) AS largest_bytes
    FROM scheduler.resources r WHERE r.resource_id = ANY($1)
"""
MOST_KNOWN = 64
"""Images of more models than that are made when a model is first asked for. In a worker's environment a set has some 20 KB."""
_KNOWN = f"""
    SELECT r.resource_id, {COLUMNS}
    FROM scheduler.resources r
    CROSS JOIN LATERAL (
        SELECT m.* FROM gateway_api.models_v1 m
        WHERE m.model_type = r.model_type AND m.base_model_id IS NULL
          AND (r.pool OR m.is_platform OR m.team_id = r.team_id)
        ORDER BY m.created_at DESC, m.model_id LIMIT $2
    ) AS m
    WHERE r.resource_id = ANY($1)
"""
_HOLDING = (PlaceState.STARTING, PlaceState.READY)


class PinKeeper:
    """`sets`: what each worker with a place shall hold, by incarnation; of the last look."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.sets: dict[str, PinSet] = {}
        self._told_s: dict[str, float] = {}

    def knows_all(self, stored: Stored) -> bool:
        """Whether the last look saw all workers that may hold something."""
        return all(place.incarnation in self.sets for place in stored.places if place.state in _HOLDING)

    def to_tell(
        self, stored: Stored, workers: Mapping[str, tuple[WorkerReport, float]], now_s: float
    ) -> list[SetPins]:
        """What has to be said, perhaps again, to workers that report another set. now_s: any clock."""
        self._told_s = {key: told_s for key, told_s in self._told_s.items() if key in self.sets}
        messages = []
        for place in stored.places:
            pins, heard = self.sets.get(place.incarnation), workers.get(place.incarnation)
            if pins is None or heard is None or heard[0].pins_version == pins.version:
                continue
            if now_s - self._told_s.get(place.incarnation, float("-inf")) >= TELL_AGAIN_S:
                self._told_s[place.incarnation] = now_s
                messages.append(SetPins(worker_id=place.worker_id, incarnation=place.incarnation, pins=pins))
        return messages

    async def look(self, stored: Stored, workers: Mapping[str, tuple[WorkerReport, float]]) -> None:
        """Raises `Unavailable`."""
        places = [place for place in stored.places if place.state in _HOLDING]
        if not places:
            self.sets = {}
            return
        pinned = await self._database.fetch(_PINS)
        preloads: dict[str, list[PreloadAsked]] = defaultdict(list)
        for row in await self._database.fetch(_PRELOADS, PRELOAD_LASTS_S):
            asked = PreloadAsked(model=model_ref(row), asked_unix_ms=round(row["asked_at"] * 1000))
            preloads[row["resource_id"]].append(asked)
        known: dict[str, list[ModelRef]] = defaultdict(list)
        for row in await self._database.fetch(
            _KNOWN, list({place.resource_id for place in places}), MOST_KNOWN
        ):
            known[row["resource_id"]].append(model_ref(row))
        held = await self._held(places, pinned, {key: report for key, (report, _) in workers.items()})
        self.sets = {
            place.incarnation: pin_set(
                held.get(place.incarnation, []), preloads[place.resource_id], known[place.resource_id]
            )
            for place in places
        }

    async def _held(
        self, places: list[StoredPlace], pinned: list[asyncpg.Record], reports: Mapping[str, WorkerReport]
    ) -> dict[str, list[ModelRef]]:
        """What is pinned on each incarnation."""
        by_resource: dict[str, list[asyncpg.Record]] = defaultdict(list)
        for row in pinned:
            by_resource[row["resource_id"]].append(row)
        if not by_resource:
            return {}
        sizes = {
            row["resource_id"]: (int(row["largest_bytes"]), int(row["models"]))
            for row in await self._database.fetch(MODELS_OF, list(by_resource))
        }
        held: dict[str, list[ModelRef]] = {}
        for resource_id, rows in by_resource.items():
            pins = [Pin(row["model_id"], row["copies"]) for row in rows]
            refs = {row["model_id"]: model_ref(row) for row in rows}
            own = [place for place in places if place.resource_id == resource_id]
            workers = [_worker(place, reports.get(place.incarnation), *sizes[resource_id]) for place in own]
            assigned = assign_pins(pins, workers)
            for place in own:
                held[place.incarnation] = [refs[model_id] for model_id in assigned[place.place]]
        return held


def _worker(
    place: StoredPlace, report: WorkerReport | None, largest_bytes: int, model_count: int
) -> PinWorker:
    if report is None:
        return PinWorker(place.place)
    return PinWorker(
        place.place,
        room_for_pins(report.model_memory_bytes, largest_bytes, model_count),
        frozenset(model_id for model_id, _ in report.pinned),
        frozenset(model.model_id for model in report.models if model.state == "ready"),
    )


def pin_set(
    pinned: list[ModelRef], preload: list[PreloadAsked], known: list[ModelRef] | None = None
) -> PinSet:
    """The set with its version: the same models, in whatever order, have the same one."""
    known = known or []
    if not (pinned or preload or known):
        return NO_PINS
    groups = [sorted(map(msgspec.json.encode, each)) for each in (pinned, preload, known)]
    digest = hashlib.sha256(b"\n\n".join(map(b"\n".join, groups))).hexdigest()
    return PinSet(version=digest[:16], pinned=pinned, preload=preload, known=known)
