"""Where the files of a model that is registered come from: the operator's folder, the team's upload, or a hub."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from msgspec import UNSET

from services.gateway.management.acting import Acting, ManagementDeps
from services.gateway.management.bodies import ModelSource
from services.gateway.model_import import SourceFolder
from shared.inference.errors import bad_request
from shared.outcomes import Unavailable

log = structlog.get_logger()


class Sources:
    def __init__(self, deps: ManagementDeps) -> None:
        self._importer = deps.importer
        self._uploads = deps.uploads
        self._hub = deps.hub

    @asynccontextmanager
    async def opened(self, team: Acting, body: ModelSource) -> AsyncIterator[SourceFolder]:
        """The folder with the files, for the body of the `with`; an upload ends with it, unless it was refused.

        Raises `ApiError` 400 unless the body names exactly one source, and one that is there.
        """
        named = [name for name in ("path", "upload_id", "hub") if getattr(body, name) is not UNSET]
        if not named:
            raise bad_request("missing_parameter", "One of path, upload_id and hub is required.", "path")
        if len(named) > 1:
            raise bad_request("invalid_value", f"{' and '.join(named)} exclude each other.", named[1])
        if body.hub_revision is not UNSET and body.hub is UNSET:
            raise bad_request("invalid_value", "hub_revision belongs to hub.", "hub_revision")
        if body.path is not UNSET:
            yield SourceFolder(self._importer.find(body.path), "path")
        elif body.hub is not UNSET:
            async with self._from_hub(team, body.hub, body) as source:
                yield source
        else:
            assert body.upload_id is not UNSET
            async with self._from_upload(team, body.upload_id) as source:
                yield source

    @asynccontextmanager
    async def _from_hub(
        self, team: Acting, repository: str, body: ModelSource
    ) -> AsyncIterator[SourceFolder]:
        revision = None if body.hub_revision is UNSET else body.hub_revision
        upload_id = await self._hub.fetch(team.team_id, repository, revision)
        try:
            yield SourceFolder(self._uploads.folder(upload_id), "hub")
        finally:
            await asyncio.shield(self._end(team, upload_id))

    @asynccontextmanager
    async def _from_upload(self, team: Acting, upload_id: str) -> AsyncIterator[SourceFolder]:
        upload = await self._uploads.table.upload(team.team_id, upload_id)
        if upload is None:
            raise bad_request("unknown_upload", "The team has no such open upload.", "upload_id")
        if not upload.files:
            raise bad_request("missing_file", "The upload has no whole file yet.", "upload_id")
        yield SourceFolder(self._uploads.folder(upload_id), "upload_id")
        await self._end(team, upload_id)

    async def _end(self, team: Acting, upload_id: str) -> None:
        try:
            await self._uploads.delete(team.team_id, upload_id)
        except Unavailable as error:
            # The answer stands; what is left expires.
            log.warning("upload_not_deleted", upload_id=upload_id, error=str(error))
