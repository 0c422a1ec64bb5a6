"""Counts what a file's lines come to: prompts by the model's own tokenizer, answers by how long they were lately."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog

from services.batch.input_lines import AcceptedLine, Problem
from services.batch.pages import PAGE_LINES, cut_page
from services.batch.preparation import Prepared, Preparer
from services.batch.quote import Answers, Counted
from services.batch.records import Batch, LineRef
from shared.file_store import FileStore
from shared.inference.errors import ApiError
from shared.inference.principal import ModelView, ResourceView, Route
from shared.messages import GenerateJob

log = structlog.get_logger()

BUSY_RETRY_S = 0.5
BUSY_LIMIT_S = 60.0
"""For so long the tokenizers may be busy, or fail at a page: a page that no tokenizer survives would hold up all others."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose lines they are, and where they lie."""

    subject_id: str
    team_id: str
    key_id: str
    endpoint: str
    input_path: str


async def count_lines(
    subject: Subject,
    lines: Sequence[AcceptedLine],
    model: ModelView,
    context_tokens: int,
    answers: Answers,
    files: FileStore,
    preparer: Preparer,
) -> Counted | Problem:
    """Prepare every line as if it went out. context_tokens: of the resource that it would run on.

    Returns a problem when the tokenizers do not count. Raises `Unavailable` or `MissingFile`.
    """
    batch, route = _stand_in(subject, model, context_tokens)
    refs = [LineRef(line.number, line.offset, line.length) for line in lines]
    refused = prompt_tokens = most = done = 0
    expected = 0.0
    page_since_s = time.monotonic()
    while done < len(refs):
        page = cut_page(refs[done : done + PAGE_LINES])
        start = page[0].offset
        text = await files.read_range(subject.input_path, start, page[-1].offset + page[-1].length - start)
        pieces = [(each.line, text[each.offset - start : each.offset - start + each.length]) for each in page]
        try:
            found = await preparer.prepare(batch, model, route, pieces)
        except ApiError as error:  # the tokenizers are busy: live requests and running batches have them
            log.info("count_held", subject_id=subject.subject_id, code=error.code)
            if time.monotonic() - page_since_s > BUSY_LIMIT_S:
                return Problem("count_unavailable", f"The lines could not be counted: {error.message}")
            await asyncio.sleep(BUSY_RETRY_S)
            continue
        page_since_s = time.monotonic()
        for each in found:
            if not isinstance(each, Prepared):
                refused += 1
                continue
            prompt_tokens += each.prompt_tokens
            line_most = each.cost_tokens - each.prompt_tokens
            most += line_most
            expected += _expected_tokens(each, line_most, answers.mean_tokens)
        done += len(page)
    return Counted(
        lines=len(refs),
        refused_lines=refused,
        prompt_tokens=prompt_tokens,
        completion_tokens=math.ceil(round(expected, 6)),
        completion_tokens_at_most=most,
        answers=answers,
    )


def _expected_tokens(line: Prepared, most: int, mean_tokens: float | None) -> float:
    """The mean of earlier answers for each answer, or the line's own limit where that is less."""
    if mean_tokens is None:
        return most
    choices = sum(job.choices for job in line.jobs if isinstance(job, GenerateJob))
    return min(mean_tokens * choices, most)


def _stand_in(subject: Subject, model: ModelView, context_tokens: int) -> tuple[Batch, Route]:
    """A batch and a route that exist only for the count: nothing of it goes out."""
    now = datetime.now(UTC)
    batch = Batch(
        batch_id=subject.subject_id,
        team_id=subject.team_id,
        key_id=subject.key_id,
        endpoint=subject.endpoint,
        input_path=subject.input_path,
        metadata={},
        output_expires_after_s=None,
        state="validating",
        model_id=model.model_id,
        revision=model.revision,
        model_name=model.full_name,
        model_type=model.model_type,
        total=0,
        waiting_for="",
        created_at=now,
        expires_at=now + timedelta(days=1),
    )
    resource = ResourceView(
        resource_id="none",
        team_id=subject.team_id,
        model_type=model.model_type,
        pool=False,
        wanted="on",
        state="live",
        live_count=1,
        max_context_tokens=context_tokens,
        expected_live_unix_s=None,
        created_unix_s=0.0,
    )
    return batch, Route(resource, "resource")
