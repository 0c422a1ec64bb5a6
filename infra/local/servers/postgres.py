"""A private PostgreSQL: loopback TCP only (no Unix socket, whose path may be too long), own superuser and password.

PostgreSQL refuses to run as root. As root it runs in a user namespace, where this folder's owner has another number:
that works inside a 0700 folder and makes no user. Where namespaces are forbidden it runs as Debian's `postgres` user,
with its data in a folder that this user can reach.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from infra.local.failures import SetupFailed, explain
from infra.local.layout import write_private
from infra.local.probes import PostgresProbe
from infra.local.process_spec import ProcessSpec

USER = "roundhouse"
DATABASE = "roundhouse"
BINARIES = Path("/usr/lib/postgresql")
OLDEST_MAJOR = 15
MAX_CONNECTIONS = 200  # a pool of ten per service, psql, and what tests open side by side
REACHABLE_HOME = Path("/var/lib/roundhouse-postgres")
NAMESPACE = ("unshare", "--user", "--map-user=1000", "--map-group=1000", "--")


@dataclass(frozen=True, slots=True)
class PrivatePostgres:
    """durable: False gives up fsync, for tests: a crash of the machine may then lose everything, a killed server not."""

    folder: Path
    port: int
    password: str = field(repr=False)
    durable: bool = True

    @property
    def url(self) -> str:
        return f"postgresql://{USER}:{self.password}@127.0.0.1:{self.port}/{DATABASE}"

    @property
    def data(self) -> Path:
        return data_folder(self.folder)

    def prepare(self) -> None:
        """Make the data folder if there is none. A broken-off attempt leaves only a folder that the next one removes."""
        binaries = find_binaries(self._data_major())
        if (self.data / "PG_VERSION").exists():
            return
        shutil.rmtree(self.data, ignore_errors=True)  # without PG_VERSION it is not a data folder
        part = self.data.with_name(self.data.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True, mode=0o700)
        _give_to_server_user(part)
        self.folder.mkdir(parents=True, exist_ok=True)
        # The password goes by standard input: a file would have to be readable by the other user.
        _run(
            [f"{binaries}/initdb", "-D", str(part), "-U", USER, "--pwfile=/dev/stdin", "--auth=scram-sha-256"]
            + ["--encoding=UTF8", "--locale=C.UTF-8", "--no-sync", "--no-instructions"],
            self.password + "\n",
            "making the database folder",
        )
        _run(
            [f"{binaries}/postgres", "--single", "-D", str(part), "postgres"],
            f"CREATE DATABASE {DATABASE}\n",
            "making the database",
        )
        part.rename(self.data)
        write_private(self.folder / "data-folder", f"{self.data}\n")

    def specs(self, env: Mapping[str, str]) -> list[ProcessSpec]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": str(MAX_CONNECTIONS),
            "shared_buffers": "128MB",
            "timezone": "UTC",
            "log_min_duration_statement": "1000",
        }
        if not self.durable:
            settings |= {"fsync": "off", "full_page_writes": "off"}
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        script = f'exec "{BINARIES}/$(cat "$1/PG_VERSION")/bin/postgres" -D "$1" "${{@:2}}"'
        return [
            ProcessSpec(
                name="postgres",
                # The major version is known only after `prepare`, so a shell reads it and becomes the server.
                command=(*unprivileged(), "bash", "-c", script, "postgres", str(self.data), *flags),
                env=env,
                prepare=self.prepare,
                ready=PostgresProbe(self.url),
                ready_timeout_s=60.0,  # recovery after a kill -9
                stop_signal=signal.SIGINT,  # "fast": SIGTERM would wait for every client to leave
                stop_deadline_s=15.0,
            )
        ]

    def _data_major(self) -> int | None:
        try:
            return int((self.data / "PG_VERSION").read_text())
        except FileNotFoundError:
            return None


def find_binaries(data_major: int | None, root: Path = BINARIES) -> Path:
    """The folder of the server's programs: of the data's version, or the newest if there are no data yet."""
    majors = {int(path.parent.parent.name): path.parent for path in root.glob("[0-9]*/bin/initdb")}
    if data_major is not None:
        if data_major not in majors:
            raise SetupFailed(
                f"the data are of PostgreSQL {data_major}, which is not installed any more: install "
                f"postgresql-{data_major}, or run 'make clean' to start from nothing"
            )
        return majors[data_major]
    usable = [major for major in majors if major >= OLDEST_MAJOR]
    if not usable:
        raise SetupFailed(
            f"PostgreSQL {OLDEST_MAJOR} or newer is not installed: run 'make up' again, which installs it"
        )
    return majors[max(usable)]


@cache
def unprivileged() -> tuple[str, ...]:
    """What to put before a command so that it does not run as root. Empty if we are not root."""
    if os.geteuid() != 0:
        return ()
    if subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0:
        return NAMESPACE
    return ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--")


def data_folder(folder: Path) -> Path:
    """Inside `folder`, unless the server must run as another user, who may not be able to reach it."""
    if unprivileged()[:1] != ("setpriv",):
        return folder / "data"
    return REACHABLE_HOME / hashlib.sha256(str(folder).encode()).hexdigest()[:16]


def remove_data(folder: Path) -> None:
    """Remove data that lie outside `folder`, if any do; what lies inside goes with it."""
    outside = data_folder(folder)
    if folder not in outside.parents:
        shutil.rmtree(outside, ignore_errors=True)


def _give_to_server_user(path: Path) -> None:
    if unprivileged()[:1] == ("setpriv",):
        path.parent.chmod(0o755)
        shutil.chown(path, "postgres", "postgres")


def _run(command: list[str], text: str, step: str) -> None:
    done = subprocess.run([*unprivileged(), *command], input=text, capture_output=True, text=True, cwd="/")
    if done.returncode != 0:
        raise SetupFailed(explain(done.stderr + done.stdout, step=step))
