"""SQL of submissions: which batch their lines join, what was told of them, and the lines' texts.

A queue's batch takes lines as long as it collects; the batch's row is locked by whoever adds to it and by whoever ends
that, so that no line joins a batch that is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from services.batch.store import READ_TIMEOUT_S, Store
from services.batch.submission.judging import Judged
from shared.database import Connection, Database
from shared.ids import new_id
from shared.inference.principal import ModelView

MAX_BATCH_LINES = 50_000
MAX_BATCH_BYTES = 16 * 1024 * 1024
"""A batch that has so much takes no more lines. Until it is over all of it counts for the team, also what is done."""
COLLECT_SHARE = 24
"""A batch takes lines for this part of their completion window, and has as much longer: each line has its whole window."""
OUTPUT_KEPT_S = 7 * 24 * 3600
"""Results went to the reply queue: the files are for who missed them, and come by the thousand."""
IDLE_S = 10
"""A batch whose lines have all ended is over when nothing came for so long."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Where a submission's lines are."""

    batch_id: str
    first_line: int
    lines: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Acceptance:
    team_id: str
    submission_id: str
    reply_queue: str
    batch_id: str
    first_line: int
    lines: int


@dataclass(frozen=True, slots=True)
class DueResult:
    batch_id: str
    line: int
    submission_id: str
    reply_queue: str
    custom_id: str
    state: str
    request_id: str | None
    status_code: int | None
    response: bytes | None


class SubmissionTables:
    def __init__(self, database: Database, store: Store) -> None:
        self._database, self._store = database, store

    # ---- taking

    async def find(self, connection: Connection, team_id: str, submission_id: str) -> Kept | None:
        row = await connection.fetchrow(
            "SELECT batch_id, first_line, lines, digest FROM batch.submissions WHERE team_id = $1 AND submission_id = $2",
            team_id,
            submission_id,
        )
        return None if row is None else Kept(**dict(row))

    async def tell_again(self, connection: Connection, judged: Judged) -> None:
        """The acceptance goes out once more, to whom asks now; results that are not told yet go there, too."""
        await connection.execute(
            "UPDATE batch.submissions SET is_told = false, reply_queue = $3, credential_id = $4"
            " WHERE team_id = $1 AND submission_id = $2",
            judged.user.team_id,
            judged.submission.id,
            judged.reply_queue,
            judged.user.credential_id,
        )

    async def load(self, connection: Connection, team_id: str) -> tuple[int, int]:
        """Return how many lines of the team's that came through the queue are not over, and the bytes of their batches."""
        row = await connection.fetchrow(
            """
            SELECT coalesce(sum(b.total - b.completed - b.failed), 0)::bigint AS lines,
                   coalesce(sum(q.size_bytes), 0)::bigint AS size_bytes
            FROM batch.queue_batches q JOIN batch.batches b USING (batch_id)
            WHERE b.team_id = $1 AND b.state IN ('in_progress', 'finalizing', 'cancelling')
            """,
            team_id,
        )
        assert row is not None
        return row["lines"], row["size_bytes"]

    async def collecting(
        self, connection: Connection, judged: Judged, model: ModelView
    ) -> tuple[str, int] | None:
        """Lock and return the batch that these lines may join, with the number of lines that it has."""
        row = await connection.fetchrow(
            """
            SELECT b.batch_id, b.total FROM batch.queue_batches q JOIN batch.batches b USING (batch_id)
            WHERE q.credential_id = $1 AND b.endpoint = $2 AND b.model_id = $3 AND b.revision = $4
              AND b.completion_window = $5 AND b.state = 'in_progress' AND q.collects_until > now() AND b.total + $6 <= $7
              AND q.size_bytes < $8
            ORDER BY b.batch_id DESC LIMIT 1 FOR UPDATE OF b
            """,
            judged.user.credential_id,
            judged.endpoint,
            model.model_id,
            model.revision,
            judged.submission.completion_window,
            len(judged.lines),
            MAX_BATCH_LINES,
            MAX_BATCH_BYTES,
        )
        return None if row is None else (row["batch_id"], row["total"])

    async def begin_batch(self, connection: Connection, judged: Judged, model: ModelView) -> str:
        """Make a batch without lines; it has no file, and nothing of it is left to check."""
        batch_id, window_s = new_id("batch"), judged.submission.window_s
        await connection.execute(
            "INSERT INTO batch.batches (batch_id, team_id, key_id, endpoint, input_file_id, input_path, completion_window,"
            " metadata, output_expires_after_s, state, model_id, revision, model_name, model_type, expires_at, in_progress_at)"
            " VALUES ($1, $2, $3, $4, '', '', $5, '{}', $11, 'in_progress', $6, $7, $8, $9,"
            " now() + make_interval(secs => $10), now())",
            batch_id,
            judged.user.team_id,
            judged.user.key_id,
            judged.endpoint,
            judged.submission.completion_window,
            model.model_id,
            model.revision,
            model.full_name,
            model.model_type,
            window_s * (1 + 1 / COLLECT_SHARE),
            OUTPUT_KEPT_S,
        )
        await connection.execute(
            "INSERT INTO batch.queue_batches (batch_id, credential_id, collects_until)"
            " VALUES ($1, $2, now() + make_interval(secs => $3))",
            batch_id,
            judged.user.credential_id,
            window_s / COLLECT_SHARE,
        )
        return batch_id

    async def add(self, connection: Connection, judged: Judged, batch_id: str, held: int) -> None:
        """Add the lines to a batch that has `held` of them."""
        numbered = list(enumerate(judged.lines, start=held + 1))
        submission_id, team_id = judged.submission.id, judged.user.team_id
        await connection.copy_records_to_table(
            "lines",
            schema_name="batch",
            columns=["batch_id", "line", "custom_id", "byte_offset", "byte_length"],
            # Their texts are in no file: `replies_due` knows them by this.
            records=[(batch_id, line, custom_id, -1, len(text)) for line, (custom_id, text) in numbered],
        )
        await connection.copy_records_to_table(
            "queue_lines",
            schema_name="batch",
            columns=["batch_id", "line", "team_id", "submission_id", "content"],
            records=[(batch_id, line, team_id, submission_id, text) for line, (_, text) in numbered],
        )
        await connection.execute(
            "INSERT INTO batch.submissions (team_id, submission_id, digest, credential_id, reply_queue, batch_id,"
            " first_line, lines) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
            team_id,
            submission_id,
            judged.digest,
            judged.user.credential_id,
            judged.reply_queue,
            batch_id,
            held + 1,
            len(numbered),
        )
        await connection.execute(
            "UPDATE batch.batches SET total = total + $2 WHERE batch_id = $1", batch_id, len(numbered)
        )
        await connection.execute(
            "UPDATE batch.queue_batches SET latest_at = now(), size_bytes = size_bytes + $2 WHERE batch_id = $1",
            batch_id,
            judged.size_bytes,
        )

    # ---- running

    async def texts(self, batch_id: str, lines: Sequence[int]) -> dict[int, bytes]:
        rows = await self._database.fetch(
            "SELECT line, content FROM batch.queue_lines WHERE batch_id = $1 AND line = ANY($2)",
            batch_id,
            list(lines),
            timeout_s=READ_TIMEOUT_S,
        )
        return {row["line"]: row["content"] for row in rows}

    async def stop_collecting(self, batch_id: str) -> bool:
        """Whether the batch takes no more lines and has none left; one that was idle for long enough takes no more."""
        async with self._store.writing() as connection:
            await connection.execute("SELECT 1 FROM batch.batches WHERE batch_id = $1 FOR UPDATE", batch_id)
            stopped = await connection.execute(
                """
                UPDATE batch.queue_batches q SET collects_until = least(collects_until, now())
                WHERE batch_id = $1 AND (collects_until <= now() OR latest_at < now() - make_interval(secs => $2))
                  AND NOT EXISTS (SELECT 1 FROM batch.lines l
                                  WHERE l.batch_id = q.batch_id AND l.state IN ('queued', 'running'))
                """,
                batch_id,
                float(IDLE_S),
            )
        return bool(stopped == "UPDATE 1")

    # ---- telling

    async def acceptances(self, held: Sequence[str], limit: int) -> list[Acceptance]:
        """Those that are not told yet, oldest first; not those for the queues in `held`."""
        rows = await self._database.fetch(
            """
            SELECT s.team_id, s.submission_id, s.reply_queue, s.batch_id, s.first_line, s.lines
            FROM batch.submissions s JOIN batch.queue_credentials c USING (credential_id)
            WHERE NOT s.is_told AND s.reply_queue <> ALL($1) AND c.revoked_at IS NULL ORDER BY s.created_at LIMIT $2
            """,
            list(held),
            limit,
        )
        return [Acceptance(**dict(row)) for row in rows]

    async def mark_accepted(self, told: Sequence[Acceptance]) -> None:
        async with self._store.writing() as connection:
            await connection.execute(
                "UPDATE batch.submissions s SET is_told = true"
                " FROM unnest($1::text[], $2::text[], $3::text[]) AS g(team_id, submission_id, reply_queue)"
                " WHERE s.team_id = g.team_id AND s.submission_id = g.submission_id AND s.reply_queue = g.reply_queue",
                [each.team_id for each in told],
                [each.submission_id for each in told],
                [each.reply_queue for each in told],
            )

    async def results(self, teams: Sequence[str], held: Sequence[str], limit: int) -> list[DueResult]:
        """Lines of these teams that are over and whose submitter, who knows of the acceptance, was not told; of each team
        the same share."""
        rows: list[asyncpg.Record] = await self._database.fetch(
            """
            SELECT due.batch_id, due.line, due.submission_id, due.reply_queue, l.custom_id, l.state, l.request_id,
                   l.status_code, l.response
            FROM unnest($1::text[]) AS t(team_id) CROSS JOIN LATERAL (
                SELECT q.batch_id, q.line, q.submission_id, s.reply_queue,
                       row_number() OVER (ORDER BY q.batch_id, q.line) AS place
                FROM batch.queue_lines q
                JOIN batch.submissions s USING (team_id, submission_id)
                JOIN batch.queue_credentials c USING (credential_id)
                WHERE q.team_id = t.team_id AND q.reply = 'due' AND s.is_told AND s.reply_queue <> ALL($2)
                  AND c.revoked_at IS NULL
                ORDER BY q.batch_id, q.line LIMIT $3
            ) AS due JOIN batch.lines l ON l.batch_id = due.batch_id AND l.line = due.line
            ORDER BY due.place, due.batch_id, due.line LIMIT $3
            """,
            list(teams),
            list(held),
            limit,
            timeout_s=READ_TIMEOUT_S,
        )
        return [DueResult(**dict(row)) for row in rows]

    async def mark_results(self, told: Sequence[DueResult]) -> None:
        async with self._store.writing() as connection:
            await connection.execute(
                "UPDATE batch.queue_lines q SET reply = 'told' FROM unnest($1::text[], $2::int[]) AS g(batch_id, line)"
                " WHERE q.batch_id = g.batch_id AND q.line = g.line",
                [each.batch_id for each in told],
                [each.line for each in told],
            )

    async def sweep(self, limit: int) -> bool:
        """Forget some submissions whose lines were swept with their batch; whether there may be more."""
        async with self._store.writing() as connection:
            deleted = await connection.execute(
                "DELETE FROM batch.submissions WHERE (team_id, submission_id) IN ("
                "SELECT s.team_id, s.submission_id FROM batch.submissions s WHERE NOT EXISTS ("
                "SELECT 1 FROM batch.queue_lines q WHERE q.team_id = s.team_id AND q.submission_id = s.submission_id)"
                " LIMIT $1)",
                limit,
            )
        return bool(deleted == f"DELETE {limit}")
