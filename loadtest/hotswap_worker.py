"""A real worker process over a real broker, with the owner of its jobs in this process: what a gateway's clients would see
of a trace, less HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from infra.local.layout import ROOT
from loadtest.hotswap_models import IMAGES_LIMIT_BYTES, FineTunes
from loadtest.hotswap_sides import CONTEXT_TOKENS, MAX_BATCH, PRECISION
from loadtest.hotswap_traffic import PATIENCE_S, Arrival
from loadtest.stack import free_port, wait_ready
from services.gateway.owner import Finished, OwnedStream, Owner
from shared import topology
from shared.broker import Broker
from shared.ids import new_id
from shared.messages import (
    CommandResult,
    GenerateJob,
    JobVoided,
    ModelRef,
    SamplingParams,
    UsageEvent,
    WorkerSpec,
)


@dataclass(slots=True)
class WorkerSide:
    """Holds one worker with memory for some models, and the owner of what it is asked."""

    owner: Owner
    queue: topology.Queue
    resource_id: str
    tunes: FineTunes
    process: subprocess.Popen[bytes]

    async def replay(self, trace: Sequence[Arrival]) -> list[float | None]:
        """When each was answered whole, from its arrival; None for what was given up."""
        started_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(self._ask(arrival, started_s)) for arrival in trace]
        return [task.result() for task in asked]

    async def answer(
        self, ref: ModelRef, prompt: Sequence[int], tokens: int, *, patience_s: float = PATIENCE_S
    ) -> tuple[Finished, list[int]]:
        """One greedy answer of that length: its end, and its tokens."""
        stream = await self.owner.submit(self._job(ref, prompt, tokens, patience_s), self.queue)
        end = await _read_end(stream)
        return end, stream.owned.tokens[0]

    async def _ask(self, arrival: Arrival, started_s: float) -> float | None:
        due_s = started_s + arrival.at_s
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        model = self.tunes.models[arrival.model]
        end, tokens = await self.answer(model.ref, arrival.prompt, arrival.answer_tokens)
        if end.outcome == "expired":
            return None
        if end.outcome != "succeeded" or len(tokens) != arrival.answer_tokens:
            raise RuntimeError(f"{end.outcome} ({end.error_code}: {end.error_message}), {len(tokens)} tokens")
        return time.perf_counter() - due_s

    def _job(self, ref: ModelRef, prompt: Sequence[int], tokens: int, patience_s: float) -> GenerateJob:
        now_unix_ms = time.time_ns() // 1_000_000
        return GenerateJob(
            job_id=new_id("job"),
            request_id=new_id("req"),
            team_id="bench",
            key_id="bench",
            resource_id=self.resource_id,
            billing="resource",
            work_class="live",
            operation="text_completion",
            model_type="bench",
            model=ref,
            owner_queue=self.owner.queue,
            prompt_tokens=list(prompt),
            max_tokens=tokens,
            accepted_unix_ms=now_unix_ms,
            deadline_unix_ms=now_unix_ms + int(patience_s * 1000),
            sampling=SamplingParams(temperature=0.0, ignore_eos=True),
        )


@contextlib.asynccontextmanager
async def running_worker(
    amqp_url: str, tunes: FineTunes, *, slots: int, threads: int, log: Path
) -> AsyncIterator[WorkerSide]:
    """amqp_url: of a vhost that nobody else uses."""
    async with AsyncExitStack() as stack:
        broker = await Broker.open(amqp_url, "loadtest.hotswap", stack)
        owner = Owner(broker, _void, _ignore)
        resource_id = new_id("res")
        await broker.declare(topology.job_queues(resource_id, pool=False))
        # What the worker tells billing must be taken by somebody.
        await broker.subscribe(
            topology.BILLING_EVENTS, UsageEvent, lambda _: None, prefetch=1000, no_ack=True
        )
        group = await stack.enter_async_context(asyncio.TaskGroup())
        await owner.start(group)
        port = free_port()
        process = _start(amqp_url, tunes, resource_id, slots, threads, port, log)
        try:
            await asyncio.to_thread(wait_ready, f"http://127.0.0.1:{port}/readyz", process)
            yield WorkerSide(owner, topology.job_queue(resource_id, "live"), resource_id, tunes, process)
        finally:
            process.kill()
            process.wait()
            for task in group._tasks.copy():  # the owner's, which serve until they are cancelled
                task.cancel()


def _start(
    amqp_url: str, tunes: FineTunes, resource_id: str, slots: int, threads: int, port: int, log: Path
) -> subprocess.Popen[bytes]:
    spec = WorkerSpec(
        worker_id=new_id("wrk"),
        resource_id=resource_id,
        place=0,
        incarnation=new_id("inc"),
        pool=False,
        model_type="bench",
        precision=PRECISION,
        device_kind="cpu",
        max_batch=MAX_BATCH,
        max_context_tokens=CONTEXT_TOKENS,
        kv_tokens=MAX_BATCH * CONTEXT_TOKENS,
        preload=[tunes.models[0].ref],
    )
    environment = {
        **os.environ,
        "AMQP_URL": amqp_url,
        "OPS_PORT": str(port),
        "ROUNDHOUSE_WORKER_SPEC": msgspec.json.encode(spec).decode(),
        "ROUNDHOUSE_WORKER_THREADS": str(threads),
        "ROUNDHOUSE_WORKER_MODEL_BYTES": str(slots * tunes.weight_bytes),
        "ROUNDHOUSE_MODEL_STORE": str(tunes.store),
        "ROUNDHOUSE_IMAGE_DIR": str(tunes.images),
        "ROUNDHOUSE_IMAGE_BYTES": str(IMAGES_LIMIT_BYTES),
    }
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "services.worker"], cwd=ROOT, env=environment, stderr=file
        )


async def _read_end(stream: OwnedStream) -> Finished:
    async for event in stream:
        if isinstance(event, Finished):
            return event
    raise RuntimeError("a stream ended without an end")


async def _void(_fact: JobVoided, _headers: dict[str, str]) -> None:
    """Nobody is charged here."""


def _ignore(_result: CommandResult) -> None: ...
