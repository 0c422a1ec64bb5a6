"""The batch that owns its resource: sized and made while its file is checked, on while lines run, gone afterwards.

Level-triggered: `keep` compares batches with the scheduler's resources every second and sends the next command. What a
dead process had begun is found by the resource's name, which is the batch's id. If nobody comes back, the scheduler turns
off by itself what is not held on (`own_rules.HOLD_S`).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import structlog

from services.batch.counting import Subject, count_lines
from services.batch.input_lines import AcceptedLine, Problem
from services.batch.own_rules import HOLD_S, Seen, choose_option, more_gpus, next_act, refusal_of_size
from services.batch.own_table import OwnRow, OwnTable
from services.batch.preparation import Preparer
from services.batch.quote import Counted
from services.batch.quote_views import QuoteViews
from services.batch.records import Batch
from shared import topology
from shared.commands import CommandCaller
from shared.file_store import FileStore
from shared.inference.errors import ApiError
from shared.inference.principal import ModelView
from shared.messages import (
    Command,
    CommandResult,
    CreateResource,
    DeleteResource,
    ScaleResource,
    TurnOffResource,
    TurnOnResource,
)
from shared.outcomes import Unavailable

log = structlog.get_logger()

LOOK_S = 1.0
RESIZE_S = 30.0
"""Between two looks at whether a batch has GPUs enough: its pace is a mean of the last 20 seconds."""


class OwnResources:
    def __init__(
        self,
        table: OwnTable,
        views: QuoteViews,
        files: FileStore,
        preparer: Preparer,
        commands: CommandCaller,
    ) -> None:
        self._table, self._views, self._files = table, views, files
        self._preparer, self._commands = preparer, commands
        self._held: Mapping[str, OwnRow] = {}
        self._resized_s: dict[str, float] = {}

    # ---- what dispatching asks

    def is_owner(self, batch_id: str) -> bool:
        return batch_id in self._held

    def resource_of(self, batch_id: str) -> str | None:
        """The id of the batch's own resource, if it has one."""
        row = self._held.get(batch_id)
        return None if row is None else row.resource_id

    def lines_at_once(self, resource_id: str) -> int:
        """Enough lines to fill the batches of all its GPUs twice; 0 for a resource that no batch owns."""
        for row in self._held.values():
            if row.resource_id == resource_id and row.max_batch and row.gpus:
                return 2 * row.max_batch * row.gpus
        return 0

    async def refresh(self) -> None:
        """Read anew which batches have a resource. Raises `Unavailable`."""
        self._held = {row.batch_id: row for row in await self._table.held()}

    # ---- the beginning

    async def wants(self, batch_id: str) -> bool:
        """Whether the batch is to have a resource for itself. Raises `Unavailable`."""
        return await self._table.get(batch_id) is not None

    async def acquire(self, batch: Batch, model: ModelView, lines: Sequence[AcceptedLine]) -> Problem | None:
        """Size and make the batch's resource, if it is to have one; return why it cannot have it.

        Again after a crash: what is decided is kept, and the command to make the resource is the same one.
        Raises `Unavailable` or `MissingFile`; then try again.
        """
        row = await self._table.get(batch.batch_id)
        if row is None:
            return None
        if row.state == "wanted":
            problem = await self._size(row, batch, model, lines)
            if problem is not None:
                return problem
            row = await self._table.get(batch.batch_id)
            assert row is not None
        if row.resource_id is not None:
            return None
        assert row.option_id is not None and row.gpus is not None
        await self._table.note_asked(row.batch_id)
        made = await self._send(
            CreateResource(
                **self._envelope(row, once=True),
                team_id=row.team_id,
                name=row.batch_id,
                model_type=model.model_type,
                option_id=row.option_id,
                fixed_count=row.gpus,
                takes_traffic=False,
            )
        )
        if not made.ok:
            await self._table.release(row.batch_id)
            return Problem(
                made.code, f"The batch's resource was refused: {made.message}", param="own_resource"
            )
        await self._table.note_resource(row.batch_id, str(made.body["resource_id"]))
        await self.refresh()
        return None

    async def _size(
        self, row: OwnRow, batch: Batch, model: ModelView, lines: Sequence[AcceptedLine]
    ) -> Problem | None:
        options = await self._views.options(row.team_id, model.model_type, row.option_name)
        if not options:
            name = row.option_name or "any"
            return Problem(
                "unknown_option",
                f"The type '{model.model_type}' has no option '{name}'.",
                param="own_resource",
            )
        counted = await self._counted(
            row, batch, model, lines, max(each.max_context_tokens for each in options)
        )
        if isinstance(counted, Problem):
            return counted
        quota = await self._views.quota(row.team_id)
        left_s = batch.expires_at.timestamp() - time.time()
        option, quoted = choose_option(counted, options, quota, row.max_gpus, left_s, int(time.time()))
        spent = await self._table.stopped(replace(row, model_id=model.model_id), None)
        spendable = await self._table.spendable(row.team_id)
        problem = refusal_of_size(quoted, spendable, spent and spendable != 0, quota)
        if problem is None:
            await self._table.hold(row.batch_id, option, quoted, counted)
        return problem

    async def _counted(
        self, row: OwnRow, batch: Batch, model: ModelView, lines: Sequence[AcceptedLine], context_tokens: int
    ) -> Counted | Problem:
        if row.quote_id is not None:
            quote = await self._table.quoted(row.team_id, row.quote_id, batch.input_path, batch.endpoint)
            if quote is None:
                message = "There is no such quote of this file; quotes are kept for a day."
                return Problem("quote_not_found", message, param="own_resource.quote_id")
            return quote.counted
        subject = Subject(batch.batch_id, batch.team_id, batch.key_id, batch.endpoint, batch.input_path)
        answers = await self._views.answers(batch.team_id, model.model_id, batch.endpoint)
        return await count_lines(subject, lines, model, context_tokens, answers, self._files, self._preparer)

    # ---- from then on

    async def run(self) -> None:
        """Mind all batches' resources, until cancelled."""
        while True:
            try:
                await self.keep()
            except Unavailable as error:
                log.warning("own_resources_held", error=str(error))
            await asyncio.sleep(LOOK_S)

    async def keep(self) -> None:
        """One look at each. Raises `Unavailable`."""
        await self.refresh()
        rows = list(self._held.values())
        seen = await self._table.seen(rows)
        for row in rows:
            try:
                await self._mind(row, seen.get(row.batch_id))
            except Unavailable as error:  # the others' turn comes all the same
                log.warning("own_resource_held", batch_id=row.batch_id, error=str(error))

    async def _mind(self, row: OwnRow, seen: Seen | None) -> None:
        stopped = await self._table.stopped(row, row.resource_id)
        act = next_act(row.batch_state, stopped, seen, row.resource_id is not None, row.held_for_s)
        if act == "forget":
            await self._table.release(row.batch_id)
            log.info("own_resource_released", batch_id=row.batch_id)
            return
        if seen is None:
            return
        if act == "wait":
            await self._resize(row, seen)
            return
        command: Command
        named: dict[str, Any] = {"team_id": row.team_id, "resource_id": seen.resource_id}
        if act == "turn_on":
            until_ms = int((time.time() + HOLD_S) * 1000)
            command = TurnOnResource(**self._envelope(row), **named, until_unix_ms=until_ms)
        elif act == "turn_off":
            command = TurnOffResource(**self._envelope(row), **named)
        else:
            command = DeleteResource(**self._envelope(row), **named)
        result = await self._send(command)
        log.info("own_resource", batch_id=row.batch_id, act=act, code=result.code)

    async def _resize(self, row: OwnRow, seen: Seen) -> None:
        """Give the batch more GPUs if it goes slower than was thought."""
        now_s = time.monotonic()
        if row.batch_state != "in_progress" or seen.wanted != "on":
            return
        if now_s - self._resized_s.setdefault(row.batch_id, now_s) < RESIZE_S:
            return
        self._resized_s[row.batch_id] = now_s
        assert row.gpus is not None and row.gpus_at_most is not None and row.start_s is not None
        live = await self._table.live_gpus(seen.resource_id)
        left_s = row.expires_at.timestamp() - time.time()
        gpus = more_gpus(
            row.gpus, live, row.lines_left, row.lines_per_s, left_s, row.start_s, row.gpus_at_most
        )
        if gpus == row.gpus:
            return
        result = await self._send(
            ScaleResource(
                **self._envelope(row), team_id=row.team_id, resource_id=seen.resource_id, fixed_count=gpus
            )
        )
        log.info("own_resource_scaled", batch_id=row.batch_id, gpus=gpus, code=result.code)
        if result.ok:
            await self._table.note_gpus(row.batch_id, gpus)

    # ---- commands

    def _envelope(self, row: OwnRow, *, once: bool = False) -> dict[str, Any]:
        """once: the same command however often it is sent. Others are about the state of things, and do no harm twice."""
        same = hashlib.sha256(f"{row.batch_id}/resource".encode()).digest() if once else None
        return asdict(self._commands.envelope(f"batch {row.batch_id}", same))

    async def _send(self, command: Command) -> CommandResult:
        try:
            return await self._commands.call(topology.SCHEDULER_COMMANDS, command)
        except ApiError as error:  # what came of it is not known: the next look tells
            raise Unavailable(f"scheduler: {error.code}") from error
