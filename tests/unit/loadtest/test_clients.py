"""What a client counts of an answer that was cut."""

from __future__ import annotations

import json

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from loadtest.clients import RecordingClient, tokens_shown

WHOLE = ["The", " sea", " is", " w", "ide", ""]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("The", 1),
        ("The s", 1),
        ("The sea", 2),
        ("The sea is w", 4),
        ("The sea is wide", 6),
        ("The lake", 1),
        ("A sea", 0),
    ],
)
def test_a_cut_text_counts_the_tokens_that_it_shows_whole(text: str, count: int) -> None:
    assert tokens_shown(text, WHOLE) == count


def test_without_the_whole_answer_nothing_is_counted() -> None:
    assert tokens_shown("The sea", []) is None


async def events(request: web.Request) -> web.StreamResponse:
    """Six tokens, then the usage and the end."""
    response = web.StreamResponse(headers={"x-request-id": "req_1"})
    await response.prepare(request)
    for token in WHOLE:
        await response.write(b"data: " + json.dumps({"choices": [{"text": token}]}).encode() + b"\n\n")
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(WHOLE)}}
    await response.write(b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n")
    return response


@pytest.mark.parametrize(
    ("leave_after", "outcome", "tokens"),
    [(None, "answered", 6), (2, "cancelled_by_client", 2), (99, "answered", 6)],
)
async def test_a_client_that_leaves_says_so_and_counts_what_it_saw(
    leave_after: int | None, outcome: str, tokens: int
) -> None:
    app = web.Application()
    app.router.add_post("/v1/completions", events)
    async with TestServer(app) as server, ClientSession() as session:
        client = RecordingClient(str(server.make_url("")).rstrip("/"), "k", "team")
        record, _ = await client.complete(
            session, "m", "The", 6, stream=True, tokens=WHOLE, leave_after=leave_after
        )
    assert (record.outcome, record.completion_tokens, record.request_id) == (outcome, tokens, "req_1")
    assert client.records == [record]
