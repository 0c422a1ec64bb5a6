"""The node agent's settings. It has no database, and needs none."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

from shared.settings import CommonSettings, SettingsError, env

_NODE_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentSettings(CommonSettings):
    node_id: str = env("ROUNDHOUSE_NODE_ID")
    home: Path = env("ROUNDHOUSE_HOME")  # noqa: RUF009 - a field declaration
    devices: str = env("ROUNDHOUSE_DEVICES", "auto")
    """`auto`, or a list: `cuda:0,cuda:1` or `cpu:0`."""
    cpu_devices: int = env("ROUNDHOUSE_CPU_DEVICES", 2, low=0, high=256)
    """Seats on a host without GPUs: each takes one worker."""
    worker_threads: int = env("ROUNDHOUSE_WORKER_THREADS", 0, low=0, high=64)
    worker_logs: str = env("ROUNDHOUSE_WORKER_LOGS", "files")
    """`files` (below the home folder) or `inherit` (the agent's own output, for containers)."""
    worker_command_json: str = env("ROUNDHOUSE_WORKER_COMMAND", "")
    keep_workers: bool = env("ROUNDHOUSE_AGENT_KEEP_WORKERS", False)
    """Leave the workers running when the agent is asked to stop; the next agent adopts them."""

    def __post_init__(self) -> None:
        problems = []
        if not _NODE_ID.match(self.node_id):
            problems.append("ROUNDHOUSE_NODE_ID must be 1 to 63 letters, digits, dots, dashes or underscores")
        if self.worker_logs not in ("files", "inherit"):
            problems.append("ROUNDHOUSE_WORKER_LOGS must be files or inherit")
        if not _is_command(self.worker_command_json):
            problems.append("ROUNDHOUSE_WORKER_COMMAND must be a JSON list of strings")
        if problems:
            raise SettingsError("\n".join(problems))

    @property
    def worker_command(self) -> tuple[str, ...]:
        if not self.worker_command_json:
            return (sys.executable, "-m", "services.worker")
        return tuple(json.loads(self.worker_command_json))

    @property
    def state_file(self) -> Path:
        return self.home / "agent" / f"{self.node_id}.json"

    @property
    def lock_file(self) -> Path:
        return self.home / "agent" / f"{self.node_id}.lock"

    @property
    def log_folder(self) -> Path:
        return self.home / "logs" / "workers"


def _is_command(raw: str) -> bool:
    if not raw:
        return True
    try:
        value = json.loads(raw)
    except ValueError:
        return False
    return isinstance(value, list) and bool(value) and all(isinstance(part, str) and part for part in value)
