"""What each model's swaps took, and how many jobs found it ready: a bounded memory of this worker, for its reports.

A job is a hit if its model was ready when it came and no swap was made for it until it was claimed; else it is a miss.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.worker.pull_snapshot import ModelKey
from shared.messages import ModelHistory

KEPT_LOADS = 32
"""Of each model: the latest ones, which its percentiles are of."""
MOST_MODELS = 256
"""Those used last; a worker whose team has more forgets the others' numbers."""
MOST_REPORTED = 64
"""In one report. The scheduler keeps what it was told, so that those that changed last are enough."""


@dataclass(slots=True)
class _Record:
    loads: int = 0
    hits: int = 0
    misses: int = 0
    load_ms: deque[int] = field(default_factory=lambda: deque(maxlen=KEPT_LOADS))


class ModelHistories:
    """Counts since the start of this worker."""

    def __init__(self) -> None:
        self._records: OrderedDict[ModelKey, _Record] = OrderedDict()

    def note_load(self, key: ModelKey, load_s: float) -> None:
        record = self._changed(key)
        record.loads += 1
        record.load_ms.append(round(load_s * 1000))

    def note_claim(self, key: ModelKey, *, hit: bool) -> None:
        record = self._changed(key)
        record.hits += hit
        record.misses += not hit

    def report(self) -> list[ModelHistory]:
        """Those that changed last come first."""
        newest = list(reversed(self._records.items()))[:MOST_REPORTED]
        return [
            ModelHistory(
                model_id=model_id,
                revision=revision,
                loads=record.loads,
                load_ms_p50=percentile(record.load_ms, 0.5),
                load_ms_p95=percentile(record.load_ms, 0.95),
                hits=record.hits,
                misses=record.misses,
            )
            for (model_id, revision), record in newest
        ]

    def _changed(self, key: ModelKey) -> _Record:
        record = self._records.setdefault(key, _Record())
        self._records.move_to_end(key)
        if len(self._records) > MOST_MODELS:
            self._records.popitem(last=False)
        return record


def percentile(values: Sequence[int], share: float) -> int:
    """The smallest value that at least this share of the values do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else 0
