"""`/api/models/uploads`: a model's files over HTTP, one by one; registered with `{"upload_id": ...}`."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from services.gateway.management import schemas
from services.gateway.management.acting import (
    PAGE_QUERY,
    TEAM_QUERY,
    Acting,
    ManagementDeps,
    acting_team,
    answer,
    listing,
    not_found,
    page_of,
    path_id,
    timestamp,
)
from services.gateway.management.idempotency import idempotent
from services.gateway.routes import MANAGE, RouteSpec
from services.gateway.upload_table import Upload
from shared.inference.errors import ApiError


class Uploads:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store
        self._uploads = deps.uploads

    def routes(self) -> list[RouteSpec]:
        once = idempotent(self._store)
        all_of_them = "/api/models/uploads"
        one = all_of_them + "/{upload_id}"
        return [
            schemas.route(
                "POST", all_of_them, once(self.create), MANAGE, "Open an upload of a model's files",
                answers={201: schemas.UPLOAD}, query=TEAM_QUERY,
            ),
            schemas.route(
                "GET", all_of_them, self.list_page, MANAGE, "List open uploads",
                answers={200: schemas.page(schemas.UPLOAD)}, query=PAGE_QUERY | TEAM_QUERY,
            ),
            schemas.route(
                "GET", one, self.get, MANAGE, "One upload, and the files that are whole",
                answers={200: schemas.UPLOAD}, query=TEAM_QUERY,
            ),
            schemas.route(
                "DELETE", one, self.delete, MANAGE, "Give up an upload", answers={204: None}, query=TEAM_QUERY,
            ),
            schemas.route(
                "PUT", one + "/files/{name}", self.put, MANAGE, "Send one file, whole; it replaces one of this name",
                answers={200: schemas.UPLOADED_FILE}, query=TEAM_QUERY,
                max_body_bytes=self._uploads.limits.folder.total_bytes,
            ),
            schemas.route(
                "DELETE", one + "/files/{name}", self.delete_file, MANAGE, "Remove one file", answers={204: None},
                query=TEAM_QUERY,
            ),
        ]  # fmt: skip

    async def create(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        upload_id = await self._uploads.create(team.team_id)
        return answer(_upload_json(await self._find(team, upload_id)), 201)

    async def list_page(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        page = page_of(request)
        uploads = await self._uploads.table.uploads(team.team_id, page.after, page.limit + 1)
        return listing(uploads, page, _upload_json, lambda upload: upload.upload_id)

    async def get(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        return answer(_upload_json(await self._find(team, path_id(request, "upload_id"))))

    async def delete(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        if not await self._uploads.delete(team.team_id, path_id(request, "upload_id")):
            raise not_found()
        return web.Response(status=204)

    async def put(self, request: web.Request) -> web.Response:
        try:
            return await self._put(request)
        except ApiError as error:
            if not request.content.at_eof():
                # The rest of a large file is not worth reading to keep the connection.
                error.headers["Connection"] = "close"
            raise

    async def _put(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        upload = await self._find(team, path_id(request, "upload_id"))
        name, size_bytes = request.match_info["name"], request.content_length
        if size_bytes is None:
            raise ApiError(411, "length_required", "Content-Length must say how long the file is.")
        self._uploads.check_name(name, size_bytes)
        sha256 = await self._uploads.receive(
            team.team_id, upload.upload_id, name, size_bytes, request.content
        )
        return answer({"name": name, "size_bytes": size_bytes, "sha256": sha256})

    async def delete_file(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        upload = await self._find(team, path_id(request, "upload_id"))
        if not await self._uploads.delete_file(team.team_id, upload.upload_id, request.match_info["name"]):
            raise not_found()
        return web.Response(status=204)

    async def _find(self, team: Acting, upload_id: str) -> Upload:
        upload = await self._uploads.table.upload(team.team_id, upload_id)
        if upload is None:
            raise not_found()
        return upload


def _upload_json(upload: Upload) -> dict[str, Any]:
    return {
        "upload_id": upload.upload_id,
        "files": [
            {"name": file.name, "size_bytes": file.size_bytes, "sha256": file.sha256} for file in upload.files
        ],
        "created_at": timestamp(upload.created_at),
        "expires_at": timestamp(upload.expires_at),
    }
