"""Pure: whether the values of a command can be right, before anything is looked up."""

from __future__ import annotations

import re

from services.scheduler.quotas import EVERY_TEAM, MAX_PLACES, PLATFORM
from services.scheduler.scaling_settings import MAX_COUNT, TARGET_WAITS_S, settings_problem
from shared.messages import (
    CreateOption,
    CreateResource,
    PinModel,
    ScaleResource,
    SchedulerCommand,
    SetQuota,
    SetScaling,
)

MAX_NAME = 100
MAX_BATCH = 1024
CONTEXT_TOKENS = range(16, 1_048_576 + 1)
MAX_KV_TOKENS = 2**31 - 1
MAX_HOURLY_RATE_NANOUSD = 10_000 * 10**9
NOT_BUILT = frozenset({("cuda", "int8")})
"""Pairs that the engine refuses at its start: a resource with such an option could never go live."""
_OPTION_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
_MODEL_TYPE = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_MAX_TEXT = 200


def problem_of(command: SchedulerCommand) -> str | None:
    """Return what is wrong with the values, naming the field; None when nothing is.

    1. Ids and actor: short printable text. 2. Numbers in the ranges that the tables have too. 3. Names: an option's
    is a slug, a resource's any printable text of 1 to 100 characters without space at its ends.
    """
    for field in ("command_id", "actor", "team_id", "resource_id", "option_id", "model_id", "scope"):
        value = getattr(command, field, None)
        if value is not None and not _is_text(value, _MAX_TEXT):
            return f"{field} must be 1 to {_MAX_TEXT} printable characters"
    match command:
        case CreateOption():
            return _option_problem(command)
        case CreateResource():
            if not _is_text(command.name, MAX_NAME) or command.name != command.name.strip():
                return f"name must be 1 to {MAX_NAME} printable characters"
            if not _MODEL_TYPE.fullmatch(command.model_type):
                return "model_type is not a model type's name"
            return _count_problem(command.fixed_count)
        case ScaleResource():
            return _count_problem(command.fixed_count)
        case PinModel(copies=int(copies)) if not 1 <= copies <= MAX_COUNT:
            return f"copies must be between 1 and {MAX_COUNT}"
        case SetScaling():
            return _scaling_problem(command)
        case SetQuota():
            return _quota_problem(command)
    return None


def _option_problem(command: CreateOption) -> str | None:
    if not _MODEL_TYPE.fullmatch(command.model_type):
        return "model_type is not a model type's name"
    if not _OPTION_NAME.fullmatch(command.name):
        return "name must be 1 to 63 of a-z, 0-9, dot and dash, and begin with a letter or digit"
    if (command.device_kind, command.precision) in NOT_BUILT:
        return f"precision {command.precision} does not run on {command.device_kind} yet"
    if not 1 <= command.max_batch <= MAX_BATCH:
        return f"max_batch must be between 1 and {MAX_BATCH}"
    if command.max_context_tokens not in CONTEXT_TOKENS:
        return f"max_context_tokens must be between {CONTEXT_TOKENS.start} and {CONTEXT_TOKENS.stop - 1}"
    if not command.max_context_tokens <= command.kv_tokens <= MAX_KV_TOKENS:
        return f"kv_tokens must be between max_context_tokens and {MAX_KV_TOKENS}"
    if not 0 <= command.hourly_rate_nanousd <= MAX_HOURLY_RATE_NANOUSD:
        return f"hourly_rate_nanousd must be between 0 and {MAX_HOURLY_RATE_NANOUSD}"
    return None


def _quota_problem(command: SetQuota) -> str | None:
    if command.places is None and command.scope in (EVERY_TEAM, PLATFORM):
        return "places may be null for one team's own quota only"
    if command.places is not None and not 0 <= command.places <= MAX_PLACES:
        return f"places must be between 0 and {MAX_PLACES}"
    return None


def _scaling_problem(command: SetScaling) -> str | None:
    if not command.autoscaling and command.min_count != command.max_count:
        return "with autoscaling off there is one number of gpus"
    if command.target_wait_s not in TARGET_WAITS_S:
        return f"target_wait_s must be between {TARGET_WAITS_S.start} and {TARGET_WAITS_S.stop - 1}"
    return settings_problem(command.min_count, command.max_count, command.idle_timeout_s, command.windows)


def _count_problem(count: int) -> str | None:
    return None if 0 <= count <= MAX_COUNT else f"fixed_count must be between 0 and {MAX_COUNT}"


def _is_text(value: str, most: int) -> bool:
    return 1 <= len(value) <= most and value.isprintable()
