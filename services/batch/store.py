"""All SQL on the batch service's tables. Every write is the leader's: `Store.writing` opens its transaction and fences it.

Lines are written in groups, each group in one statement: several hundred lines a second cost some ten statements.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from services.batch.input_lines import AcceptedLine, Problem
from services.batch.records import Batch, Dispatched, Ended, LineRef, Lost, OutputFile, Reserved
from services.batch.states import ENDING_STATES, OPEN_STATES, LineEnd
from shared.database import Connection, Database
from shared.inference.principal import ModelView
from shared.lease import Lease
from shared.messages import CommandResult, CreateBatch, JobVoided, decoder, encode

READ_TIMEOUT_S = 5.0
_BATCH = """
    SELECT batch_id, team_id, key_id, endpoint, input_path, metadata, output_expires_after_s, state, model_id, revision,
           model_name, model_type, total, waiting_for, created_at, expires_at
    FROM batch.batches
"""
_DISPATCH = """
    UPDATE batch.lines AS l
    SET state = 'running', job_id = g.job_id, jobs = g.jobs, request_id = g.request_id, resource_id = g.resource_id,
        billing = g.billing, accepted_unix_ms = g.accepted_unix_ms, reserved = g.reserved
    FROM unnest($1::text[], $2::int[], $3::text[], $4::int[], $5::text[], $6::text[], $7::text[], $8::bigint[], $9::jsonb[])
        AS g(batch_id, line, job_id, jobs, request_id, resource_id, billing, accepted_unix_ms, reserved)
    WHERE l.batch_id = g.batch_id AND l.line = g.line AND l.state = 'queued'
    RETURNING l.job_id
"""
# A line ends in the dispatch that it runs in, or before any: whatever else says that it has ended is of another time.
_END = """
    WITH ended AS (
        UPDATE batch.lines AS l
        SET state = g.state, request_id = g.request_id, status_code = g.status_code, response = g.response,
            prompt_tokens = g.prompt_tokens, completion_tokens = g.completion_tokens
        FROM unnest($1::text[], $2::int[], $3::text[], $4::text[], $5::text[], $6::int[], $7::bytea[], $8::int[], $9::int[])
            AS g(batch_id, line, state, job_id, request_id, status_code, response, prompt_tokens, completion_tokens)
        WHERE l.batch_id = g.batch_id AND l.line = g.line
          AND ((l.state = 'running' AND l.job_id = g.job_id) OR (l.state = 'queued' AND g.job_id IS NULL))
        RETURNING l.batch_id, l.state, l.prompt_tokens, l.completion_tokens
    ), counts AS (
        SELECT batch_id, count(*) FILTER (WHERE state = 'succeeded') AS completed,
               count(*) FILTER (WHERE state = 'failed') AS failed,
               coalesce(sum(prompt_tokens) FILTER (WHERE state = 'succeeded'), 0) AS prompt_tokens,
               coalesce(sum(completion_tokens) FILTER (WHERE state = 'succeeded'), 0) AS completion_tokens
        FROM ended GROUP BY batch_id
    )
    UPDATE batch.batches AS b
    SET completed = b.completed + c.completed, failed = b.failed + c.failed,
        prompt_tokens = b.prompt_tokens + c.prompt_tokens, completion_tokens = b.completion_tokens + c.completion_tokens
    FROM counts AS c WHERE b.batch_id = c.batch_id
"""
_REQUEUE = """
    UPDATE batch.lines AS l SET state = 'queued', job_id = NULL
    FROM unnest($1::text[], $2::int[], $3::text[]) AS g(batch_id, line, job_id)
    WHERE l.batch_id = g.batch_id AND l.line = g.line AND l.state = 'running' AND l.job_id = g.job_id
"""

_decode_result = decoder(CommandResult).decode
_decode_void = decoder(JobVoided).decode


class Store:
    """The batch service's tables."""

    def __init__(self, database: Database, lease: Lease) -> None:
        self._database = database
        self._lease = lease

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Connection]:
        """A transaction of the leader's. Raises `Fenced` for one that is not it, and `Unavailable`."""
        async with self._database.transaction() as connection:
            await self._lease.fence(connection)
            yield connection

    # ---- commands

    async def result_of(self, connection: Connection, command_id: str) -> CommandResult | None:
        """The kept answer to a command; others with its id wait until this transaction is over."""
        await connection.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"batch command {command_id}"
        )
        kept = await connection.fetchval(
            "SELECT result FROM batch.command_results WHERE command_id = $1", command_id
        )
        return None if kept is None else _decode_result(kept)

    async def keep_result(self, connection: Connection, result: CommandResult) -> None:
        await connection.execute(
            "INSERT INTO batch.command_results (command_id, result) VALUES ($1, $2)",
            result.command_id,
            encode(result).decode(),
        )

    async def sweep_results(self, keep_s: float) -> None:
        async with self.writing() as connection:
            await connection.execute(
                "DELETE FROM batch.command_results WHERE created_at < now() - make_interval(secs => $1)",
                keep_s,
            )

    async def add_batch(
        self, connection: Connection, batch_id: str, command: CreateBatch, input_path: str
    ) -> None:
        await connection.execute(
            "INSERT INTO batch.batches (batch_id, team_id, key_id, endpoint, input_file_id, input_path, completion_window,"
            " metadata, output_expires_after_s, expires_at)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, now() + make_interval(secs => $10))",
            batch_id,
            command.team_id,
            command.key_id,
            command.endpoint,
            command.input_file_id,
            input_path,
            command.completion_window,
            json.dumps(command.metadata),
            command.output_expires_after_s,
            float(command.completion_window_s),
        )

    async def open_count(self, connection: Connection, team_id: str) -> int:
        """How many batches of the team are not over; others wait with theirs until this transaction is over."""
        await connection.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"batch team {team_id}"
        )
        count: int = await connection.fetchval(
            "SELECT count(*) FROM batch.batches WHERE team_id = $1 AND state = ANY($2)", team_id, OPEN_STATES
        )
        return count

    async def lock_batch(self, connection: Connection, team_id: str, batch_id: str) -> str | None:
        """Return the batch's state, or None for one that the team does not have."""
        state: str | None = await connection.fetchval(
            "SELECT state FROM batch.batches WHERE team_id = $1 AND batch_id = $2 FOR UPDATE",
            team_id,
            batch_id,
        )
        return state

    async def begin_cancelling(self, connection: Connection, batch_id: str) -> None:
        await connection.execute(
            "UPDATE batch.batches SET state = 'cancelling', cancelling_at = now() WHERE batch_id = $1",
            batch_id,
        )

    async def delete_file(self, connection: Connection, team_id: str, file_id: str) -> str | None:
        """Return the path of what is to be removed from the storage, or None for a file that the team does not have."""
        path: str | None = await connection.fetchval(
            "UPDATE batch.files SET deleted_at = now()"
            " WHERE team_id = $1 AND file_id = $2 AND deleted_at IS NULL RETURNING storage_path",
            team_id,
            file_id,
        )
        return path

    # ---- batches

    async def open_batches(self) -> list[Batch]:
        """All batches that are not over, oldest first."""
        rows = await self._database.fetch(
            _BATCH + " WHERE state = ANY($1) ORDER BY batch_id", OPEN_STATES, timeout_s=READ_TIMEOUT_S
        )
        return [_batch(row) for row in rows]

    async def reject_file(self, batch_id: str, problems: Sequence[Problem]) -> None:
        shown = [{"code": p.code, "message": p.message, "line": p.line, "param": p.param} for p in problems]
        async with self.writing() as connection:
            await connection.execute(
                "UPDATE batch.batches SET state = 'failed', failed_at = now(), errors = $2"
                " WHERE batch_id = $1 AND state = 'validating'",
                batch_id,
                json.dumps(shown),
            )

    async def accept_file(self, batch_id: str, model: ModelView, lines: Sequence[AcceptedLine]) -> None:
        """Make the lines' rows and open the batch; nothing if it was cancelled meanwhile."""
        async with self.writing() as connection:
            state = await connection.fetchval(
                "SELECT state FROM batch.batches WHERE batch_id = $1 FOR UPDATE", batch_id
            )
            if state != "validating":
                return
            await connection.copy_records_to_table(
                "lines",
                schema_name="batch",
                columns=["batch_id", "line", "custom_id", "byte_offset", "byte_length"],
                records=[(batch_id, n.number, n.custom_id, n.offset, n.length) for n in lines],
            )
            await connection.execute(
                "UPDATE batch.batches SET state = 'in_progress', in_progress_at = now(), total = $2, model_id = $3,"
                " revision = $4, model_name = $5, model_type = $6 WHERE batch_id = $1",
                batch_id,
                len(lines),
                model.model_id,
                model.revision,
                model.full_name,
                model.model_type,
            )

    async def note_progress(
        self, batch_id: str, lines_per_s: float, tokens_per_s: float, waiting: str
    ) -> None:
        async with self.writing() as connection:
            await connection.execute(
                "UPDATE batch.batches SET lines_per_s = $2, tokens_per_s = $3, waiting_for = $4 WHERE batch_id = $1",
                batch_id,
                lines_per_s,
                tokens_per_s,
                waiting,
            )

    # ---- lines

    async def waiting_lines(self, batch_id: str, after_line: int, limit: int) -> list[LineRef]:
        rows = await self._database.fetch(
            "SELECT line, byte_offset, byte_length FROM batch.lines"
            " WHERE batch_id = $1 AND line > $2 AND state = 'queued' ORDER BY line LIMIT $3",
            batch_id,
            after_line,
            limit,
            timeout_s=READ_TIMEOUT_S,
        )
        return [LineRef(row["line"], row["byte_offset"], row["byte_length"]) for row in rows]

    async def dispatch(self, lines: Sequence[Dispatched]) -> set[str]:
        """Note that these lines go out; return the job ids of those that still waited."""
        async with self.writing() as connection:
            rows = await connection.fetch(
                _DISPATCH,
                [n.batch_id for n in lines],
                [n.line for n in lines],
                [n.job_id for n in lines],
                [n.jobs for n in lines],
                [n.request_id for n in lines],
                [n.resource_id for n in lines],
                [n.billing for n in lines],
                [n.accepted_unix_ms for n in lines],
                [_encode_reserved(n.reserved) for n in lines],
            )
        return {row["job_id"] for row in rows}

    async def end(self, lines: Sequence[Ended], voids: Sequence[JobVoided] = ()) -> None:
        """Write what became of lines, count them, and leave the facts about jobs that nobody may be charged for."""
        async with self.writing() as connection:
            await connection.execute(
                _END,
                [n.batch_id for n in lines],
                [n.line for n in lines],
                [n.state for n in lines],
                [n.job_id for n in lines],
                [n.request_id for n in lines],
                [n.status_code for n in lines],
                [n.response for n in lines],
                [n.prompt_tokens for n in lines],
                [n.completion_tokens for n in lines],
            )
            await self._add_voids(connection, voids)

    async def running_lines(self, batch: Batch) -> list[Lost]:
        rows = await self._database.fetch(
            "SELECT line, job_id, jobs, request_id, resource_id, billing, accepted_unix_ms, reserved"
            " FROM batch.lines"
            " WHERE batch_id = $1 AND state = 'running' ORDER BY line",
            batch.batch_id,
            timeout_s=READ_TIMEOUT_S,
        )
        return [Lost(batch, **{**row, "reserved": _reserved(row["reserved"])}) for row in rows]

    async def requeue(self, lines: Sequence[tuple[str, int, str]], voids: Sequence[JobVoided]) -> None:
        """Put lines back, given as (batch, line, job); their jobs will never be charged for."""
        async with self.writing() as connection:
            await connection.execute(
                _REQUEUE, [n[0] for n in lines], [n[1] for n in lines], [n[2] for n in lines]
            )
            await self._add_voids(connection, voids)

    async def close_waiting(self, batch_id: str, state: LineEnd) -> None:
        """End all lines that are not out: the batch was cancelled or has expired."""
        async with self.writing() as connection:
            await connection.execute(
                "UPDATE batch.lines SET state = $2 WHERE batch_id = $1 AND state = 'queued'", batch_id, state
            )

    async def fail_waiting(self, batch_id: str, status: int, response: bytes) -> None:
        """End all lines that are not out with one error."""
        async with self.writing() as connection:
            await connection.execute(
                """
                WITH ended AS (
                    UPDATE batch.lines SET state = 'failed', status_code = $2, response = $3,
                        request_id = 'req_' || md5(batch_id || '/' || line)
                    WHERE batch_id = $1 AND state = 'queued' RETURNING 1
                )
                UPDATE batch.batches SET failed = failed + (SELECT count(*) FROM ended) WHERE batch_id = $1
                """,
                batch_id,
                status,
                response,
            )

    # ---- the end of a batch

    async def is_done(self, batch_id: str) -> bool:
        row = await self._database.fetchrow(
            "SELECT EXISTS (SELECT 1 FROM batch.lines WHERE batch_id = $1 AND state IN ('queued', 'running')) AS more",
            batch_id,
            timeout_s=READ_TIMEOUT_S,
        )
        return row is not None and not row["more"]

    async def begin_finalizing(self, batch_id: str) -> None:
        """Unless lines have come since it was seen to have none left: whoever adds some holds the batch's row, too."""
        async with self.writing() as connection:
            await connection.execute("SELECT 1 FROM batch.batches WHERE batch_id = $1 FOR UPDATE", batch_id)
            await connection.execute(
                "UPDATE batch.batches b SET state = 'finalizing', finalizing_at = now()"
                " WHERE batch_id = $1 AND state = 'in_progress' AND NOT EXISTS (SELECT 1 FROM batch.lines l"
                " WHERE l.batch_id = b.batch_id AND l.state IN ('queued', 'running'))",
                batch_id,
            )

    async def results(self, batch_id: str, after_line: int, limit: int) -> list[asyncpg.Record]:
        return await self._database.fetch(
            "SELECT line, custom_id, state, request_id, status_code, response FROM batch.lines"
            " WHERE batch_id = $1 AND line > $2 ORDER BY line LIMIT $3",
            batch_id,
            after_line,
            limit,
            timeout_s=READ_TIMEOUT_S,
        )

    async def finish(self, batch: Batch, output: OutputFile | None, errors: OutputFile | None) -> None:
        """Name the files and end the batch: cancelled, expired if a line did, else completed.

        Nothing for one that has ended since it was seen to be open: its files have their names.
        """
        async with self.writing() as connection:
            if await self.lock_batch(connection, batch.team_id, batch.batch_id) not in ENDING_STATES:
                return
            for made in (output, errors):
                if made is not None:
                    await connection.execute(
                        "INSERT INTO batch.files (file_id, team_id, batch_id, filename, bytes, storage_path, expires_at)"
                        " VALUES ($1, $2, $3, $4, $5, $6, now() + make_interval(secs => $7))",
                        made.file_id,
                        batch.team_id,
                        batch.batch_id,
                        made.filename,
                        made.bytes,
                        made.storage_path,
                        batch.output_expires_after_s,
                    )
            await connection.execute(
                """
                UPDATE batch.batches SET output_file_id = $2, error_file_id = $3, waiting_for = '',
                    state = CASE WHEN state = 'cancelling' THEN 'cancelled' WHEN $4 THEN 'expired' ELSE 'completed' END,
                    cancelled_at = CASE WHEN state = 'cancelling' THEN now() END,
                    expired_at = CASE WHEN state <> 'cancelling' AND $4 THEN now() END,
                    completed_at = CASE WHEN state <> 'cancelling' AND NOT $4 THEN now() END
                WHERE batch_id = $1
                """,
                batch.batch_id,
                output.file_id if output else None,
                errors.file_id if errors else None,
                await connection.fetchval(
                    "SELECT EXISTS (SELECT 1 FROM batch.lines WHERE batch_id = $1 AND state = 'expired')",
                    batch.batch_id,
                ),
            )

    async def expired_files(self, limit: int) -> list[tuple[str, str]]:
        """Return ids and paths of files whose time is over and that still lie in the storage."""
        rows = await self._database.fetch(
            "SELECT file_id, storage_path FROM batch.files WHERE expires_at < now() AND deleted_at IS NULL LIMIT $1",
            limit,
        )
        return [(row["file_id"], row["storage_path"]) for row in rows]

    async def mark_file_deleted(self, file_id: str) -> None:
        async with self.writing() as connection:
            await connection.execute(
                "UPDATE batch.files SET deleted_at = now() WHERE file_id = $1 AND deleted_at IS NULL", file_id
            )

    async def sweep_lines(self, keep_s: float, limit: int) -> bool:
        """Delete some lines of batches that are over for long; whether there may be more."""
        async with self.writing() as connection:
            deleted = await connection.execute(
                """
                DELETE FROM batch.lines WHERE (batch_id, line) IN (
                    SELECT l.batch_id, l.line FROM batch.batches b JOIN batch.lines l USING (batch_id)
                    WHERE coalesce(b.completed_at, b.expired_at, b.cancelled_at) < now() - make_interval(secs => $1)
                    LIMIT $2)
                """,
                keep_s,
                limit,
            )
        return bool(deleted == f"DELETE {limit}")

    # ---- facts for billing

    async def unsent_voids(self, limit: int) -> list[JobVoided]:
        rows = await self._database.fetch(
            "SELECT payload FROM batch.outbox WHERE sent_at IS NULL ORDER BY created_at LIMIT $1", limit
        )
        return [_decode_void(row["payload"]) for row in rows]

    async def mark_sent(self, event_ids: Sequence[str], keep_s: float) -> None:
        async with self.writing() as connection:
            await connection.execute(
                "UPDATE batch.outbox SET sent_at = now() WHERE event_id = ANY($1)", list(event_ids)
            )
            await connection.execute(
                "DELETE FROM batch.outbox WHERE sent_at < now() - make_interval(secs => $1)", keep_s
            )

    async def _add_voids(self, connection: Connection, voids: Iterable[JobVoided]) -> None:
        rows: list[Any] = [(fact.event_id, encode(fact).decode()) for fact in voids]
        if rows:
            await connection.executemany(
                "INSERT INTO batch.outbox (event_id, payload) VALUES ($1, $2) ON CONFLICT DO NOTHING", rows
            )


def _encode_reserved(reserved: Reserved) -> str | None:
    if not reserved.lease_ids:
        return None
    return json.dumps({"lease_ids": list(reserved.lease_ids), "nanousd": list(reserved.nanousd)})


def _reserved(text: str | None) -> Reserved:
    return Reserved() if text is None else Reserved(**json.loads(text))


def _batch(row: asyncpg.Record) -> Batch:
    values = dict(row)
    values["metadata"] = json.loads(values["metadata"])
    return Batch(**values)
