"""Who asks, and what their models run on: the values that the edge finds and the handlers use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Principal:
    """The team and key behind a request."""

    key_id: str
    team_id: str
    team_slug: str
    is_platform: bool
    ppt_fallback: bool
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class BaseView:
    """The revision of a model that an adapter stands on."""

    model_id: str
    full_name: str
    revision: int
    folder: str


@dataclass(frozen=True, slots=True)
class ModelView:
    """A registered model's current revision, as the route table sees it."""

    model_id: str
    team_id: str
    team_slug: str
    name: str
    revision: int
    folder: str
    """Below the model store."""
    signature: str
    model_type: str
    context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    created_unix_s: int
    base: BaseView | None = None
    """Set for an adapter."""
    version: int = 1
    """Counts the changes of its row."""

    @property
    def full_name(self) -> str:
        return f"{self.team_slug}/{self.name}"

    @property
    def tokenizer_folder(self) -> str:
        """Where tokenizer and chat template lie: an adapter has its base's."""
        return self.folder if self.base is None else self.base.folder


@dataclass(frozen=True, slots=True)
class ResourceView:
    """A resource as the route table sees it."""

    resource_id: str
    team_id: str
    model_type: str
    pool: bool
    wanted: str
    state: str
    live_count: int
    max_context_tokens: int
    expected_live_unix_s: float | None
    created_unix_s: float
    reason: str = ""
    """Why it is in this state, for people; filled for failures."""
    wakes: bool = False
    """It may have no GPU for want of work, and is to be woken by a request, which waits meanwhile."""
    takes_traffic: bool = True
    """Whether it runs all requests of its type; else only what names it."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: the queue's resource, and how it is billed."""

    resource: ResourceView
    billing: str
    """"ppt" on a shared pool, "resource" on the team's own GPUs."""
