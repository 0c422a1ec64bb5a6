"""Checks a new batch's file: reads it from the storage in pieces, and makes the lines' rows or the list of problems."""

from __future__ import annotations

import asyncio

import structlog

from services.batch.input_lines import FileCheck, FileLine, LineSplitter, Problem
from services.batch.own_resources import OwnResources
from services.batch.records import Batch
from services.batch.routing import Waiting, choose_line_route
from services.batch.store import Store
from services.batch.views import Views
from shared.file_store import FileStore, MissingFile
from shared.inference.principal import ModelView

log = structlog.get_logger()

LINES_BETWEEN_PAUSES = 200
"""Some milliseconds of work; then others have the event loop."""


class Validator:
    def __init__(self, store: Store, views: Views, files: FileStore, own: OwnResources) -> None:
        self._store, self._views, self._files, self._own = store, views, files, own

    async def validate(self, batch: Batch) -> None:
        """Open the batch or fail it. Raises `Unavailable`, and then changed nothing."""
        try:
            check = await check_file(self._files, batch.input_path, batch.endpoint)
            problems = list(check.problems)
        except MissingFile:
            problems = [Problem("file_not_found", "The input file was deleted.")]
        if not problems:
            model = await find_model_of(self._views, batch.team_id, check.model or "")
            if isinstance(model, Problem):
                problems = [model]
            else:
                problem = await self._capacity_problem(batch, model, check)
                if problem is not None:
                    problems = [problem]
                else:
                    await self._store.accept_file(batch.batch_id, model, check.accepted)
                    log.info("batch_accepted", batch_id=batch.batch_id, lines=len(check.accepted))
                    return
        await self._store.reject_file(batch.batch_id, problems)
        log.info("batch_rejected", batch_id=batch.batch_id, code=problems[0].code)

    async def _capacity_problem(self, batch: Batch, model: ModelView, check: FileCheck) -> Problem | None:
        """Why nothing could ever run the batch; None if something can, or its own resource was made for it."""
        if await self._own.wants(batch.batch_id):
            try:
                return await self._own.acquire(batch, model, check.accepted)
            except MissingFile:
                return Problem("file_not_found", "The input file was deleted.")
        route = choose_line_route(batch.team_id, True, model.model_type, await self._views.resources())
        if isinstance(route, Waiting) and route.missing:
            return Problem("no_resource", f"{route.reason}.".capitalize())
        return None


async def check_file(files: FileStore, path: str, endpoint: str) -> FileCheck:
    """Read a file and judge its lines. Raises `MissingFile` or `Unavailable`."""
    check = FileCheck(endpoint)
    splitter = LineSplitter()
    count = 0
    async for piece in files.read(path):
        for line in splitter.feed(piece):
            check.add(line)
            count += 1
            if check.full:
                return check
            if count % LINES_BETWEEN_PAUSES == 0:
                await asyncio.sleep(0)
    last: FileLine
    for last in splitter.close():
        check.add(last)
    check.finish()
    return check


async def find_model_of(views: Views, team_id: str, name: str) -> ModelView | Problem:
    """The model that a file's lines name."""
    model = await views.find_model(team_id, name)
    if model is None:
        message = "The model does not exist, or you do not have access to it."
        return Problem("model_not_found", message, param="body.model")
    return model
