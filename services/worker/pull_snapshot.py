"""What the worker's decisions see (`pull_policy.plan`, `model_turns.plan_turns`): jobs, models, memory. Data only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

ModelKey = tuple[str, int]
"""(model id, revision): a job names its revision and never gets another."""
WorkClass = Literal["live", "batch"]


@dataclass(frozen=True, slots=True)
class WaitingJob:
    """A job that is not running: held (attempt 0), granted and not yet started, or paused."""

    job_id: str
    model: ModelKey
    work_class: WorkClass
    sequences: int
    waited_s: float
    """Since it came, or since it was paused."""
    lane: int = 0
    """Queue it came from; on a shared pool the lanes take turns by tokens."""
    attempt: int = 0
    claimable: bool = True
    """False while its claim is out, or while its owner does not answer."""
    is_paused: bool = False
    """It ran, gave way, and goes on from the tokens that it has."""


@dataclass(frozen=True, slots=True)
class RunningJob:
    job_id: str
    model: ModelKey
    sequences: int
    attempt: int
    work_class: WorkClass = "live"
    ran_s: float = 0.0
    """Since it started, or since it went on after a pause."""


@dataclass(frozen=True, slots=True)
class ModelSlot:
    """A model on the device."""

    state: Literal["loading", "ready", "evicting"]
    weight_bytes: int
    last_used_s: float
    turn_s: float = 0.0
    """For how long it has been ready and had work without a break; 0 without work."""


@dataclass(frozen=True, slots=True)
class Preload:
    """A model to load before anybody asks for it. may_evict: in place of others without work, else only into free memory."""

    model: ModelKey
    may_evict: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    waiting: Sequence[WaitingJob]
    running: Sequence[RunningJob]
    claimed_sequences: int
    """Sequences of jobs whose claim is out: their places are spoken for."""
    models: Mapping[ModelKey, ModelSlot]
    sizes: Mapping[ModelKey, int]
    """Weight bytes of the models that waiting jobs, pins and preloads name; a model that is missing here cannot be loaded."""
    lane_tokens: Mapping[int, int] = field(default_factory=dict)
    """Tokens that each lane was served so far."""
    swap_s: Mapping[ModelKey, float] = field(default_factory=dict)
    """How long a load of each model takes, as measured; a model that is missing here counts as `UNKNOWN_SWAP_S`."""
    pinned: Mapping[ModelKey, float] = field(default_factory=dict)
    """Models that have to be here, and for how many seconds that has been so; those that cannot be loaded are left out."""
    bases: Mapping[ModelKey, ModelKey] = field(default_factory=dict)
    """Of adapters: the model that each stands on. It has to be here for the adapter to be loaded, and as long as that is."""
    preload: Sequence[Preload] = ()
    """In this order; also such that are here already."""
    since_swap_s: float = math.inf
    """How long ago the last model that was loaded became ready."""
