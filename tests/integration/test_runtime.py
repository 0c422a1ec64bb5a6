"""A service's life as the outside sees it: exit statuses, signals, the ops port. Each test runs a real process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

_PROGRAM = """
import asyncio
import dataclasses
from pathlib import Path
from shared.runtime import Lifetime, run
from shared.settings import CommonSettings, env

@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(CommonSettings):
    folder: Path = env("FOLDER")
    count: int = env("COUNT", 1, low=1, high=5)
    drain_s: float = env("DRAIN_S", 0.0)

async def appears(path):
    while not path.exists():
        await asyncio.sleep(0.01)

async def die(path):
    await appears(path)
    raise LookupError("a task of the service died")

async def close(path):
    path.touch()

async def serve(settings: Settings, life: Lifetime) -> None:
    at = settings.folder
    life.stack.push_async_callback(close, at / "closed")
    life.check("broker", (at / "broker").exists)
    life.check("database", (at / "database").exists)
    life.group.create_task(die(at / "die"))
    await appears(at / "start")
    life.started()
    await life.stopping.wait()
    (at / "draining").touch()
    await asyncio.sleep(settings.drain_s)
    (at / "drained").touch()

run("example", Settings, serve)
"""


class Service:
    """One process of the program above, told what to do by files in its folder."""

    def __init__(self, folder: Path, **environment: str) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port: int = sock.getsockname()[1]
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            cwd=ROOT,
            env={
                "PATH": os.environ["PATH"],
                "AMQP_URL": "amqp://nowhere/",
                "FOLDER": str(folder),
                "OPS_PORT": str(self.port),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def tell(self, word: str) -> None:
        (self.folder / word).touch()

    def heard(self, word: str) -> bool:
        return (self.folder / word).exists()

    def await_word(self, word: str) -> None:
        deadline_s = time.monotonic() + 15
        while not self.heard(word):
            assert time.monotonic() < deadline_s and self.process.poll() is None
            time.sleep(0.01)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; retried until the port is open."""
        deadline_s = time.monotonic() + 15
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()
            except urllib.error.URLError:
                assert time.monotonic() < deadline_s and self.process.poll() is None
                time.sleep(0.02)

    def waits_for(self) -> list[str]:
        """What `/readyz` says is missing; the status has to agree."""
        status, body = self.get("/readyz")
        answer = json.loads(body)
        assert (status, answer["ready"]) == ((503, False) if answer["waiting_for"] else (200, True))
        names: list[str] = answer["waiting_for"]
        return names

    def end(self) -> tuple[int, list[dict[str, Any]]]:
        """Exit status and log lines."""
        _, errors = self.process.communicate(timeout=15)
        return self.process.returncode, [json.loads(line) for line in errors.splitlines()]


@pytest.fixture
def service(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Service]:
    running = Service(tmp_path, **getattr(request, "param", {}))
    yield running
    if running.process.poll() is None:
        running.process.kill()
    running.process.communicate()


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_good_settings_can_be_checked_without_starting(tmp_path: Path) -> None:
    done = _run("--check-settings", AMQP_URL="amqp://nowhere/", FOLDER=str(tmp_path), OPS_PORT="0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "example: settings are good\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("--check-settings",)])
def test_bad_settings_stop_the_start_with_all_problems_listed(arguments: tuple[str, ...]) -> None:
    done = _run(*arguments, OPS_PORT="99999", COUNT="7", LOG_LEVEL="CHATTY")
    assert done.returncode == 78
    assert done.stdout == ""
    assert sorted(done.stderr.splitlines()) == [
        "example: AMQP_URL is not set",
        "example: COUNT must be between 1 and 5",
        "example: FOLDER is not set",
        "example: LOG_LEVEL must be one of DEBUG, INFO, WARNING, ERROR",
        "example: OPS_PORT must be between 0 and 65535",
    ]


def test_the_ops_port_tells_life_readiness_and_metrics_until_a_clean_end(service: Service) -> None:
    assert service.get("/livez") == (200, '{"status": "alive"}')
    assert service.waits_for() == ["starting"]
    service.tell("database")
    service.tell("start")
    while service.waits_for() == ["starting"]:
        time.sleep(0.01)
    assert service.waits_for() == ["broker"]
    service.tell("broker")
    assert service.waits_for() == []
    (service.folder / "database").unlink()
    assert service.waits_for() == ["database"], "ready can be lost again"
    status, metrics = service.get("/metrics")
    assert status == 200
    assert "process_cpu_seconds_total" in metrics
    assert service.get("/nothing")[0] == 404

    service.process.send_signal(signal.SIGTERM)
    status, lines = service.end()
    assert status == 0
    assert service.heard("drained")
    assert service.heard("closed")
    events = [line["event"] for line in lines]
    assert events == [
        "service_starting",
        "signal_received",
        "service_stopping",
        "service_stopped",
    ]
    assert {line["service"] for line in lines} == {"example"}


@pytest.mark.parametrize("service", [{"DRAIN_S": "60"}], indirect=True)
def test_a_service_that_drains_is_alive_and_not_ready_and_a_second_signal_ends_it(service: Service) -> None:
    for word in ("start", "broker", "database"):
        service.tell(word)
    while service.waits_for():
        time.sleep(0.01)
    service.process.send_signal(signal.SIGINT)
    service.await_word("draining")
    assert service.waits_for() == ["stopping"]
    assert service.get("/livez")[0] == 200
    service.process.send_signal(signal.SIGTERM)
    status, lines = service.end()
    assert status == 70
    assert lines[-1]["event"] == "service_forced_to_stop"
    assert not service.heard("drained")


def test_a_long_task_that_dies_takes_the_service_down(service: Service) -> None:
    service.tell("start")
    service.get("/livez")
    service.tell("die")
    status, lines = service.end()
    assert status == 1
    assert service.heard("closed"), "what was opened is closed all the same"
    assert lines[-1]["event"] == "service_failed"
    assert "LookupError: a task of the service died" in lines[-1]["exception"]


def test_a_taken_ops_port_is_a_failure_that_says_so(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        done = _run(AMQP_URL="amqp://nowhere/", FOLDER=str(tmp_path), OPS_PORT=str(port))
    assert done.returncode == 1
    assert "address already in use" in json.loads(done.stderr.splitlines()[-1])["exception"]
