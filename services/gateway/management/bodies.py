"""The request bodies of `/api` as structs: what is checked here is what the OpenAPI page shows."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from shared.inference.errors import ApiError, bad_request
from shared.messages import BudgetAction, BudgetScope

T = TypeVar("T")

Slug = Annotated[
    str, Meta(pattern="^[a-z0-9][a-z0-9-]{0,38}$", description="Lower-case letters, digits and hyphens.")
]
Title = Annotated[str, Meta(min_length=1, max_length=100)]
ModelName = Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9._-]{0,95}$")]
TypeName = Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9.-]{0,62}$")]
OptionName = TypeName
Usd = Annotated[str, Meta(pattern="^(0|[1-9][0-9]{0,6})([.][0-9]{1,9})?$", examples=["0.60"])]
Gpus = Annotated[int, Meta(ge=0, le=64)]


class Body(Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of all bodies: a field that is not named is refused."""


class CreateTeam(Body):
    slug: Slug
    name: Title
    ppt_fallback: bool = False


class ChangeTeam(Body):
    name: Title | UnsetType = UNSET
    ppt_fallback: bool | UnsetType = UNSET


class CreateKey(Body):
    name: Title
    scopes: Annotated[list[Literal["inference", "manage", "platform"]], Meta(min_length=1, max_length=3)]


class CreateQueueCredential(Body):
    name: Slug


class ModelSource(Body, kw_only=True):
    """Where the files come from: exactly one of these is given (`sources.py`)."""

    path: (
        Annotated[str, Meta(min_length=1, max_length=512, description="Folder below the import folder.")]
        | UnsetType
    ) = UNSET
    upload_id: (
        Annotated[
            str,
            Meta(pattern="^upl_[0-9a-f]{32}$", description="An upload with all files; it ends with this."),
        ]
        | UnsetType
    ) = UNSET
    hub: (
        Annotated[
            str,
            Meta(
                pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$",
                description="A repository of the hub, where the installation allows it.",
            ),
        ]
        | UnsetType
    ) = UNSET
    hub_revision: (
        Annotated[
            str,
            Meta(
                pattern="^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$",
                description="Branch, tag or commit; the main branch, if it is left out.",
            ),
        ]
        | UnsetType
    ) = UNSET


BaseName = Annotated[
    str,
    Meta(
        pattern="^[a-z0-9][a-z0-9._/-]{0,150}$",
        description="Of an adapter: id or name of the model that it was trained on, the team's or the platform's.",
    ),
]


class RegisterModel(ModelSource, kw_only=True):
    name: ModelName
    base: BaseName | UnsetType = UNSET
    model_type: TypeName | None = None


class AddRevision(ModelSource, kw_only=True):
    base: BaseName | UnsetType = UNSET


class ChangeModel(Body):
    name: ModelName | UnsetType = UNSET
    revision: (
        Annotated[int, Meta(ge=1, le=2_147_483_647, description="One of those that are kept.")] | UnsetType
    ) = UNSET


class CreateOption(Body):
    model_type: TypeName
    name: OptionName
    device_kind: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16", "int8"]
    max_batch: Annotated[int, Meta(ge=1, le=1024)]
    max_context_tokens: Annotated[int, Meta(ge=16, le=1_048_576)]
    kv_tokens: Annotated[int, Meta(ge=16, le=2_147_483_647)]
    hourly_rate_usd: Usd


class SetPrice(Body):
    model_type: TypeName
    work_class: Literal["live", "batch"]
    prompt_usd_per_million: Usd
    completion_usd_per_million: Usd
    starts_at: Annotated[str, Meta(max_length=40, description="RFC 3339; now, if it is left out.")] | None = (
        None
    )


class SetRate(Body):
    option_id: Annotated[str, Meta(pattern="^opt_[0-9a-f]{32}$")]
    hourly_rate_usd: Usd
    starts_at: Annotated[str, Meta(max_length=40, description="RFC 3339; now, if it is left out.")] | None = (
        None
    )


class ChangeTerms(Body):
    pays: Literal["prepaid", "postpaid"]
    credit_limit_usd: Usd | None = None
    """What a postpaid team may owe; any amount if it is left out."""


class GrantCredit(Body):
    amount_usd: Usd
    reason: Annotated[str, Meta(min_length=1, max_length=200)]


class TopUp(Body):
    amount_usd: Usd


AlertPercents = Annotated[
    list[Annotated[int, Meta(ge=1, le=100)]],
    Meta(max_length=10, description="Shares of the limit at which somebody is told."),
]
BudgetActions = Annotated[
    list[BudgetAction],
    Meta(
        max_length=4, description="What is done when it is spent; refuse_ppt is a cap that is never passed."
    ),
]


class CreateBudget(Body):
    scope: BudgetScope
    period: Annotated[Literal["day", "month"], Meta(description="In UTC.")]
    limit_usd: Usd
    scope_id: (
        Annotated[
            str, Meta(max_length=100, description="Id of the resource, model or key; none for the team.")
        ]
        | None
    ) = None
    alert_percents: AlertPercents = []
    actions: BudgetActions = []


class ChangeBudget(Body):
    limit_usd: Usd | UnsetType = UNSET
    alert_percents: AlertPercents | UnsetType = UNSET
    actions: BudgetActions | UnsetType = UNSET


class CreateResource(Body):
    name: Title
    model_type: TypeName
    option: Annotated[
        str, Meta(min_length=1, max_length=100, description="Name or id of a performance option.")
    ]
    gpus: Gpus = 1
    pool: bool = False


class ScaleResource(Body):
    gpus: Gpus


class PinModel(Body):
    copies: Annotated[int, Meta(ge=1, le=64)] | Literal["all"] = 1


class ChangeQuota(Body):
    of: Annotated[
        Literal["team", "every_team", "platform"],
        Meta(
            description="`team`: the one that the request acts for; `every_team`: those without a quota of their own."
        ),
    ]
    places: (
        Annotated[
            int, Meta(ge=0, le=100_000, description="GPUs at once; null takes a team's own quota away.")
        ]
        | None
    )


class ScalingWindow(Body):
    name: Title
    start: Annotated[
        str,
        Meta(
            min_length=9,
            max_length=100,
            description="Times of opening: minute, hour, day of month, month, day of week, as in cron.",
            examples=["0 8 * * mon-fri"],
        ),
    ]
    duration_minutes: Annotated[int, Meta(ge=1, le=10_080)]
    min: Gpus
    max: Gpus
    time_zone: Annotated[str, Meta(min_length=1, max_length=64, examples=["Europe/Berlin"])] = "UTC"


class SetScaling(Body):
    """All settings at once: what is left out gets its default."""

    autoscaling: bool
    gpus: Annotated[Gpus, Meta(description="The fixed number; only with autoscaling off.")] | UnsetType = (
        UNSET
    )
    min: Annotated[Gpus, Meta(description="Only with autoscaling on.")] | UnsetType = UNSET
    max: Annotated[Gpus, Meta(description="Only with autoscaling on.")] | UnsetType = UNSET
    idle_timeout_s: Annotated[
        int, Meta(ge=10, le=604_800, description="So long the last GPU is kept with nothing to do.")
    ] = 600
    when_asleep: Annotated[
        Literal["wake", "refuse"],
        Meta(description="What a request does while no GPU is up for want of work."),
    ] = "wake"
    target_wait_s: Annotated[
        int,
        Meta(
            ge=1,
            le=3600,
            description="How long a request may wait when a crowd comes like those of the last minutes: less keeps more GPUs.",
        ),
    ] = 10
    windows: Annotated[list[ScalingWindow], Meta(max_length=16, description="The first open one holds.")] = []


_PLACE = re.compile(r" - at `\$\.?(.*)`$")
_NAMED = re.compile(r"(unknown|missing required) field `([^`]*)`")


def parse(document: dict[str, Any], kind: type[T]) -> T:
    """Return the body as a struct. Raises `ApiError` 400 that names the field:

    1. A field that the struct lacks -> unknown_parameter.
    2. A required field that is not there -> missing_parameter.
    3. Another JSON type -> invalid_type.
    4. Out of range, pattern or choices, or with control characters -> invalid_value; for money -> invalid_money.
    """
    try:
        value = msgspec.convert(document, kind, strict=True)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from error
    _refuse_control_characters(document, "")
    return value


def _refusal(text: str) -> ApiError:
    place = _PLACE.search(text)
    param = place[1] if place else ""
    named = _NAMED.search(text)
    if named:
        # A name of theirs may be anything; only a plain one is repeated.
        field = named[2] if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", named[2]) else "?"
        param = f"{param}.{field}" if param else field
        if named[1] == "unknown":  # 1
            return bad_request("unknown_parameter", f"There is no parameter '{param}'.", param)
        return bad_request("missing_parameter", f"The parameter '{param}' is required.", param)  # 2
    said = _PLACE.sub("", text).replace("`", "'")
    if ", got " in said:  # 3
        return bad_request("invalid_type", f"{param}: {said}.", param)
    if param.endswith(("_usd", "_usd_per_million")):  # 4
        return bad_request(
            "invalid_money", f'{param} must be a decimal string of USD, such as "0.60".', param
        )
    if said.startswith("Invalid enum value"):
        said = "Not one of the values that are known"
    return bad_request("invalid_value", f"{param}: {said}.", param)


def _refuse_control_characters(value: Any, param: str) -> None:
    # A pattern's `$` also matches before a last newline, and names are shown on pages and in logs.
    if isinstance(value, str):
        if any(ord(character) < 0x20 or ord(character) == 0x7F for character in value):
            raise bad_request("invalid_value", f"{param} may not contain control characters.", param)
    elif isinstance(value, dict):
        for key, child in value.items():
            _refuse_control_characters(child, f"{param}.{key}" if param else key)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            _refuse_control_characters(child, f"{param}[{index}]")
