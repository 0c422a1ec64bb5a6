"""Pure: from a worker's reports to rows that say which models it holds and what it measured of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import msgspec

from services.scheduler.snapshot import clean
from shared.messages import WorkerReport

ModelKey = tuple[str, int]
"""(model id, revision)"""

MOST_ROWS = 512
"""Of one worker; more than its reports name at once, so that what it said of the others is kept for a while."""


class ModelRow(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one worker, as the table has it."""

    model_id: str
    revision: int
    state: str = "absent"
    reason: str = ""
    weight_bytes: int = 0
    loads: int = 0
    load_ms_p50: int = 0
    load_ms_p95: int = 0
    hits: int = 0
    misses: int = 0
    pinned: bool = False
    preload: bool = False

    @property
    def is_plain(self) -> bool:
        """Neither here nor wanted here."""
        return self.state == "absent" and not self.pinned and not self.preload


@dataclass(frozen=True, slots=True)
class RowChanges:
    after: dict[ModelKey, ModelRow]
    """All of the worker's rows, those that changed last at the end."""
    written: list[ModelRow]
    removed: list[ModelKey]


def update_rows(before: Mapping[ModelKey, ModelRow], report: WorkerReport) -> RowChanges:
    """Say what a report changes of a worker's rows.

    1. A model that the report lists is as it says; its reason and its bytes too. What it weighed stays when it goes.
    2. A model that it does not list is absent.
    3. Counts and times are those of the report; a model without any there keeps what was said of it before.
    4. What is pinned or to be preloaded there is what the report says, also of absent models.
    5. Of more than `MOST_ROWS`, those that are absent, not wanted, and have not changed for longest are forgotten.
    """
    unsaid = {"state": "absent", "reason": "", "pinned": False, "preload": False}
    rows = {key: msgspec.structs.replace(row, **unsaid) for key, row in before.items()}  # 2, 4
    for model in islice(report.models, MOST_ROWS):  # 1
        key = (model.model_id, model.revision)
        row = rows.get(key) or ModelRow(model_id=model.model_id, revision=model.revision)
        rows[key] = msgspec.structs.replace(
            row,
            state=model.state,
            reason=clean(model.reason),
            weight_bytes=model.weight_bytes or row.weight_bytes,
        )
    for history in islice(report.history, MOST_ROWS):  # 3
        key = (history.model_id, history.revision)
        row = rows.get(key) or ModelRow(model_id=history.model_id, revision=history.revision)
        rows[key] = msgspec.structs.replace(
            row,
            loads=history.loads,
            load_ms_p50=history.load_ms_p50,
            load_ms_p95=history.load_ms_p95,
            hits=history.hits,
            misses=history.misses,
        )
    for field, keys in (("pinned", report.pinned), ("preload", report.preload)):  # 4
        for key in islice(keys, MOST_ROWS):
            row = rows.get(key) or ModelRow(model_id=key[0], revision=key[1])
            rows[key] = msgspec.structs.replace(row, **{field: True})
    changed = {key: row for key, row in rows.items() if before.get(key) != row}
    after = {key: row for key, row in rows.items() if key not in changed} | changed
    plain = (key for key, row in after.items() if row.is_plain)
    dropped = list(islice(plain, max(len(after) - MOST_ROWS, 0)))  # 5
    for key in dropped:
        del after[key]
    return RowChanges(
        after,
        [row for key, row in changed.items() if key in after],
        [key for key in dropped if key in before],
    )
