"""The one error type that handlers raise; `edge.py` turns it into the shape that the path's clients expect."""

from __future__ import annotations

from collections.abc import Mapping


class ApiError(Exception):
    """A refusal with everything its answer needs. `message` is for people and never repeats secrets or long input."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(retry_after_s)


def bad_request(code: str, message: str, param: str | None = None) -> ApiError:
    return ApiError(400, code, message, param=param)


def must_not_retry(error: ApiError) -> ApiError:
    """Mark an error that clients would otherwise retry by themselves although it would fail or cost again."""
    error.headers["x-should-retry"] = "false"
    return error


def error_type(status: int) -> str:
    """OpenAI's `type` word for a status."""
    if status in (401, 403):
        return "authentication_error" if status == 401 else "permission_error"
    if status == 402:
        return "insufficient_quota"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
