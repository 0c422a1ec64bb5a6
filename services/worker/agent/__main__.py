"""Composition root of the node agent: `python -m services.worker.agent`."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path

import structlog

from services.worker.agent.agent import Agent, unix_ms
from services.worker.agent.devices import find_devices
from services.worker.agent.launch import Launcher, shorten_logs
from services.worker.agent.settings import AgentSettings
from services.worker.agent.state_file import hold_lock
from shared import topology
from shared.broker import Broker
from shared.ids import new_id
from shared.messages import NodeCommand
from shared.runtime import Lifetime, run

log = structlog.get_logger()

LOGS_BOUNDED_EVERY_S = 30.0


async def serve(settings: AgentSettings, life: Lifetime) -> None:
    lock = await asyncio.to_thread(hold_lock, settings.lock_file)
    life.stack.callback(os.close, lock)
    devices = await asyncio.to_thread(find_devices, settings.devices, settings.cpu_devices)
    launcher = Launcher(
        node_id=settings.node_id,
        home=settings.home,
        state_file=settings.state_file,
        command=settings.worker_command,
        environment=os.environ,
        threads=settings.worker_threads,
        log_folder=settings.log_folder if settings.worker_logs == "files" else None,
    )
    agent = Agent(settings.node_id, new_id("agent"), devices, launcher, unix_ms)
    agent.adopt()
    log.info("agent_ready_for_work", devices=[device.name for device in devices], adopted=len(agent.living))
    broker = await Broker.open(settings.amqp_url, f"agent:{settings.node_id}", life.stack)
    life.check("broker", lambda: broker.connected)
    # One at a time: commands of one scheduler take effect in the order in which it sent them.
    life.group.create_task(
        broker.consume(topology.node_commands(settings.node_id), NodeCommand, agent.on_command, prefetch=1)
    )
    life.group.create_task(agent.report_forever(broker))
    if launcher.log_folder is not None:
        life.group.create_task(_bound_logs(launcher.log_folder))
    life.started()
    await life.stopping.wait()
    if settings.keep_workers:
        log.info("workers_kept", count=len(agent.living))
        return
    await agent.stop_all(settings.drain_timeout_s)
    await agent.send_report(broker)


async def _bound_logs(folder: Path) -> None:
    """Keep each worker's log under a bound, until cancelled. A full disk is said, and tried again."""
    while True:
        await asyncio.sleep(LOGS_BOUNDED_EVERY_S)
        try:
            await asyncio.to_thread(shorten_logs, folder)
        except OSError as error:
            log.warning("logs_not_shortened", error=str(error))


def main() -> None:
    run("agent", AgentSettings, _with_absolute_home)


async def _with_absolute_home(settings: AgentSettings, life: Lifetime) -> None:
    # The home folder is one of the marks by which workers are found again: it must not depend on the directory.
    await serve(dataclasses.replace(settings, home=settings.home.resolve()), life)


if __name__ == "__main__":
    main()
