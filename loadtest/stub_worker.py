"""`python -m loadtest.stub_worker`: the real worker around the stub engine.

STUB_STEP_S, STUB_TOKENS_PER_STEP and STUB_LOAD_S set its pace, STUB_START_S a time that its start takes longer;
everything else is as for `python -m services.worker`.
"""

from __future__ import annotations

import asyncio
import os

import msgspec

from loadtest.stub_engine import StubEngine
from services.worker.__main__ import serve_with
from services.worker.settings import WorkerSettings
from shared.messages import WorkerSpec
from shared.runtime import Lifetime, run


async def _serve(settings: WorkerSettings, life: Lifetime) -> None:
    engine = StubEngine(
        float(os.environ.get("STUB_STEP_S", "0")),
        int(os.environ.get("STUB_TOKENS_PER_STEP", "1")),
        float(os.environ.get("STUB_LOAD_S", "0")),
    )
    await asyncio.sleep(float(os.environ.get("STUB_START_S", "0")))
    await serve_with(settings, life, msgspec.json.decode(settings.spec_json, type=WorkerSpec), engine)


if __name__ == "__main__":
    run("worker", WorkerSettings, _serve)
