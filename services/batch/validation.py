"""Checks a new batch's file: reads it from the storage in pieces, and makes the lines' rows or the list of problems."""

from __future__ import annotations

import asyncio

import structlog

from services.batch.input_lines import FileCheck, FileLine, LineSplitter, Problem
from services.batch.records import Batch
from services.batch.routing import Waiting, choose_line_route
from services.batch.store import Store
from services.batch.views import Views
from shared.file_store import FileStore, MissingFile

log = structlog.get_logger()

LINES_BETWEEN_PAUSES = 200
"""Some milliseconds of work; then others have the event loop."""


class Validator:
    def __init__(self, store: Store, views: Views, files: FileStore) -> None:
        self._store, self._views, self._files = store, views, files

    async def validate(self, batch: Batch) -> None:
        """Open the batch or fail it. Raises `Unavailable`, and then changed nothing."""
        check = FileCheck(batch.endpoint)
        try:
            await self._read(batch, check)
        except MissingFile:
            check.problems = [Problem("file_not_found", "The input file was deleted.")]
        if not check.problems:
            model = await self._views.find_model(batch.team_id, check.model or "")
            if model is None:
                message = "The model does not exist, or you do not have access to it."
                check.problems = [Problem("model_not_found", message, param="body.model")]
            else:
                resources = await self._views.resources()
                route = choose_line_route(batch.team_id, True, model.model_type, resources)
                if isinstance(route, Waiting) and route.missing:
                    check.problems = [Problem("no_resource", f"{route.reason}.".capitalize())]
                else:
                    await self._store.accept_file(batch.batch_id, model, check.accepted)
                    log.info("batch_accepted", batch_id=batch.batch_id, lines=len(check.accepted))
                    return
        await self._store.reject_file(batch.batch_id, check.problems)
        log.info("batch_rejected", batch_id=batch.batch_id, code=check.problems[0].code)

    async def _read(self, batch: Batch, check: FileCheck) -> None:
        splitter = LineSplitter()
        count = 0
        async for piece in self._files.read(batch.input_path):
            for line in splitter.feed(piece):
                check.add(line)
                count += 1
                if check.full:
                    return
                if count % LINES_BETWEEN_PAUSES == 0:
                    await asyncio.sleep(0)
        last: FileLine
        for last in splitter.close():
            check.add(last)
        check.finish()
