"""Where everything of one clone lies. A value; makes no folder until asked."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# In the environment of every process that a supervisor starts: whose it is, and which. Processes are found by it,
# never by their name, so that two clones (or another user's PostgreSQL) never touch each other.
CLONE_VARIABLE = "ROUNDHOUSE_CLONE"
PROCESS_VARIABLE = "ROUNDHOUSE_PROCESS"


@dataclass(frozen=True, slots=True)
class Layout:
    """One running set: the clone's own under `.local/`, or the tests' under `.local/test/` and `.local/e2e/`."""

    home: Path

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def worker_logs(self) -> Path:
        return self.logs / "workers"

    @property
    def run(self) -> Path:
        return self.home / "run"

    @property
    def state_file(self) -> Path:
        return self.run / "state.json"

    @property
    def supervisor_lock(self) -> Path:
        return self.run / "supervisor.lock"

    @property
    def up_lock(self) -> Path:
        return self.run / "up.lock"

    @property
    def ports_file(self) -> Path:
        return self.home / "ports.json"

    @property
    def secrets_file(self) -> Path:
        return self.home / "secrets.json"

    @property
    def env_file(self) -> Path:
        return self.home / "env"

    @property
    def models(self) -> Path:
        return self.home / "models"

    @property
    def marker(self) -> str:
        """The value of `CLONE_VARIABLE`: the folder itself, unique on this machine and stable over restarts."""
        return str(self.home)

    @property
    def port_base(self) -> int:
        """Where the search for free ports begins: below Linux's ephemeral range, and different from clone to clone,
        so that two that start at once seldom try the same one."""
        digest = hashlib.sha256(self.marker.encode()).digest()
        return 20_000 + int.from_bytes(digest[:2], "big") % 500 * 20

    def make_folders(self) -> None:
        """Only this user may look inside: secrets, logs and the servers' data are here."""
        for folder in (self.home, self.logs, self.run):
            folder.mkdir(parents=True, exist_ok=True)
        self.home.chmod(0o700)


def main_layout(root: Path = ROOT) -> Layout:
    return Layout(root / ".local")


def test_layout(root: Path = ROOT) -> Layout:
    return Layout(root / ".local" / "test")


def e2e_layout(root: Path = ROOT) -> Layout:
    return Layout(root / ".local" / "e2e")


def write_private(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace `path` in one step, readable by this user only: a reader sees the old text or the new, never a part.

    durable: wait until it is on the disk; not needed for what a restart makes anew.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
