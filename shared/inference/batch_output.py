"""One line of a batch's results, as its files and its partial results spell it. Pure."""

from __future__ import annotations

import msgspec

from shared.inference.responses import encode

CLOSED = {
    "cancelled": {"code": "batch_cancelled", "message": "The batch was cancelled before this line ended."},
    "expired": {
        "code": "batch_expired",
        "message": "This line did not end before the batch's completion window was over.",
    },
}


def output_line(
    custom_id: str, state: str, request_id: str | None, status_code: int | None, response: bytes | None
) -> bytes:
    """Return the line without its end. request_id: None for a line that never ran; response: the answer's body."""
    closed = CLOSED.get(state)
    answered = None
    if closed is None:
        answered = {
            "status_code": status_code,
            "request_id": request_id,
            "body": msgspec.Raw(response or b"null"),
        }
    suffix = (request_id or "req_").removeprefix("req_")
    return encode(
        {"id": f"batch_req_{suffix}", "custom_id": custom_id, "response": answered, "error": closed}
    )
