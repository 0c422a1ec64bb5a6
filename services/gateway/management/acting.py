"""What all `/api` handlers share: for which team a request acts, its query, its page, its answer."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from services.gateway.edge import spec_of
from services.gateway.hub import Hub
from services.gateway.keys import KeyCache
from services.gateway.model_import import ModelImporter
from services.gateway.model_registry import ModelRegistry
from services.gateway.model_uploads import ModelUploads
from services.gateway.payments.provider import PaymentProvider
from services.gateway.queue_views import QueueDoor
from services.gateway.route_table import RouteTable
from services.gateway.routes import PLATFORM, principal_of
from services.gateway.store import Row, Store
from services.gateway.views import Views
from shared.commands import CommandCaller
from shared.inference.errors import ApiError, bad_request

PAGE = 20
MAX_PAGE = 100
_ID = re.compile(r"[a-z]{2,10}_[0-9a-f]{32}")
_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,38}")
T = TypeVar("T")

PAGE_QUERY: dict[str, dict[str, Any]] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": PAGE},
    "cursor": {"type": "string", "description": "`next_cursor` of the page before."},
}
TEAM_QUERY: dict[str, dict[str, Any]] = {
    "team": {
        "type": "string",
        "description": "Act for this team (its slug); needs the scope platform for others.",
    }
}


@dataclass(frozen=True, slots=True)
class ManagementDeps:
    """What the management API is made of."""

    store: Store
    models: ModelRegistry
    views: Views
    routes: RouteTable
    keys: KeyCache
    commands: CommandCaller
    importer: ModelImporter
    uploads: ModelUploads
    hub: Hub
    public_url: str | None
    queue: QueueDoor
    payments: PaymentProvider | None = None
    """Where teams pay; None: nowhere."""


@dataclass(frozen=True, slots=True)
class Acting:
    """The team that a request acts for."""

    team_id: str
    slug: str
    is_platform: bool


async def acting_team(request: web.Request, store: Store) -> Acting:
    """Return the key's own team, or the one in `?team=` for keys with the scope platform."""
    principal = principal_of(request)
    slug = query_of(request).get("team")
    if slug is None or slug == principal.team_slug:
        return Acting(principal.team_id, principal.team_slug, principal.is_platform)
    if PLATFORM not in principal.scopes:
        # Not a 404: it would tell which teams there are.
        raise ApiError(403, "insufficient_scope", "This key acts for its own team only.", param="team")
    row = await store.team_by_slug(slug) if _SLUG.fullmatch(slug) else None
    if row is None:
        raise ApiError(404, "team_not_found", "There is no such team.", param="team")
    return Acting(row["team_id"], row["slug"], row["is_platform"])


def query_of(request: web.Request) -> dict[str, str]:
    """Return the query. Raises `ApiError` 400 for a parameter that the route does not know, or that comes twice."""
    spec = spec_of(request)
    known = spec.query if spec else {}
    for name in request.query:
        if name not in known:
            raise bad_request("unknown_parameter", "The query has a parameter that this path does not know.")
        if len(request.query.getall(name)) > 1:
            raise bad_request("invalid_value", f"{name} is given more than once.", name)
        if "\x00" in request.query[name] or not _is_unicode(request.query[name]):
            raise bad_request("invalid_unicode", f"{name} is not plain text.", name)
    return dict(request.query)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def path_id(request: web.Request, name: str) -> str:
    """Return an id from the path. What cannot be an id of ours is a 404 like any unknown one."""
    value = request.match_info[name]
    if not _ID.fullmatch(value):
        raise not_found()
    return value


def is_bound_to(request: web.Request, tag: str) -> bool:
    """Whether the request holds for the thing as `tag` has it alone. Raises `ApiError` 412 if it is for another."""
    wanted = request.headers.get("If-Match", "*").strip()
    if wanted == "*":
        return False
    if tag not in [each.strip() for each in wanted.split(",")]:
        raise changed_since()
    return True


def changed_since() -> ApiError:
    return ApiError(412, "precondition_failed", "It was changed since you read it.")


def not_found() -> ApiError:
    """The one answer for unknown and foreign things: the same bytes."""
    return ApiError(404, "not_found", "There is no such thing.")


# ---- pages


@dataclass(frozen=True, slots=True)
class Page:
    limit: int
    after: str
    """The text inside the cursor; empty on the first page."""


def page_of(request: web.Request) -> Page:
    query = query_of(request)
    raw = query.get("limit", str(PAGE))
    if not re.fullmatch(r"[0-9]{1,4}", raw) or not 1 <= int(raw) <= MAX_PAGE:
        raise bad_request("invalid_value", f"limit must be an integer from 1 to {MAX_PAGE}.", "limit")
    return Page(int(raw), read_cursor(query["cursor"]) if "cursor" in query else "")


def write_cursor(after: str) -> str:
    return base64.urlsafe_b64encode(after.encode()).decode().rstrip("=")


def read_cursor(cursor: str) -> str:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode(
            "ascii"
        )
    except (binascii.Error, ValueError) as error:
        raise invalid_cursor() from error
    if not re.fullmatch(r"[0-9a-z_:]{1,300}", text):
        raise invalid_cursor()
    return text


def invalid_cursor() -> ApiError:
    return bad_request("invalid_cursor", "The cursor is not one of ours.", "cursor")


def listing(
    rows: Sequence[T], page: Page, show: Callable[[T], Any], position: Callable[[T], str]
) -> web.Response:
    """Answer a page. `rows` were asked for with one more than the page holds, which tells whether there is a next."""
    shown = rows[: page.limit]
    more = len(rows) > page.limit
    return answer(
        {
            "data": [show(row) for row in shown],
            "next_cursor": write_cursor(position(shown[-1])) if more else None,
        }
    )


# ---- answers


_encoder = msgspec.json.Encoder()


def answer(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        status=status, body=_encoder.encode(body), content_type="application/json", headers=headers or {}
    )


def timestamp(moment: datetime | None) -> str | None:
    """Return RFC 3339 in UTC with milliseconds."""
    if moment is None:
        return None
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_time(text: str, param: str) -> datetime:
    """Return a moment from RFC 3339 or a bare date (its start in UTC). Raises `ApiError` 400."""
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII):
            day = date.fromisoformat(text)
            return datetime(day.year, day.month, day.day, tzinfo=UTC)
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise _bad_time(param) from error
    # A moment without an offset would mean another one on each reader's machine.
    if moment.tzinfo is None or not 2000 <= moment.year <= 2999:
        raise _bad_time(param)
    return moment.astimezone(UTC)


def _bad_time(param: str) -> ApiError:
    message = f"{param} must be a time such as 2026-11-01T00:00:00Z, or a date."
    return bad_request("invalid_value", message, param)


def team_json(row: Row) -> dict[str, Any]:
    return {
        "team_id": row["team_id"],
        "slug": row["slug"],
        "name": row["name"],
        "ppt_fallback": row["ppt_fallback"],
        "created_at": timestamp(row["created_at"]),
    }
