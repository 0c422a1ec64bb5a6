"""Models from a hub: listed first, so that the team's quota is asked before a byte comes, then fetched into an upload."""

from __future__ import annotations

import asyncio
import json
import os
import re
from dataclasses import dataclass
from typing import Any

import structlog

from services.gateway.children import run_child
from services.gateway.model_uploads import ModelUploads
from services.gateway.store import LimitReached
from services.gateway.upload_table import NewFile, UploadGone
from shared.ids import new_id
from shared.inference.errors import ApiError, bad_request

log = structlog.get_logger()

CHILD = "services.gateway.hub_child"
PLAN_TIMEOUT_S = 60.0
FETCHED_BYTES_PER_S = 1024 * 1024
"""What a line gives at the least: a fetch that is slower is given up."""
FETCHES_AT_ONCE = 2
RETRY_S = 30
# How the machine reaches the outside: the library reads them. None is a secret of ours.
PASSED_ON = (
    *("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "all_proxy", "no_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR"),
)  # fmt: skip
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Hub:
    """url: None for the hub that the library knows."""

    uploads: ModelUploads
    enabled: bool
    url: str | None
    places: asyncio.Semaphore
    """For fetches of this gateway at once."""

    async def fetch(self, team_id: str, repository: str, revision: str | None) -> str:
        """Return the id of an upload with the repository's model. Raises `ApiError`."""
        if not self.enabled:
            raise bad_request("hub_disabled", "This installation fetches from no hub.", "hub")
        if self.places.locked():
            message = "Too many models are being fetched."
            raise ApiError(429, "too_many_uploads", message, retry_after_s=RETRY_S)
        async with self.places:
            upload_id = await self.uploads.create(team_id)
            fetched = False
            try:
                await self._fetch(team_id, upload_id, repository, revision)
                fetched = True
            finally:
                if not fetched:
                    await asyncio.shield(self.uploads.delete(team_id, upload_id))
        return upload_id

    async def _fetch(self, team_id: str, upload_id: str, repository: str, revision: str | None) -> None:
        planned = await self._ask(
            "plan", {"repository": repository, "revision": revision}, upload_id, PLAN_TIMEOUT_S
        )
        sizes: dict[str, int] = planned["files"]
        if not _COMMIT.fullmatch(planned["commit"]):
            raise ApiError(502, "hub_error", "The hub does not say which commit it is.", param="hub")
        await self._reserve(team_id, upload_id, sizes)
        folder = self.uploads.folder(upload_id)
        await asyncio.to_thread(folder.mkdir, parents=True)
        question = {
            "repository": repository,
            "commit": planned["commit"],
            "into": str(folder),
            "sizes": sizes,
        }
        await self._ask(
            "fetch", question, upload_id, PLAN_TIMEOUT_S + sum(sizes.values()) / FETCHED_BYTES_PER_S
        )

    async def _reserve(self, team_id: str, upload_id: str, sizes: dict[str, int]) -> None:
        limit_bytes = self.uploads.limits.team_bytes
        try:
            for name, size_bytes in sizes.items():
                file = NewFile(upload_id, name, size_bytes, new_id("wri"))
                await self.uploads.table.begin_file(team_id, file, limit_bytes)
        except LimitReached as error:
            message = f"A team's open uploads may have {limit_bytes} bytes in all."
            raise ApiError(409, "upload_quota_exceeded", message) from error
        except UploadGone as error:
            raise ApiError(409, "upload_superseded", "The upload was deleted meanwhile.") from error

    async def _ask(
        self, call: str, question: dict[str, Any], upload_id: str, timeout_s: float
    ) -> dict[str, Any]:
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment |= {
            "HF_HOME": str(self.uploads.folder(upload_id).with_name("home")),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # The other way of transfer has other hosts, and writes where it pleases.
            "HF_HUB_DISABLE_XET": "1",
        }
        if self.url is not None:
            environment["HF_ENDPOINT"] = self.url
        try:
            status, stdout = await run_child(CHILD, [call, json.dumps(question)], timeout_s, environment)
        except TimeoutError as error:
            raise _unreachable("The hub is too slow.") from error
        if status < 0:
            raise ApiError(
                502, "hub_error", "The hub sent more than it listed, or too much to read.", param="hub"
            )
        if status > 0:
            raise RuntimeError(f"the hub's child ended with status {status}")
        answer: dict[str, Any] = json.loads(stdout)
        if "error" in answer:
            raise _refusal(answer["error"]["code"], answer["error"]["message"][:300])
        return answer


def _refusal(code: str, message: str) -> ApiError:
    log.info("hub_refused", code=code, message=message)
    if code == "hub_unreachable":
        return _unreachable(message)
    status = {"hub_error": 502, "store_full": 507}.get(code, 400)
    return ApiError(status, code, message, param="hub")


def _unreachable(message: str) -> ApiError:
    return ApiError(503, "hub_unreachable", message, param="hub", retry_after_s=RETRY_S)
