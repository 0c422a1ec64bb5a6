"""How a worker's process is started on this host: its command, environment and log file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from services.worker.agent import processes
from services.worker.agent.adopt import DEVICE_VARIABLE, SPEC_VARIABLE
from services.worker.agent.devices import Device
from shared.messages import WorkerSpec

LOG_FILES_KEPT = 50
LOG_LIMIT_BYTES = 10 * 1024 * 1024
_NOT_FOR_WORKERS = ("DATABASE_URL", "REDIS_URL", "DATABASE_URL_FILE", "REDIS_URL_FILE")
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
)


@dataclass(frozen=True, slots=True)
class Launcher:
    """log_folder: None lets workers write to the agent's own output."""

    node_id: str
    home: Path
    state_file: Path
    command: Sequence[str]
    environment: Mapping[str, str]
    threads: int
    log_folder: Path | None

    def spawn(self, spec: WorkerSpec, device: Device) -> tuple[processes.Held, int]:
        """Start the worker. Raises OSError; then nothing runs."""
        environment = worker_environment(
            self.environment, spec, device, node_id=self.node_id, home=str(self.home), threads=self.threads
        )
        if self.log_folder is None:
            return processes.spawn(self.command, environment, None)
        self.log_folder.mkdir(parents=True, exist_ok=True)
        remove_old_logs(self.log_folder, keep=LOG_FILES_KEPT - 1)
        with open(self.log_folder / f"{spec.incarnation}.log", "ab") as output:
            return processes.spawn(self.command, environment, output)

    def find_workers(self) -> list[processes.FoundProcess]:
        return processes.find_workers(self.node_id, str(self.home))

    def kill_rest(self, incarnation: str) -> int:
        return processes.kill_rest(incarnation, self.node_id, str(self.home))


def worker_environment(
    inherited: Mapping[str, str], spec: WorkerSpec, device: Device, *, node_id: str, home: str, threads: int
) -> dict[str, str]:
    """The environment of a worker: the agent's, less what no worker may have, plus its place. Pure."""
    environment = {name: value for name, value in inherited.items() if name not in _NOT_FOR_WORKERS}
    # Libraries' threads would spin beside the engine's own, so where it measures their number, they get one.
    environment |= {name: str(threads or 1) for name in _THREAD_VARIABLES}
    environment |= {
        "ROUNDHOUSE_WORKER_THREADS": str(threads),
        processes.INCARNATION_VARIABLE: spec.incarnation,
        processes.NODE_VARIABLE: node_id,
        processes.HOME_VARIABLE: home,
        DEVICE_VARIABLE: device.name,
        SPEC_VARIABLE: msgspec.json.encode(spec).decode(),
        # One folder for all workers of this host, on its own disk.
        "ROUNDHOUSE_IMAGE_DIR": inherited.get("ROUNDHOUSE_IMAGE_DIR", f"{home}/images"),
        # A worker sees the one GPU that it was given, as number 0, and on a processor's seat none at all.
        "CUDA_VISIBLE_DEVICES": str(device.index) if device.kind == "cuda" else "",
        "OPS_PORT": "0",
    }
    return environment


def remove_old_logs(folder: Path, *, keep: int) -> None:
    """Keep the newest `keep` log files. A worker whose file is removed goes on writing to it unseen."""
    files = []
    for entry in os.scandir(folder):
        if entry.name.endswith(".log"):
            with contextlib.suppress(FileNotFoundError):
                files.append((entry.stat().st_mtime, entry.path))
    for _, path in sorted(files, reverse=True)[keep:]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def shorten_logs(folder: Path, *, limit_bytes: int = LOG_LIMIT_BYTES) -> int:
    """Cut each log over the limit to its last half of it, in place; return how many there were. Blocking.

    Workers hold their files open for appending, so they go on behind what is left; what one writes at this very moment
    is lost.
    """
    shortened = 0
    for path in folder.glob("*.log"):
        with contextlib.suppress(FileNotFoundError):
            size_bytes = path.stat().st_size
            if size_bytes <= limit_bytes:
                continue
            with path.open("rb") as file:
                file.seek(size_bytes - limit_bytes // 2)
                file.readline()  # the rest of a line that is cut
                kept = file.read()
            os.truncate(path, 0)
            with path.open("ab") as file:
                file.write(kept)
            shortened += 1
    return shortened
