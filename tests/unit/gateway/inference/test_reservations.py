"""What the doors do with a budget: refused before anything is published, and what never ran is given back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from services.gateway.owner import OwnedStream
from shared.budgets.caps import Cap, refusal_of_cap
from shared.budgets.gate import Reservation
from shared.inference.errors import ApiError
from shared.messages import JobQueueMessage
from shared.topology import Queue
from tests.unit.gateway.inference.builders import KEY, FakeOwner, say_hello, serving


class Recorded(Reservation):
    """A reservation that remembers what it was told."""

    def __init__(self, jobs: Sequence[JobQueueMessage]) -> None:
        super().__init__(jobs)
        self.told: list[int | str] = []

    def published(self, index: int) -> None:
        self.told.append(index)

    def resolve(self) -> None:
        self.told.append("resolved")


class Recording:
    def __init__(self) -> None:
        self.reservations: list[Recorded] = []

    async def reserve(self, jobs: Sequence[JobQueueMessage]) -> Recorded:
        self.reservations.append(Recorded(jobs))
        return self.reservations[-1]


class Spent:
    async def reserve(self, jobs: Sequence[JobQueueMessage]) -> Reservation:
        raise refusal_of_cap(Cap("bud_1", jobs[0].team_id, "team", jobs[0].team_id, "month"), spent_up=True)


class RefusingOwner(FakeOwner):
    """Refuses the jobs with this prompt, and never answers about those with the other."""

    async def submit(self, job: JobQueueMessage, queue: Queue) -> OwnedStream:
        if job_prompt(job) == [66]:
            raise ApiError(429, "queue_full", "The resource's queue is full.")
        if job_prompt(job) == [67]:
            await asyncio.sleep(60)
        return await super().submit(job, queue)


def job_prompt(job: Any) -> list[int]:
    return list(job.prompt_tokens)


async def post(base: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], str | None]:
    headers = {"Authorization": f"Bearer {KEY}"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(base + path, json=body, headers=headers) as reply,
    ):
        return reply.status, await reply.json(), reply.headers.get("x-should-retry")


async def test_a_spent_budget_refuses_before_anything_is_published(tmp_path: Path) -> None:
    owner = FakeOwner(say_hello)
    async with serving(owner, tmp_path, budgets=Spent()) as base:
        status, body, retry = await post(base, "/v1/completions", {"model": "acme/tiny", "prompt": "Hi"})
        assert (status, body["error"]["code"], retry) == (402, "budget_exceeded", "false")
        assert body["error"]["type"] == "insufficient_quota"
        status, _, _ = await post(base, "/models/acme/tiny/completions", {"prompt": "Hi"})
        assert status == 403, "as that URL's vendor says it"
        status, _, _ = await post(base, "/v1/embeddings", {"model": "acme/tiny", "input": "Hi"})
        assert status == 402
    assert owner.jobs == []


async def test_a_job_that_is_published_keeps_its_reservation(tmp_path: Path) -> None:
    budgets = Recording()
    async with serving(FakeOwner(say_hello), tmp_path, budgets=budgets) as base:
        status, _, _ = await post(base, "/v1/completions", {"model": "acme/tiny", "prompt": [[65], [68]]})
    assert status == 200
    assert sorted(map(str, budgets.reservations[0].told)) == ["0", "1", "resolved"]
    assert budgets.reservations[0].told[-1] == "resolved"


async def test_what_was_certainly_not_published_is_given_back_and_what_is_in_doubt_is_not(
    tmp_path: Path,
) -> None:
    budgets = Recording()
    async with serving(RefusingOwner(say_hello), tmp_path, budgets=budgets) as base:
        body = {"model": "acme/tiny", "prompt": [[65], [66], [67]]}
        status, _, _ = await post(base, "/v1/completions", body)
    assert status == 429
    assert budgets.reservations[0].told == [0, 2, "resolved"]
