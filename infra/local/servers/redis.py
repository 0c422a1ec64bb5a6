"""A private Redis: loopback, a password, memory bounded, nothing kept on disk (losing it loses nothing)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra.local.failures import SetupFailed
from infra.local.layout import write_private
from infra.local.probes import RedisProbe
from infra.local.process_spec import ProcessSpec

# Set-title would overwrite the environment that left-over processes are found by.
CONFIGURATION = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir {folder}
daemonize no
save ""
appendonly no
maxmemory 256mb
maxmemory-policy allkeys-lru
set-proc-title no
"""


@dataclass(frozen=True, slots=True)
class PrivateRedis:
    folder: Path
    port: int
    password: str = field(repr=False)

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def prepare(self) -> None:
        if shutil.which("redis-server") is None:
            raise SetupFailed("redis-server is not installed: run 'make up' again, which installs it")
        self.folder.mkdir(parents=True, exist_ok=True)
        text = CONFIGURATION.format(port=self.port, password=self.password, folder=f'"{self.folder}"')
        write_private(self.folder / "redis.conf", text)

    def specs(self, env: Mapping[str, str]) -> list[ProcessSpec]:
        return [
            ProcessSpec(
                name="redis",
                command=("redis-server", str(self.folder / "redis.conf")),
                env=env,
                prepare=self.prepare,
                ready=RedisProbe(self.port, self.password),
                ready_timeout_s=15.0,
            )
        ]
