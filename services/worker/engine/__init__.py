"""Text generation for the worker: tokens in, tokens and text out. See README.md here for the map."""

from __future__ import annotations

from .api import (
    Delta,
    EngineConfig,
    EngineRefusal,
    ModelInfo,
    ModelRefusal,
    Pooling,
    Sampling,
    SequenceRequest,
    StepReport,
    TokenLogprob,
)
from .engine import Engine

__all__ = [
    "Delta",
    "Engine",
    "EngineConfig",
    "EngineRefusal",
    "ModelInfo",
    "ModelRefusal",
    "Pooling",
    "Sampling",
    "SequenceRequest",
    "StepReport",
    "TokenLogprob",
]
