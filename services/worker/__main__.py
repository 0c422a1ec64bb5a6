"""`python -m services.worker`: one worker process at one place, started by its node agent."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from services.worker.engine import Engine, EngineConfig
from services.worker.engine_thread import EnginePort
from services.worker.image_store import ImageStore
from services.worker.service import Worker
from services.worker.settings import WorkerSettings
from shared.broker import Broker
from shared.messages import WorkerSpec
from shared.runtime import Lifetime, run


def engine_config(spec: WorkerSpec, settings: WorkerSettings) -> EngineConfig:
    """What the place's device and precision ask for."""
    return EngineConfig(
        device=spec.device_kind,
        precision=spec.precision,
        max_batch=spec.max_batch,
        max_context_tokens=spec.max_context_tokens,
        kv_tokens=spec.kv_tokens,
        threads=settings.threads,
        host_image_bytes=settings.host_image_bytes,
    )


def open_images(settings: WorkerSettings, config: EngineConfig) -> ImageStore | None:
    """None where the worker has no folder for images. Raises OSError when it cannot be made."""
    if not settings.image_dir:
        return None
    return ImageStore(Path(settings.image_dir), settings.image_bytes, config)


async def serve_with(
    settings: WorkerSettings,
    life: Lifetime,
    spec: WorkerSpec,
    engine: EnginePort,
    images: ImageStore | None = None,
) -> None:
    """Serve until told to stop by a signal, or drained by the scheduler."""
    broker = await Broker.open(settings.amqp_url, f"worker:{spec.worker_id}", life.stack)
    worker = Worker(spec, settings, broker, engine, images)
    life.check("broker", lambda: broker.connected)
    life.check("worker", lambda: worker.phase == "ready")
    await worker.start(life.group)
    life.started()
    drained = life.group.create_task(worker.drained())
    stopping = life.group.create_task(life.stopping.wait())
    await asyncio.wait({drained, stopping}, return_when=asyncio.FIRST_COMPLETED)
    await worker.drain()


async def _serve(settings: WorkerSettings, life: Lifetime) -> None:
    spec = msgspec.json.decode(settings.spec_json, type=WorkerSpec)
    config = engine_config(spec, settings)
    await serve_with(settings, life, spec, Engine(config), open_images(settings, config))


if __name__ == "__main__":
    run("worker", WorkerSettings, _serve)
