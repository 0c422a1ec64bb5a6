"""What becomes of lines whose jobs are over, and of lines that are called back: an end in their rows, or another try."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence

import structlog

from services.batch.line_run import LineRun, error_body, refusal_of_end, voided
from services.batch.owner import LineOwner
from services.batch.preparation import Refused, Tokenizers
from services.batch.records import Batch, Ended
from services.batch.results import Results
from services.batch.states import LineEnd
from services.batch.store import Store
from shared.inference.errors import ApiError
from shared.messages import JobVoided
from shared.outcomes import Unavailable

log = structlog.get_logger()

RETRIES = 2
"""Of a line that failed by our fault; what is wrong with the line itself is not tried again."""
RETRY_S = 0.5
SPELL_LIMIT_S = 60.0
"""A tokenizer that is busy answers long before; one whose model was deleted never does."""

CLOSED_CODES: dict[LineEnd, str] = {"cancelled": "batch_cancelled", "expired": "batch_expired"}


class Endings:
    """came_back: told the batch whose lines wait again, so that they are read again."""

    def __init__(
        self, store: Store, results: Results, tokenizers: Tokenizers, came_back: Callable[[str], None]
    ) -> None:
        self._store, self._results, self._tokenizers = store, results, tokenizers
        self._came_back = came_back
        self._over: asyncio.Queue[LineRun] = asyncio.Queue()
        self._failures: Counter[tuple[str, int]] = Counter()

    def on_done(self, run: LineRun) -> None:
        """The owner's word: the line is over."""
        self._over.put_nowait(run)

    async def run(self) -> None:
        """Settle lines that are over, until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                run = await self._over.get()
                if run.failure() is not None:
                    group.create_task(self._failed(run))
                elif run.tokens_to_spell():
                    group.create_task(self._spelled(run))
                else:
                    self._results.add(_succeeded(run, run.body(None)))

    def refuse(self, batch: Batch, refused: Refused) -> None:
        """The endpoint would refuse this line: it ends without having gone out."""
        self._results.add(
            Ended(
                batch_id=batch.batch_id,
                line=refused.line,
                state="failed",
                job_id=None,
                request_id=refused.request_id,
                status_code=refused.error.status,
                response=error_body(refused.error),
            )
        )

    async def close(self, owner: LineOwner, runs: Sequence[LineRun], state: LineEnd) -> None:
        """End lines that are out because their batch is over: they cost nothing."""
        code = CLOSED_CODES[state]
        for run in runs:
            await owner.give_up(run, "expired" if state == "expired" else "cancelled", code)
            self._results.add(_ended(run, state, None, b""), _voids(run, code))

    async def put_back(self, runs: Sequence[LineRun], code: str) -> None:
        """Let lines wait again; what their jobs did costs nothing."""
        rows = [(run.prepared.batch.batch_id, run.prepared.line, run.job_id) for run in runs]
        voids = [void for run in runs for void in _voids(run, code)]
        while True:
            try:
                await self._store.requeue(rows, voids)
                break
            except Unavailable as error:
                log.warning("lines_not_put_back", count=len(rows), error=str(error))
                await asyncio.sleep(RETRY_S)
        for batch_id in {row[0] for row in rows}:
            self._came_back(batch_id)

    def forget(self, batch_id: str) -> None:
        """The batch is over."""
        for key in [key for key in self._failures if key[0] == batch_id]:
            del self._failures[key]

    async def _failed(self, run: LineRun) -> None:
        failure = run.failure()
        assert failure is not None
        if failure.outcome == "expired" and not run.ends_with_its_batch:
            await self.put_back([run], "out_too_long")
            return
        if failure.outcome == "expired":
            self._results.add(_ended(run, "expired", None, b""), _voids(run, CLOSED_CODES["expired"]))
            return
        refusal = refusal_of_end(failure)
        key = (run.prepared.batch.batch_id, run.prepared.line)
        if refusal.status == 503 and self._failures[key] < RETRIES:
            self._failures[key] += 1
            log.warning("line_tried_again", batch_id=key[0], line=key[1], code=refusal.code)
            await self.put_back([run], refusal.code)
            return
        self._results.add(
            _ended(run, "failed", refusal.status, error_body(refusal)), _voids(run, refusal.code)
        )

    async def _spelled(self, run: LineRun) -> None:
        """The answer shows tokens by themselves: their spelling is the tokenizer's, which may be gone with its model."""
        until_s = time.monotonic() + SPELL_LIMIT_S
        while True:
            try:
                spellings = await self._tokenizers.spellings(
                    run.prepared.model.tokenizer_folder, run.tokens_to_spell()
                )
                return self._results.add(_succeeded(run, run.body(spellings)))
            except ApiError as error:
                log.warning("spellings_not_had", job_id=run.job_id, code=error.code)
                if error.status != 503 or time.monotonic() > until_s:
                    failed = _ended(run, "failed", error.status, error_body(error))
                    return self._results.add(failed, _voids(run, error.code))
            await asyncio.sleep(RETRY_S)


def _succeeded(run: LineRun, body: bytes) -> Ended:
    return _ended(run, "succeeded", 200, body)


def _ended(run: LineRun, state: LineEnd, status_code: int | None, response: bytes) -> Ended:
    is_good = state == "succeeded"
    return Ended(
        batch_id=run.prepared.batch.batch_id,
        line=run.prepared.line,
        state=state,
        job_id=run.job_id,
        request_id=run.prepared.request_id,
        status_code=status_code,
        response=response,
        prompt_tokens=run.prepared.prompt_tokens if is_good else 0,
        completion_tokens=run.completion_tokens if is_good else 0,
    )


def _voids(run: LineRun, code: str) -> list[JobVoided]:
    return [voided(job, code) for job in run.prepared.jobs]
