"""The rows of the batch service as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from services.batch.states import LineEnd
from shared.messages import BillingMode


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What of a batch's row is needed to run it."""

    batch_id: str
    team_id: str
    key_id: str
    endpoint: str
    input_path: str
    metadata: Mapping[str, str]
    output_expires_after_s: int | None
    state: str
    model_id: str | None
    revision: int | None
    model_name: str | None
    model_type: str | None
    total: int
    waiting_for: str
    created_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class LineRef:
    """A line that waits: where its text lies in the batch's input file."""

    line: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """What a line holds of budgets: so much for each of its jobs, of each of these leases. Both empty without a cap."""

    lease_ids: Sequence[str] = ()
    nanousd: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """A line that goes out now. `job_id` is the first of `jobs` jobs with ids in a row."""

    batch_id: str
    line: int
    job_id: str
    jobs: int
    request_id: str
    resource_id: str
    billing: BillingMode
    accepted_unix_ms: int
    reserved: Reserved


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A line that is over. job_id: of the dispatch that it ended in; None if it never went out."""

    batch_id: str
    line: int
    state: LineEnd
    job_id: str | None
    request_id: str
    status_code: int | None
    response: bytes
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Lost:
    """A line whose jobs have nobody who waits for them any more."""

    batch: Batch
    line: int
    job_id: str
    jobs: int
    request_id: str
    resource_id: str
    billing: BillingMode
    accepted_unix_ms: int
    reserved: Reserved


@dataclass(frozen=True, slots=True)
class OutputFile:
    file_id: str
    filename: str
    bytes: int
    storage_path: str
