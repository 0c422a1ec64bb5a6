"""Where the files of a model that is registered come from: a folder of the operator's, or an upload of the team's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from msgspec import UNSET

from services.gateway.errors import bad_request
from services.gateway.management.acting import Acting, ManagementDeps
from services.gateway.management.bodies import ModelSource
from services.gateway.model_import import SourceFolder
from shared.outcomes import Unavailable

log = structlog.get_logger()


class Sources:
    def __init__(self, deps: ManagementDeps) -> None:
        self._importer = deps.importer
        self._uploads = deps.uploads

    @asynccontextmanager
    async def opened(self, team: Acting, body: ModelSource) -> AsyncIterator[SourceFolder]:
        """The folder with the files, for the body of the `with`; an upload ends with it, unless it was refused.

        Raises `ApiError` 400 unless the body names exactly one source, and one that is there.
        """
        named = [name for name in ("path", "upload_id") if getattr(body, name) is not UNSET]
        if not named:
            raise bad_request("missing_parameter", "One of path and upload_id is required.", "path")
        if len(named) > 1:
            raise bad_request("invalid_value", f"{' and '.join(named)} exclude each other.", named[1])
        if body.upload_id is UNSET:
            yield SourceFolder(self._importer.find(str(body.path)), "path")
            return
        upload = await self._uploads.table.upload(team.team_id, body.upload_id)
        if upload is None:
            raise bad_request("unknown_upload", "The team has no such open upload.", "upload_id")
        if not upload.files:
            raise bad_request("missing_file", "The upload has no whole file yet.", "upload_id")
        yield SourceFolder(self._uploads.folder(body.upload_id), "upload_id")
        try:
            await self._uploads.delete(team.team_id, body.upload_id)
        except Unavailable as error:
            # The model is registered; what is left expires.
            log.warning("upload_not_deleted", upload_id=body.upload_id, error=str(error))
