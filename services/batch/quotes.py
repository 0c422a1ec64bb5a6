"""Quotes: asked for by a command, counted beside the batches, one after the other, and kept for a day."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import structlog

from services.batch.counting import Subject, count_lines
from services.batch.input_lines import Problem
from services.batch.preparation import Preparer
from services.batch.quote import Quote, make_quote
from services.batch.quote_views import QuoteViews
from services.batch.store import Store
from services.batch.validation import check_file, find_model_of
from services.batch.views import Views
from shared.database import Connection, Database
from shared.file_store import FileStore, MissingFile
from shared.messages import QuoteBatch
from shared.outcomes import Unavailable

log = structlog.get_logger()

LOOK_S = 0.5
KEEP_S = 24 * 3600.0
COUNTING_PER_TEAM = 4
"""Quotes of a team that are not counted yet: each may be 50,000 lines."""


@dataclass(frozen=True, slots=True)
class QuoteRow:
    quote_id: str
    team_id: str
    key_id: str
    endpoint: str
    input_path: str
    deadline_s: int
    option_name: str | None
    max_gpus: int | None


class QuoteTable:
    """SQL of quotes. Writes are the leader's."""

    def __init__(self, database: Database, store: Store) -> None:
        self._database, self._store = database, store

    async def counting_of(self, connection: Connection, team_id: str) -> int:
        count: int = await connection.fetchval(
            "SELECT count(*) FROM batch.quotes WHERE team_id = $1 AND state = 'counting'", team_id
        )
        return count

    async def add(self, connection: Connection, quote_id: str, command: QuoteBatch, input_path: str) -> None:
        await connection.execute(
            "INSERT INTO batch.quotes (quote_id, team_id, key_id, endpoint, input_file_id, input_path, deadline_s,"
            " option_name, max_gpus) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            quote_id,
            command.team_id,
            command.key_id,
            command.endpoint,
            command.input_file_id,
            input_path,
            command.deadline_s,
            command.option,
            command.max_gpus,
        )

    async def next(self) -> QuoteRow | None:
        """The oldest one that is not counted."""
        row = await self._database.fetchrow(
            "SELECT quote_id, team_id, key_id, endpoint, input_path, deadline_s, option_name, max_gpus"
            " FROM batch.quotes WHERE state = 'counting' ORDER BY quote_id LIMIT 1"
        )
        return None if row is None else QuoteRow(**dict(row))

    async def end(self, quote_id: str, quote: Quote | None, problems: Sequence[Problem]) -> None:
        shown = [{"code": p.code, "message": p.message, "line": p.line, "param": p.param} for p in problems]
        async with self._store.writing() as connection:
            await connection.execute(
                "UPDATE batch.quotes SET state = CASE WHEN $2::jsonb IS NULL THEN 'failed' ELSE 'ready' END, quote = $2,"
                " errors = $3, ended_at = now() WHERE quote_id = $1 AND state = 'counting'",
                quote_id,
                None if quote is None else msgspec.json.encode(quote).decode(),
                json.dumps(shown),
            )

    async def sweep(self) -> None:
        async with self._store.writing() as connection:
            await connection.execute(
                "DELETE FROM batch.quotes WHERE ended_at < now() - make_interval(secs => $1)", KEEP_S
            )


class Quoter:
    """`run` is one long task: a quote at a time, so that counting leaves the tokenizers to lines and requests."""

    def __init__(
        self, table: QuoteTable, views: Views, quote_views: QuoteViews, files: FileStore, preparer: Preparer
    ) -> None:
        self._table, self._views, self._quote_views = table, views, quote_views
        self._files, self._preparer = files, preparer
        self._wake = asyncio.Event()

    def wake(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        while True:
            try:
                row = await self._table.next()
                if row is not None:
                    quote, problems = await self._quote(row)
                    await self._table.end(row.quote_id, quote, problems)
                    log.info("quoted", quote_id=row.quote_id, problems=len(problems))
                    continue
                await self._table.sweep()
            except Unavailable as error:
                log.warning("quote_held", error=str(error))
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def _quote(self, row: QuoteRow) -> tuple[Quote | None, Sequence[Problem]]:
        try:
            check = await check_file(self._files, row.input_path, row.endpoint)
            if check.problems:
                return None, check.problems
            model = await find_model_of(self._views, row.team_id, check.model or "")
            if isinstance(model, Problem):
                return None, [model]
            options = await self._quote_views.options(row.team_id, model.model_type, row.option_name)
            if row.option_name is not None and not options:
                message = f"The type '{model.model_type}' has no performance option '{row.option_name}'."
                return None, [Problem("unknown_option", message, param="option")]
            context_tokens = max(
                (option.max_context_tokens for option in options), default=model.context_tokens
            )
            answers = await self._quote_views.answers(row.team_id, model.model_id, row.endpoint)
            subject = Subject(row.quote_id, row.team_id, row.key_id, row.endpoint, row.input_path)
            counted = await count_lines(
                subject, check.accepted, model, context_tokens, answers, self._files, self._preparer
            )
        except MissingFile:
            return None, [Problem("file_not_found", "The input file was deleted.")]
        if isinstance(counted, Problem):
            return None, [counted]
        quote = make_quote(
            model.full_name,
            counted,
            await self._quote_views.price(model.model_type),
            options,
            await self._quote_views.quota(row.team_id),
            row.max_gpus,
            row.deadline_s,
            int(time.time()),
        )
        return quote, ()
