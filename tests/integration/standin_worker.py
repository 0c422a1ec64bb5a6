"""A worker without an engine: a real process that reports over the real broker, drains and exits as it is told.

It holds a lock per seat for its life and writes down every run, so that two workers at one seat at once are seen.
`behaviour` is a folder of switches that tests make and remove: `fail-start`, `slow-start`, `busy`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sys
import time
from pathlib import Path

import msgspec

from shared import topology
from shared.broker import Broker
from shared.messages import DrainWorker, WorkerCommand, WorkerPhase, WorkerReport, WorkerSpec
from shared.outcomes import Unavailable
from shared.runtime import Lifetime, run
from shared.settings import CommonSettings

FOLDER = Path(sys.argv[1])
SPEC = msgspec.json.decode(os.environ["ROUNDHOUSE_WORKER_SPEC"].encode(), type=WorkerSpec)
REPORT_INTERVAL_S = 0.3


def write_down(what: str) -> None:
    line = f"{what} {SPEC.resource_id} {SPEC.place} {SPEC.incarnation} {os.getpid()} {os.environ['ROUNDHOUSE_DEVICE']}\n"
    with open(FOLDER / "runs", "a") as file:
        file.write(line)


def hold_seat() -> int:
    descriptor = os.open(FOLDER / f"seat-{SPEC.resource_id}-{SPEC.place}", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        write_down("DOUBLE")
    return descriptor


async def serve(settings: CommonSettings, life: Lifetime) -> None:
    if (FOLDER / "fail-start").exists():
        sys.exit(3)
    phase: WorkerPhase = "loading"
    changed = asyncio.Event()
    broker = await Broker.open(settings.amqp_url, f"standin:{SPEC.worker_id}", life.stack)

    async def report_forever() -> None:
        while True:
            changed.clear()
            with contextlib.suppress(Unavailable):
                await broker.send_event(
                    WorkerReport(
                        worker_id=SPEC.worker_id,
                        resource_id=SPEC.resource_id,
                        place=SPEC.place,
                        incarnation=SPEC.incarnation,
                        phase=phase,
                        sent_unix_ms=time.time_ns() // 1_000_000,
                    )
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), REPORT_INTERVAL_S)

    life.group.create_task(report_forever())
    await broker.subscribe(
        topology.worker_commands(SPEC.worker_id),
        WorkerCommand,
        lambda delivery: life.stopping.set() if isinstance(delivery.message, DrainWorker) else None,
        prefetch=10,
        no_ack=True,
    )
    life.started()
    while (FOLDER / "slow-start").exists() and not life.stopping.is_set():
        await asyncio.sleep(0.1)
    if not life.stopping.is_set():
        phase = "ready"
        changed.set()
        write_down("up")
    await life.stopping.wait()
    phase = "draining"
    changed.set()
    while (FOLDER / "busy").exists():
        await asyncio.sleep(0.1)
    phase = "drained"
    changed.set()
    await asyncio.sleep(0.1)


if __name__ == "__main__":
    seat = hold_seat()
    write_down("run")
    run("standin", CommonSettings, serve)
