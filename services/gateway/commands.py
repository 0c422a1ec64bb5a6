"""What a refused command is over HTTP."""

from __future__ import annotations

from shared.inference.errors import ApiError
from shared.messages import CommandResult

_STATUS = {
    "not_found": 404,
    "resource_not_found": 404,
    "file_not_found": 404,
    "too_many_batches": 429,
    "too_many_quotes": 429,
    "too_many_schedules": 429,
    "invalid_schedule": 400,
    "invalid_price": 400,
    "invalid_rate": 400,
    "invalid_option": 400,
    "invalid_scaling": 400,
    "invalid_value": 400,
    "unknown_option": 400,
    "option_not_found": 400,
    "model_type_mismatch": 400,
    "price_starts_in_past": 400,
    "rate_starts_in_past": 400,
    "too_many_copies": 400,
    "forbidden": 403,
    "precondition_failed": 412,
}
"""What a refused command is over HTTP; any other refusal is about the state of things: 409."""


def refusal(result: CommandResult) -> ApiError:
    """Return the error for a refused command."""
    code, status = result.code, _STATUS.get(result.code, 409)
    if status == 404:
        return ApiError(404, "not_found", "There is no such thing.")
    return ApiError(status, code, result.message or "The request was refused.")
