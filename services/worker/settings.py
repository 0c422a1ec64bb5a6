"""What one worker process is told by its node agent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared.settings import CommonSettings, env


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(CommonSettings):
    """The place it serves comes as JSON in ROUNDHOUSE_WORKER_SPEC (`shared.messages.WorkerSpec`)."""

    spec_json: str = env("ROUNDHOUSE_WORKER_SPEC")
    model_store: Path = env("ROUNDHOUSE_MODEL_STORE")  # noqa: RUF009 (env makes a field)
    threads: int = env("ROUNDHOUSE_WORKER_THREADS", 0, low=0, high=64)
    """That compute on a CPU; 0: the engine measures at start whether more than one bring anything."""
    model_memory_bytes: int = env("ROUNDHOUSE_WORKER_MODEL_BYTES", 2 * 1024**3, low=1)
    """Budget for the weights of resident models (host memory on a CPU, device memory on a GPU)."""
    image_dir: str = env("ROUNDHOUSE_IMAGE_DIR", "")
    """A folder on this host's own disk for images of models, shared by its workers; empty: load from the store's folders."""
    host_image_bytes: int = env("ROUNDHOUSE_WORKER_HOST_IMAGE_BYTES", 16 * 1024**3, low=0)
    """On a GPU: pinned memory of this worker for images, so that a swap is one copy. A CPU maps its images."""
    image_bytes: int = env("ROUNDHOUSE_IMAGE_BYTES", 50 * 1024**3, low=1)
    """Limit of that folder; images that no worker holds leave it, the longest unused first."""
    lookahead_jobs: int = env("ROUNDHOUSE_WORKER_LOOKAHEAD", 16, low=0, high=16)
    """Most jobs held beyond the running batch, in steps of 4; how many it are goes by measured work (`window.py`)."""
    most_hold_s: float = env("ROUNDHOUSE_WORKER_HOLD_S", 60.0, low=1.0, high=600.0)
    """A job that was not begun for that long goes back to the queue, where another worker may be quicker."""
